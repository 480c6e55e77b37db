"""MiniCPM-V 4.6 whole, as transformers stores it: what its JSON files say of the model (spec v4 sections 2, 3, 4.1).

Every field that changes what the model computes is read or, where there is only one way here, checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from uhd_jax.config import (
    MODES,
    ChatConfig,
    CompressorConfig,
    ConnectorConfig,
    ModelConfig,
    SlicingConfig,
    TowerConfig,
    VideoConfig,
)
from uhd_jax.convert import minicpmv
from uhd_jax.convert.decoder_families import config_of, text_dropped
from uhd_jax.convert.family import Dropped, Family, dtype_of, settings
from uhd_jax.convert.files import added_tokens
from uhd_jax.convert.minicpmv46_files import (
    CHAT_MARKS,
    IMAGE_FILE,
    PROCESSOR_FILE,
    TEMPLATE_FILE,
    VIDEO_FILE,
    write_files,
)
from uhd_jax.convert.tables import ConvertError

if TYPE_CHECKING:
    from uhd_jax.convert.source import Source

MODEL_TYPE = "minicpmv4_6"
# What transformers takes for keys that are not there.
_TOP = {
    "insert_layer_id": 6,
    "tie_word_embeddings": False,
    "downsample_mode": "16x",
    "merge_kernel_size": (2, 2),
    "merger_times": 1,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "window_kernel_size": (2, 2),
}
_IMAGE = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "slice_mode": True,
    "use_image_id": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "resample": 3,  # bicubic
}
_CLIP = {"max_num_frames": 128, "stack_frames": 1, "do_sample_frames": True}
_FIXED = ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")


def _config(source: Source) -> ModelConfig:
    config = _Fields(source, "config.json", source.json("config.json"), _TOP)
    vision = _Fields(source, "config.json", config.get("vision_config") or {}, _VISION, "vision_config.")
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise config.wrong("text_config", "there is none; it says what the language model is")
    config.require("merge_kernel_size", (2, 2))
    for key in ("hidden_act", "num_channels", "window_kernel_size"):
        vision.require(key, _VISION[key])
    image = _processor(source, IMAGE_FILE, "image_processor", _IMAGE)
    video = _processor(source, VIDEO_FILE, "video_processor", _IMAGE | _CLIP)
    for settings_of in (image, video):
        for key in _FIXED:
            settings_of.require(key, _IMAGE[key])
        settings_of.require("patch_size", vision["patch_size"])
    tower = _tower(source, vision)
    after = config["insert_layer_id"]
    if after >= tower.layers:
        raise config.wrong("insert_layer_id", f"{after} is not an index of the tower's {tower.layers} layers")
    if after < 0 and config["downsample_mode"] == "16x" and config["merger_times"] == 1:
        raise config.wrong("insert_layer_id", f"{after} leaves out the compressor, which downsample_mode '16x' needs")
    if config["downsample_mode"] not in MODES:
        raise config.wrong("downsample_mode", f"{config['downsample_mode']!r} is none of {', '.join(MODES)}")
    return ModelConfig(
        decoder=config_of(source, dict(text) | {"tie_word_embeddings": config["tie_word_embeddings"]}),
        tower=tower,
        compressor=CompressorConfig("window_attention_reused_mlp", after) if after >= 0 else CompressorConfig("none"),
        connector=ConnectorConfig(rounds=config["merger_times"]),
        slicing=SlicingConfig(
            scale_resolution=image["scale_resolution"],
            max_slices=image["max_slice_nums"] if image["slice_mode"] else 1,
        ),
        video=VideoConfig(
            max_frames=video["max_num_frames"],
            stack_frames=video["stack_frames"],
            max_slices=video["max_slice_nums"] if video["slice_mode"] else 1,
        ),
        chat=_chat(source, config, image["use_image_id"]),
        mode=config["downsample_mode"],
        dtype=dtype_of(config.values),
    )


class _Fields:
    """The fields of a JSON object, with defaults; errors name file and key."""

    def __init__(
        self, source: Source, file: str, values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
    ):
        self.values, self._defaults = dict(defaults) | dict(values), defaults
        self._path, self._prefix = source.folder / file, prefix

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def __getitem__(self, key: str) -> Any:
        """A value that a size or a switch is made of."""
        value = self.values[key]
        if not isinstance(value, int | float | str):
            raise self.wrong(key, f"{value!r} is not a single value")
        kind = type(self._defaults[key])
        if not isinstance(value, (int, float) if kind is float else kind) or (
            kind is not bool and isinstance(value, bool)
        ):
            raise self.wrong(key, f"{value!r} is not of type {kind.__name__}")
        return value

    def wrong(self, key: str, what: str) -> ConvertError:
        return ConvertError(f"{self._path}: {self._prefix}{key}: {what}")

    def require(self, key: str, only: Any) -> None:
        """Raises ConvertError unless the value is the only one that is supported."""
        found = self.values[key]
        plain = tuple(found) if isinstance(found, list) else found
        close = isinstance(plain, float) and isinstance(only, float) and abs(plain - only) < 1e-9
        if plain != only and not close:
            raise self.wrong(key, f"{found!r} is not supported; it must be {only!r}")


def _processor(source: Source, file: str, part: str, defaults: Mapping[str, Any]) -> _Fields:
    """Settings of the image or the video processor: in a file of its own, or in that of both.

    Of video settings a checkpoint may say nothing at all; then they are those of images.
    """
    if source.has(PROCESSOR_FILE):
        values = source.json(PROCESSOR_FILE).get(part)
        if isinstance(values, Mapping):
            return _Fields(source, PROCESSOR_FILE, values, defaults, f"{part}.")
    if not source.has(file) and part == "video_processor":
        return _processor(source, IMAGE_FILE, "image_processor", defaults)
    return _Fields(source, file, source.json(file), defaults)


def _tower(source: Source, vision: _Fields) -> TowerConfig:
    tower = minicpmv.tower_config({key: vision[key] for key in _VISION if key != "window_kernel_size"})
    table = source.tensors.get("model.vision_tower.embeddings.position_embedding.weight")
    if table is not None and table.shape[0] != tower.table_side**2:
        problem = (
            f"{vision['image_size']} with patch_size {vision['patch_size']} makes a position table of "
            f"{tower.table_side**2} rows, but the one in {table.file.name} has {table.shape[0]}"
        )
        raise vision.wrong("image_size", problem)
    return tower


def _chat(source: Source, config: _Fields, use_image_id: bool) -> ChatConfig:
    """Marks of the tokenizer, whose ids must be those of config.json."""
    names = source.json("tokenizer_config.json") if source.has("tokenizer_config.json") else {}
    extra = names.get("extra_special_tokens")
    names = (extra if isinstance(extra, Mapping) else {}) | names
    marks = {ours: _content(source, theirs, names[theirs]) for ours, theirs in CHAT_MARKS.items() if names.get(theirs)}
    template = "jinja" if source.has(TEMPLATE_FILE) or names.get("chat_template") else "chatml"
    chat = ChatConfig(template, tokenizer=str(source.folder), use_image_id=use_image_id, **marks)
    added = added_tokens(source.json("tokenizer.json"), source.folder / "tokenizer.json")
    for key, mark in (("image_token_id", chat.placeholder), ("video_token_id", chat.video_placeholder)):
        if config.get(key) is not None and added.get(mark) != config.get(key):
            raise config.wrong(key, f"{config.get(key)} is not the id of {mark!r} in tokenizer.json, {added.get(mark)}")
    if config.get("image_token_id") is None:
        raise config.wrong("image_token_id", f"there is none; it is the id of {chat.placeholder!r}")
    generation = source.json("generation_config.json") if source.has("generation_config.json") else {}
    ends = generation.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) for end in ends):
        raise ConvertError(
            f"{source.folder / 'generation_config.json'}: eos_token_id: {generation['eos_token_id']!r} is no id or list"
        )
    stop = tuple(mark for mark, i in added.items() if i in ends and mark not in (chat.turn_end, chat.padding))
    return dataclasses.replace(chat, stop=stop)


def _content(source: Source, key: str, token: Any) -> str:
    """A token as tokenizer_config.json has it: its text, or an object with this as `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise ConvertError(f"{source.folder / 'tokenizer_config.json'}: {key}: {token!r} is not a token")
    return text


def _dropped(config: ModelConfig) -> tuple[Dropped, ...]:
    dropped = text_dropped(config.decoder, "lm_head.weight")
    if config.compressor.kind == "none":
        dropped += (
            Dropped(r"model\.vision_tower\.vit_merger\..+", "the compressor, which insert_layer_id leaves out"),
        )
    return dropped


MINICPM_V_4_6 = Family(
    name="minicpm_v_4_6",
    parts=("tower", "connector", "decoder"),
    recognise=lambda source: settings(source).get("model_type") == MODEL_TYPE,
    config=_config,
    table=minicpmv.table,
    dropped=_dropped,
    write_files=write_files,
)
