"""What a configuration costs for one image or view: the numbers behind `uhd-jax cost`."""

from __future__ import annotations

import dataclasses
from typing import Any

from uhd_jax import cost
from uhd_jax.analysis.activations import activations
from uhd_jax.batch import Bucket
from uhd_jax.config import ConfigError, ModelConfig, RunConfig
from uhd_jax.slicing.plan import Grid, Plan, Size, plan_image

STATE = "training state, the moments being the optimiser's two; all float32 and over all devices"
ACTIVATIONS = (
    "activations of one such sample in a row of its own, as traced under the remat policies: what the forward pass "
    "keeps for the backward pass, and the largest piece that is worked on meanwhile; without the compiler's own choices"
)
WEIGHTS = "all parameters; generation holds them in float32"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is counted, and how. Either `image` or `view` is given."""

    image: Size | None
    view: Size | None = None  # one view of this size, instead of those of an image
    text_tokens: int = 0
    mode: str | None = None  # None: the configuration's
    convention: cost.Convention | None = cost.DEFAULT  # None: that of the paper of the model's tower


@dataclasses.dataclass(frozen=True)
class _Sample:
    """An image's views with its text."""

    plan: Plan | None  # None: one view, not from an image
    grids: tuple[Grid, ...]
    visual_tokens: int | None  # None: of a view that does not merge into whole ones
    tokens: int  # of the decoder

    @classmethod
    def of(cls, model: ModelConfig, case: Case, max_slices: int | None = None) -> _Sample:
        if case.view is None:
            plan = plan_image(case.image, model, case.mode, max_slices)
            grids, visual_tokens = tuple(view.patch_grid for view in plan.views), plan.visual_tokens
        else:
            plan, multiple = None, view_multiple(model, case)
            if min(case.view) < multiple or any(side % multiple for side in case.view):
                raise ConfigError(
                    f"view {case.view}: sides must be multiples of {multiple} pixels for this configuration"
                )
            grids = (Grid(*(side // model.tower.patch_size for side in case.view)),)
            whole = all(side % 2 ** model.merge_levels(case.mode) == 0 for side in grids[0])
            visual_tokens = model.visual_tokens(grids[0].area, case.mode) if whole else None
        return cls(plan, grids, visual_tokens, (visual_tokens or 0) + case.text_tokens)


def view_multiple(model: ModelConfig, case: Case) -> int:
    """Of how many pixels a view's sides must be multiples. The papers count towers, also of views that do not merge."""
    return model.tower.patch_size * (1 if case.convention is None else 2 ** model.merge_levels(case.mode))


def costs_of(config: RunConfig, name: str, case: Case) -> dict[str, Any]:
    """The cost of a forward pass, with JSON types only; docs/cost.md explains the keys.

    Raises:
      ConfigError: the case's view does not fit the model's patches and merges; or the papers' convention is asked for
        and the family has no paper for the model's tower; or a part is of a kind whose cost is not known.
      ImageRefused: as of `plan_image`.
    """
    model, convention = config.model, case.convention
    sample = _Sample.of(model, case)
    work = cost.work(sample.grids, [sample.tokens])
    parameters = cost.parameter_counts(model)
    if convention is None:
        groups, text = cost.paper_groups(model, sample.grids, sample.tokens, case.mode)
        forward = overhead = None
        published = [figure._asdict() for figure in cost.published(model, sample.grids, case.mode)]
    else:
        forward, text = cost.forward_flops(model, work, case.mode, convention), str(convention)
        groups, published = cost.groups(forward), []
        overhead = cost.overhead_flops(model, work, case.mode, convention) / 1e9
        forward |= {"total": sum(forward.values())}
    gflops = {group: None if flops is None else flops / 1e9 for group, flops in groups.items()}
    return {
        "name": name,
        "plan": sample.plan.to_json() if sample.plan else None,
        "image": list(case.image) if case.image else None,
        "view": list(case.view) if case.view else None,
        "views": len(sample.grids),
        "patches": work.patches,
        "visual_tokens": sample.visual_tokens,
        "text_tokens": case.text_tokens,
        "mode": case.mode or model.mode,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "weight_bytes": cost.weight_bytes(model),
        "forward_flops": forward,
        **{f"{group}_gflops": value for group, value in gflops.items()},
        "total_gflops": None if None in gflops.values() else sum(gflops.values()),
        "overhead_gflops": overhead,
        "published": published,
        "stages": [],
        "flops_convention": text,
        "weight_bytes_convention": WEIGHTS,
        "state_bytes_convention": STATE,
        "activation_bytes_convention": ACTIVATIONS,
    }


def stages_of(config: RunConfig, case: Case) -> list[dict[str, Any]]:
    """What training costs in each stage, for the same image under the stage's slicing. Raises as `costs_of`."""
    stages = []
    for stage in config.train.stages:
        model = config.model.for_stage(stage)
        sample = _Sample.of(model, case, stage.max_slices)
        work = cost.work(sample.grids, [sample.tokens])
        patches = max(grid.area for grid in sample.grids)
        bucket = Bucket(1, len(sample.grids), max(sample.tokens, 2), patches, model.tower.patch_bytes)
        flops = memory = None
        if stage.objective == "language":  # the other, VDIM's pre-training, is another program
            flops = cost.train_flops(model, work, stage.trainable, case.mode, case.convention)
            memory = dataclasses.asdict(activations(model, bucket, stage.trainable, case.mode))
        stages.append(
            {
                "name": stage.name,
                "views": len(sample.grids),
                "visual_tokens": sample.visual_tokens,
                "train_flops": flops,
                "state_bytes": cost.state_bytes(model, stage.trainable),
                "activation_bytes": memory,
            }
        )
    return stages
