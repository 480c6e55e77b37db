"""The JSON files beside the tensors of an exported checkpoint, as far as several families share them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uhd_jax.config import ModelConfig


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of them that we have written ourselves."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes one of the JSON files of a checkpoint."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def token_ids(tokenizer: Path | None, config: ModelConfig) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` as far as the tokenizer in a folder has them."""
    if tokenizer is None:
        return {}
    content = read_json(tokenizer / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    marks = {"bos": config.chat.bos, "eos": config.chat.turn_end, "pad": config.chat.padding}
    return {f"{name}_token_id": ids[mark] for name, mark in marks.items() if mark in ids}


def write_tokenizer(tokenizer: Path | None, config: ModelConfig, folder: Path) -> None:
    """Copies the tokenizer's files; with a tokenizer_config.json, made where there is none, transformers loads it."""
    if tokenizer is None:
        return
    for file in sorted(tokenizer.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    target = folder / "tokenizer_config.json"
    if not target.exists():
        chat = config.chat
        marks = {"bos_token": chat.bos, "eos_token": chat.turn_end, "pad_token": chat.padding}
        fields = {name: mark for name, mark in marks.items() if mark}
        write_json(target, {"tokenizer_class": "PreTrainedTokenizerFast", **fields})
