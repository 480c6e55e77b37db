"""A page to try the model in a browser: one file, nothing from elsewhere."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from uhd_jax.config import MODES
from uhd_jax.serving.errors import ApiError
from uhd_jax.slicing.image_io import open_image
from uhd_jax.slicing.pixels import view_pixels
from uhd_jax.slicing.plan import ImageRefused, Size, plan_image

if TYPE_CHECKING:
    from uhd_jax.serving.app import Server

PAGE = Path(__file__).with_name("demo.html")


def demo_routes(server: Server) -> list[Route]:
    """The page at "/", and what it asks for: the views of an image."""
    page, longest = PAGE.read_text(encoding="utf-8"), server.settings.max_new_tokens
    page = page.replace('max="1" value="1"', f'max="{longest}" value="{min(256, longest)}"')
    sources = {kind: _hash(page, tag) for kind, tag in (("script", "script"), ("style", "style"))}
    policy = (
        f"default-src 'none'; script-src '{sources['script']}'; style-src '{sources['style']}'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    async def show(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=headers)

    async def views(request: Request) -> Response:
        content = await server.body(request)
        mode = request.query_params.get("mode") or None
        slices = request.query_params.get("max_slices", "")
        if mode not in (None, *MODES) or not re.fullmatch("[0-9]{0,4}", slices):
            raise ApiError(400, "mode or max_slices is not one that there is")
        loop = asyncio.get_running_loop()
        threads = server.completions.threads
        return JSONResponse(await loop.run_in_executor(threads, _views, server, content, mode, int(slices or 0)))

    return [
        Route("/", server.guarded(show, key=False)),
        Route("/demo/views", server.guarded(views), methods=["POST"]),
    ]


def _views(server: Server, content: bytes, mode: str | None, max_slices: int) -> dict[str, Any]:
    config = server.engine.assistant.config
    limits = config.slicing.limits
    try:
        pixels = open_image(content, limits)
        if pixels.shape[0] * pixels.shape[1] > server.settings.max_pixels:
            raise ImageRefused(f"has more than {server.settings.max_pixels} pixels")
        limit = min(max_slices or config.slicing.max_slices, config.slicing.max_slices)
        plan = plan_image(Size(*pixels.shape[:2]), config, mode, limit)
    except ImageRefused as error:
        raise ApiError(400, str(error).removeprefix("<bytes>: "), "invalid_image") from None
    pictures = [_data_url(view) for view in view_pixels(pixels, plan)]
    tokens = [view.visual_tokens for view in plan.views]
    return plan.to_json() | {"pictures": pictures, "tokens": tokens, "has_thumbnail": plan.thumbnail is not None}


def _data_url(pixels: Any) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _hash(page: str, tag: str) -> str:
    content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
