"""The tokenizer: bytes as ids, marks that text cannot fake, streaming without half characters."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from uhd_jax.config import ChatConfig
from uhd_jax.data.tokenizer import StreamDecoder, Tokenizer, TokenizerError, byte_tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "v4_full_qwen3_16x"
TEXT = "Größe 7 µm, 漢字 🙂\n\ttab  two\r\n"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_bytes_are_their_own_ids(tokenizer):
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size < 288


def test_marks_follow_the_bytes_and_never_move(tokenizer):
    chat = ChatConfig()
    marks = [chat.padding, chat.turn_start, chat.turn_end, chat.placeholder, chat.image_start, chat.image_end]
    assert [tokenizer.special(mark) for mark in marks] == list(range(256, 262))
    assert [tokenizer.special(mark) for mark in ("<image_id>", "<think>", "</think>")] == [264, 266, 267]


@pytest.mark.parametrize("source", ["bytes", GOLDEN])
def test_marks_in_text_stay_text(source):
    tokenizer = load_tokenizer(source)
    chat = ChatConfig()
    marks = [chat.placeholder, chat.image_start, chat.slice_end, chat.turn_end, chat.padding, "<think>", "</think>"]
    text = "a " + "".join(marks) + " b"
    ids = tokenizer.encode(text)
    assert not {tokenizer.special(mark) for mark in marks} & set(ids)
    assert tokenizer.decode(ids) == text


def test_think_tags_are_neutralised_though_not_flagged_special_and_stay_visible(tokenizer):
    flags = {t["content"]: t["special"] for t in json.loads(tokenizer._definition)["added_tokens"]}
    assert not flags["<think>"] and flags["<image>"]
    ids = [tokenizer.special("<think>"), *tokenizer.encode("x"), tokenizer.special("<|im_end|>")]
    assert tokenizer.decode(ids) == "<think>x"
    assert tokenizer.decode(ids, skip_special=False) == "<think>x<|im_end|>"


def test_added_words_that_are_no_marks_keep_their_ids(tokenizer):
    definition = json.loads(tokenizer._definition)
    definition["added_tokens"].append(definition["added_tokens"][-1] | {"id": 268, "content": "    "})
    assert Tokenizer(json.dumps(definition), "blanks").encode("a    b") == [97, 268, 98]


def test_a_vocabulary_that_reads_marks_from_text_is_refused(tokenizer):
    definition = json.loads(tokenizer._definition)
    pairs = ["<", "i", "m", "a", "g", "e", ">"]
    whole = pairs[0]
    for piece in pairs[1:]:
        definition["model"]["merges"].append([whole, piece])
        whole += piece
        definition["model"]["vocab"].setdefault(whole, 260 if whole == "<image>" else 300 + len(whole))
    with pytest.raises(TokenizerError, match="'<image>' encodes to a mark"):
        Tokenizer(json.dumps(definition), "trap")


def test_missing_mark_names_tokenizer_and_mark(tokenizer):
    with pytest.raises(TokenizerError, match=r"bytes.*'<video>'"):
        tokenizer.special("<video>")


def test_save_load_and_pickle_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for other in (
        load_tokenizer(tmp_path),
        load_tokenizer(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert other.encode("<image>" + TEXT) == tokenizer.encode("<image>" + TEXT)
        assert other.vocab_size == tokenizer.vocab_size
        assert other.special("<think>") == tokenizer.special("<think>")


@pytest.mark.parametrize("content", [None, "", "{}", "not json"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        load_tokenizer(path)


@pytest.mark.parametrize("source", ["bytes", GOLDEN])
def test_streaming_never_splits_a_character_and_loses_nothing(source):
    tokenizer = load_tokenizer(source)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(TEXT)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == TEXT and decoder.flush() == ""


def test_streaming_of_garbage_equals_decoding_it_whole(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice([0x41, 0xC3, 0xA4, 0xE2, 0x82, 0xAC, 0xF0, 0xFF, 257, 266], size=12).tolist()
        decoder = StreamDecoder(tokenizer)
        text = "".join(decoder.push(token) for token in ids) + decoder.flush()
        assert text == tokenizer.decode(ids)


def test_words_are_single_ids_but_no_marks():
    tokenizer = byte_tokenizer(ChatConfig(words=("user\n", "How many ")))
    assert tokenizer.vocab_size == byte_tokenizer().vocab_size + 2
    assert len(tokenizer.encode("How many users?")) == 1 + len("users?")
    assert tokenizer.decode(tokenizer.encode("user\nHow many 7s?")) == "user\nHow many 7s?"
    with pytest.raises(TokenizerError, match="no special token 'user"):
        tokenizer.special("user\n")
