"""Language models alone: Llama (Vicuna), Qwen2, Qwen3 and Qwen3.5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uhd_jax.config import ChatConfig, CompressorConfig, ConnectorConfig, DecoderConfig, ModelConfig, TowerConfig
from uhd_jax.convert.decoders import decoder_config, decoder_dropped, decoder_table, text_config
from uhd_jax.convert.family import Dropped, Family, dtype_of, settings
from uhd_jax.convert.fields import text_prefix
from uhd_jax.convert.files import token_ids, write_json, write_tokenizer
from uhd_jax.convert.tables import ConvertError

if TYPE_CHECKING:
    from uhd_jax.convert.source import Source

# model_type -> class and longest input of the published models, for a decoder that does not know its own.
_CLASSES = {
    "llama": ("LlamaForCausalLM", 4096),
    "qwen2": ("Qwen2ForCausalLM", 32_768),
    "qwen3": ("Qwen3ForCausalLM", 40_960),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", 262_144),
}
NO_TOWER = TowerConfig(width=8, mlp_width=8, layers=1, heads=1, table_side=1)  # in the config of a decoder alone


def config_of(source: Source, text: Mapping[str, Any]) -> DecoderConfig:
    """DecoderConfig from the fields of a language model in config.json.

    Raises:
      ConvertError: another kind of model, or a missing field; names the file.
    """
    try:
        return decoder_config(text)
    except KeyError as error:
        raise ConvertError(f"{source.folder / 'config.json'}: no {error} of the language model") from None
    except ConvertError as error:
        prefix = text_prefix(source.json("config.json"))
        raise ConvertError(f"{source.folder / 'config.json'}: {prefix}{error}") from None


def text_dropped(config: DecoderConfig, head: str) -> tuple[Dropped, ...]:
    """`decoders.decoder_dropped` as `Dropped`."""
    return tuple(Dropped(pattern, reason) for pattern, reason in decoder_dropped(config, head))


def _config(source: Source) -> ModelConfig:
    config = settings(source)
    text = dict(config) | config.get("text_config", {})
    return ModelConfig(
        decoder=config_of(source, text),
        tower=NO_TOWER,
        compressor=CompressorConfig("none"),
        connector=ConnectorConfig("mlp"),
        chat=ChatConfig(tokenizer=str(source.folder)),
        mode="4x",
        dtype=dtype_of(config),
    )


def _write(kind: str, config: ModelConfig, tokenizer: Path | None, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer of a language model alone."""
    text = text_config(config.decoder)
    if text["model_type"] != kind:
        raise ConvertError(f"decoder: the layout is of a {kind}, the model has a {text['model_type']}")
    name, longest = _CLASSES[kind]
    ids = token_ids(tokenizer, config)
    fields = {"architectures": [name], "max_position_embeddings": longest, **text, "torch_dtype": config.dtype}
    if kind != "qwen3_5_text":
        fields["rope_theta"] = config.decoder.rope_theta  # where transformers 4 looks for it
    write_json(folder / "config.json", fields | ids)
    write_json(folder / "generation_config.json", ids)
    write_tokenizer(tokenizer, config, folder)


def _family(kind: str, name: str, prefix: str = "model.", export: bool = True) -> Family:
    inside = prefix != "model."
    vision = (Dropped(r"model\.visual\..*", "the vision tower of Qwen3.5"),) if inside else ()
    model_type = "qwen3_5" if inside else kind

    def recognise(source: Source) -> bool:
        return settings(source).get("model_type") == model_type and f"{prefix}embed_tokens.weight" in source.tensors

    def write_files(config: ModelConfig, tokenizer: Path | None, folder: Path) -> None:
        _write(kind, config, tokenizer, folder)

    return Family(
        name=name,
        parts=("decoder",),
        recognise=recognise,
        config=_config,
        table=lambda config: decoder_table(config.decoder, prefix, "lm_head.weight"),
        dropped=lambda config: (*text_dropped(config.decoder, "lm_head.weight"), *vision),
        write_files=write_files if export else None,
    )


DECODER_FAMILIES: tuple[Family, ...] = (
    _family("llama", "llama"),
    _family("qwen2", "qwen2"),
    _family("qwen3", "qwen3"),
    _family("qwen3_5_text", "qwen3_5"),
    _family("qwen3_5_text", "qwen3_5_with_vision", "model.language_model.", export=False),
)
