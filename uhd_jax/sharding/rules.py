"""Where every parameter and every batch lies: path regex -> logical axes -> mesh axes.

A parameter's path is its keys joined by "/", e.g. `decoder/layers/mlp/gate/kernel`. Exactly one rule of `RULES` matches
each path, and names one logical axis per dimension; `MESH_AXES` says over which mesh axis a logical axis is split.
Optimiser moments lie where their parameters lie.

A dimension that its mesh axes do not divide is replicated for parameters below `SMALL` elements; for larger ones it
is an error, since replicating them silently would cost the memory that the mesh was asked to save.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from uhd_jax.batch import Batch
from uhd_jax.config import DecoderConfig, MeshConfig
from uhd_jax.sharding.mesh import BATCH_AXES, ShardingError, row_shards

SMALL = 2**20  # elements that may lie whole on every device

RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"tower/patch_embedding/kernel", ("patch", "embed")),
    (r"tower/position_table", ("table", "embed")),
    (r"tower/layers/attention/(query|key|value)/kernel", ("layers", "embed", "heads")),
    (r"tower/layers/attention/out/kernel", ("layers", "heads", "embed")),
    (r"tower/layers/mlp/fc1/kernel", ("layers", "embed", "mlp")),
    (r"tower/layers/mlp/fc2/kernel", ("layers", "mlp", "embed")),
    (r"tower/compressor/attention/(query|key|value)/kernel", ("embed", "heads")),
    (r"tower/compressor/attention/out/kernel", ("heads", "embed")),
    (r"tower/compressor/(linear_1|mlp/fc1)/kernel", ("embed", "mlp")),
    (r"tower/compressor/(linear_2|mlp/fc2)/kernel", ("mlp", "embed")),
    (r"connector/(round_\d/)?linear_1/kernel", ("embed", "mlp")),
    (r"connector/(round_\d/)?linear_2/kernel", ("mlp", "embed")),
    (r"connector/(position_table|queries(/set_\d)?)", ("table", "embed")),
    (r"connector/(key_value|level_\d)/kernel", ("embed", "mlp")),
    (r"connector/level_embeddings/level_\d", ("vector",)),
    (r"connector/attention/(query|key|value)/kernel", ("embed", "heads")),
    (r"connector/attention/out/kernel", ("heads", "embed")),
    (r"connector/join/kernel", ("embed", "mlp")),
    (r"connector/output", ("mlp", "embed")),
    (r"connector/upsampler/up\d/(range_temperature|spatial_sigma)", ()),
    (r"connector/upsampler/up\d/(range|kernel)_\d/kernel", ("vector", "vector")),
    (r"connector/upsampler/(deconvolution_\d|fixup)/kernel", ("embed", "mlp")),
    # Split along its width: split along its rows, a lookup would gather the whole batch's activations.
    (r"decoder/embedding", ("table", "width")),
    (r"decoder/layers/attention/(query|key|value|gate)/kernel", ("layers", "embed", "heads")),
    (r"decoder/layers/attention/out/kernel", ("layers", "heads", "embed")),
    (r"decoder/(delta_)?layers/mlp/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"decoder/(delta_)?layers/mlp/down/kernel", ("layers", "mlp", "embed")),
    (r"decoder/delta_layers/delta/(qkv|z|b|a)/kernel", ("layers", "embed", "heads")),
    (r"decoder/delta_layers/delta/out/kernel", ("layers", "heads", "embed")),
    (r"decoder/delta_layers/delta/conv", ("layers", "vector", "vector")),
    (r"decoder/delta_layers/delta/(log_decay|dt_bias)", ("layers", "vector")),
    (r"decoder/head", ("embed", "vocab")),
    (r"(tower|decoder)/(delta_)?layers/.+/(scale|bias)", ("layers", "vector")),
    (r"(tower/compressor|connector)/.+/(scale|bias)", ("vector",)),
    (r"(tower|decoder)/(patch_embedding|pre_norm|final_norm)/(scale|bias)", ("vector",)),
    (r"tower/class_token", ("vector",)),
    (r"scaffold/level_\d/(attention|scale)/kernel", ("vector", "vector")),
    (r"scaffold/level_\d/(attention|scale)/bias", ("vector",)),
    (r"scaffold/level_\d/(weight|bias)", ("vector", "vector")),
)

PARAM_AXES = ("fsdp", "sequence")  # over which parameters are split beside tensor; each layer gathers its own

MESH_AXES: dict[str, tuple[str, ...]] = {
    "embed": PARAM_AXES,
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "width": (*PARAM_AXES, "tensor"),
    "layers": (),
    "patch": (),
    "table": (),
    "vector": (),
}


def logical_axes(path: str) -> tuple[str, ...]:
    """The logical axes of the parameter at `path`.

    Raises:
      ShardingError: no rule matches, or more than one.
    """
    found = [axes for pattern, axes in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ShardingError(f"parameter {path!r} is matched by {len(found)} sharding rules instead of one")
    return found[0]


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How the parameter at `path` is split over `mesh`.

    Raises:
      ShardingError: no single rule, a rule for another rank, or a large dimension that does not divide.
    """
    axes = logical_axes(path)
    if len(axes) != len(shape):
        raise ShardingError(f"parameter {path!r} has shape {shape}, but its sharding rule names axes {axes}")
    spec: list[str | tuple[str, ...] | None] = []
    for dimension, axis in zip(shape, axes, strict=True):
        over = tuple(mesh_axis for mesh_axis in MESH_AXES[axis] if mesh.shape[mesh_axis] > 1)
        if dimension % math.prod(mesh.shape[mesh_axis] for mesh_axis in over):
            if math.prod(shape) >= SMALL:
                sizes = " x ".join(f"{mesh_axis}={mesh.shape[mesh_axis]}" for mesh_axis in over)
                raise ShardingError(
                    f"parameter {path!r} of shape {shape}: mesh axis {sizes} does not divide its {axis!r} dimension of "
                    f"{dimension}; choose a divisor, and the rest for mesh axis data"
                )
            over = ()
        spec.append(over[0] if len(over) == 1 else over or None)
    return PartitionSpec(*spec)


