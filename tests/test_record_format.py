"""Records of `uhd-jax data pack`: what goes in comes out, and damage is named."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from uhd_jax.data.chat import ImagePart, Message, VideoPart
from uhd_jax.data.record_format import PackedSample, RecordError, decode, encode

QUESTION = Message("user", ("Look: ", ImagePart(0), "\u00e9\U0001f642\n", VideoPart(1, 2), ""))
SAMPLE = PackedSample(
    (Message("system", ("Be brief.",)), QUESTION, Message("assistant", ())), (b"one", b"", b"three"), "train.jsonl:17"
)


def changed(**changes):
    header = json.loads(encode(SAMPLE)[8 : 8 + struct.unpack_from("<I", encode(SAMPLE), 4)[0]])
    text = json.dumps(header | changes).encode()
    return b"UHD1" + struct.pack("<I", len(text)) + text + b"".join(SAMPLE.images)


def test_what_goes_in_comes_out():
    assert decode(encode(SAMPLE)) == SAMPLE
    assert decode(memoryview(encode(SAMPLE))) == SAMPLE
    text_only = PackedSample((Message("user", ("a",)), Message("assistant", ("b",))), (), "")
    assert decode(encode(text_only)) == text_only


def test_the_images_stand_there_as_they_were():
    assert encode(SAMPLE).endswith(b"onethree")


def test_a_place_that_is_not_unicode_does_not_lose_the_sample():
    odd = SAMPLE._replace(where="odd\udcff.jpg")
    assert decode(encode(odd)) == SAMPLE._replace(where="odd\\udcff.jpg")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (SAMPLE._replace(images=(b"one",)), r"show the images \[0, 1, 2\], but there are 1"),
        (SAMPLE._replace(messages=(Message("user", (ImagePart(1), ImagePart(0))),), images=(b"", b"")), r"\[1, 0\]"),
        (PackedSample((Message("user", ("\ud83d",)),), (), ""), "surrogate"),
    ],
)
def test_samples_that_cannot_be_records(sample, message):
    with pytest.raises(RecordError, match=message):
        encode(sample)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"UHD", "too short"),
        (b"JPEG1234", "not written by"),
        (encode(SAMPLE)[:50], "cut off inside its header"),
        (encode(SAMPLE)[:-1], "8 bytes announced, 7 bytes there"),
        (encode(SAMPLE) + b"x", "8 bytes announced, 9 bytes there"),
        (b"UHD1\x02\x00\x00\x00[]", "not an object"),
        (b"UHD1" + struct.pack("<I", 10**5) + b"[" * 10**5, "damaged header"),
        (changed(images=[3, -3, 8]), "images: expected lengths"),
        (changed(images=[3, 5]), "2 files, but the messages show 3"),
        (changed(where=1), "where: expected str, got int"),
        (changed(where="\ud83d"), "where: holds half"),
        (changed(messages={}), "messages: expected list"),
        (changed(messages=["a"]), r"messages\[0\]: expected an object"),
        (changed(messages=[{"role": "tool", "content": []}]), r"messages\[0\].role: 'tool'"),
        (changed(messages=[{"role": "user"}]), r"messages\[0\].content: missing"),
        (changed(messages=[{"role": "user", "content": [1]}]), r"content\[0\]: expected an object"),
        (changed(messages=[{"role": "user", "content": [{"type": "audio"}]}]), "'audio' is not one of"),
        (changed(messages=[{"role": "user", "content": [{"type": "video", "pictures": 10**9}]}]), "pictures: 10"),
        (changed(messages=[{"role": "user", "content": [{"type": "video", "pictures": True}]}]), "got bool"),
    ],
)
def test_damage_is_named(record, message):
    with pytest.raises(RecordError, match=message):
        decode(record)


def test_fuzzed_records_are_refused_or_read_and_nothing_else():
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(1000):
        record = bytearray(encode(SAMPLE))
        for _ in range(random.integers(1, 4)):
            record[random.integers(len(record))] = random.integers(256)
        try:
            decode(bytes(record[: random.integers(len(record) // 2, len(record) * 3)]))
        except RecordError:
            refused += 1
    assert refused > 500
