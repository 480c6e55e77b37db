"""Types of what is read from a foreign config.json, and our own complaints in the words of that file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from uhd_jax.config import ConfigError
from uhd_jax.convert.tables import ConvertError

_OBJECT, _LIST, _STRING = (Mapping,), (list,), (str,)
_POSITIVE = "a whole number of at least 1"
_NUMBER = "a number above 0 and below 1e30"
_LARGEST = 2**31 - 1  # of sizes: what indices are made of
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT: dict[str, Any] = {
    **dict.fromkeys((*_SIZES, "vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings"), _POSITIVE),
    **dict.fromkeys((f"linear_num_{part}_heads" for part in ("key", "value")), _POSITIVE),
    **dict.fromkeys((f"linear_{part}_head_dim" for part in ("key", "value")), _POSITIVE),
    **dict.fromkeys(("linear_conv_kernel_dim", "full_attention_interval"), _POSITIVE),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor"), _NUMBER),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _OBJECT),
    "layer_types": _LIST,
    "model_type": _STRING,
}
_ROPE: dict[str, Any] = {**dict.fromkeys(("rope_theta", "partial_rotary_factor"), _NUMBER), "mrope_section": _LIST}
_VISION: dict[str, Any] = {
    **dict.fromkeys((*_SIZES, "patch_size", "image_size", "num_patches", "num_channels"), _POSITIVE),
    **dict.fromkeys(("init_pos_emb_height", "init_pos_emb_width"), _POSITIVE),
    "layer_norm_eps": _NUMBER,
    "hidden_act": _STRING,
}
_TOP: dict[str, Any] = {
    **dict.fromkeys(("text_config", "llm_config", "vision_config", "slice_config"), _OBJECT),
    **dict.fromkeys(("mm_vision_select_layer", "feature_scale_mask", "insert_layer_id", "merger_times"), (int,)),
    "mm_vision_select_feature": _STRING,
    "drop_vision_last_layer": (bool,),
}
# Of these one value is supported, which is also meant where there is no such key.
_ONLY = {"num_channels": 3, "mm_vision_select_feature": "patch", "drop_vision_last_layer": False}
# null means the same as no such key
_NULLABLE = {"num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "partial_rotary_factor"}
_NULLABLE |= {"rope_parameters", "rope_scaling", "layer_types", "text_config", "llm_config", "slice_config"}
_NULLABLE |= {"mm_vision_select_feature", "drop_vision_last_layer", "mrope_section"}
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_FEW = 1000  # layers, of which a list does no harm, whatever the tensors are
_WORDS = {
    _OBJECT: "an object",
    _LIST: "a list",
    _STRING: "a string",
    (int,): "a whole number",
    (bool,): "true or false",
}

# Our fields that stand for one of config.json, in our checks' messages.
_THEIRS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "rotary_dim": "partial_rotary_factor times head_dim",
    "mrope_sections": "rope_parameters.mrope_section",
    "full_attention_interval": "full_attention_interval (or the one that layer_types make)",
    "delta_key_heads": "linear_num_key_heads",
    "delta_value_heads": "linear_num_value_heads",
    "delta_key_dim": "linear_key_head_dim",
    "delta_value_dim": "linear_value_head_dim",
    "delta_conv": "linear_conv_kernel_dim",
    "table_side": "image_size in patches",
    "rounds": "merger_times",
    "skipped_layers": "mm_vision_select_layer",
    "compressor.after_layer": "insert_layer_id",
    "max_slices": "max_slice_nums",
    "max_frames": "max_num_frames",
}


def check_types(config: Mapping[str, Any], parts: tuple[str, ...], tensors: int, path: Path) -> None:
    """Refuses values that the families' functions could not read.

    Args:
      config: the whole of config.json.
      parts: what the family fills; of the others it reads nothing.
      tensors: in the checkpoint; many more layers are refused before lists are made of their number.
      path: the file, for messages.

    Raises:
      ConvertError: a wrong type, a size below 1, or a way of computing that is not ours; names file, key and value.
    """
    _check(config, _TOP, "", path)
    for key in ("torch_dtype", "dtype"):
        if config.get(key) is not None and config[key] not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ConvertError(f"{path}: {key}: {_short(config[key])} is not supported; it must be one of {known}")
    for prefix, values, kinds in _objects(config, parts):
        _check(values, kinds, prefix, path)
        layers = values.get("num_hidden_layers")
        if layers is not None and layers > max(tensors, _FEW):
            raise ConvertError(f"{path}: {prefix}num_hidden_layers: {layers}, but there are only {tensors} tensors")


def text_prefix(config: Mapping[str, Any]) -> str:
    """Where a config.json has the fields of its language model: "text_config.", "llm_config.", or "" for the top."""
    return next((f"{name}." for name in ("text_config", "llm_config") if config.get(name)), "")


def _objects(config: Mapping[str, Any], parts: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """The objects that hold sizes of the parts: their prefix in messages, their values, the kinds of these."""
    if "decoder" in parts:
        prefix = text_prefix(config)
        text = config[prefix[:-1]] if prefix else config
        yield prefix, text, _TEXT
        for key in ("rope_parameters", "rope_scaling"):
            yield f"{prefix}{key}.", text.get(key) or {}, _ROPE
    if "tower" in parts:
        if "vision_config" in config:
            yield "vision_config.", config["vision_config"], _VISION
        elif "decoder" not in parts:
            yield "", config, _VISION


def _check(values: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str, path: Path) -> None:
    for key, kind in kinds.items():
        value = values.get(key)
        if key not in values or (value is None and key in _NULLABLE):
            continue
        types = {_POSITIVE: (int,), _NUMBER: (int, float)}.get(kind, kind)
        fits = isinstance(value, types) and isinstance(value, bool) == (kind == (bool,))
        if fits and kind in (_POSITIVE, _NUMBER):
            fits = 1 <= value <= _LARGEST if kind is _POSITIVE else 0 < value < 1e30
        if not fits:
            large = f" and at most {_LARGEST}" if kind is _POSITIVE and isinstance(value, int) and value > 1 else ""
            raise ConvertError(f"{path}: {prefix}{key}: {_short(value)} is not {_WORDS.get(kind, kind)}{large}")
    for key in _ONLY.keys() & kinds.keys():
        if values.get(key) not in (None, _ONLY[key]):
            raise ConvertError(f"{path}: {prefix}{key}: {values[key]!r} is not supported; it must be {_ONLY[key]!r}")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def in_their_words(error: ConfigError, path: Path) -> ConvertError:
    """A complaint of our configuration about values of a checkpoint, by the checkpoint's own keys."""
    key, _, message = str(error).partition(": ")
    names = "|".join(sorted((name for name in _THEIRS if "." not in name), key=len, reverse=True))
    message = re.sub(rf"\b({names}) (?=-?\d)", lambda found: f"{_THEIRS[found[1]]} ", message)
    return ConvertError(f"{path}: {_THEIRS.get(key) or _THEIRS.get(key.rpartition('.')[2], key)}: {message}")
