"""Tokenizers of Llama's kind against SentencePiece, which made the stored ids with the stored model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from uhd_jax.convert.sentencepiece import MODEL_FILE, has_tokenizer, tokenizer_json
from uhd_jax.convert.tables import ConvertError
from uhd_jax.convert.transfer import _copy_tokenizer
from uhd_jax.data.tokenizer import Tokenizer, load_tokenizer

FOLDER = Path(__file__).parent / "golden" / "sentencepiece"
CASES = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tokenizer_json(FOLDER), "stored")


def test_ids_and_texts(tokenizer):
    assert len(CASES) > 50
    for case in CASES:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


def test_marks(tokenizer):
    assert [tokenizer.special(mark) for mark in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert tokenizer.vocab_size == 600


def test_added_tokens(tmp_path):
    shutil.copyfile(FOLDER / MODEL_FILE, tmp_path / MODEL_FILE)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 600}')
    tokenizer = Tokenizer(tokenizer_json(tmp_path), "more")
    assert tokenizer.special("<pad>") == 600 and tokenizer.vocab_size == 601


def test_an_import_brings_a_tokenizer_json(tmp_path):
    (tmp_path / "source").mkdir()
    assert not has_tokenizer(tmp_path / "source") and not _copy_tokenizer(tmp_path / "source", tmp_path / "none")
    shutil.copyfile(FOLDER / MODEL_FILE, tmp_path / "source" / MODEL_FILE)
    assert _copy_tokenizer(tmp_path / "source", tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode(CASES[0]["text"]) == CASES[0]["ids"]
    assert sorted(path.name for path in (tmp_path / "source").iterdir()) == [MODEL_FILE]


def _changed(field: bytes, value: bytes) -> bytes:
    """The model with one more part at its end, of which the last value counts."""
    return (FOLDER / MODEL_FILE).read_bytes() + field + bytes([len(value)]) + value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no model", "no SentencePiece model"),
        (b"", "it holds no pieces"),
        ((FOLDER / MODEL_FILE).read_bytes()[:-3], "it is cut off"),
        (_changed(b"\x12", b"\x18\x01"), "model_type is 1; only Llama's kind"),
        (_changed(b"\x1a", b"\x18\x00"), "add_dummy_prefix is 0"),
        (_changed(b"\x1a", b"\x12\x01x"), "charsmap is b'x'"),
    ],
)
def test_other_files(data, message, tmp_path):
    (tmp_path / MODEL_FILE).write_bytes(data)
    with pytest.raises(ConvertError, match=message):
        tokenizer_json(tmp_path)
