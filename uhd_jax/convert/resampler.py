"""Names of v1's connectors, and of torch's attention inside them (spec v1-v2 sections 3.1 and 3.2)."""

from __future__ import annotations

from uhd_jax.convert.tables import Entry, dense, joined_dense, layer_norm


def resampler_table(prefix: str) -> list[Entry]:
    """v1's spatial resampler, and the perceiver, under `prefix`, e.g. "model.mm_projector."."""
    return [
        Entry("connector/position_table", f"{prefix}pos_embed"),
        Entry("connector/queries", f"{prefix}query"),
        *dense("connector/key_value", f"{prefix}kv_proj", bias=False),
        *layer_norm("connector/query_norm", f"{prefix}ln_q"),
        *layer_norm("connector/key_value_norm", f"{prefix}ln_kv"),
        *attention_table("connector/attention", f"{prefix}attn."),
        *layer_norm("connector/post_norm", f"{prefix}ln_post"),
        Entry("connector/output", f"{prefix}proj"),  # multiplied from the right: not transposed
    ]


def attention_table(ours: str, prefix: str) -> list[Entry]:
    """torch.nn.MultiheadAttention under `prefix`."""
    joined = joined_dense(ours, ("query", "key", "value"), f"{prefix}in_proj_weight", f"{prefix}in_proj_bias")
    return joined + dense(f"{ours}/out", f"{prefix}out_proj")
