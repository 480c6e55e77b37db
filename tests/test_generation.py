"""Sampling, batches of unlike prompts, streaming, limits: the object a user holds, on a tiny random model."""

from __future__ import annotations

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_assistant import CONFIG, SMALL, WIDE, make_assistant

import uhd_jax
from uhd_jax.checkpoint import CheckpointError, save_model
from uhd_jax.config import ChatConfig
from uhd_jax.generation import decode
from uhd_jax.generation.assistant import Assistant, PromptError
from uhd_jax.generation.sampling import Sampling, choose, empty_draws, penalised, set_draws
from uhd_jax.generation.shapes import room
from uhd_jax.slicing.plan import ImageRefused


@pytest.fixture(scope="module")
def model():
    return make_assistant()


PROMPTS = ["Hello", "A much longer question about the picture before it?", "And two?"]
IMAGES = [[], [WIDE], [SMALL, WIDE]]


def test_a_batch_answers_as_each_prompt_alone(model):
    together = model.generate(PROMPTS, IMAGES, max_new_tokens=10)
    alone = [model.generate(p, images, max_new_tokens=10) for p, images in zip(PROMPTS, IMAGES, strict=True)]
    assert together == alone
    assert len(set(alone)) == 3


def test_streamed_pieces_make_the_answer(model):
    pieces = []
    answer = model.generate(PROMPTS[1], IMAGES[1], max_new_tokens=12, stream=pieces.append)
    assert "".join(pieces) == answer and len(pieces) > 1


def test_sampling_is_reproducible_and_differs_by_seed(model):
    def sample(seed, **options):
        return model.generate(PROMPTS[0], max_new_tokens=12, temperature=1.5, seed=seed, **options)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    greedy = model.generate(PROMPTS[0], max_new_tokens=12)
    assert sample(1, top_k=1) == sample(2, top_k=1) == greedy
    assert sample(1, top_p=1e-6) == greedy


def choose_tokens(logits, samplings, step, seen=()):
    draws = empty_draws(len(logits))
    for row, sampling in enumerate(samplings):
        set_draws(draws, row, sampling, step, logits.shape[1])
    there = np.zeros(logits.shape, bool)
    there[:, list(seen)] = True
    return np.asarray(jax.jit(choose)(logits, draws, there))


def test_frequencies_of_sampled_tokens():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.tile(jnp.log(probabilities), (20_000, 1))

    def frequencies(**options):
        samplings = [Sampling(**options, stream=row) for row in range(20_000)]
        return np.bincount(choose_tokens(logits, samplings, 0), minlength=4) / 20_000

    np.testing.assert_allclose(frequencies(temperature=1.0), probabilities, atol=0.02)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.02)
    # 0.5 alone does not reach 0.6, so the second stays; the third begins at 0.8
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0], atol=0.02)
    squared = probabilities**2 / (probabilities**2).sum()
    np.testing.assert_allclose(frequencies(temperature=0.5), squared, atol=0.02)
    np.testing.assert_array_equal(frequencies(), [1, 0, 0, 0])


def test_a_rows_sample_does_not_depend_on_the_other_rows():
    logits = jax.random.normal(jax.random.key(0), (5, 50))
    samplings = [
        Sampling(temperature=1.0, seed=7),
        Sampling(),
        Sampling(temperature=2.0, seed=7, stream=1),
        Sampling(temperature=0.5, top_k=3, seed=2),
        Sampling(temperature=1.0, top_p=0.3, seed=2**32 - 1),
    ]
    together = choose_tokens(logits, samplings, 3)
    alone = [choose_tokens(logits[row : row + 1], [sampling], 3)[0] for row, sampling in enumerate(samplings)]
    np.testing.assert_array_equal(together, alone)
    assert together[1] == logits[1].argmax()
    # As drawn before each row had options of its own: by seed, step and row.
    keys = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 3), 0)
    assert together[0] == jax.random.categorical(keys, logits[0])


