"""The tokenizer of Llama and Vicuna, as a `tokenizer.json`.

Their checkpoints hold a `tokenizer.model` of SentencePiece, a protocol buffer of pieces with scores. Joining two
neighbours is tried in the order of the joined piece's score, the best first; that is byte-pair encoding with the splits
of every piece as its merges. Characters without a piece become bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uhd_jax.convert.tables import ConvertError

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"  # stands for a blank inside pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces; 6 is a byte
BPE = 2


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint's folder holds a tokenizer.json, or what `tokenizer_json` makes one of."""
    return any((folder / name).is_file() for name in ("tokenizer.json", MODEL_FILE))


def tokenizer_json(folder: Path) -> str:
    """The text of a tokenizer.json that does what a checkpoint's tokenizer.model and added_tokens.json do.

    Raises:
      ConvertError: the file is no SentencePiece model, or of a kind that no Llama has.
    """
    path = folder / MODEL_FILE
    try:
        pieces, model = _parse(path.read_bytes())
    except (IndexError, KeyError, UnicodeDecodeError, ValueError) as error:
        raise ConvertError(f"{path}: no SentencePiece model ({type(error).__name__}: {error})") from None
    wanted = {
        "model_type": BPE,
        "byte_fallback": 1,
        "charsmap": b"",
        "add_dummy_prefix": 1,
        "remove_extra_whitespaces": 0,
    }
    for key, value in wanted.items():
        if model[key] != value:
            raise ConvertError(f"{path}: {key} is {model[key]!r}; only Llama's kind is known, where it is {value!r}")
    vocab = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    added = [
        _mark(number, piece, kind != USER_DEFINED)
        for number, (piece, _, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    unknown = next((piece for piece, _, kind in pieces if kind == UNKNOWN), None)
    if (folder / "added_tokens.json").is_file():
        more = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        added += [_mark(number, text, True) for text, number in sorted(more.items(), key=lambda item: item[1])]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, _replace(" ", SPACE)],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace(SPACE, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": _merges(pieces),
        },
    }
    return json.dumps(definition, ensure_ascii=False)


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    normal = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    merges = []
    for piece, _ in sorted(normal.items(), key=lambda item: -item[1]):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [[left, right] for left, right in splits if left in normal and right in normal]
    return merges


def _mark(number: int, text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": special, **flags}


def _replace(text: str, other: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": other}


def _parse(data: bytes) -> tuple[list[tuple[str, float, int]], dict[str, Any]]:
    """Pieces (text, score, type), and what is said of training and normalising."""
    pieces = []
    model: dict[str, Any] = {"model_type": 1, "byte_fallback": 0}
    model |= {"charsmap": b"", "add_dummy_prefix": 1, "remove_extra_whitespaces": 1}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        elif number in (2, 3):
            names = {3: "model_type", 35: "byte_fallback"} if number == 2 else {}
            if number == 3:
                names = {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces"}
            model |= {names[key]: inner for key, inner in _fields(value) if key in names}
    if not pieces:
        raise ValueError("it holds no pieces")
    return pieces, model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protocol buffer: number, and an int or the bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        size = {1: lambda: 8, 2: varint, 5: lambda: 4}[kind]()
        if place + size > len(data):
            raise ValueError("it is cut off")
        yield tag >> 3, data[place : place + size]
        place += size