def param_specs(params: Any, mesh: Mesh | AbstractMesh, prefix: str = "") -> Any:
    """A tree of PartitionSpec for a tree of parameters (anything with a shape); `prefix` stands before their paths."""

    def place(path, leaf):
        return param_spec(prefix + jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(place, params)


def param_shardings(params: Any, mesh: Mesh, prefix: str = "") -> Any:
    """A tree of NamedSharding for a tree of parameters (arrays, or ShapeDtypeStruct from `jax.eval_shape`)."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(params, mesh, prefix))


def with_shardings(abstract_params: Any, mesh: Mesh) -> Any:
    """The same ShapeDtypeStruct tree, each leaf with its sharding: a target to restore a checkpoint into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params,
        param_shardings(abstract_params, mesh),
    )


def check_params(params: Any, mesh: Mesh, tolerance: float = MeshConfig.unsharded_tolerance) -> None:
    """Refuses a mesh that should split the parameters and leaves too many of them whole.

    Nothing to check where `PARAM_AXES` are of size 1. Up to `SMALL` elements in all may always stay whole: of a tiny
    model the vectors alone would be too large a share.

    Args:
      params: arrays or ShapeDtypeStruct.
      mesh: where they are to lie.
      tolerance: share of all bytes that may stay whole.

    Raises:
      ShardingError: names the largest of those left whole; or a large dimension does not divide.
    """
    if all(mesh.shape[axis] == 1 for axis in PARAM_AXES):
        return
    total, whole = 0, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        split = {
            axis
            for axes in param_spec(name, leaf.shape, mesh)
            for axis in ((axes,) if isinstance(axes, str) else axes or ())
        }
        total += size
        if not split & set(PARAM_AXES):
            whole.append((size, name, leaf.shape))
    left = sum(size for size, _, _ in whole)
    if left > max(tolerance * total, 4 * SMALL):
        largest = ", ".join(f"{name} {shape}" for _, name, shape in sorted(whole, reverse=True)[:5])
        raise ShardingError(
            f"mesh fsdp={mesh.shape['fsdp']} sequence={mesh.shape['sequence']} leaves {left / total:.1%} of the "
            f"parameters' bytes whole on every device, more than train.mesh.unsharded_tolerance={tolerance:g}; the "
            f"largest: {largest}. Choose sizes that divide them, or raise the tolerance"
        )


def check_decoder(config: DecoderConfig, mesh: Mesh) -> None:
    """Refuses a mesh over which the decoder's heads do not spread: attention has whole rows, and each device its heads.

    Raises:
      ShardingError: names the heads and the axes.
    """
    parts = mesh.shape["tensor"] * mesh.shape["sequence"]
    over = f"tensor={mesh.shape['tensor']} x sequence={mesh.shape['sequence']}"
    if config.heads % parts:
        raise ShardingError(
            f"model.decoder.heads={config.heads} do not spread over {over}: choose sizes whose product divides them"
        )
    here, shared = config.heads // parts, config.heads // config.kv_heads
    if here % shared and shared % here:
        raise ShardingError(
            f"model.decoder.kv_heads={config.kv_heads} do not spread over {over}: {here} heads of a device would share "
            f"key heads in part; choose sizes whose product divides {config.kv_heads} or is a multiple of it"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `BATCH_AXES`; one sharding for every array of a `Batch`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_rows(rows: int, accumulation: int, mesh: Mesh) -> None:
    """Refuses rows that do not spread evenly over the mesh.

    Raises:
      ShardingError: names rows, accumulation and devices.
    """
    if rows % (accumulation * row_shards(mesh)):
        over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ShardingError(
            f"rows={rows} with accumulation={accumulation} do not spread over {over} devices: rows must be a multiple "
            f"of {accumulation * row_shards(mesh)}"
        )


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Sends this process's rows (NumPy) to its devices; the result is the batch of all processes."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)  # all arrays at once: half the time
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
