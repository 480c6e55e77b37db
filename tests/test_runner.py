"""The running batch: requests that join and leave, each with options of its own, in few programs, also over a mesh."""

from __future__ import annotations

import collections
import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from tiny_assistant import CONFIG, HYBRID, SMALL, WIDE, make_assistant

from uhd_jax.config import MeshConfig
from uhd_jax.generation import decode
from uhd_jax.generation.prompt import PromptError
from uhd_jax.generation.request import AnswerOptions, Request
from uhd_jax.generation.runner import Runner, _no_prompts
from uhd_jax.generation.sampling import Sampling, empty_draws
from uhd_jax.generation.shapes import Shapes, fit, patch_rooms, serving_shapes, shapes_for
from uhd_jax.generation.visual import Picture, VisualCache, VisualEncoder, chunks
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import param_shardings
from uhd_jax.slicing.plan import Size, plan_image

pytestmark = pytest.mark.usefixtures("unoptimised")

SHAPES = Shapes(rows=3, prefill_rows=1, lengths=(64, 200), views=(1, 4), patches=(128,))
ASKED = [
    ("Hello", [], AnswerOptions(9)),
    ("A longer question about it?", [WIDE], AnswerOptions(12)),
    ("And two?", [SMALL, WIDE], AnswerOptions(7, Sampling(1.5, seed=4))),
    ("Hello", [], AnswerOptions(9, Sampling(1.5, seed=5, top_p=0.9))),
    ("Beams?", [SMALL], AnswerOptions(8, beams=3)),
    ("Hello", [], AnswerOptions(1)),
    ("Short", [], AnswerOptions(11, Sampling(0.8, top_k=5, seed=2**32 - 1))),
    ("A longer question about it?", [WIDE], AnswerOptions(12, Sampling(repetition_penalty=1.7))),
    ("Beams?", [SMALL], AnswerOptions(8, Sampling(repetition_penalty=3.0), beams=3)),
]


@pytest.fixture(scope="module", params=[CONFIG, HYBRID], ids=["qwen3", "qwen3.5"])
def model(request):
    return make_assistant(request.param)


def make_requests(model, asked=ASKED, ends=frozenset(), **callbacks):
    made = []
    for prompt, images, options in asked:
        prepared = model.prepare(prompt, images)
        made.append(Request(prepared.sample, prepared.pictures, options, model.tokenizer, ends, **callbacks))
    return made


def make_runner(model, shapes=SHAPES, mesh=None, params=None):
    params = model.params if params is None else params
    encoder = VisualEncoder(model.config, params, VisualCache(), mesh)
    return Runner(model.config, params, encoder, shapes, mesh)


@contextlib.contextmanager
def compilations():
    """Yields a list that grows by every program that is compiled."""
    found = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_requests_that_join_and_leave_answer_as_alone_and_compile_nothing(model):
    runner = make_runner(model)
    with compilations() as compiled:
        runner.warm_up(["16x"])
        assert 2 <= len(compiled) <= 12
        compiled.clear()
        together = make_requests(model)
        runner.run(together)
        alone = make_requests(model)
        for request in alone:
            runner.run([request])
        assert compiled == []
    assert [request.tokens for request in together] == [request.tokens for request in alone]
    assert [len(request.tokens) for request in together] == [9, 12, 7, 9, 8, 1, 11, 12, 8]
    assert len({tuple(request.tokens) for request in together}) == 9
    assert together[5].tokens == together[0].tokens[:1]  # the same question, as differently as they are batched
    assert {request.reason for request in together} == {"length"} and runner.free_rows == 3


def test_greedy_answers_follow_the_logits(model):
    request = make_requests(model, ASKED[1:2])[0]
    make_runner(model).run([request])
    ids = np.concatenate([request.sample.tokens, request.tokens[:4]])
    likeliest = model.logits(ids, [WIDE]).argmax(axis=-1)
    assert request.tokens[:5] == likeliest[request.length - 1 :].tolist()


