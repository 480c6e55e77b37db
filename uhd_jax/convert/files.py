"""The JSON files beside the tensors of an exported checkpoint, as far as several families share them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uhd_jax.config import ModelConfig
from uhd_jax.convert.tables import ConvertError


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of them that we have written ourselves."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes one of the JSON files of a checkpoint."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def added_tokens(content: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Texts and ids of the marks in a tokenizer.json.

    Raises:
      ConvertError: they are not listed as tokenizers lists them.
    """
    try:
        return {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (KeyError, TypeError):
        raise ConvertError(f"{path}: added_tokens is not a list of objects with content and id") from None


def token_ids(tokenizer: Path | None, config: ModelConfig) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` as far as the tokenizer in a folder has them."""
    if tokenizer is None:
        return {}
    path = tokenizer / "tokenizer.json"
    ids = added_tokens(read_json(path), path)
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
