"""The same greedy tokens alone, in a batch, streamed, over HTTP and inside lmms-eval: of the demo and of MiniCPM-V 4.6.

The demo's model has random weights here; UHD_JAX_DEMO=runs/quickstart takes a trained one.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_v4 import GOLDEN
from hf46 import torch_inputs
from PIL import Image
from serving import KEY, question, running

import uhd_jax
from uhd_jax.checkpoint import save_model
from uhd_jax.cli.configs import load_file
from uhd_jax.data.demo import DigitPages
from uhd_jax.data.tokenizer import load_tokenizer
from uhd_jax.generation import assistant
from uhd_jax.generation.engine import Engine
from uhd_jax.generation.request import AnswerOptions
from uhd_jax.generation.sampling import Sampling
from uhd_jax.generation.shapes import Shapes
from uhd_jax.models import uhd

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("unoptimised")

TOKENS = 10
IMPORTED = GOLDEN / "v4_full_qwen35_16x"
WAYS = {"greedy": {}, "beams": {"beams": 3}, "penalty": {"repetition_penalty": 1.3}}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder of the demo's model."""
    if given := os.environ.get("UHD_JAX_DEMO"):
        return Path(given)
    config = load_file("configs/demo.py").model
    params = jax.jit(uhd.init_params, static_argnums=0)(config, jax.random.key(3))
    params["decoder"]["head"] *= 40  # so that answers differ from prompt to prompt
    folder = tmp_path_factory.mktemp("demo") / "model"
    save_model(folder, params, config)
    (folder / "tokenizer").mkdir()
    load_tokenizer(config.chat.tokenizer, config.chat).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module", params=["demo", "4.6"])
def asked(request):
    """A folder, its model, questions, and their images."""
    if request.param == "demo":
        pages = DigitPages({"split": "held_out"})
        images = [pages.images(number)[0] for number in range(2)]
        questions = ["Transcribe.", "What is in row 1?"]
        folder = request.getfixturevalue("demo")
    else:
        images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(IMPORTED.glob("image_*.png"))]
        questions, folder = ["What is this?", "A longer question about it?"], IMPORTED
    return folder, uhd_jax.load(folder), questions, [images, images[1:]]