def test_beams_beat_greedy_answers(model):
    """The sum of log probabilities over the length, computed apart from the search."""

    def score(request):
        ids = np.concatenate([request.sample.tokens, request.tokens])
        likely = jax.nn.log_softmax(model.logits(ids)[request.length - 1 : -1])
        return likely[np.arange(len(request.tokens)), np.array(request.tokens)].mean()

    asked = [(text, [], AnswerOptions(6, beams=beams)) for text in ("Beams?", "Chairs", "Tables") for beams in (1, 3)]
    requests = make_requests(model, asked)
    make_runner(model).run(requests)
    placeholder = model.tokenizer.special("<|image_pad|>")
    pairs = [pair for pair in zip(requests[::2], requests[1::2], strict=True)
             if placeholder not in pair[0].tokens + pair[1].tokens]  # fmt: skip
    gains = [score(beams) - score(greedy) for greedy, beams in pairs]
    assert len(gains) > 1 and min(gains) > -1e-4
    if model.config == CONFIG:  # of the other one the greedy answers are the best already
        assert max(gains) > 1e-3


def test_matrices_in_the_dtype_of_the_computation_change_nothing(model):
    config = dataclasses.replace(model.config, dtype="bfloat16")
    cast = decode.as_computed(model.params, config)
    kinds = collections.Counter(str(leaf.dtype) for leaf in jax.tree.leaves(cast["decoder"]))
    assert kinds["bfloat16"] > 8 and kinds["float32"] > 3  # norms, decays
    prompts, draws = _no_prompts(SHAPES, 64, config.decoder.width, config.dtype), empty_draws(1)
    prompts.tokens[0], prompts.lengths[0], prompts.rows[0] = np.arange(64) % 60, 50, 0
    step = decode.Step(np.full(3, -1, np.int32), np.array([50, 0, 0], np.int32), np.arange(3, dtype=np.int32))
    told = []
    for params in (model.params, cast):
        state, first = decode.prefill(params, decode.start(config, 3, 200), prompts, draws, config)
        _, second = decode.decode(params, state, step, empty_draws(3), config, 64, True)
        told.append([np.asarray(array)[0] for array in (*first, *second)])
    jax.tree.map(np.testing.assert_array_equal, *told)
    assert decode.as_computed(model.params, model.config) is model.params


def test_over_a_mesh_the_answers_are_the_same(model):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.device_put(model.params, param_shardings(model.params, mesh))
    runner = make_runner(model, Shapes(8, 4, (64, 200), (4,), (128,)), mesh, params)
    together, alone = make_requests(model), make_requests(model)
    runner.run(together)
    make_runner(model).run(alone)
    assert [request.tokens for request in together] == [request.tokens for request in alone]
    keys = runner._state.cache["key"]
    assert len({shard.device for shard in keys.addressable_shards}) == 8
    assert keys.addressable_shards[0].data.size * 8 == keys.size


def test_the_tower_runs_once_per_image():
    model = make_assistant()
    runner = make_runner(model)
    views = len(plan_image(Size(*WIDE.shape[:2]), CONFIG).views)
    asked = [("One", [WIDE], AnswerOptions(2)), ("Two", [WIDE.copy(), WIDE], AnswerOptions(2))]
    runner.run(make_requests(model, asked))
    assert runner.encoder.views_encoded == views
    runner.run(make_requests(model, [("Once more", [WIDE[:, ::-1]], AnswerOptions(2))]))
    assert runner.encoder.views_encoded == 2 * views
    model.generate("One", [WIDE], max_new_tokens=2)
    model.generate([{"role": "user", "content": [{"type": "image", "image": WIDE}]}], max_new_tokens=2)
    assert model.encoder.views_encoded == views
    model.encode_images([WIDE], mode="4x")
    assert model.encoder.views_encoded == 2 * views


def test_visual_tokens_are_forgotten_by_bytes():
    cache = VisualCache(limit=100)
    arrays = {name: np.zeros(10, np.float32) for name in "abc"}
    for name, array in arrays.items():
        cache.put(name, array)
        cache.get("a")
    assert (cache.get("b"), cache.bytes, len(cache)) == (None, 80, 2)
    assert cache.get("a") is arrays["a"] and cache.get("c") is arrays["c"]
    cache.put("large", np.zeros(26, np.float32))
    assert cache.get("large") is None and len(cache) == 2
    key = Picture(WIDE, plan_image(Size(100, 240), CONFIG), "16x").key()
    assert key != Picture(WIDE, plan_image(Size(100, 240), CONFIG, max_slices=1), "16x").key()


