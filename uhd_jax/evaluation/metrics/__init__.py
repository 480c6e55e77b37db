"""Metrics: pure functions from a prediction and its references to a score, in the definitions of STYLES."""
