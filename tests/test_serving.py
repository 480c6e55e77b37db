"""The server as clients see it: OpenAI's own client, limits, refusals, cancelled requests, stopping."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import threading
import time

import numpy as np
import pytest
from serving import KEY, data_url, question, running
from tiny_assistant import SMALL, WIDE, make_assistant

from uhd_jax.generation.engine import Engine
from uhd_jax.generation.shapes import Shapes
from uhd_jax.serving import completions

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("unoptimised")

SHAPES = Shapes(rows=3, prefill_rows=1, lengths=(128, 300), views=(4,), patches=(128,))


@pytest.fixture(scope="module")
def model():
    return make_assistant()


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, SHAPES, max_waiting=3, modes=("16x", "4x"))
    engine.start()
    yield engine
    engine.close()
    assert engine.broken is None and engine.running == 0


@pytest.fixture(scope="module")
def server(engine):
    with running(engine, max_new_tokens=200, max_images=3, max_views=12, max_pixels=200_000) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)


@pytest.fixture
def held(engine, monkeypatch):
    """Holds the engine before every step until the event is set."""
    gate, step = threading.Event(), engine._runner.step
    monkeypatch.setattr(engine._runner, "step", lambda: (gate.wait(30), step()))
    yield gate
    gate.set()
    wait_until(lambda: not engine.running and not engine.waiting)


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ask(client, text="Hello", images=(), **options):
    options = {"model": "tiny", "max_tokens": 12} | options
    return client.chat.completions.create(messages=question(text, *images), **options)


def reason(usage):
    return "length" if usage.completion_tokens == 12 else "stop"


def test_answers_are_the_models(client, model):
    for text, images in (("Hello", []), ("A longer question?", [WIDE]), ("Two?", [SMALL, WIDE])):
        answer = ask(client, text, images)
        assert answer.choices[0].message.content == model.generate(text, images, max_new_tokens=12)
        assert answer.usage.prompt_tokens == len(model.prepare(text, images).token_ids) and answer.model == "tiny"
        assert answer.choices[0].finish_reason == reason(answer.usage)


def test_streamed_answers_are_the_same(client, model):
    events = list(ask(client, "A longer question?", [WIDE], stream=True, stream_options={"include_usage": True}))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == model.generate("A longer question?", [WIDE], max_new_tokens=12)
    assert events[0].choices[0].delta.role == "assistant" and events[0].usage is None
    assert len(events) > 4 and not events[-1].choices and events[-1].usage.completion_tokens > 3
    assert events[-2].choices[0].finish_reason == reason(events[-1].usage)


def test_choices_seeds_and_stops(client, model):
    sampled = ask(client, n=3, temperature=1.5, seed=5)
    texts = [choice.message.content for choice in sampled.choices]
    assert len(set(texts)) > 1 and [choice.index for choice in sampled.choices] == [0, 1, 2]
    assert texts[0] == model.generate("Hello", max_new_tokens=12, temperature=1.5, seed=5)
    assert ask(client, temperature=1.5, seed=5).choices[0].message.content == texts[0]
    assert (
        ask(client, temperature=1.5, seed=5, top_p=1e-6).choices[0].message.content
        == ask(client).choices[0].message.content
    )
    whole = ask(client).choices[0].message.content
    stopped = ask(client, stop=[whole[4:6], "never"]).choices[0]
    assert stopped.message.content == whole[: whole.index(whole[4:6])] and stopped.finish_reason == "stop"
    streamed = ask(client, n=2, stream=True)
    parts = {0: "", 1: ""}
    for event in streamed:
        for choice in event.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == {0: whole, 1: whole}


def test_fields_beyond_openais(client, model):
    thumbnail = model.generate("What?", [WIDE], max_new_tokens=12, max_slices=1)
    for body in ({"max_slices": 1}, {"mm_processor_kwargs": {"max_slice_nums": 1}}):
        assert ask(client, "What?", [WIDE], extra_body=body).choices[0].message.content == thumbnail
    messages = question("What?", WIDE)
    messages[0]["content"][0]["image_url"]["detail"] = "low"
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    assert answer.choices[0].message.content == thumbnail
    more = ask(client, "What?", [SMALL], extra_body={"mode": "4x"})
    assert more.choices[0].message.content == model.generate("What?", [SMALL], max_new_tokens=12, mode="4x")
    assert more.usage.prompt_tokens > ask(client, "What?", [SMALL]).usage.prompt_tokens
    beams = ask(client, "What?", [SMALL], extra_body={"beams": 3})
    assert beams.choices[0].message.content == model.generate("What?", [SMALL], max_new_tokens=12, beams=3)
    sampled = ask(client, temperature=2.0, seed=1, extra_body={"top_k": 3}).choices[0].message.content
    assert sampled == model.generate("Hello", max_new_tokens=12, temperature=2.0, seed=1, top_k=3)


def test_a_conversation_goes_on(client, model):
    first = ask(client, "What?", [SMALL]).choices[0].message
    turns = [*question("What?", SMALL), first, {"role": "user", "content": "And now?"}]
    turns.insert(0, {"role": "developer", "content": "Be short."})
    answer = client.chat.completions.create(model="tiny", messages=turns, max_completion_tokens=6)
    told = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image", "image": SMALL}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "And now?"},
    ]
    assert answer.choices[0].message.content == model.generate(told, max_new_tokens=6)


def test_log_probabilities(client, model):
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=5)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5 and all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.logprob == pytest.approx(entry.top_logprobs[0].logprob) for entry in content)
    ids = model.prepare("Hello").token_ids
    logits = model.logits(ids)[-1]
    assert content[0].logprob == pytest.approx(np.max(logits) - np.logaddexp.reduce(logits), abs=1e-4)
    assert model.tokenizer.decode([logits.argmax()], skip_special=False) == content[0].token
    streamed = [event for event in ask(client, logprobs=True, max_tokens=5, stream=True) if event.choices]
    told = [entry for event in streamed if event.choices[0].logprobs for entry in event.choices[0].logprobs.content]
    assert [entry.token for entry in told] == [entry.token for entry in content]


def test_models_health_and_metrics(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    assert server.send("GET", "/health", headers={"Authorization": None}) == (200, {"status": "ok"})
    ask(client, "Hello", [SMALL])
    status, text = server.send("GET", "/metrics", headers={"Authorization": None})
    metrics = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and float(metrics['uhd_jax_requests_total{status="200"}']) >= 1
    assert float(metrics['uhd_jax_tokens_total{kind="answer"}']) >= 12
    assert float(metrics["uhd_jax_visual_cache_bytes"]) > 0 and float(metrics["uhd_jax_requests_running"]) == 0
    assert float(metrics["uhd_jax_decode_steps_total"]) > 0 and float(metrics["uhd_jax_views_encoded_total"]) > 0
    assert float(metrics["uhd_jax_rows"]) == 3 and float(metrics["process_resident_memory_bytes"]) > 2**20


def test_clients_of_openai_raise_their_own_errors(server, client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; this server has 'tiny'"):
        ask(client, model="gpt")
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=server.url, api_key="other", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, temperature=-1)
    assert (error.value.param, error.value.type) == ("temperature", "invalid_request_error")


def shown(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


PNG = data_url(SMALL)
REFUSED = {
    "a field that is not there": ({"temprature": 1}, 400, "temprature: there is no such field"),
    "a wrong type": ({"max_tokens": "many"}, 400, "max_tokens: input should be a valid integer"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens: "),
    "too many tokens": ({"max_tokens": 201}, 400, "max_tokens: 201 is above the 200"),
    "two lengths": ({"max_completion_tokens": 5}, 400, "max_tokens is given twice"),
    "no messages": ({"messages": []}, 400, "messages: "),
    "an unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
    "an unknown part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages[0].content"),
    "an answer last": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "answer already"),
    "an image in an answer": ({"messages": [{"role": "system", "content": shown(PNG)[0]["content"]}]}, 400, "user mes"),
    "a long prompt": ({"messages": question("x" * 300)}, 400, "exceed the room for 300 tokens"),
    "a longer prompt": ({"messages": question("x" * 500)}, 400, "max_length=400"),
    "too many choices": ({"n": 9}, 400, "n: 9 is above 8"),
    "an empty stop": ({"stop": ""}, 400, "stop: "),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools: "),
    "penalties": ({"frequency_penalty": 0.5}, 400, "frequency_penalty: "),
    "another format": ({"response_format": {"type": "json_object"}}, 400, "response_format.type: "),
    "options of no stream": ({"stream_options": {}}, 400, "stream_options: only with stream=true"),
    "likeliest of none": ({"top_logprobs": 2}, 400, "top_logprobs: only with logprobs=true"),
    "sampled beams": ({"beams": 2, "temperature": 1}, 400, "temperature: cannot be had with beams"),
    "another mode": ({"mode": "1x"}, 400, "mode: "),
    "half a character": ({"messages": question("\ud800")}, 400, "lone surrogate"),
    "a file": ({"messages": shown("file:///etc/passwd")}, 400, "data URLs only"),
    "a page": ({"messages": shown("https://example.com/a.png")}, 400, "data URLs only"),
    "no base64": ({"messages": shown("data:image/png,abc")}, 400, "must be base64"),
    "bad base64": ({"messages": shown("data:image/png;base64,$$$$")}, 400, "not base64"),
    "no image": ({"messages": shown("data:image/png;base64,AAAA")}, 400, "image_url: not a readable"),
    "half an image": ({"messages": shown(PNG[: len(PNG) // 2 // 4 * 4])}, 400, "messages[0].content[0].image_url"),
    "a large image": ({"messages": question("?", np.zeros((500, 500, 3), np.uint8))}, 400, "pixels"),
    "many images": ({"messages": question("?", *[SMALL] * 4)}, 400, "4 images in a request, but at most 3"),
    "many views": ({"messages": question("?", *[np.tile(SMALL, (6, 6, 1))] * 2)}, 400, "lower max_slices"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(server, name):
    fields, status, part = REFUSED[name]
    found, body = server.chat(**fields)
    assert found == status and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert part in body["error"]["message"] and "\n" not in body["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b'{"temperature": NaN}', {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"\xff\xfe", {}, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}, 415, "not_json"),
        ("POST", "/v1/chat/completions", b"{}", {"Authorization": None}, 401, "invalid_api_key"),
        ("POST", "/v1/chat/completions", b"{}", {"Authorization": "Basic YTpi"}, 401, "invalid_api_key"),
        ("GET", "/v1/models", None, {"Authorization": "Bearer \xff"}, 401, "invalid_api_key"),
        ("GET", "/v1/models/other", None, {}, 404, "model_not_found"),
        ("GET", "/v1/chat/completions", None, {}, 405, "not_found"),
        ("GET", "/nothing", None, {}, 404, "not_found"),
    ],
)
def test_wrong_requests(server, method, path, body, headers, status, code):
    found, answer = server.send(method, path, body, headers)
    assert (found, answer["error"]["code"]) == (status, code)


def test_limits_of_a_body(engine):
    with running(engine, max_body_bytes=2000, body_seconds=0.2) as server:
        assert server.chat(messages=question("x" * 3000))[0] == 413
        with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            head += f"Authorization: Bearer {KEY}\r\n"
            connection.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
            for _ in range(2):
                connection.sendall(b"5dc\r\n" + b"x" * 1500 + b"\r\n")
            assert b" 413 " in connection.recv(100)
        with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as connection:
            connection.sendall((head + "Content-Length: 50\r\n\r\n{").encode())
            assert b" 408 " in connection.recv(100)


def test_connections_that_ask_for_nothing(engine):
    """They would use up the files that a process may open."""
    with running(engine, body_seconds=0.2) as server:
        for sent, status, code in (
            (b"", None, None),
            (b"GET /health HTTP/1.1\r\nHost: x\r\n", 408, "head_too_slow"),
            (b"nonsense\r\n\r\n", 400, "invalid_http"),
            (b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000, 400, "invalid_http"),
        ):
            with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), 10)) as connection:
                connection.sendall(sent)
                answer = http.client.HTTPResponse(connection)
                if status is None:
                    assert connection.recv(1) == b""
                    continue
                answer.begin()
                assert answer.status == status and json.loads(answer.read())["error"]["code"] == code
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for _ in range(2):  # one that asks again in time is kept
            client.request("GET", "/health")
            assert client.getresponse().read() == b'{"status":"ok"}'
        assert client.sock.recv(1) == b""
        client.close()


def test_the_name_of_another_host(engine):
    with running(engine, hosts=("localhost", "127.0.0.1")) as server:
        assert server.send("GET", "/v1/models")[0] == 200
        status, answer = server.send("GET", "/v1/models", headers={"Host": "evil.example:80"})
        assert (status, answer["error"]["code"]) == (421, "wrong_host")


def test_a_full_queue(server, engine, held):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(server.chat())) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: (engine.running, engine.waiting) == (1, 3))  # one was admitted before the engine was held
    status, answer = server.chat()
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    engine.cancel(engine._waiting[-1])
    assert server.chat(n=2)[0] == 429 and engine.waiting == 2  # both choices or none
    held.set()
    for thread in threads:
        thread.join()
    assert sorted(status for status, _ in answers) == [200, 200, 200, 500]


def test_too_late(engine, held):
    with running(engine, seconds=0.1) as server:
        held_answers = []
        thread = threading.Thread(target=lambda: held_answers.append(server.chat(max_tokens=100)))
        thread.start()
        time.sleep(0.3)
        held.set()
        thread.join()
    status, answer = held_answers[0]
    assert (status, answer["error"]["code"]) == (504, "timeout")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(server, engine, held, stream):
    body = json.dumps({"model": "tiny", "messages": question("Hello"), "max_tokens": 200, "stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: engine.running == 1)
    request = engine._runner.running[0]
    wait_until(lambda: request.reason == "cancelled")
    held.set()
    wait_until(lambda: engine.running == 0)
    assert len(request.tokens) < 10


def test_a_client_that_stops_reading(engine, model):
    """Others go on meanwhile, its place becomes free, and it is given up."""
    messages = question("Hello")
    fields = {"model": "tiny", "messages": messages, "max_tokens": 200, "stream": True, "logprobs": True, "n": 3}
    body = json.dumps(fields | {"top_logprobs": 20}).encode()
    with running(engine, send_seconds=0.3) as server, contextlib.closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: engine.running == 3)
        assert server.chat()[1]["choices"][0]["message"]["content"] == model.generate("Hello", max_new_tokens=4)
        wait_until(lambda: engine.running == 0 and server.server.open == 0)


def test_a_step_that_does_not_end(engine, held, monkeypatch):
    monkeypatch.setattr(completions, "_GRACE", 0.1)
    with running(engine, seconds=0.2) as server:
        status, answer = server.chat()
        assert (status, answer["error"]["code"]) == (504, "timeout")
        held.set()


def test_stopping_lets_running_requests_end_and_refuses_new_ones(model):
    engine = Engine(model, SHAPES)
    engine._thread.start()  # what was compiled for the other engine serves this one
    with running(engine, drain_seconds=20) as server:
        client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        stream = ask(client, stream=True, max_tokens=150)
        first = next(iter(stream))
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        assert server.chat()[0] == 503 and server.send("GET", "/health") == (503, {"status": "stopping"})
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length" and first.id == rest[-1].id
        wait_until(lambda: server.uvicorn.should_exit)
    assert not engine._thread.is_alive()


def test_stopping_too_slowly_tells_those_who_wait(model):
    engine = Engine(model, SHAPES)
    gate, step = threading.Event(), engine._runner.step
    engine._runner.step = lambda: (gate.wait(0.05), step())
    engine._thread.start()
    with running(engine, drain_seconds=0.2) as server:
        client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        stream = iter(ask(client, stream=True, max_tokens=200))
        next(stream)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(server.chat(max_tokens=200)))
        thread.start()
        wait_until(lambda: engine.running == 2)
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        thread.join()
        assert answers[0][0] == 503


def test_a_fault_of_the_engine_is_told(model, caplog):
    engine = Engine(model, SHAPES)

    def fail():
        raise RuntimeError("secret")

    engine._runner.step = fail
    engine._thread.start()
    with running(engine) as server:
        status, answer = server.chat()
        assert status == 500 and "secret" not in json.dumps(answer)
        assert server.chat()[0] == 500 and server.send("GET", "/health")[0] == 503
    assert "secret" in caplog.text