@pytest.fixture(scope="module")
def shapes(asked):
    """Of all programs, but for the batch of `test_together_and_streamed`: few, as compiling is what takes time here."""
    _, model, questions, images = asked
    plans = [plan for one in zip(questions, images, strict=True) for plan in model.prepare(*one).plans]
    patches = max(view.patch_grid.area for plan in plans for view in plan.views)
    return Shapes(4, 1, (256,), (4,), (-(-patches // 16) * 16,))


@pytest.fixture(scope="module")
def expected(asked, shapes):
    """By way of asking, the ids of every answer, each made alone."""
    _, model, questions, images = asked
    prepared = [model.prepare(*one) for one in zip(questions, images, strict=True)]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistant, "shapes_for", lambda *_: shapes)
        for way, options in WAYS.items():
            found[way] = [model.answer([one], [options_of(**options)])[0].tokens for one in prepared]
    assert len({tuple(tokens) for each in found.values() for tokens in each}) >= 3, found
    return found


def options_of(beams=1, repetition_penalty=1.0):
    return AnswerOptions(TOKENS, Sampling(repetition_penalty=repetition_penalty), beams=beams)


def texts(model, answers):
    return [model.tokenizer.decode(tokens) for tokens in answers]


def test_together_and_streamed(asked, expected, shapes, monkeypatch):
    """One batch of greedy answers, beams and penalties beside each other."""
    _, model, questions, images = asked
    prepared = [model.prepare(*one) for one in zip(questions, images, strict=True)]
    options = [options_of(**options) for options in WAYS.values() for _ in prepared]
    together = [request.tokens for request in model.answer(prepared * len(WAYS), options)]
    assert together == [tokens for each in expected.values() for tokens in each]
    pieces = []
    monkeypatch.setattr(assistant, "shapes_for", lambda *_: shapes)
    answer = model.generate(questions[1], images[1], max_new_tokens=TOKENS, stream=pieces.append)
    assert [answer, "".join(pieces)] == texts(model, [expected["greedy"][1]]) * 2


def test_over_http(asked, expected, shapes):
    """All at once, so that they share a running batch; whole and streamed, by OpenAI's client."""
    _, model, questions, images = asked
    engine = Engine(model, shapes)
    engine.start()
    with running(engine) as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)

        def ask(number, way, stream):
            options = {"model": "tiny", "max_tokens": TOKENS, "extra_body": WAYS[way], "stream": stream}
            messages = question(questions[number], *images[number])
            answer = client.chat.completions.create(messages=messages, **options)
            if not stream:
                return answer.choices[0].message.content
            return "".join(event.choices[0].delta.content or "" for event in answer)

        asking = [(number, way, stream) for way in WAYS for stream in (False, True) for number in range(len(questions))]
        found = list(pool.map(lambda one: ask(*one), asking))
    engine.close()
    assert found == [texts(model, [expected[way][number]])[0] for number, way, _ in asking]


@pytest.fixture
def lmms_model(monkeypatch):
    """The class that lmms-eval asks for, and its `Instance`; stand-ins for what it imports where that is missing."""
    try:
        from lmms_eval.api.instance import Instance
    except ImportError:

        class Base:
            def __init__(self):
                self.task_dict = {}

        @dataclasses.dataclass
        class Instance:
            request_type: str
            arguments: tuple
            idx: int
            metadata: dict

            @property
            def args(self):
                return self.arguments

        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            module = types.ModuleType(name)
            module.lmms = Base
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "uhd_jax.evaluation.lmms_model", raising=False)
    module = importlib.import_module("uhd_jax.evaluation.lmms_model")
    yield module.UhdJax, Instance
    sys.modules.pop("uhd_jax.evaluation.lmms_model", None)


def test_inside_lmms_eval(asked, expected, shapes, lmms_model, monkeypatch):
    """Asked as its evaluator does, answers of different options in one list."""
    folder, model, questions, images = asked
    made, instance = lmms_model
    monkeypatch.setattr(assistant, "shapes_for", lambda *_: shapes)
    harness = made(str(folder), batch_size=1)
    harness.task_dict = {"pages": {"test": list(zip(questions, images, strict=True))}}

    def messages(row):
        content = [{"type": "image", "url": Image.fromarray(image)} for image in row[1]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": row[0]}]}]

    names = {"beams": "num_beams", "repetition_penalty": "repetition_penalty"}
    requests = []
    for options in WAYS.values():
        given = {"max_new_tokens": TOKENS, "do_sample": False} | {names[key]: value for key, value in options.items()}
        for row in range(len(questions)):
            arguments = (questions[row], messages, given, row, "pages", "test")
            metadata = {"task": "pages", "doc_id": row, "repeats": 1}
            requests.append(instance("generate_until", arguments, len(requests), metadata))
    found = harness.generate_until(requests)
    assert found == [text for each in expected.values() for text in texts(model, each)]


def test_in_transformers(asked, expected):
    folder, model, questions, images = asked
    if folder != IMPORTED:
        pytest.skip("transformers has no class for the demo's model")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    names = {"beams": "num_beams", "repetition_penalty": "repetition_penalty"}
    for way, options in WAYS.items():
        given = {names[key]: value for key, value in options.items()}
        for number, one in enumerate(zip(questions, images, strict=True)):
            prepared = model.prepare(*one)
            inputs, ends = torch_inputs(prepared, model.config), sorted(model.ends)
            with torch.no_grad():
                ids = theirs.generate(
                    **inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=ends, pad_token_id=0, **given
                )
            answer = [token for token in ids[0, len(prepared.token_ids) :].tolist() if token not in (*ends, 0)]
            assert answer == expected[way][number], way