@pytest.mark.parametrize("penalty", [1.2, 3.0, 0.7])
def test_a_repetition_penalty_is_that_of_transformers(penalty):
    """Rows with another penalty, and none, stand beside it; the penalty comes before the temperature and top_k."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    scores = np.array(jax.random.normal(jax.random.key(1), (3, 40)))
    ids = np.array([[0, 5, 5, 39], [1, 2, 3, 4], [7, 7, 7, 7]])
    seen = np.zeros(scores.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    found = np.asarray(jax.jit(penalised)(scores, seen, np.array([penalty, 1.0, 1.5], np.float32)))
    for row, value in enumerate((penalty, 1.0, 1.5)):
        theirs = transformers.RepetitionPenaltyLogitsProcessor(value)
        of_row = slice(row, row + 1)
        expected = theirs(torch.tensor(ids[of_row]), torch.tensor(scores[of_row]))[0].numpy()
        np.testing.assert_array_max_ulp(found[row], expected, maxulp=1)  # XLA may multiply by the inverse

    logits = jnp.log(jnp.array([[0.6, 0.4, 1e-6]]))  # the likeliest is there already: 0.6 ** 3 = 0.216
    options = {"repetition_penalty": 3.0, "seed": 1}
    sampled = [Sampling(temperature=t, top_k=1, **options) for t in (0.0, 1.0, 5.0)]
    assert choose_tokens(jnp.tile(logits, (3, 1)), sampled, 0, seen=[0]).tolist() == [1, 1, 1]
    assert choose_tokens(logits, [Sampling(**options)], 0).tolist() == [0]


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1.0, NAN, INFINITE, "warm", None)),
        *(("top_k", value) for value in (-1, 2.0)),
        *(("top_p", value) for value in (0.0, 1.5, NAN)),
        *(("seed", value) for value in (-1, 2**32, 1.0)),
        *(("repetition_penalty", value) for value in (0, -1.2, NAN, INFINITE, "some")),
    ],
)
def test_impossible_sampling(model, name, value):
    with pytest.raises(ValueError, match=f"{name}={re.escape(repr(value))}: must be a"):
        model.generate("Hello", **{name: value})


@pytest.mark.filterwarnings("error")
def test_sampling_at_the_ends_of_its_ranges(model):
    def sample(**options):
        return model.generate("Hello", max_new_tokens=4, **{"temperature": 1.5, "seed": 2**32 - 1} | options)

    assert sample(top_k=2**40) == sample()
    assert sample(top_p=1e-320) == model.generate("Hello", max_new_tokens=4)  # 0 in float32
    assert isinstance(sample(temperature=1e300), str)
    assert isinstance(sample(repetition_penalty=1e-300), str)


def test_marks_in_a_prompt_are_text(model):
    prepared = model.prepare("Where is <image> and <|image_pad|>?", [SMALL])
    placeholder = model.tokenizer.special("<|image_pad|>")
    assert (prepared.token_ids == placeholder).sum() == prepared.plans[0].visual_tokens
    assert model.tokenizer.decode(prepared.token_ids).count("<|image_pad|>") == 1


def test_prompts_that_cannot_be_answered(model, tmp_path):
    with pytest.raises(PromptError, match="prompt has 5.. tokens .0 of them visual., more than max_length=400"):
        model.prepare("x" * 500)
    with pytest.raises(PromptError, match="max_new_tokens=390 exceed max_length=400"):
        model.generate("Hello", max_new_tokens=390)
    with pytest.raises(PromptError, match="2 prompts, but 1 lists of images"):
        model.generate(["a", "b"], [[SMALL]])
    with pytest.raises(PromptError, match="single prompt"):
        model.generate(["a"], stream=print)
    with pytest.raises(ImageRefused, match="nothing.png"):
        model.generate("Hello", [tmp_path / "nothing.png"])
    for one in (WIDE, "wide.png", Image.fromarray(WIDE)):
        with pytest.raises(PromptError, match="for one image write images="):
            model.generate("Hello", one)
    assert model.generate([]) == []


@pytest.mark.parametrize("prompt", [b"Hello", None, 3, {"Hello": 1}], ids=str)
def test_what_is_no_prompt(model, prompt):
    with pytest.raises(PromptError, match=f"must be text .str., not {type(prompt).__name__}"):
        model.prepare(prompt)
    with pytest.raises(PromptError, match=f"text .str. or a list of texts, not {type(prompt).__name__}"):
        model.generate(prompt)


def test_a_prompt_with_bytes_that_are_not_utf8(model):
    prompt = os.fsdecode(b"What?\xff")
    with pytest.raises(PromptError, match=r"character 5 is the lone surrogate '\\udcff'; give the prompt in UTF-8"):
        model.generate(prompt)


@pytest.mark.parametrize("count", [0, -1, 2.5, "3"])
def test_an_impossible_length_of_answers(model, count):
    with pytest.raises(PromptError, match="max_new_tokens=.*at least 1"):
        model.generate("Hello", max_new_tokens=count)


@pytest.mark.parametrize("images", [[SMALL, SMALL], ["a.png", "b.png"], [[SMALL], SMALL], SMALL, "ab"])
def test_images_of_a_batch_that_are_not_one_list_per_prompt(model, images):
    with pytest.raises(PromptError, match="a list of images for each: images="):
        model.generate(["Hello", "you"], images)


@pytest.mark.parametrize(
    ("prompt", "images", "kind", "part"),
    [
        (b"Hello", [], PromptError, "must be text"),
        ("x" * 500, [], PromptError, "max_length=400"),
        ("x" * 330, [], PromptError, "max_new_tokens=80"),
        ("Hello", ["missing.png"], ImageRefused, "missing.png"),
        ("Hello", [3], TypeError, "not int"),
    ],
)
def test_the_errors_of_a_batch_name_the_prompt(model, prompt, images, kind, part):
    with pytest.raises(kind, match=rf"prompt\[1\]: .*{part}"):
        model.generate(["Hello", prompt], [[], images], max_new_tokens=80)


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        ([], "but is empty"),
        ([1.5], r"but is float64\[1\]"),
        ([[1, 2]], r"but is int64\[1, 2\]"),
        ("Hello", "but is <U5"),
        ([1, 272], r"token_ids\[1\] is 272, but the model's ids go from 0 to 271"),
        ([-1], r"token_ids\[0\] is -1"),
        ([2**40], "is 1099511627776"),
    ],
)
def test_logits_of_what_are_no_ids(model, ids, part):
    with pytest.raises(PromptError, match=part):
        model.logits(ids)


def test_slice_limit_and_mode_of_a_request(model):
    full, thumbnail = model.prepare("?", [WIDE]), model.prepare("?", [WIDE], max_slices=1)
    assert len(full.views) > 1 == len(thumbnail.views)
    np.testing.assert_array_equal(full.views[0], thumbnail.views[0])
    assert len(model.prepare("?", [WIDE], mode="4x").token_ids) > len(full.token_ids)
    assert isinstance(model.generate("?", [SMALL], mode="4x", max_new_tokens=3), str)


@pytest.mark.parametrize("layout", ["v4", "A"])
def test_logits_continue_to_the_greedy_answer(model, layout):
    config = dataclasses.replace(CONFIG, chat=ChatConfig(layout=layout))
    model = Assistant(config, model.params, model.tokenizer, model.max_length)
    ids = model.prepare(PROMPTS[1], IMAGES[1]).token_ids
    for _ in range(4):
        ids = np.append(ids, model.logits(ids, IMAGES[1])[-1].argmax())
    greedy = model.generate(PROMPTS[1], IMAGES[1], max_new_tokens=4)
    assert model.tokenizer.decode(ids[-4:]) == greedy


def test_similar_prompts_share_programs(model):
    before = decode.prefill._cache_size()
    for text in ("abcdefgh", "ijklmnopq", "rstuv"):
        model.generate(text, [SMALL], max_new_tokens=3)
    assert decode.prefill._cache_size() - before <= 1


def test_rooms_are_few_and_near():
    rooms = {room(n) for n in range(1, 5000)}
    assert len(rooms) < 100
    assert all(n <= room(n) <= n * 1.125 + 1 for n in range(1, 5000))
    assert room(0) == 0 and room(3, 16) == 16


def test_a_saved_model_answers_as_before(model, tmp_path):
    Image.fromarray(WIDE).save(tmp_path / "wide.png")
    save_model(tmp_path / "model", model.params, CONFIG)
    (tmp_path / "model" / "tokenizer").mkdir()
    model.tokenizer.save(tmp_path / "model" / "tokenizer")
    loaded = uhd_jax.load(tmp_path / "model")
    question = "What is it?"
    assert loaded.config == CONFIG
    assert loaded.generate(question, [tmp_path / "wide.png"], max_new_tokens=8) == model.generate(
        question, [WIDE], max_new_tokens=8
    )


def test_a_tokenizer_too_large_for_the_decoder(model):
    small = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, vocab_size=100))
    with pytest.raises(ValueError, match="268 ids, the decoder only 100"):
        Assistant(small, model.params, model.tokenizer)


def test_loading_from_what_is_no_folder(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"")
    for path, problem in ((file, "is a file"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(CheckpointError, match=f"{path.name} {problem}; give the folder"):
            uhd_jax.load(path)
