"""Training: stages, optimiser, step, loop and what is logged."""
