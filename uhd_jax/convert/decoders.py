"""Text models as transformers stores them: Llama, Qwen2, Qwen3 and the Qwen3.5 hybrid (spec v4 sections 4.1, 4.4)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from uhd_jax.config import DecoderConfig
from uhd_jax.convert.tables import SAME, TRANSPOSE, ConvertError, Entry, Rule

KINDS = ("llama", "qwen2", "qwen3", "qwen3_5_text")
LINEAR, FULL = "linear_attention", "full_attention"

# torch depthwise convolution [C, 1, K] <-> [K, C]
DEPTHWISE = Rule(lambda a: a[:, 0].T, lambda a, _: a.T[:, None], lambda s: s[::-2] if s[1:2] == (1,) else ())


def decoder_table(config: DecoderConfig, prefix: str, head: str) -> list[Entry]:
    """Every parameter of the decoder under `prefix`; `head` is the full name of the output matrix."""
    interval = config.full_attention_interval
    full = tuple(range(interval - 1, config.layers, interval)) if interval > 1 else ()
    entries = [
        Entry("decoder/embedding", f"{prefix}embed_tokens.weight"),
        Entry("decoder/final_norm/scale", f"{prefix}norm.weight"),
        *_layer("decoder/layers", prefix, full),
        *_attention(config, prefix, full),
    ]
    if interval > 1:
        delta = tuple(index for index in range(config.layers) if index not in full)
        entries += _layer("decoder/delta_layers", prefix, delta) + _gated_delta(prefix, delta)
    return entries if config.tied_head else [*entries, Entry("decoder/head", head, TRANSPOSE)]


def decoder_dropped(config: DecoderConfig, head: str) -> tuple[tuple[str, str], ...]:
    """Tensors of a text model left out on purpose: (full regex on the name, reason)."""
    dropped = [
        (r"(.+\.)?mtp\..+", "the multi-token prediction layers are for speculative decoding alone"),
        (r".+\.self_attn\.rotary_emb\.inv_freq", "the frequencies follow from the configuration"),
    ]
    if config.tied_head:
        dropped.append((re.escape(head), "the output matrix is tied to the embedding"))
    return tuple(dropped)


def _names(prefix: str, layers: tuple[int, ...], rules: Mapping[str, tuple[str, Rule]]) -> list[Entry]:
    theirs = f"{prefix}layers.{{L}}."
    return [Entry(ours, theirs + name, rule, layers=layers) for ours, (name, rule) in rules.items()]


def _layer(ours: str, prefix: str, layers: tuple[int, ...]) -> list[Entry]:
    """What every kind of layer has."""
    rules = {
        f"{ours}/input_norm/scale": ("input_layernorm.weight", SAME),
        f"{ours}/post_attention_norm/scale": ("post_attention_layernorm.weight", SAME),
    }
    rules |= {f"{ours}/mlp/{name}/kernel": (f"mlp.{name}_proj.weight", TRANSPOSE) for name in ("gate", "up", "down")}
    return _names(prefix, layers, rules)


def _attention(config: DecoderConfig, prefix: str, layers: tuple[int, ...]) -> list[Entry]:
    ours = "decoder/layers/attention"
    rules = {f"{ours}/out/kernel": ("self_attn.o_proj.weight", TRANSPOSE)}
    plain = ("key", "value") if config.gated_attention else ("query", "key", "value")
    for name in plain:
        rules[f"{ours}/{name}/kernel"] = (f"self_attn.{name[0]}_proj.weight", TRANSPOSE)
        if config.qkv_bias:
            rules[f"{ours}/{name}/bias"] = (f"self_attn.{name[0]}_proj.bias", SAME)
    if config.qk_norm:
        rules |= {f"{ours}/{name}_norm/scale": (f"self_attn.{name[0]}_norm.weight", SAME) for name in ("query", "key")}
    entries = _names(prefix, layers, rules)
    if config.gated_attention:  # one matrix: per head, the rows of the query and then those of its gate
        joined = f"{prefix}layers.{{L}}.self_attn.q_proj.weight"
        for index, name in enumerate(("query", "gate")):
            part = dict(part=(index, 2), groups=config.heads, layers=layers)
            entries.append(Entry(f"{ours}/{name}/kernel", joined, TRANSPOSE, **part))
    return entries


def _gated_delta(prefix: str, layers: tuple[int, ...]) -> list[Entry]:
    ours, theirs = "decoder/delta_layers/delta", "linear_attn"
    rules = {f"{ours}/{name}/kernel": (f"{theirs}.in_proj_{name}.weight", TRANSPOSE) for name in ("qkv", "z", "b", "a")}
    rules |= {
        f"{ours}/out/kernel": (f"{theirs}.out_proj.weight", TRANSPOSE),
        f"{ours}/conv": (f"{theirs}.conv1d.weight", DEPTHWISE),
        f"{ours}/log_decay": (f"{theirs}.A_log", SAME),
        f"{ours}/dt_bias": (f"{theirs}.dt_bias", SAME),
        f"{ours}/norm/scale": (f"{theirs}.norm.weight", SAME),
    }
    return _names(prefix, layers, rules)


def decoder_config(text: Mapping[str, Any]) -> DecoderConfig:
    """DecoderConfig from a `text_config`, or the config.json of a text model.

    Raises:
      ConvertError: another kind of text model, or one with a feature that the decoder has not.
    """
    kind = text.get("model_type")
    if kind not in KINDS:
        raise ConvertError(f"model_type: {kind!r} is none of {', '.join(KINDS)}")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    layers = text["num_hidden_layers"]
    interval = _interval(text) if kind == "qwen3_5_text" else 1
    types = text.get("layer_types") or _layer_types(layers, interval)
    _require(text, "hidden_act", "silu")
    _require(text, "attention_bias", kind == "qwen2")
    _require(text, "mlp_bias", False)
    _require(text, "use_sliding_window", False)
    _require(text, "attn_output_gate", True)
    for name in ("rope_parameters", "rope_scaling"):
        found = text.get(name) or {}
        _require(found, "rope_type", "default", f"{name}.")
        _require(found, "type", "default", f"{name}.")  # its older name
        _require(found, "mrope_interleaved", True, f"{name}.")
    if list(types) != _layer_types(layers, interval):
        raise ConvertError(
            f"layer_types: {types} is not {layers} layers of which the last of every {interval} is "
            f"{FULL!r} and the others are {LINEAR!r}"
        )
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    config = dict(
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        mlp_width=text["intermediate_size"],
        layers=layers,
        heads=text["num_attention_heads"],
        kv_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
        head_dim=head_dim,
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 10_000.0),
        norm_eps=text["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3_5_text"),
        tied_head=bool(text.get("tie_word_embeddings", False)),
        max_positions=text.get("max_position_embeddings") or 0,
    )
    if kind == "qwen3_5_text":
        partial = rope.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 0.25
        config |= dict(
            full_attention_interval=interval,
            rotary_dim=int(head_dim * partial),
            mrope_sections=tuple(rope.get("mrope_section") or ()),
            gated_attention=True,
            zero_centred_norm=True,
        )
        if interval > 1:
            config |= {ours: text[theirs] for ours, theirs in _DELTA_SIZES.items()}
    return DecoderConfig(**config)


_DELTA_SIZES = {
    "delta_key_heads": "linear_num_key_heads",
    "delta_value_heads": "linear_num_value_heads",
    "delta_key_dim": "linear_key_head_dim",
    "delta_value_dim": "linear_value_head_dim",
    "delta_conv": "linear_conv_kernel_dim",
}


def _interval(text: Mapping[str, Any]) -> int:
    if types := text.get("layer_types"):
        return list(types).index(FULL) + 1 if FULL in types else len(types)
    return text.get("full_attention_interval", 4)


def _layer_types(layers: int, interval: int) -> list[str]:
    return [FULL if (index + 1) % interval == 0 else LINEAR for index in range(layers)]


def _require(config: Mapping[str, Any], key: str, value: Any, prefix: str = "") -> None:
    found = config.get(key, value)
    if found is not None and found != value:
        raise ConvertError(f"{prefix}{key}: {found!r} is not supported; it must be {value!r}")


def text_config(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `decoder_config`: a `text_config` without ids, and without a longest input that is not known."""
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
    }
    if config.max_positions:
        text["max_position_embeddings"] = config.max_positions
    if config.gated_attention:
        kind = "qwen3_5_text"
        rope["partial_rotary_factor"] = (config.rotary_dim or config.head_dim) / config.head_dim
        if config.mrope_sections:
            rope |= {"mrope_section": list(config.mrope_sections), "mrope_interleaved": True}
        text["layer_types"] = _layer_types(config.layers, config.full_attention_interval)
        text |= {theirs: getattr(config, ours) for ours, theirs in _DELTA_SIZES.items() if getattr(config, ours)}
    made = {"model_type": kind, **text, "rope_parameters": rope}
    read = decoder_config(made)
    if config.rotary_dim == 0:  # which is the whole head; the field has its number
        read = dataclasses.replace(read, rotary_dim=0)
    if read != config:
        raise ConvertError(f"no text model of transformers has this decoder: {config}")
    return made
