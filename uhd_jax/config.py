"""Typed configuration of a run.

A file in `configs/` returns an `ml_collections.ConfigDict`; `from_config_dict` turns it, once, into the frozen
dataclasses below. An unknown key, a wrong type or an impossible mix raises `ConfigError` naming the full key.
Everything behind the command line sees only the dataclasses, never a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

MODES = ("16x", "4x")
COMPRESSORS = (
    "none",
    "average_pool",
    "unshuffle_mlp",
    "reused_mlp",
    "cross_attention_top_left",
    "cross_attention_mean",
    "window_attention_mlp",
    "window_attention_reused_mlp",
)
PARTS = ("tower", "patch_embedding", "position_table", "compressor", "connector", "decoder")


class ConfigError(ValueError):
    """A key of the configuration is unknown, has the wrong type, or contradicts another."""


def _require(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: {message}")


def _require_at_least(config: Any, smallest: int, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(value >= smallest, key, f"must be at least {smallest}, not {value}")


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What an image file may be before it is decoded. Sizes in pixels unless said otherwise."""

    max_bytes: int = 256 * 2**20
    max_pixels: int = 178_956_970
    max_side: int = 65_535
    max_aspect_ratio: float = 200.0


@dataclasses.dataclass(frozen=True)
class SlicingConfig:
    """How an image becomes views (spec: v4 sections 3.1 to 3.3)."""

    rule: Literal["v4"] = "v4"
    encoding: Literal["slices", "global"] = "slices"  # global: the whole image as one view (paper's GE)
    scale_resolution: int = 448  # side in pixels of a square view
    max_slices: int = 9
    max_view_patches: int = 1408  # a view beyond this is refused, not resized silently
    limits: ImageLimits = ImageLimits()

    def __post_init__(self):
        _require_at_least(self, 1, "scale_resolution", "max_slices", "max_view_patches")


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """SigLIP 2 so400m in NaViT form by default (spec: v4 section 2.1)."""

    kind: Literal["siglip2"] = "siglip2"
    width: int = 1152
    mlp_width: int = 4304
    layers: int = 27
    heads: int = 16
    patch_size: int = 14
    table_side: int = 70  # the position table is table_side x table_side
    norm_eps: float = 1e-6

    def __post_init__(self):
        _require_at_least(self, 1, "width", "mlp_width", "layers", "heads", "patch_size", "table_side")
        _require(self.width % self.heads == 0, "heads", f"{self.heads} does not divide width {self.width}")

    @property
    def patch_dim(self) -> int:
        """Values per patch: channels x height x width."""
        return 3 * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """What reduces tokens by 4 inside the tower, after the layer with zero-based index `after_layer`."""

    kind: Literal[COMPRESSORS] = "window_attention_reused_mlp"
    after_layer: int = 6


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Merging MLP between tower and decoder; two rounds are the paper's post-ViT 16x baseline."""

    kind: Literal["merging_mlp"] = "merging_mlp"
    rounds: int = 1
    norm_eps: float = 1e-6

    def __post_init__(self):
        _require(self.rounds in (1, 2), "rounds", f"must be 1 or 2, not {self.rounds}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder for Llama/Vicuna, Qwen2 and Qwen3, told apart by the flags."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tied_head: bool = False

    def __post_init__(self):
        _require_at_least(self, 1, "vocab_size", "width", "mlp_width", "layers", "heads", "kv_heads", "head_dim")
        _require(self.heads % self.kv_heads == 0, "kv_heads", f"{self.kv_heads} does not divide heads {self.heads}")
        _require(self.head_dim % 2 == 0, "head_dim", "must be even for rotary positions")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Strings around text and images. The marks are looked up in the tokenizer; each must be one id."""

    template: Literal["chatml"] = "chatml"
    tokenizer: str = "bytes"  # "bytes" (built in), or a path to a tokenizer.json or its folder
    placeholder: str = "<|image_pad|>"
    image_start: str = "<image>"
    image_end: str = "</image>"
    slice_start: str = "<slice>"
    slice_end: str = "</slice>"
    image_id_start: str = "<image_id>"
    image_id_end: str = "</image_id>"
    turn_start: str = "<|im_start|>"
    turn_end: str = "<|im_end|>"
    padding: str = "<|endoftext|>"
    words: tuple[str, ...] = ()  # one id each in the built-in byte tokenizer, for short rows
    use_image_id: bool = True
    system: str = ""
    empty_think: bool = False  # an empty, untrained think block opens the last answer (MiniCPM-V Instruct)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model: independent parts plus how they are computed."""

    decoder: DecoderConfig
    tower: TowerConfig = TowerConfig()
    compressor: CompressorConfig = CompressorConfig()
    connector: ConnectorConfig = ConnectorConfig()
    slicing: SlicingConfig = SlicingConfig()
    chat: ChatConfig = ChatConfig()
    mode: Literal[MODES] = "16x"  # 4x skips the compressor; the weights serve both
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; parameters stay float32
    tower_remat: Literal["none", "full", "dots"] = "full"
    decoder_remat: Literal["none", "full", "dots"] = "full"
    scan_layers: bool = True
    loss_chunk: int = 1024  # tokens whose logits exist at one time

    def __post_init__(self):
        _require_at_least(self, 1, "loss_chunk")
        if self.compressor.kind != "none":
            _require(
                0 <= self.compressor.after_layer < self.tower.layers,
                "compressor.after_layer",
                f"{self.compressor.after_layer} is not a layer index of a tower of {self.tower.layers} layers",
            )
        _require(
            not (self.compressor.kind == "none" and self.connector.rounds == 1 and self.mode == "16x"),
            "mode",
            "'16x' needs a compressor or connector.rounds=2; without either use mode='4x'",
        )

    def at_resolution(self, scale_resolution: int) -> ModelConfig:
        """The same model cutting images for another side of a square view in pixels; 0 keeps its own."""
        if not scale_resolution:
            return self
        return dataclasses.replace(self, slicing=dataclasses.replace(self.slicing, scale_resolution=scale_resolution))

    def merge_levels(self, mode: str | None = None) -> int:
        """Number of 2x2 merges between patches and visual tokens: tokens = patches / 4**levels."""
        mode = mode or self.mode
        if mode not in MODES:
            raise ConfigError(f"mode: {mode!r} is not one of {MODES}")
        inside = int(self.compressor.kind != "none" and mode == "16x")
        return inside + self.connector.rounds


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
    scale_resolution: int = 0  # replaces slicing.scale_resolution during the stage; 0 keeps it
    sample_weight_power: float = 1.0  # 0.5: a sample of L trained tokens weighs L**0.5 (stage 4)
    slots: int = 0  # view slots per row; 0: chosen by the bucket planner
    buckets: tuple[BucketConfig, ...] = ()  # empty: chosen by the bucket planner
    bucket_budget: int = 2  # programs the planner may ask for

    def __post_init__(self):
        _require_at_least(self, 1, "steps", "rows", "packed_length", "accumulation", "max_slices", "bucket_budget")
        _require_at_least(self, 0, "warmup_steps", "slots", "scale_resolution", "learning_rate", "learning_rate_min")
        divides = self.rows % self.accumulation == 0
        _require(divides, "accumulation", f"{self.accumulation} does not divide rows {self.rows}")
        for part in self.trainable:
            _require(part in PARTS, "trainable", f"{part!r} is not one of {PARTS}")
        _require(bool(self.trainable), "trainable", "names no part: nothing would be trained")


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
    """Devices per mesh axis; one of them may be -1, 'all that are left'."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Stages in order, and what they share."""

    stages: tuple[StageConfig, ...]
    seed: int = 0
    init_from: str = ""  # model or workdir whose parameters the first stage starts from; empty: random
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    max_bad_steps: int = 10  # non-finite steps in a row before the run is aborted
    packing_window: int = 256  # samples looked at together when rows are filled
    prefetch: int = 4  # batches prepared ahead of the device
    data_workers: int = 0  # processes that decode images; 0: threads of this one
    peak_flops: float = 0.0  # per device; 0: from the table of known devices, else measured

    def __post_init__(self):
        _require(len(self.stages) > 0, "stages", "is empty")
        _require_at_least(
            self, 1, "checkpoint_every", "keep_checkpoints", "log_every", "max_bad_steps", "packing_window"
        )
        _require_at_least(self, 0, "prefetch", "data_workers", "peak_flops", "seed")
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), "stages", f"names repeat: {names}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything `uhd-jax train` needs."""

    name: str
    model: ModelConfig
    train: TrainConfig


def from_config_dict(config: Any, cls: type = RunConfig, path: str = "config") -> Any:
    """Builds `cls` from a ConfigDict or plain mapping.

    Raises:
      ConfigError: an unknown or missing key, a value of the wrong type, or an impossible mix; the message holds the
        full key, e.g. `config.model.tower.heads`.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return _build(cls, config, path)


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_config_dict`, with JSON types only (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=dict))


def _build(annotation: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, value, path)
    origin = typing.get_origin(annotation)
    if origin is Literal:
        if value not in typing.get_args(annotation):
            raise ConfigError(f"{path}: {value!r} is not one of {typing.get_args(annotation)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {type(value).__name__}")
        item = typing.get_args(annotation)[0]
        return tuple(_build(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {type(value).__name__}")
        return dict(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: expected {annotation.__name__}, got {type(value).__name__} {value!r}")
    return value


def _build_dataclass(cls: type, value: Any, path: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a mapping, got {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise ConfigError(f"{path}.{key}: unknown key; known keys here: {', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{path}.{name}: missing")
    arguments = {key: _build(hints[key], v, f"{path}.{key}") for key, v in value.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None
