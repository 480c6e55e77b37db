"""Names of v2's connector in the released checkpoints (spec v1-v2 section 6.3)."""

from __future__ import annotations

from uhd_jax.config import ConnectorConfig
from uhd_jax.convert.resampler import attention_table
from uhd_jax.convert.tables import Entry, Rule, dense, layer_norm
from uhd_jax.convert.vdim import upsampler_table

# [1, 1, D] <-> [D]
EMBEDDING = Rule(lambda a: a[0, 0], lambda a, _: a[None, None], lambda s: s[2:])
# A second copy of the vision model, which the projector's initialisation has overwritten in part and nothing uses.
VISION_COPY = "upsampler.model.0."


def hiwin_table(config: ConnectorConfig, prefix: str) -> list[Entry]:
    """Hierarchical window attention and its up-sampler under `prefix`, e.g. "model.mm_projector."."""
    entries = [
        Entry("connector/position_table", f"{prefix}pos_embed"),
        *layer_norm("connector/query_norm", f"{prefix}ln_q"),
        *layer_norm("connector/key_value_norm", f"{prefix}ln_kv"),
        *attention_table("connector/attention", f"{prefix}attn."),
        *layer_norm("connector/set_norm", f"{prefix}ln_proj"),
        *dense("connector/join", f"{prefix}cat_proj"),
        *layer_norm("connector/post_norm", f"{prefix}ln_post"),
        Entry("connector/output", f"{prefix}proj"),  # multiplied from the right: not transposed
    ]
    for number in range(config.query_sets):
        entries.append(Entry(f"connector/queries/set_{number}", f"{prefix}query_{number + 1}"))
    for level in config.pyramid.levels:
        ours, (embedding, projector) = f"level_{level}", _level_names(level)
        entries.append(Entry(f"connector/level_embeddings/{ours}", f"{prefix}{embedding}", EMBEDDING))
        entries += dense(f"connector/{ours}", f"{prefix}{projector}")
    return entries + upsampler_table(f"{prefix}upsampler.upsampler.")


def hiwin_dropped(config: ConnectorConfig, width: int, tower_width: int, prefix: str) -> dict[str, tuple[int, ...]]:
    """Tensors of a released projector that its forward pass never reads, name -> shape; `VISION_COPY` besides.

    Args:
      config: of the connector; levels that its pyramid does not use are here.
      width: of the decoder.
      tower_width: of the features.
      prefix: as of `hiwin_table`.
    """
    shapes = {"query": (config.queries, width), "kv_proj.weight": (width, tower_width)}
    for level in sorted({0, 1, 2, 3} - set(config.pyramid.levels)):
        embedding, projector = _level_names(level)
        shapes |= {embedding: (1, 1, width), f"{projector}.weight": (width, tower_width), f"{projector}.bias": (width,)}
    shapes |= {f"upsampler.model.1.norm.{name}": (tower_width,) for name in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


def _level_names(level: int) -> tuple[str, str]:
    return f"feature_{2**level}x_embedding", f"features_{2**level}x_projector"
