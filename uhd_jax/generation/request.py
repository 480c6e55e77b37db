"""One prompt to be answered: what is asked of the answer, and how far it has come."""

from __future__ import annotations

import dataclasses
import numbers
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from uhd_jax.data.chat import EncodedSample
from uhd_jax.data.tokenizer import StreamDecoder, Tokenizer
from uhd_jax.generation.beams import BeamSearch
from uhd_jax.generation.prompt import PromptError
from uhd_jax.generation.sampling import Sampling
from uhd_jax.generation.visual import Picture

MAX_BEAMS = 5  # as many as the papers used


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """What is asked of an answer.

    `beams` above 1 is beam search, which does not sample and tells its answer at the end; length_penalty and
    early_stopping as of `generation.beams`. Where the text comes to hold one of the strings `stop`, it ends before it.
    """

    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    likeliest: bool = False  # tell the likeliest tokens with their log probabilities

    def __post_init__(self):
        for name in ("max_new_tokens", "beams"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise PromptError(f"{name}={value!r}: must be a whole number of at least 1")
        if self.beams > MAX_BEAMS:
            raise PromptError(f"beams={self.beams}: must be at most {MAX_BEAMS}")
        if self.beams > 1 and self.sampling.temperature > 0:
            raise PromptError(f"beams={self.beams} do not sample: leave temperature at 0")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise PromptError(f"stop={self.stop!r}: must be a list of texts that are not empty")


class Likely(NamedTuple):
    """A token that was chosen, with its log probability and the likeliest tokens in its place."""

    token: int
    log_probability: float
    ids: np.ndarray  # int32[N], the likeliest first
    log_probabilities: np.ndarray  # float32[N]


class Request:
    """A prompt on its way to an answer.

    Args:
      sample: the prompt.
      pictures: its images, let go of when they are encoded.
      options: what is asked of the answer.
      tokenizer: for the text.
      ends: ids that end an answer.
      on_text: called with each new piece of text, and with the tokens since the last one if `options.likeliest`.
      on_end: called when the answer has ended, for whatever reason.
    """

    def __init__(
        self,
        sample: EncodedSample,
        pictures: tuple[Picture, ...],
        options: AnswerOptions,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        on_text: Callable[[str, list[Likely]], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ):
        self.sample, self.pictures, self.options, self.ends = sample, pictures, options, ends
        self.tokens: list[int] = []  # of the answer, without the id that ended it
        self.reason: str | None = None  # why it ended: "stop", "length", or whatever `finish` was called with
        self.rows: list[int] = []  # of the running batch; empty while it waits
        self.deadline: float | None = None  # of `time.monotonic`
        self.dispatched = 0  # tokens of the answer that the device was told to choose
        self.beams: BeamSearch | None = None
        self.parents: list[int] = []  # of the beams in the next step, as positions in `rows`
        self._tokenizer, self._decoder = tokenizer, StreamDecoder(tokenizer)
        self._on_text, self._on_end = on_text, on_end
        self._lock = threading.Lock()
        self._held = ""  # text that may be the beginning of a stop string
        self._told: list[Likely] = []
        if options.beams > 1:
            self.beams = BeamSearch(
                options.beams, ends, options.max_new_tokens, options.length_penalty, options.early_stopping
            )

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.sample.tokens)

    @property
    def text(self) -> str:
        """The answer so far."""
        text = self._tokenizer.decode(self.tokens)
        places = [text.find(stop) for stop in self.options.stop if stop in text]
        return text[: min(places)] if places else text

    def take(self, token: int, likely: Likely | None = None) -> None:
        """The next token of the answer."""
        if token in self.ends:
            self.finish("stop")
            return
        self.tokens.append(token)
        if likely is not None and self.options.likeliest:
            self._told.append(likely)
        if (self._on_text or self.options.stop) and self._stopped(self._decoder.push(token)):
            self.finish("stop")
        elif len(self.tokens) >= self.options.max_new_tokens:
            self.finish("length")

    def take_beams(self, likeliest: np.ndarray, log_probabilities: np.ndarray) -> None:
        """The next tokens of the beams: int32[beams or 1, N] and float32[beams or 1, N]; 1 after the prompt."""
        shape = (self.beams.beams, likeliest.shape[1])
        self.parents = self.beams.advance(np.broadcast_to(likeliest, shape), np.broadcast_to(log_probabilities, shape))
        if not self.beams.done:
            return
        reason = "stop" if self.beams.best_stopped else "length"
        for token in self.beams.best:
            self.tokens.append(token)
            if (self._on_text or self.options.stop) and self._stopped(self._decoder.push(token)):
                reason = "stop"
                break
        self.finish(reason)

    def finish(self, reason: str) -> None:
        """Ends the answer; nothing happens where it has ended already."""
        with self._lock:  # a request may be given up while it ends
            if self.reason is not None:
                return
            self.reason = reason
        if self._on_text and reason in ("stop", "length"):
            rest = "" if self._cut else self._decoder.flush()
            if not self._stopped(rest):
                self._tell(self._held)
            self._held = ""
            if self._told:
                self._tell("")
        if self._on_end:
            self._on_end()

    _cut = False  # whether a stop string was found

    def _stopped(self, piece: str) -> bool:
        """Tells a new piece of text as far as no stop string begins in it; whether one is whole."""
        if self._cut:
            return True
        self._held += piece
        places = [place for stop in self.options.stop if (place := self._held.find(stop)) >= 0]
        if places:
            self._cut = True
            self._tell(self._held[: min(places)])
            self._held = ""
            return True
        begun = max((_begun(self._held, stop) for stop in self.options.stop), default=0)
        certain = len(self._held) - begun
        text, self._held = self._held[:certain], self._held[certain:]
        if text:
            self._tell(text)
        return False

    def _tell(self, text: str) -> None:
        told, self._told = self._told, []
        if self._on_text and (text or told):
            self._on_text(text, told)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