def test_streamed_text_never_shows_a_stop_string_or_its_beginning():
    model = make_assistant()
    told = []
    plain = make_requests(model, ASKED[1:2])[0]
    make_runner(model).run([plain])
    text = plain.text
    stop = text[5:8]
    asked = [("A longer question about it?", [WIDE], AnswerOptions(12, stop=("never", stop + "!", stop)))]
    request = make_requests(model, asked, on_text=lambda piece, _: told.append(piece))[0]
    make_runner(model).run([request])
    assert "".join(told) == request.text == text[: text.index(stop)]
    assert request.reason == "stop" and len(request.tokens) < len(plain.tokens)
    # What was held back is told when it turns out not to be one.
    told.clear()
    asked = [("A longer question about it?", [WIDE], AnswerOptions(12, stop=(text[-1] + "?", stop + "no")))]
    make_runner(model).run(make_requests(model, asked, on_text=lambda piece, _: told.append(piece)))
    assert "".join(told) == text


def test_an_end_ends_an_answer():
    model = make_assistant()
    plain = make_requests(model, ASKED[:1])[0]
    make_runner(model).run([plain])
    ends = frozenset(plain.tokens[3:4])
    ended = make_requests(model, ASKED[:1], ends)[0]
    make_runner(model).run([ended])
    first = plain.tokens.index(plain.tokens[3])
    assert (ended.tokens, ended.reason) == (plain.tokens[:first], "stop")


def test_likeliest_tokens_are_told():
    model = make_assistant()
    told = []
    asked = [("Hello", [], AnswerOptions(3, Sampling(1.0, seed=3), likeliest=True))]
    request = make_requests(model, asked, on_text=lambda _, likely: told.extend(likely))[0]
    make_runner(model).run([request])
    logits = model.logits(np.concatenate([request.sample.tokens, request.tokens]))[request.length - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    assert [likely.token for likely in told] == request.tokens
    for likely, of_all in zip(told, expected, strict=True):
        assert likely.log_probability == pytest.approx(of_all[likely.token], abs=1e-4)
        np.testing.assert_array_equal(likely.ids, np.argsort(-of_all)[:20])
        np.testing.assert_allclose(likely.log_probabilities, np.sort(of_all)[::-1][:20], atol=1e-4)


def test_requests_are_admitted_in_their_order():
    model = make_assistant()
    runner = make_runner(model)
    beams, one = make_requests(model, [ASKED[4], ASKED[0]])
    runner._free = runner._free[:2]
    waiting = collections.deque([beams, one])
    assert runner.next_group(waiting) == [] and len(waiting) == 2  # three beams wait, and nobody overtakes them


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"beams": 6}, "beams=6: must be at most 5"),
        ({"beams": 0}, "beams=0"),
        ({"beams": 2, "temperature": 1.0}, "beams=2 do not sample"),
        ({"stop": "text"}, "stop='text': must be a list"),
        ({"stop": [""]}, "not empty"),
    ],
)
def test_impossible_answers(options, part):
    with pytest.raises(PromptError, match=part):
        make_assistant().generate("Hello", **options)


def test_parts_of_many_views():
    assert list(chunks(10, (1, 4))) == [(0, 4), (4, 4), (8, 1), (9, 1)]
    assert list(chunks(3, (1, 4))) == [(0, 3)]
    assert list(chunks(5, (2,))) == [(0, 2), (2, 2), (4, 1)]


def test_a_long_answer_attends_to_little_at_its_beginning():
    assert shapes_for(1, [700], 256, 1, 64).lengths == (704, 960)
    assert shapes_for(1, [700], 8192, 1, 64).lengths == (704, 2048, 4096, 8192, 9216)
    assert shapes_for(1, [3000], 2000, 1, 64).lengths == (3072, 4096, 5120)


def test_shapes_for_serving():
    shapes = serving_shapes(CONFIG, 8, 1000)
    assert shapes.lengths == (128, 256, 512, 1000) and shapes.length == 1000
    assert fit(129, shapes.lengths) == 256
    spread = serving_shapes(CONFIG, 9, 1000, shards=4)
    assert (spread.rows, spread.prefill_rows, spread.views) == (12, 4, (4, 16))
    usual, largest = patch_rooms(CONFIG)
    assert 64 < usual <= 128 and largest == CONFIG.slicing.max_view_patches
    with pytest.raises(ValueError, match="1001 is above the largest size, 1000"):
        fit(1001, shapes.lengths)
