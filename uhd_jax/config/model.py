"""What a model is: slicing, tower, compressor, connector, decoder and the strings around text and images."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from uhd_jax.config.checks import ConfigError, require, require_at_least

if TYPE_CHECKING:
    from uhd_jax.config.run import StageConfig

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
CONNECTORS = ("merging_mlp", "mlp", "bilinear_mlp", "perceiver", "spatial_resampler", "hiwin")
QUERY_CONNECTORS = CONNECTORS[2:]  # visual tokens per view do not depend on its size
PYRAMID_CONNECTORS = ("bilinear_mlp", "perceiver", "hiwin")


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What an image file may be before it is decoded. Sizes in pixels unless said otherwise."""

    max_bytes: int = 256 * 2**20
    max_pixels: int = 178_956_970
    max_side: int = 65_535
    max_aspect_ratio: float = 200.0


@dataclasses.dataclass(frozen=True)
class PreResizeConfig:
    """Resizing of an image before it is sliced (spec: v1-v2 section 1.4)."""

    long_side: int = 0  # pixels of the longer side; 0: as it is
    only_enlarge: bool = False  # images whose longer side is above long_side stay as they are
    refill_probability: float = 0.0  # training only: of giving an image too small for refill_slices slices their area
    refill_slices: int = 6

    def __post_init__(self):
        require_at_least(self, 0, "long_side", "refill_probability")
        require_at_least(self, 1, "refill_slices")
        require(self.refill_probability <= 1, "refill_probability", f"{self.refill_probability} is above 1")


