"""Beams, greedy decoding and repetition penalties live against transformers, with an imported MiniCPM-V 4.6."""

from __future__ import annotations

import pytest
from golden_v4 import GOLDEN
from hf46 import torch_inputs

import uhd_jax
from uhd_jax.generation.request import AnswerOptions
from uhd_jax.generation.sampling import Sampling

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

FOLDER = GOLDEN / "v4_full_qwen35_16x"
PROMPTS = ["What is this?", "And a somewhat longer question about what can be seen here?"]


@pytest.fixture(scope="module")
def models():
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(FOLDER, attn_implementation="eager").eval()
    return uhd_jax.load(FOLDER), theirs


def their_answer(theirs, prepared, config, ends, **options):
    inputs = torch_inputs(prepared, config)
    with torch.no_grad():
        ids = theirs.generate(**inputs, do_sample=False, eos_token_id=sorted(ends), pad_token_id=0, **options)
    answer = ids[0, len(prepared.token_ids) :].tolist()
    return answer[: next((place for place, token in enumerate(answer) if token in ends), len(answer))]


@pytest.mark.parametrize(
    ("beams", "length_penalty", "early_stopping", "repetition_penalty"),
    [
        (1, 1.0, False, 1.0),
        (3, 1.0, False, 1.0),
        (5, 1.0, False, 1.0),
        (3, 0.0, True, 1.0),
        (5, 2.0, True, 1.3),
        (3, -1.0, False, 1.0),
        (1, 1.0, False, 1.2),
        (3, 1.0, False, 1.2),
    ],
)
def test_answers_are_those_of_transformers(models, beams, length_penalty, early_stopping, repetition_penalty):
    """Both prompts at once here, one after the other there. Frequent tokens are made ends, so that beams finish."""
    ours, theirs = models
    images = sorted(FOLDER.glob("image_*.png"))
    prepared = [ours.prepare(PROMPTS[0], images), ours.prepare(PROMPTS[1], images[1:])]
    sampling = Sampling(repetition_penalty=repetition_penalty)
    options = AnswerOptions(12, sampling, (), beams, length_penalty, early_stopping)
    asked = {"num_beams": beams, "max_new_tokens": 12, "repetition_penalty": repetition_penalty}
    if beams > 1:
        asked |= {"length_penalty": length_penalty, "early_stopping": early_stopping}
    (plain, _) = ours.answer(prepared, [AnswerOptions(12, sampling, beams=beams)] * 2, ends=frozenset([256]))
    for ends in (frozenset([256]), frozenset([256, *plain.tokens[3:6:2]])):
        requests = ours.answer(prepared, [options] * 2, ends=ends)
        expected = [their_answer(theirs, one, ours.config, ends, **asked) for one in prepared]
        assert [request.tokens for request in requests] == expected
