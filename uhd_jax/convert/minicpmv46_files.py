"""The files of an export in MiniCPM-V 4.6's layout, all but the tensors, as transformers 5 and others read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uhd_jax.config import ChatConfig, ModelConfig
from uhd_jax.convert.decoders import text_config
from uhd_jax.convert.files import added_tokens, read_json, write_json, write_tokenizer
from uhd_jax.convert.tables import ConvertError

IMAGE_FILE, VIDEO_FILE, PROCESSOR_FILE = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
TEMPLATE_FILE = "chat_template.jinja"
# Fields of ChatConfig and the names that transformers' processor has for these marks.
CHAT_MARKS = {
    "padding": "pad_token",
    "placeholder": "image_token",
    "video_placeholder": "video_token",
    "image_start": "image_start_token",
    "image_end": "image_end_token",
    "slice_start": "slice_start_token",
    "slice_end": "slice_end_token",
    "image_id_start": "image_id_start_token",
    "image_id_end": "image_id_end_token",
}
_LONGEST = {"qwen3": 40_960, "qwen3_5_text": 262_144}  # tokens, of the released language models


def write_files(config: ModelConfig, tokenizer: Path | None, folder: Path) -> None:
    """Writes config.json, the processors' settings, generation settings, tokenizer and chat template.

    Args:
      config: the model.
      tokenizer: a folder with tokenizer.json, and perhaps tokenizer_config.json and a chat template, which are kept.
      folder: where the files go; it exists.

    Raises:
      ConvertError: the layout has no place for the model, or there is no tokenizer.
    """
    _check(config)
    if tokenizer is None:
        raise ConvertError(
            "an export in MiniCPM-V 4.6's layout needs the model's tokenizer: a folder with tokenizer.json"
        )
    added = added_tokens(read_json(tokenizer / "tokenizer.json"), tokenizer / "tokenizer.json")
    chat = config.chat
    if chat.placeholder not in added:
        raise ConvertError(
            f"{tokenizer / 'tokenizer.json'}: has no token {chat.placeholder!r} (model.chat.placeholder)"
        )
    ends = [added[mark] for mark in (chat.turn_end, chat.padding, *chat.stop) if mark in added]
    write_tokenizer(tokenizer, config, folder)
    write_json(folder / "config.json", _model(config, added))
    write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": added.get(chat.padding)})
    image = _image_processor(config)
    video = _video_processor(config)
    write_json(folder / IMAGE_FILE, image)
    write_json(folder / VIDEO_FILE, video)
    write_json(
        folder / PROCESSOR_FILE,
        {"processor_class": "MiniCPMV4_6Processor", "image_processor": image, "video_processor": video},
    )
    names = {theirs: getattr(chat, ours) for ours, theirs in CHAT_MARKS.items()}
    target = folder / "tokenizer_config.json"
    fields = {"eos_token": chat.turn_end} | read_json(target) | names | {"tokenizer_class": "TokenizersBackend"}
    if chat.template == "chatml":  # what the tokenizer came with is another prompt form
        fields.pop("chat_template", None)
        (folder / TEMPLATE_FILE).write_text(chat_template(chat), encoding="utf-8")
    elif not (folder / TEMPLATE_FILE).exists() and "chat_template" not in fields:
        raise ConvertError(f"{tokenizer}: has no {TEMPLATE_FILE}, which model.chat.template 'jinja' needs")
    write_json(target, fields)


def _check(config: ModelConfig) -> None:
    """The layout has one kind of everything."""
    slicing = config.slicing
    needed = {
        "model.tower.kind": (config.tower.kind, "siglip2"),
        "model.compressor.kind": (config.compressor.kind, "window_attention_reused_mlp"),
        "model.connector.kind": (config.connector.kind, "merging_mlp"),
        "model.connector.norm_eps": (config.connector.norm_eps, 1e-6),
        "model.slicing.rule": (slicing.rule, "v4"),
        "model.slicing.encoding": (slicing.encoding, "slices"),
        "model.slicing.overview": (slicing.overview, True),
        "model.slicing.pre_resize.long_side": (slicing.pre_resize.long_side, 0),
        "model.chat.layout": (config.chat.layout, "v4"),
        "model.chat.bos": (config.chat.bos, ""),
    }
    for key, (found, only) in needed.items():
        if found != only:
            raise ConvertError(f"{key}: {found!r} has no place in MiniCPM-V 4.6's layout, which needs {only!r}")
    if config.chat.template not in ("chatml", "jinja"):
        raise ConvertError(
            f"model.chat.template: {config.chat.template!r} has no place in MiniCPM-V 4.6's layout; train with 'chatml'"
        )


def _model(config: ModelConfig, added: dict[str, int]) -> dict[str, Any]:
    tower, chat = config.tower, config.chat
    text = text_config(config.decoder)
    ids = {"eos_token_id": added.get(chat.turn_end), "pad_token_id": added.get(chat.padding), "bos_token_id": None}
    longest = {"max_position_embeddings": _LONGEST.get(text["model_type"], 32_768)}
    text = longest | text | ids | {"dtype": config.dtype}
    vision = {
        "model_type": "minicpmv4_6_vision",
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "num_channels": 3,
        "image_size": tower.table_side * tower.patch_size,
        "patch_size": tower.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": tower.norm_eps,
        "attention_dropout": 0.0,
        "insert_layer_id": config.compressor.after_layer,
        "window_kernel_size": [2, 2],
        "dtype": config.dtype,
    }
    return {
        "architectures": ["MiniCPMV4_6ForConditionalGeneration"],
        "model_type": "minicpmv4_6",
        "dtype": config.dtype,
        "image_token_id": added[chat.placeholder],
        "video_token_id": added.get(chat.video_placeholder),
        "eos_token_id": added.get(chat.turn_end),
        "insert_layer_id": config.compressor.after_layer,
        "downsample_mode": config.mode,
        "merge_kernel_size": [2, 2],
        "merger_times": config.connector.rounds,
        "image_size": config.slicing.scale_resolution,
        "drop_vision_last_layer": False,
        "tie_word_embeddings": config.decoder.tied_head,
        "text_config": text,
        "vision_config": vision,
    }


def _image_processor(config: ModelConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "MiniCPMV4_6ImageProcessor",
        "processor_class": "MiniCPMV4_6Processor",
        **_pixels(config),
        "max_slice_nums": config.slicing.max_slices,
    }


def _video_processor(config: ModelConfig) -> dict[str, Any]:
    return {
        "video_processor_type": "MiniCPMV4_6VideoProcessor",
        "processor_class": "MiniCPMV4_6Processor",
        **_pixels(config),
        "do_sample_frames": True,
        "max_num_frames": config.video.max_frames,
        "stack_frames": config.video.stack_frames,
        "max_slice_nums": config.video.max_slices,
    }


def _pixels(config: ModelConfig) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.tower.pixel_mean),
        "image_std": list(config.tower.pixel_std),
        "patch_size": config.tower.patch_size,
        "scale_resolution": config.slicing.scale_resolution,
        "slice_mode": True,
        "use_image_id": config.chat.use_image_id,
        "downsample_mode": config.mode,
    }


def chat_template(chat: ChatConfig) -> str:
    """The prompt form "chatml" of `data.chat` as a Jinja template: the same ids, also for `enable_thinking`."""
    image, video, start, end = (
        json.dumps(mark) for mark in (chat.placeholder, chat.video_placeholder, chat.turn_start, chat.turn_end)
    )
    order = "content"
    if chat.images_first:
        parts = (f"content | {which}attr('type', 'equalto', 'text') | list" for which in ("reject", "select"))
        order = " + ".join(parts)
    thinks = "false" if chat.empty_think else "true"
    opening = '"<think>\\n"' if chat.open_think else '""'
    system = json.dumps(chat.system)
    return f"""\
{{%- macro say(content) -%}}
{{%- if content is string -%}}{{{{- content | trim -}}}}
{{%- else -%}}
{{%- set done = namespace(any=false) -%}}
{{%- for part in {order} -%}}
{{%- if part.type == "image" -%}}{{%- set said = {image} -%}}
{{%- elif part.type == "video" -%}}{{%- set said = {video} -%}}
{{%- else -%}}{{%- set said = part.text | trim -%}}{{%- endif -%}}
{{%- if said -%}}{{{{- ("\\n" if done.any else "") ~ said -}}}}{{%- set done.any = true -%}}{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{%- endmacro -%}}
{{%- set empty_think = "<think>\\n\\n</think>\\n\\n" -%}}
{{%- set thinks = enable_thinking if enable_thinking is defined else {thinks} -%}}
{{%- set turns = messages -%}}
{{%- if {system} and messages[0].role != "system" -%}}
{{%- set turns = [{{"role": "system", "content": {system}}}] + messages -%}}
{{%- endif -%}}
{{%- set answers = turns | selectattr("role", "equalto", "assistant") | list -%}}
{{%- set seen = namespace(answers=0) -%}}
{{%- for message in turns -%}}
{{{{- ("" if loop.first else "\\n") ~ {start} ~ message.role ~ "\\n" -}}}}
{{%- if message.role == "assistant" -%}}
{{%- set seen.answers = seen.answers + 1 -%}}
{{%- if seen.answers == answers | length and not add_generation_prompt and not thinks -%}}
{{{{- empty_think -}}}}
{{%- endif -%}}
{{%- endif -%}}
{{{{- say(message.content) ~ {end} -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- "\\n" ~ {start} ~ "assistant\\n" ~ ({opening} if thinks else empty_think) -}}}}
{{%- endif -%}}
"""
