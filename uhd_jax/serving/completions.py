"""One request for a chat completion, from its body to the pieces of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from uhd_jax.data.tokenizer import Tokenizer
from uhd_jax.generation import engine as engines
from uhd_jax.generation.assistant import Prepared
from uhd_jax.generation.engine import Engine
from uhd_jax.generation.prompt import PromptError
from uhd_jax.generation.request import AnswerOptions, Likely, Request
from uhd_jax.generation.sampling import Sampling
from uhd_jax.serving.conversation import conversation
from uhd_jax.serving.errors import ApiError
from uhd_jax.serving.metrics import Metrics
from uhd_jax.serving.protocol import ChatRequest, finite
from uhd_jax.serving.settings import Settings
from uhd_jax.slicing.plan import ImageRefused

_GRACE = 5.0  # seconds
_ENDS = {
    engines.EXPIRED: (504, "the answer took longer than this server allows", "timeout"),
    engines.CLOSED: (503, "the server is stopping", "stopping"),
    engines.FAILED: (500, "the server could not answer; its log says why", "failed"),
    engines.CANCELLED: (500, "the request was given up", "cancelled"),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Of choice `index` the next text, with its tokens, or its end."""

    index: int
    text: str = ""
    likely: tuple[Likely, ...] = ()
    reason: str | None = None


