"""The server's page in a real browser, where there is one: an image dropped, its views, a question, the answer."""

from __future__ import annotations

import shutil
import time

import pytest
from PIL import Image
from tiny_assistant import SMALL, WIDE, make_assistant

pytest.importorskip("starlette")

from serving import running

from uhd_jax.generation.engine import Engine
from uhd_jax.generation.shapes import Shapes

pytestmark = pytest.mark.usefixtures("unoptimised")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def model():
    return make_assistant()


@pytest.fixture(scope="module")
def server(model):
    engine = Engine(model, Shapes(2, 1, (128, 300), (4,), (128,)))
    engine.start()
    with running(engine, demo=True, api_key="", max_new_tokens=200) as server:
        yield server
    engine.close()


def test_views_of_an_image(server, tmp_path):
    Image.fromarray(WIDE).save(tmp_path / "wide.png")
    content = (tmp_path / "wide.png").read_bytes()
    status, plan = server.send("POST", "/demo/views", content)
    assert status == 200 and len(plan["pictures"]) == len(plan["tokens"]) == plan["views"] > 1
    assert sum(plan["tokens"]) == plan["visual_tokens"] and plan["image"] == [100, 240]
    assert server.send("POST", "/demo/views?max_slices=1", content)[1]["views"] == 1
    for path, body in (("?mode=2x", content), ("?max_slices=-1", content), ("", b"no image"), ("", b"")):
        status, answer = server.send("POST", f"/demo/views{path}", body)
        assert status == 400 and answer["error"]["message"]


def test_the_page_takes_nothing_from_elsewhere(server):
    status, page = server.send("GET", "/")
    assert status == 200 and b"http" not in page and b"src=" not in page
    assert b'max="200" value="200"' in page  # it asks by itself for no more tokens than are allowed


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_in_a_browser(server, model, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    Image.fromarray(WIDE).save(tmp_path / "wide.png")
    Image.fromarray(SMALL).save(tmp_path / "small.png")
    (tmp_path / "none.png").write_bytes(b"nothing")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        problems = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.set_default_timeout(60_000)
        # Dropped, as by a hand: a data transfer with the file.
        data = (tmp_path / "wide.png").read_bytes()
        transfer = page.evaluate_handle(
            "bytes => { const t = new DataTransfer();"
            " t.items.add(new File([new Uint8Array(bytes)], 'wide.png', {type: 'image/png'})); return t }",
            list(data),
        )
        page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
        page.wait_for_selector(".image")
        plan = model.prepare("", [WIDE]).plans[0]
        assert page.locator(".total").inner_text() == (
            f"100 x 240 pixels: {len(plan.views)} views, {plan.visual_tokens} visual tokens"
        )
        assert page.locator(".cell img").count() == len(plan.slices)
        page.fill("#tokens", "12")
        page.fill("#question", "What is it?")
        page.press("#question", "Enter")
        page.wait_for_selector("#stop:disabled")
        expected = model.generate([turn("What is it?", WIDE)], max_new_tokens=12)
        said = page.locator(".turn span")
        wait_until(lambda: said.nth(1).evaluate("node => node.textContent") == expected)
        page.locator("#state", has_text="tokens read").wait_for()
        page.set_input_files("#file", tmp_path / "small.png")
        page.wait_for_selector(".image >> nth=1")
        page.fill("#question", "And now?")
        page.click("#ask")
        told = [turn("What is it?", WIDE), {"role": "assistant", "content": expected}, turn("And now?", SMALL)]
        answer = model.generate(told, max_new_tokens=12)
        wait_until(lambda: said.count() == 4 and said.nth(3).evaluate("node => node.textContent") == answer)
        page.screenshot(path=tmp_path / "demo.png")
        assert problems == []
        page.set_input_files("#file", tmp_path / "none.png")
        page.locator("#problem", has_text="none.png: not a readable").wait_for()
        page.click("#reset")
        assert page.locator(".image").count() == page.locator(".turn").count() == 0
        browser.close()


def wait_until(condition, seconds=60):
    """The page's own policy forbids to evaluate strings in it, which waiting inside of it would."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def turn(text, image):
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}
