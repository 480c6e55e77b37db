"""What a model costs, from the config alone: parameters, FLOPs of inference and training, bytes of weights and state.

All analytic, by part, and honest about padding: `work` counts what views and samples hold, and what they are padded to
costs nothing. Conventions of counting are in `stretches.Convention`, and at length in docs/cost.md. `papers` has the
published figures and the conventions behind them; activations are in `analysis.activations`, which needs the model.
"""

from uhd_jax.cost.flops import GROUPS, forward_flops, forward_stretches, groups, overhead_flops, train_flops
from uhd_jax.cost.papers import Published, paper_gflops, paper_groups, published
from uhd_jax.cost.parameters import parameter_counts, state_bytes, weight_bytes
from uhd_jax.cost.peak import peak_flops
from uhd_jax.cost.stretches import DEFAULT, Convention, Stretch
from uhd_jax.cost.work import Work, batch_work, bucket_work, plan_work, window_bins, work

__all__ = [
    "Convention",
    "DEFAULT",
    "GROUPS",
    "Published",
    "Stretch",
    "Work",
    "batch_work",
    "bucket_work",
    "forward_flops",
    "forward_stretches",
    "groups",
    "overhead_flops",
    "paper_gflops",
    "paper_groups",
    "parameter_counts",
    "peak_flops",
    "plan_work",
    "published",
    "state_bytes",
    "train_flops",
    "weight_bytes",
    "window_bins",
    "work",
]
