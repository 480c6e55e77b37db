"""A stage's training step compiled for a machine that is not there: the step that `uhd-jax train` would run there."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from typing import Any

import jax

from uhd_jax.analysis.aot_targets import GIB, AotError, Target, devices_of
from uhd_jax.batch import Bucket, abstract_batch
from uhd_jax.config import ModelConfig, RunConfig, StageConfig
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import batch_sharding, check_decoder, check_params, check_rows
from uhd_jax.slicing.plan import Size, plan_image
from uhd_jax.slicing.sizes import ImageRefused
from uhd_jax.training.objective import loss_sums_of, scaffold_init
from uhd_jax.training.optimizer import make_optimizer
from uhd_jax.training.stages import SCAFFOLD
from uhd_jax.training.state import abstract_state
from uhd_jax.training.step import make_train_step

VISUAL_SHARE = 0.8  # of a packed row's tokens that are visual, for the number of view slots where no data says it
_PATCH_MULTIPLE = 64
# Without a device no tiles can be tried out for products in Triton, and of the untried ones some do not compile.
OPTIONS: dict[str, dict[str, Any]] = {
    "tpu": {},
    "cuda": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0},
}
_SIDES = (160, 224, 336, 448, 640, 900, 1344, 2000, 3000)  # of images tried for the largest view


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of it. `text` is the program's, empty where it did not fit."""

    mesh: Any
    bucket: Bucket
    attention: str
    lower_seconds: float
    compile_seconds: float
    memory: dict[str, int]  # bytes per device: arguments, outputs, aliased, temporary, code
    peak_memory_bytes: int
    fits: bool
    text: str


def stage_of(config: RunConfig, name: str | None) -> StageConfig:
    """The stage of a name; the last one for None.

    Raises:
      AotError: there is none.
    """
    stages = {stage.name: stage for stage in config.train.stages}
    if name is not None and name not in stages:
        raise AotError(f"--stage={name}: the configuration has {', '.join(stages)}")
    return stages[name] if name else config.train.stages[-1]


def largest_view(model: ModelConfig, stage: StageConfig) -> int:
    """Patches of the largest view that images of many sizes and shapes are cut into, rounded up to a multiple of 64."""
    model = model.for_stage(stage)
    patches = 0
    for height in _SIDES:
        for width in _SIDES:
            with contextlib.suppress(ImageRefused):
                plan = plan_image(Size(height, width), model, None, stage.max_slices)
                patches = max(patches, *(view.patch_grid.area for view in plan.views))
    return max(-(-patches // _PATCH_MULTIPLE), 1) * _PATCH_MULTIPLE


def bucket_of(model: ModelConfig, stage: StageConfig) -> Bucket:
    """The static shapes to compile: the stage's largest bucket, or what its data would probably need.

    Without buckets in the configuration, patches are those of the largest view, and slots so many that four fifths of
    a row's tokens are visual, at least those of one image in most slices.
    """
    if stage.buckets:
        one = max(stage.buckets, key=lambda bucket: (bucket.tokens, bucket.slots * bucket.patches))
        return Bucket(stage.rows, one.slots, one.tokens, one.patches, model.tower.patch_bytes)
    patches = largest_view(model, stage)
    room = stage.packed_length * VISUAL_SHARE / model.visual_tokens(patches)
    slots = stage.slots or max(stage.max_slices + 1, round(room))
    return Bucket(stage.rows, slots, stage.packed_length, patches, model.tower.patch_bytes)


def compile_step(config: RunConfig, stage: StageConfig, target: Target, effort: float = 0.0) -> Compiled:
    """Lowers and compiles the step of a stage for a machine. One program; nothing is computed and no array made.

    Args:
      config: of the run.
      stage: one of its stages.
      target: the machine.
      effort: how long the compiler may look for a faster step, -1 to 1 (`jax_exec_time_optimization_effort`). A TPU's
        code generator takes most of the time; with -1 memory and most collectives come out nearly the same, four to
        ten times sooner (docs/pods.md).

    Raises:
      AotError: the machine or its compiler is missing, or the compiler fails for another reason than memory.
      ShardingError: rows or parameters do not divide over its devices.
      ConfigError: the stage trains parts that the model does not have.
    """
    model = config.model
    if target.chip.platform == "cuda" and model.attention in ("auto", "cudnn"):
        model = dataclasses.replace(model, attention="xla")  # cuDNN plans its kernels on a device
    mesh = make_mesh(config.train.mesh, devices_of(target))
    check_rows(stage.rows, stage.accumulation, mesh)
    check_decoder(model.decoder, mesh)
    bucket = bucket_of(model, stage)
    started = time.monotonic()
    key = jax.random.key(0)
    params = jax.eval_shape(lambda key: uhd.init_params(model, key), key)
    check_params(params, mesh, config.train.mesh.unsharded_tolerance)
    scaffold = jax.eval_shape(scaffold_init(model, stage), key)
    optimizer = make_optimizer(config.train.optimizer, stage)
    state = abstract_state({**params, SCAFFOLD: scaffold}, optimizer, stage.trainable, mesh)
    step = make_train_step(loss_sums_of(model, stage), stage, config.train.optimizer, state, mesh)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh)), abstract_batch(bucket)
    )
    lowered = step.lower(state, batch)
    lower_seconds = time.monotonic() - started
    started = time.monotonic()
    attention = model.attention if model.attention != "auto" else "splash"
    try:
        options = OPTIONS[target.chip.platform] | {"exec_time_optimization_effort": effort}
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise AotError(f"the compiler for {target.name} fails: {' '.join(str(error).split())[:500]}") from error
        seconds = time.monotonic() - started
        return Compiled(mesh, bucket, attention, lower_seconds, seconds, {}, needed, False, "")
    seconds = time.monotonic() - started
    memory = memory_of(compiled)
    peak = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporary"] + memory["code"]
    fits = peak <= target.chip.memory_bytes
    return Compiled(mesh, bucket, attention, lower_seconds, seconds, memory, peak, fits, compiled.as_text())


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes per device of a compiled program, by what they are for."""
    stats = compiled.memory_analysis()
    fields = ("argument", "output", "alias", "temp", "generated_code")
    names = ("arguments", "outputs", "aliased", "temporary", "code")
    return {name: int(getattr(stats, f"{field}_size_in_bytes")) for name, field in zip(names, fields, strict=True)}


def needed_bytes(message: str) -> int | None:
    """How much a program needs that a compiler refused for want of memory; None if it was refused for something else.

    `Used 18.27G of 15.75G hbm` and `(180.07G) exceeds available HBM (15.75G)` are what TPU compilers say.
    """
    if "RESOURCE_EXHAUSTED" not in message and "exceeds available" not in message:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    found = [
        float(number) * units[unit]
        for number, unit in re.findall(r"(?:Used |\()([\d.]+)([KMGT]?)\)? (?:of|exceeds)", message)
    ]
    if not found:
        found = [float(number) * units[unit] for number, unit in re.findall(r"\b([\d.]+)([KMGT])i?B?\b", message)]
    return math.ceil(max(found)) if found else None


def mesh_sizes(mesh: Any) -> dict[str, int]:
    """Devices per axis."""
    return {axis: int(size) for axis, size in mesh.shape.items()}
