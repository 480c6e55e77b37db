"""What a run is: data, stages, optimiser, mesh, and the model they train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from uhd_jax.config.checks import require, require_at_least
from uhd_jax.config.model import ModelConfig, PreResizeConfig

PARTS = ("tower", "patch_embedding", "position_table", "compressor")
PARTS += ("connector", "connector_positions", "upsampler", "upsampler_fixup", "decoder")


@dataclasses.dataclass(frozen=True)
class BucketConfig:
    """Static shapes of one compiled program, per row: view slots, tokens, patches per view."""

    slots: int
    tokens: int
    patches: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A named source and its options; the source checks its own options."""

    source: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    index: str = ""  # file that `uhd-jax data index` made, to plan from; empty: the one beside the data, if any


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """The pre-training of VDIM (spec: v1-v2 sections 3.4 and 5.3). All but `form` is for the released form alone."""

    form: Literal["paper", "released"] = "paper"
    jitters: int = 2  # per step
    pad: int = 30  # pixels
    zoom: float = 2.0  # largest
    projections: int = 30
    crf_weight: float = 1e-3
    crf_pixels: int = 1000

    def __post_init__(self):
        require_at_least(self, 1, "jitters", "zoom", "projections", "crf_pixels")
        require_at_least(self, 0, "pad", "crf_weight")


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What is done to the images of a stage, drawn anew for every sample in every epoch (spec: v4 section 1.10)."""

    resize_probability: float = 0.0  # of another area in the same shape, mostly for one to twice as many slices
    jpeg_probability: float = 0.0  # of compressing an image that was given another area
    jpeg_quality: tuple[int, ...] = (75, 95)  # Pillow's, lowest and highest
    ocr_probability: float = 0.0  # of noise, blur, other colours or sharpness, as scans and photographs of pages have
    ocr_parts: tuple[str, ...] = ()  # names of the parts of a mixture that `ocr_probability` is for; empty: all data

    def __post_init__(self):
        for key in ("resize_probability", "jpeg_probability", "ocr_probability"):
            value = getattr(self, key)
            require(0 <= value <= 1, key, f"{value} is not a probability, from 0 to 1")
        quality = self.jpeg_quality
        known = len(quality) == 2 and 1 <= quality[0] <= quality[1] <= 100
        require(known, "jpeg_quality", f"{list(quality)} must be the lowest and the highest quality, from 1 to 100")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of the recipe (spec: v4 section 1.10)."""

    name: str
    data: DataConfig
    steps: int
    rows: int  # packed rows of one optimiser step, over all devices
    packed_length: int  # tokens per row
    learning_rate: float
    learning_rate_min: float
    trainable: tuple[str, ...]
    warmup_steps: int = 0
    schedule: Literal["cosine", "timm_cosine", "constant"] = "timm_cosine"
    tower_learning_rate_factor: float = 1.0
    accumulation: int = 1  # micro-batches per step; divides rows
    max_slices: int = 9
    # The last thing that is tried before a sample is dropped whose tokens or views are too many for a row.
    too_long: Literal["cut_turns", "fewer_slices", "drop"] = "cut_turns"
    max_aspect_ratio: float = 0.0  # of images, in place of slicing.limits.max_aspect_ratio; 0 keeps it
    augment: AugmentConfig = AugmentConfig()
    scale_resolution: int = 0  # replaces slicing.scale_resolution during the stage; 0 keeps it
    pre_resize: PreResizeConfig = PreResizeConfig()  # takes the place of slicing.pre_resize during the stage
    template: Literal["", "chatml", "vicuna_v1", "plain", "jinja"] = ""  # replaces chat.template during the stage
    sample_weight_power: float = 1.0  # 0.5: a sample of L trained tokens weighs L**0.5 (stage 4)
    slots: int = 0  # view slots per row; 0: chosen by the bucket planner
    buckets: tuple[BucketConfig, ...] = ()  # empty: chosen by the bucket planner
    bucket_budget: int = 2  # programs the planner may ask for
    objective: Literal["language", "reconstruction"] = "language"  # reconstruction: the pre-training of VDIM
    reconstruction: ReconstructionConfig = ReconstructionConfig()

    def __post_init__(self):
        require_at_least(self, 1, "steps", "rows", "packed_length", "accumulation", "max_slices", "bucket_budget")
        require_at_least(self, 0, "warmup_steps", "slots", "scale_resolution", "learning_rate", "learning_rate_min")
        ratio = self.max_aspect_ratio
        require(ratio == 0 or ratio >= 1, "max_aspect_ratio", f"must be at least 1, or 0 for the model's, not {ratio}")
        divides = self.rows % self.accumulation == 0
        require(divides, "accumulation", f"{self.accumulation} does not divide rows {self.rows}")
        for part in self.trainable:
            require(part in PARTS, "trainable", f"{part!r} is not one of {PARTS}")
        require(bool(self.trainable), "trainable", "names no part: nothing would be trained")
        only_upsampler = set(self.trainable) <= {"upsampler", "upsampler_fixup"}
        require(
            only_upsampler or self.objective == "language",
            "trainable",
            "the objective 'reconstruction' trains 'upsampler' and 'upsampler_fixup', nothing else",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the released scripts: everything but names with 'bias' is decayed."""

    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis, the slowest network first; one may be -1, 'all that are left' (docs/sharding.md)."""

    dcn_data: int = 1  # whole copies of the parameters, one per TPU slice or group of hosts
    data: int = -1  # whole copies
    fsdp: int = 1  # parameters and rows split
    sequence: int = 1  # tokens of a row split, and parameters
    tensor: int = 1  # layers split inside: heads, hidden units, vocabulary
    unsharded_tolerance: float = 0.02  # share of the parameters' bytes that may stay unsplit where fsdp or sequence > 1

    def __post_init__(self):
        require(0 <= self.unsharded_tolerance <= 1, "unsharded_tolerance", "must be a share, from 0 to 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Stages in order, and what they share."""

    stages: tuple[StageConfig, ...]
    seed: int = 0
    init_from: str = ""  # model, workdir or foreign checkpoint the first stage starts from; empty: random
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    max_bad_steps: int = 10  # non-finite steps in a row before the run is aborted
    max_broken_samples: float = 0.1  # share of unreadable samples above which the run is aborted; 1: never
    checksum_every: int = 500  # steps after which devices compare what they hold alike; 0: never
    hang_seconds: float = (
        1800.0  # without progress, compilation included, after which all threads' stacks are written; 0: never
    )
    hang_exits: bool = False  # end the process then, for its launcher to start the run again
    packing_window: int = 256  # samples looked at together when rows are filled
    prefetch: int = 4  # batches prepared ahead of the device
    data_workers: int = 0  # processes that decode images; 0: threads of this one
    # JPEGs much larger than their views need are decoded at 1/2, 1/4 or 1/8 of their size: faster, but the pixels are
    # not those of a resize from the whole image, which published models were trained with and answers are given from.
    jpeg_draft: bool = False
    peak_flops: float = 0.0  # per device; 0: from the table of known devices, else measured

    def __post_init__(self):
        require(len(self.stages) > 0, "stages", "is empty")
        require_at_least(
            self, 1, "checkpoint_every", "keep_checkpoints", "log_every", "max_bad_steps", "packing_window"
        )
        require_at_least(self, 0, "prefetch", "data_workers", "peak_flops", "seed", "checksum_every", "hang_seconds")
        require(0 <= self.max_broken_samples <= 1, "max_broken_samples", "must be a share, from 0 to 1")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), "stages", f"names repeat: {names}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything `uhd-jax train` needs."""

    name: str
    model: ModelConfig
    train: TrainConfig

    def __post_init__(self):
        pyramid = self.model.connector.pyramid
        trains = max(pyramid.levels) > 0 and pyramid.upsampling != "bilinear"
        for index, stage in enumerate(self.train.stages):
            require(
                trains or stage.objective == "language",
                f"train.stages[{index}].objective",
                "'reconstruction' needs a model.connector.pyramid of more than level 0 and with parameters",
            )
