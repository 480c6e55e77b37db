"""Where every parameter and every batch lies: path regex -> logical axes -> mesh axes.

A parameter's path is its keys joined by "/", e.g. `decoder/layers/mlp/gate/kernel`. Exactly one rule of `RULES` matches
each path, and names one logical axis per dimension; `MESH_AXES` says over which mesh axis a logical axis is split.
Optimiser moments lie where their parameters lie.

A dimension that its mesh axis does not divide is replicated for parameters below `SMALL` elements; for larger ones it
is an error, since replicating them silently would cost the memory that the mesh was asked to save.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uhd_jax.batch import Batch
from uhd_jax.sharding.mesh import ShardingError

SMALL = 2**20

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
    (r"decoder/embedding", ("table", "embed")),
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
)

MESH_AXES: dict[str, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "patch": None,
    "table": None,
    "vector": None,
}

BATCH_AXES = ("data", "fsdp")


def logical_axes(path: str) -> tuple[str, ...]:
    """The logical axes of the parameter at `path`.

    Raises:
      ShardingError: no rule matches, or more than one.
    """
    found = [axes for pattern, axes in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ShardingError(f"parameter {path!r} is matched by {len(found)} sharding rules instead of one")
    return found[0]


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the parameter at `path` is split over `mesh`.

    Raises:
      ShardingError: no single rule, a rule for another rank, or a large dimension that does not divide.
    """
    axes = logical_axes(path)
    if len(axes) != len(shape):
        raise ShardingError(f"parameter {path!r} has shape {shape}, but its sharding rule names axes {axes}")
    size = 1
    for dimension in shape:
        size *= dimension
    spec: list[str | None] = []
    for dimension, axis in zip(shape, axes, strict=True):
        mesh_axis = MESH_AXES[axis]
        if mesh_axis is not None and dimension % mesh.shape[mesh_axis]:
            if size >= SMALL:
                raise ShardingError(
                    f"parameter {path!r} of shape {shape}: mesh axis {mesh_axis}={mesh.shape[mesh_axis]} does not "
                    f"divide its {axis!r} dimension of {dimension}; choose a divisor, and the rest for mesh axis data"
                )
            mesh_axis = None
        spec.append(mesh_axis)
    return PartitionSpec(*spec)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding for a tree of parameters (arrays, or ShapeDtypeStruct from `jax.eval_shape`)."""

    def place(path, leaf):
        return NamedSharding(mesh, param_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def with_shardings(abstract_params: Any, mesh: Mesh) -> Any:
    """The same ShapeDtypeStruct tree, each leaf with its sharding: a target to restore a checkpoint into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params,
        param_shardings(abstract_params, mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; one sharding for every array of a `Batch`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_rows(rows: int, accumulation: int, mesh: Mesh) -> None:
    """Refuses rows that do not spread evenly over the mesh.

    Raises:
      ShardingError: names rows, accumulation and devices.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (accumulation * shards):
        raise ShardingError(
            f"rows={rows} with accumulation={accumulation} do not spread over data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']} devices: rows must be a multiple of {accumulation * shards}"
        )


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Sends this process's rows (NumPy) to its devices; the result is the batch of all processes."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