@dataclasses.dataclass(frozen=True)
class SlicingConfig:
    """How an image becomes views (spec: v4 sections 3.1 to 3.3, v1-v2 section 1)."""

    rule: Literal["v4", "v1", "v1_legacy", "fixed_2x2"] = "v4"  # fixed_2x2: ablation of the v1 paper
    encoding: Literal["slices", "global"] = "slices"  # global: the whole image as one view (paper's GE)
    scale_resolution: int = 448  # side in pixels of a square view
    max_slices: int = 9
    overview: bool = True  # False: a sliced image has no thumbnail (ablation of the v1 paper)
    pre_resize: PreResizeConfig = PreResizeConfig()
    max_view_patches: int = 1408  # a view beyond this is refused, not resized silently
    limits: ImageLimits = ImageLimits()

    def __post_init__(self):
        require_at_least(self, 1, "scale_resolution", "max_slices", "max_view_patches")


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """How a video becomes pictures, each of which is sliced like an image (spec: v4 section 5)."""

    max_frames: int = 128  # one a second; of longer videos so many, evenly spread
    stack_frames: int = 1  # frames of each second: the first by itself, the others together on one canvas
    max_slices: int = 9  # of a picture

    def __post_init__(self):
        require_at_least(self, 1, "max_frames", "stack_frames", "max_slices")


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """SigLIP 2 so400m in NaViT form by default (spec: v4 section 2.1; clip: v1-v2 section 2; moonvit: moonvit.md)."""

    kind: Literal["siglip2", "clip", "moonvit"] = "siglip2"
    width: int = 1152
    mlp_width: int = 4304
    layers: int = 27
    heads: int = 16
    patch_size: int = 14
    table_side: int = 70  # the position table is table_side x table_side
    table_cols: int = 0  # where the table is not square, its columns; 0: table_side
    norm_eps: float = 1e-6
    skipped_layers: int = 0  # last layers that have parameters and do not run; clip: 1, as features are its input

    def __post_init__(self):
        require_at_least(self, 1, "width", "mlp_width", "layers", "heads", "patch_size", "table_side")
        require_at_least(self, 0, "table_cols", "skipped_layers")
        require(self.width % self.heads == 0, "heads", f"{self.heads} does not divide width {self.width}")
        require(
            self.kind != "moonvit" or self.width % (4 * self.heads) == 0,
            "heads",
            f"width {self.width} / heads {self.heads} must be a multiple of 4 for two-dimensional rotary positions",
        )
        require(
            self.kind != "siglip2" or self.table_cols in (0, self.table_side),
            "table_cols",
            f"{self.table_cols} with table_side {self.table_side}: kind 'siglip2' has a square table; set 0",
        )
        require(self.skipped_layers < self.layers, "skipped_layers", f"leaves none of {self.layers} layers")
        require(self.kind == "clip" or self.skipped_layers == 0, "skipped_layers", f"must be 0 for kind {self.kind!r}")

    @property
    def table_shape(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.table_side, self.table_cols or self.table_side

    @property
    def pixel_mean(self) -> tuple[float, float, float]:
        """Of red, green and blue in [0, 1], subtracted from a pixel."""
        return (0.48145466, 0.4578275, 0.40821073) if self.kind == "clip" else (0.5, 0.5, 0.5)

    @property
    def pixel_std(self) -> tuple[float, float, float]:
        """Of red, green and blue in [0, 1]; a pixel less its mean is divided by it."""
        return (0.26862954, 0.26130258, 0.27577711) if self.kind == "clip" else (0.5, 0.5, 0.5)

    @property
    def patch_dim(self) -> int:
        """Values per patch that the tower sees: channels x height x width."""
        return 3 * self.patch_size**2

    @property
    def patch_bytes(self) -> int:
        """Bytes per patch in a batch: height x width x four, of which the last means nothing."""
        return 4 * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """What reduces tokens by 4 inside the tower, after the layer with zero-based index `after_layer`."""

    kind: Literal[COMPRESSORS] = "window_attention_reused_mlp"
    after_layer: int = 6


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
    """The inverse semantic pyramid of v2 (spec: v1-v2 sections 3.3 and 3.5)."""

    feature_scale_mask: int = 1  # bit l: level l, of 2**l times the tower's resolution, is used; 1: no pyramid
    upsampling: Literal["bilinear", "deconvolution", "vdim"] = "vdim"  # how the levels above 0 are made

    def __post_init__(self):
        mask = self.feature_scale_mask
        require(1 <= mask <= 15, "feature_scale_mask", f"{mask} is not a sum of 1, 2, 4 and 8")

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that are used, ascending."""
        return tuple(level for level in range(4) if self.feature_scale_mask >> level & 1)


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """What stands between tower and decoder (spec: v4 section 2.6, v1-v2 section 3).

    merging_mlp: v4, two rounds are the paper's post-ViT 16x baseline; mlp: LLaVA-1.5's, no compression; the others give
    query_side**2 visual tokens per view: bilinear_mlp (ablation of v2), perceiver (v1-arXiv, query_side 8; on a pyramid
    an ablation of v2), spatial_resampler (v1-ECCV, query_side 12), hiwin (v2, query_side 12).
    """

    kind: Literal[CONNECTORS] = "merging_mlp"
    rounds: int = 1  # merging_mlp
    norm_eps: float = 1e-6
    query_side: int = 12
    heads: int = 0  # of the query connectors; 0: one per 128 values of the decoder's width
    pyramid: PyramidConfig = PyramidConfig()
    bins: Literal["selective", "fixed", "pyramid"] = "selective"  # hiwin: RoI bins of a window (v2 Table 6)
    query_sets: int = 4  # hiwin: the paper's formulas have one, the released models four
    box_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 rounds window borders as the released models do

    def __post_init__(self):
        require(self.rounds in (1, 2), "rounds", f"must be 1 or 2, not {self.rounds}")
        require_at_least(self, 1, "query_side", "query_sets")
        require_at_least(self, 0, "heads")
        require(
            self.pyramid.feature_scale_mask == 1 or self.kind in PYRAMID_CONNECTORS,
            "pyramid.feature_scale_mask",
            f"kind {self.kind!r} uses no pyramid; set 1, or one of the kinds {PYRAMID_CONNECTORS}",
        )

    @property
    def queries(self) -> int:
        """Visual tokens of a view where they do not depend on its size; else 0."""
        return self.query_side**2 if self.kind in QUERY_CONNECTORS else 0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder for Llama/Vicuna, Qwen2, Qwen3 and the Qwen3.5 hybrid, told apart by the flags (spec v4 4.4).

    Of every `full_attention_interval` layers the last is full attention and the others are gated delta layers.
    """

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
    qk_norm: bool = False  # Qwen3 and Qwen3.5
    tied_head: bool = False
    rotary_dim: int = 0  # only so many first values of a head are rotated; 0: head_dim
    # Of the rotary_dim / 2 frequencies, how many turn with the temporal, row and column position; empty: one position.
    mrope_sections: tuple[int, ...] = ()
    gated_attention: bool = False  # Qwen3.5: full attention's output times the sigmoid of a projection
    zero_centred_norm: bool = False  # Qwen3.5: norms multiply by 1 + scale
    full_attention_interval: int = 1  # Qwen3.5: 4
    delta_key_heads: int = 0
    delta_value_heads: int = 0  # a multiple of delta_key_heads
    delta_key_dim: int = 0  # per head
    delta_value_dim: int = 0
    delta_conv: int = 4  # tokens that the causal convolution sees
    # Longest input, for an export; 0: that of the weights a training starts from, else its longest row. It changes
    # nothing that is computed.
    max_positions: int = dataclasses.field(default=0, compare=False)

    def __post_init__(self):
        require_at_least(self, 1, "vocab_size", "width", "mlp_width", "layers", "heads", "kv_heads", "head_dim")
        require_at_least(self, 0, "max_positions")
        require(self.heads % self.kv_heads == 0, "kv_heads", f"{self.kv_heads} does not divide heads {self.heads}")
        rotary = self.rotary_dim or self.head_dim
        key = "rotary_dim" if self.rotary_dim else "head_dim"
        require(rotary % 2 == 0, key, f"must be even for rotary positions, not {rotary}")
        require(0 < rotary <= self.head_dim, "rotary_dim", f"{rotary} is not from 0 to head_dim {self.head_dim}")
        require(
            not self.mrope_sections or (len(self.mrope_sections) == 3 and sum(self.mrope_sections) == rotary // 2),
            "mrope_sections",
            f"{self.mrope_sections} are not three counts of {rotary // 2} frequencies together; or leave it empty",
        )
        self._check_delta()

    def _check_delta(self):
        interval = self.full_attention_interval
        require_at_least(self, 1, "full_attention_interval")
        if interval == 1:
            return
        require(
            self.layers % interval == 0, "full_attention_interval", f"{interval} does not divide layers {self.layers}"
        )
        require_at_least(
            self, 1, "delta_key_heads", "delta_value_heads", "delta_key_dim", "delta_value_dim", "delta_conv"
        )
        heads = self.delta_key_heads
        divides = self.delta_value_heads % heads == 0
        require(divides, "delta_value_heads", f"{self.delta_value_heads} is not a multiple of delta_key_heads {heads}")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Strings around text and images. The marks are looked up in the tokenizer; each must be one id."""

    template: Literal["chatml", "vicuna_v1", "plain", "jinja"] = "chatml"  # jinja: the tokenizer's own chat template
    layout: Literal["v4", "A", "B"] = "v4"  # of the visual block (spec: v4 section 2.8, v1-v2 section 4.3)
    schema: bool = True  # layouts A and B: separators between slices; False: v1's ablation and its March 2024 code
    separator_ids: tuple[int, ...] = ()  # ids of "," and newline in layouts A and B; empty: the tokenizer's own
    images_first: bool = False  # images stand at the start of their turn, wherever the message has them
    train_turn_marks: bool = False  # turn marks and newlines are trained everywhere, as in the released v2 with Qwen2
    bos: str = ""  # mark that opens every sample, e.g. "<s>"
    tokenizer: str = "bytes"  # "bytes" (built in), or a path to a tokenizer.json or its folder
    placeholder: str = "<|image_pad|>"
    video_placeholder: str = "<|video_pad|>"  # looked up only where there is a video
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
    open_think: bool = False  # an answer that is to think begins with "<think>", which the model does not write itself
    stop: tuple[str, ...] = ()  # marks besides turn_end and padding that end an answer

    def __post_init__(self):
        count = len(self.separator_ids)
        require(count in (0, 2), "separator_ids", f"must be two ids, of comma and newline, or empty; not {count}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model: independent parts plus how they are computed."""

    decoder: DecoderConfig
    tower: TowerConfig = TowerConfig()
    compressor: CompressorConfig = CompressorConfig()
    connector: ConnectorConfig = ConnectorConfig()
    slicing: SlicingConfig = SlicingConfig()
    video: VideoConfig = VideoConfig()
    chat: ChatConfig = ChatConfig()
    mode: Literal[MODES] = "16x"  # 4x skips the compressor; the weights serve both
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; parameters stay float32 (float64: `load`)
    tower_remat: Literal["none", "full", "dots"] = "full"
    decoder_remat: Literal["none", "full", "dots"] = "full"
    scan_layers: bool = True
    # xla, or a kernel: splash (TPU), cudnn (GPU); auto: by the devices of the mesh
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    loss_chunk: int = 1024  # tokens whose logits exist at one time

    def __post_init__(self):
        require_at_least(self, 1, "loss_chunk")
        merging = self.connector.kind == "merging_mlp"
        require(
            self.compressor.kind == "none" or self.tower.kind != "clip",
            "compressor.kind",
            f"{self.compressor.kind!r} cannot stand in a 'clip' tower: its class token has no window; use 'none'",
        )
        require(
            merging or self.compressor.kind == "none" or not self.connector.pyramid.feature_scale_mask > 1,
            "connector.pyramid.feature_scale_mask",
            "a pyramid needs the tower's full resolution; use compressor.kind='none'",
        )
        if self.connector.queries:
            heads, width = self.connector_heads, self.decoder.width
            divides = heads > 0 and width % heads == 0
            require(divides, "connector.heads", f"{heads} does not divide the decoder's width {width}; set a divisor")
        require(
            self.chat.layout != "B" or self.connector.queries > 0,
            "chat.layout",
            f"'B' tiles square maps of visual tokens, which kind {self.connector.kind!r} of connector does not make",
        )
        require(
            all(0 <= i < self.decoder.vocab_size for i in self.chat.separator_ids),
            "chat.separator_ids",
            f"{self.chat.separator_ids} are not all ids of the decoder's {self.decoder.vocab_size}",
        )
        if self.compressor.kind != "none":
            require(
                0 <= self.compressor.after_layer < self.tower.layers,
                "compressor.after_layer",
                f"{self.compressor.after_layer} is not a layer index of a tower of {self.tower.layers} layers",
            )
        require(
            not (merging and self.compressor.kind == "none" and self.connector.rounds == 1 and self.mode == "16x"),
            "mode",
            "'16x' needs a compressor or connector.rounds=2; without either use mode='4x'",
        )

    def for_stage(self, stage: StageConfig) -> ModelConfig:
        """The same model with the slicing and the prompt form of a stage."""
        limits = self.slicing.limits
        slicing = dataclasses.replace(
            self.slicing,
            limits=dataclasses.replace(limits, max_aspect_ratio=stage.max_aspect_ratio or limits.max_aspect_ratio),
            scale_resolution=stage.scale_resolution or self.slicing.scale_resolution,
            pre_resize=stage.pre_resize,
        )
        chat = dataclasses.replace(self.chat, template=stage.template or self.chat.template)
        return dataclasses.replace(self, slicing=slicing, chat=chat)

    @property
    def connector_heads(self) -> int:
        """Attention heads of a query connector."""
        return self.connector.heads or self.decoder.width // 128

    def merge_levels(self, mode: str | None = None) -> int:
        """Number of 2x2 merges that patches go through, which is what their merge order is made for."""
        mode = mode or self.mode
        if mode not in MODES:
            raise ConfigError(f"mode: {mode!r} is not one of {MODES}")
        inside = int(self.compressor.kind != "none" and mode == "16x")
        return inside + (self.connector.rounds if self.connector.kind == "merging_mlp" else 0)

    def visual_tokens(self, patches: int, mode: str | None = None) -> int:
        """Visual tokens of a view (or of a slot with room) of so many patches."""
        return self.connector.queries or patches // 4 ** self.merge_levels(mode)