class Completions:
    """What all requests share."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics):
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.threads = ThreadPoolExecutor(settings.prepare_threads, "prepare")

    async def start(self, asked: ChatRequest) -> Completion:
        """Prepares a prompt and queues it.

        Raises:
          ApiError: it is refused.
        """
        began = time.monotonic()
        self._check(asked)
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self.threads, self._prepare, asked)
        asked.messages.clear()  # their images are large
        completion = Completion(self, asked, len(prepared.token_ids), began)
        completion.submit(prepared, self._options(asked, prepared))
        return completion

    def _check(self, asked: ChatRequest) -> None:
        settings = self.settings
        if asked.model != settings.name:
            message = f"there is no model {asked.model[:100]!r}; this server has {settings.name!r}"
            raise ApiError(404, message, "model_not_found", "model")
        if (asked.n or 1) > settings.max_choices:
            raise ApiError(400, f"n: {asked.n} is above {settings.max_choices}", param="n")
        if (asked.beams or 1) > 1:
            for name in ("logprobs", "temperature"):
                if getattr(asked, name):
                    raise ApiError(400, f"{name}: cannot be had with beams", param=name)
            if (asked.n or 1) > 1:
                raise ApiError(400, "n: must be 1 with beams", param="n")
        stop = _stops(asked)
        if len(stop) > 16 or not all(stop) or any(len(text) > 256 for text in stop):
            raise ApiError(400, "stop: at most 16 texts of 1 to 256 characters", param="stop")
        if self.engine.broken:
            raise ApiError(500, *_ENDS[engines.FAILED][1:])

    def _prepare(self, asked: ChatRequest) -> Prepared:
        settings, assistant = self.settings, self.engine.assistant
        more, template = asked.mm_processor_kwargs, asked.chat_template_kwargs
        slices = asked.either(asked.max_slices, more and more.max_slice_nums, name="max_slices")
        mode = asked.either(asked.mode, more and more.downsample_mode, name="mode")
        thinking = asked.either(asked.thinking, template and template.enable_thinking, name="thinking")
        if mode is not None and mode not in self.engine.modes:
            raise ApiError(400, f"mode: this server has {', '.join(self.engine.modes)} only", param="mode")
        messages, low = conversation(asked, settings, assistant.config.slicing.limits)
        limit = assistant.config.slicing.max_slices
        slices = 1 if low and slices is None else None if slices is None else min(slices, limit)
        try:
            prepared = assistant.prepare(messages, max_slices=slices, mode=mode, thinking=thinking)
        except (PromptError, ImageRefused) as error:
            code = "context_length_exceeded" if "max_length" in str(error) else "invalid_prompt"
            raise ApiError(400, str(error)[:500], code, "messages") from None
        views = sum(len(plan.views) for plan in prepared.plans)
        if views > settings.max_views:
            message = f"the images have {views} views together, at most {settings.max_views} are allowed"
            raise ApiError(400, f"{message}; lower max_slices", "too_many_views", "messages")
        return prepared

    def _options(self, asked: ChatRequest, prepared: Prepared) -> AnswerOptions:
        settings = self.settings
        given = asked.either(asked.max_tokens, asked.max_completion_tokens, name="max_tokens")
        if given is not None and given > settings.max_new_tokens:
            message = f"max_tokens: {given} is above the {settings.max_new_tokens} that are allowed"
            raise ApiError(400, message, "max_tokens_too_large", "max_tokens")
        left = self.engine.shapes.length - len(prepared.token_ids)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed % 2**32
        return AnswerOptions(
            max_new_tokens=given or max(1, min(settings.default_new_tokens, left)),
            sampling=Sampling(
                asked.temperature or 0.0,
                asked.top_k or 0,
                asked.top_p or 1.0,
                seed,
                repetition_penalty=asked.repetition_penalty or 1.0,
            ),
            stop=tuple(_stops(asked)),
            beams=asked.beams or 1,
            length_penalty=1.0 if asked.length_penalty is None else asked.length_penalty,
            early_stopping=bool(asked.early_stopping),
            likeliest=bool(asked.logprobs),
        )


def _stops(asked: ChatRequest) -> list[str]:
    return [asked.stop] if isinstance(asked.stop, str) else asked.stop or []


class Completion:
    """A request that is being answered; `close` it in any case."""

    def __init__(self, shared: Completions, asked: ChatRequest, prompt_tokens: int, began: float):
        self.shared, self.asked, self.prompt_tokens, self.began = shared, asked, prompt_tokens, began
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.requests: list[Request] = []
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def submit(self, prepared: Prepared, options: AnswerOptions) -> None:
        """Queues every choice, or none."""
        left = self.shared.settings.seconds - (time.monotonic() - self.began)
        try:
            for index in range(self.asked.n or 1):
                own = dataclasses.replace(options, sampling=dataclasses.replace(options.sampling, stream=index))
                request = self.shared.engine.submit(
                    prepared,
                    own,
                    seconds=left,
                    on_text=lambda text, likely, i=index: self._put(Piece(i, text, tuple(likely))),
                    on_end=lambda i=index: self._put(Piece(i, reason="end")),
                )
                self.requests.append(request)
        except engines.PromptTooLong as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from None
        except PromptError as error:
            raise ApiError(400, str(error), "invalid_prompt") from None
        except engines.EngineFull:
            self.close()
            raise ApiError(429, "too many requests are waiting; try again in a moment", "queue_full") from None
        except engines.EngineClosed:
            self.close()
            raise ApiError(503, "the server is stopping", "stopping") from None

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices as they come, each choice's end among them.

        Raises:
          ApiError: an answer ended in another way than by itself or by its length.
        """
        open_choices, first = len(self.requests), True
        while open_choices:
            piece = await self._next()
            if first:
                self.shared.metrics.first.observe(time.monotonic() - self.began)
                first = False
            if piece.reason is not None:
                reason = self.requests[piece.index].reason
                if reason not in ("stop", "length"):
                    raise ApiError(*_ENDS[reason])
                open_choices -= 1
                piece = dataclasses.replace(piece, reason=reason)
            yield piece

    async def _next(self) -> Piece:
        """The engine ends what is late between two steps, so here is only waited longer where a step does not end."""
        left = self.shared.settings.seconds + _GRACE - (time.monotonic() - self.began)
        try:
            return await asyncio.wait_for(self._pieces.get(), left)
        except TimeoutError:
            raise ApiError(*_ENDS[engines.EXPIRED]) from None

    def close(self) -> None:
        """Gives up what is not answered yet."""
        unfinished = [request for request in self.requests if request.reason is None]
        for request in unfinished:
            self.shared.engine.cancel(request)
        if unfinished:
            self.shared.metrics.cancelled.inc()
        if self.requests:
            self.shared.metrics.seconds.observe(time.monotonic() - self.began)
            self.shared.metrics.tokens.labels("prompt").inc(self.prompt_tokens)
            self.shared.metrics.tokens.labels("answer").inc(sum(len(request.tokens) for request in self.requests))

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, as OpenAI counts them; visual tokens are part of the prompt."""
        prompt, answer = self.prompt_tokens, sum(len(request.tokens) for request in self.requests)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _put(self, piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


def logprobs_json(likely: tuple[Likely, ...], count: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokens with their log probabilities, and `count` of the likeliest in place of each, as OpenAI writes them."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text = tokenizer.decode([token], skip_special=False)
        return {"token": text, "logprob": finite(float(value)), "bytes": list(text.encode("utf-8", "replace"))}

    content = []
    for one in likely:
        top = zip(one.ids[:count].tolist(), one.log_probabilities[:count].tolist(), strict=True)
        content.append(entry(one.token, one.log_probability) | {"top_logprobs": [entry(*pair) for pair in top]})
    return {"content": content, "refusal": None}
