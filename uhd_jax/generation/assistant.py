"""The object a user holds: a model with its tokenizer, answering questions about images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uhd_jax.batch import Batch, Bucket
from uhd_jax.checkpoint import CheckpointError, load_model
from uhd_jax.config import ChatConfig, ConfigError, ModelConfig
from uhd_jax.convert import sentencepiece, tables
from uhd_jax.convert.families import drops, find_family
from uhd_jax.convert.source import Source, open_source
from uhd_jax.data.chat import ChatError, EncodedSample, encode_chat, visual_places
from uhd_jax.data.packing import fill_batch
from uhd_jax.data.tokenizer import Tokenizer, load_tokenizer
from uhd_jax.generation import decode
from uhd_jax.generation.prompt import Conversation, Image, PromptError, Video, as_list, is_single, parse, requests
from uhd_jax.generation.request import AnswerOptions, Request
from uhd_jax.generation.runner import Runner
from uhd_jax.generation.sampling import Sampling
from uhd_jax.generation.shapes import room, shapes_for
from uhd_jax.generation.visual import Picture, VisualCache, VisualEncoder
from uhd_jax.models import uhd
from uhd_jax.slicing.image_io import open_image
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import ImageRefused, Plan, Size, plan_image
from uhd_jax.slicing.video import open_video

MAX_ROWS = 64  # answers that go on together; of a longer list the next begin where others end


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the model sees of one prompt."""

    sample: EncodedSample
    pictures: tuple[Picture, ...]  # images and pictures of videos, in order
    patch_size: int

    @functools.cached_property
    def views(self) -> tuple[np.ndarray, ...]:
        """uint8[P, patch_bytes] each, merge order, all images in order."""
        cut = (cut_views(picture.pixels, picture.plan, self.patch_size) for picture in self.pictures)
        return tuple(view for views in cut for view in views)

    @property
    def token_ids(self) -> np.ndarray:
        """int32[T], placeholders expanded."""
        return self.sample.tokens

    @property
    def plans(self) -> tuple[Plan, ...]:
        """One per image or picture of a video."""
        return self.sample.plans


class Assistant:
    """A model that answers.

    Every distinct bucket of shapes (prompts, lengths, views, patches, all rounded up) compiles once. The visual tokens
    of the last images are kept, so that a conversation goes on without encoding its images again. One thread at a time
    may ask; `generation.engine` serves many.

    Args:
      config: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      max_length: prompt and answer together may have so many tokens.
    """

    def __init__(self, config: ModelConfig, params: Any, tokenizer: Tokenizer, max_length: int = 32_768):
        if tokenizer.vocab_size > config.decoder.vocab_size:
            raise ConfigError(
                f"model.decoder.vocab_size: tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, "
                f"the decoder only {config.decoder.vocab_size}"
            )
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.encoder = VisualEncoder(config, params, VisualCache())

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        chat = self.config.chat
        return frozenset(self.tokenizer.special(mark) for mark in (chat.turn_end, chat.padding, *chat.stop))

    @functools.cached_property
    def _computed(self) -> Any:
        return decode.as_read(decode.as_computed(self.params, self.config))

    def prepare(
        self,
        prompt: str | Conversation,
        images: Sequence[Image] = (),
        videos: Sequence[Video] = (),
        *,
        max_slices: int | None = None,
        mode: str | None = None,
        thinking: bool | None = None,
    ) -> Prepared:
        """What the model would see: ids, plans and patches of a question about images, which stand before it.

        Args:
          prompt: the question; marks such as "<image>" in it are read as plain text. Or a conversation: a list of
            messages `{"role": .., "content": ..}`, the content a text or a list of `{"type": "text", "text": ..}`,
            `{"type": "image", "image": ..}` and `{"type": "video", "video": ..}`.
          images: paths, bytes, PIL images or uint8 arrays; a conversation has its own.
          videos: paths, `slicing.video.Video` or lists of frames, cut as `config.video` says; after the images.
          max_slices: slices per image at most, 1 for the thumbnail alone; None for the config's limit.
          mode: "16x" or "4x"; None for the config's.
          thinking: whether the model is to think first, where its prompt form can say so; None for its own habit.

        Raises:
          ImageRefused: an image or a video cannot be used.
          PromptError: the prompt is no text or conversation, or too long.
        """
        messages, sources = parse(prompt, images, videos, self._open_shown)
        pixels = [picture for shown in sources for picture in shown.pictures]
        plans = [
            self._plan(picture, self.config.video.max_slices if shown.is_video else max_slices, mode)
            for shown in sources
            for picture in shown.pictures
        ]
        try:
            sample = encode_chat(messages, plans, self.tokenizer, self.config.chat, generate=True, thinking=thinking)
        except ChatError as error:
            raise PromptError(str(error)) from error
        if len(sample.tokens) > self.max_length:
            visual = sum(plan.visual_tokens for plan in plans)
            raise PromptError(
                f"the prompt has {len(sample.tokens)} tokens ({visual} of them visual), more than "
                f"max_length={self.max_length}; shorten it or lower max_slices"
            )
        return self._prepared(sample, pixels, plans, mode)

    def encode_images(
        self, images: Sequence[Image], *, max_slices: int | None = None, mode: str | None = None
    ) -> list[np.ndarray]:
        """Visual tokens of each image: float32[visual tokens, D], thumbnail first, then slices in raster order."""
        pixels = self._open(images)
        plans = [self._plan(image, max_slices, mode) for image in pixels]
        pictures = [self._picture(image, plan, mode) for image, plan in zip(pixels, plans, strict=True)]
        if not pictures:
            return []
        shapes = shapes_for(1, [1], 1, *_views_and_patches(pictures))
        *_, tokens = self.encoder.encode(pictures, shapes)
        return [np.asarray(of_image, np.float32) for of_image in tokens]

    def logits(
        self,
        token_ids: Sequence[int] | np.ndarray,
        images: Sequence[Image] = (),
        videos: Sequence[Video] = (),
        *,
        max_slices: int | None = None,
        mode: str | None = None,
    ) -> np.ndarray:
        """float32[T, V] after each of T ids, in which the placeholders of the images are expanded already.

        Raises:
          PromptError: an id outside the vocabulary, or the number of placeholders is not the number of the images'
            visual tokens.
        """
        tokens = _checked_ids(token_ids, self.config.decoder.vocab_size)
        chat = self.config.chat
        view, view_token = np.full(len(tokens), -1, np.int32), np.zeros(len(tokens), np.int32)
        pixels: list[np.ndarray] = []
        plans: list[Plan] = []
        for opened, mark, limit in (
            (self._open(images), chat.placeholder, max_slices),
            (self._open_videos(videos), chat.video_placeholder, self.config.video.max_slices),
        ):
            if not opened and mark == chat.video_placeholder:
                continue
            own = [self._plan(picture, limit, mode) for picture in opened]
            places = np.flatnonzero(tokens == self.tokenizer.special(mark))
            of_view, token_of_view = visual_places(own, chat)
            if len(places) != len(of_view):
                sizes = ", ".join(f"{plan.image}: {plan.visual_tokens}" for plan in own) or "none"
                raise PromptError(
                    f"{len(places)} placeholders among the ids, but {len(of_view)} visual tokens (per image {sizes}); "
                    f"the placeholder is {mark}"
                )
            view[places], view_token[places] = of_view + sum(len(plan.views) for plan in plans), token_of_view
            pixels, plans = pixels + opened, plans + own
        sample = EncodedSample(tokens, np.zeros(len(tokens), bool), view, view_token, tuple(plans))
        batch = self._batch(self._prepared(sample, pixels, plans, mode), mode)
        return np.asarray(_logits(self.params, batch, self.config, mode))[0, : len(tokens)]

    def generate(
        self,
        prompt: str | Conversation | Sequence[str | Conversation],
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        max_slices: int | None = None,
        mode: str | None = None,
        thinking: bool | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> str | list[str]:
        """Answers one prompt, or a batch of prompts of different lengths and image counts.

        Args:
          prompt: a question or a conversation (as in `prepare`), or a list of them.
          images: the question's images; for a list of questions, a list of images for each.
          videos: likewise.
          max_new_tokens: length limit of an answer, at least 1.
          temperature: 0 for greedy.
          top_k: keep the k likeliest tokens when sampling; 0 keeps all.
          top_p: keep the likeliest tokens of this total probability when sampling.
          seed: of sampling, from 0 to 2**32 - 1.
          repetition_penalty: above 1 against tokens of the prompt and the answer so far, as transformers'.
          stop: texts before which an answer ends.
          beams: more than 1 for beam search, at most 5, as transformers' `num_beams`; without sampling.
          length_penalty: of beam search: scores are divided by an answer's length to this power.
          early_stopping: of beam search: end when `beams` answers are finished.
          max_slices: slices per image at most; None for the config's limit.
          mode: "16x" or "4x"; None for the config's.
          thinking: whether to think first, as in `prepare`.
          stream: called with each new piece of text; for a single prompt only.

        Returns:
          The answer, or a list of them.

        Raises:
          ImageRefused, PromptError: as in `prepare`, or the answer may become too long; in a batch the error begins
            with the prompt's index, as in "prompt[2]: ".
          ValueError: a sampling option out of its range.
        """
        sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty=repetition_penalty)
        options = AnswerOptions(
            max_new_tokens, sampling, stop if isinstance(stop, str) else tuple(stop), beams, length_penalty,
            early_stopping,
        )  # fmt: skip
        single = is_single(prompt)
        if stream is not None and not single:
            raise PromptError("streaming is for a single prompt")
        prepared = []
        for index, request in enumerate(requests(prompt, images, videos)):
            try:
                prepared.append(self.prepare(*request, max_slices=max_slices, mode=mode, thinking=thinking))
                self.check_room(prepared[-1], max_new_tokens)
            except (PromptError, ImageRefused, TypeError) as error:
                if single:
                    raise
                raise type(error)(f"prompt[{index}]: {error}") from error
        if not prepared:
            return []
        each = [
            dataclasses.replace(options, sampling=dataclasses.replace(sampling, stream=index))
            for index in range(len(prepared))
        ]
        answers = [request.text for request in self.answer(prepared, each, stream=stream)]
        return answers[0] if single else answers

    def answer(
        self,
        prepared: Sequence[Prepared],
        options: Sequence[AnswerOptions],
        *,
        ends: frozenset[int] | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> list[Request]:
        """Answers prompts together, each with options of its own.

        Args:
          prepared: what `prepare` made.
          options: as many.
          ends: ids that end an answer; None for the model's own.
          stream: called with each new piece of the first answer's text.

        Returns:
          The requests, each with its answer's `tokens`, `text` and the `reason` of its end.
        """
        ends = self.ends if ends is None else ends
        tell = (lambda text, _: stream(text)) if stream else None
        requests = [
            Request(one.sample, one.pictures, asked, self.tokenizer, ends, None if number else tell)
            for number, (one, asked) in enumerate(zip(prepared, options, strict=True))
        ]
        shapes = shapes_for(
            min(sum(asked.beams for asked in options), max(MAX_ROWS, options[0].beams)),
            [len(one.token_ids) for one in prepared],
            max(asked.max_new_tokens for asked in options),
            *_views_and_patches([picture for one in prepared for picture in one.pictures]),
        )
        Runner(self.config, self._computed, self.encoder, shapes).run(requests)
        return requests

    def check_room(self, prepared: Prepared, max_new_tokens: int) -> None:
        """Raises PromptError where prompt and answer may become longer than `max_length` together."""
        length = len(prepared.token_ids)
        if length + max_new_tokens > self.max_length:
            raise PromptError(
                f"a prompt of {length} tokens and max_new_tokens={max_new_tokens} exceed max_length={self.max_length}"
            )

    def _open(self, images: Sequence[Image]) -> list[np.ndarray]:
        return [open_image(image, self.config.slicing.limits) for image in as_list(images, "image")]

    def _open_videos(self, videos: Sequence[Video]) -> list[np.ndarray]:
        return [picture for video in as_list(videos, "video") for picture in self._open_shown(video, True)]

    def _open_shown(self, source: Any, is_video: bool) -> list[np.ndarray]:
        limits = self.config.slicing.limits
        return open_video(source, self.config.video, limits) if is_video else [open_image(source, limits)]

    def _plan(self, image: np.ndarray, max_slices: int | None, mode: str | None) -> Plan:
        return plan_image(Size(*image.shape[:2]), self.config, mode, max_slices)

    def _picture(self, pixels: np.ndarray, plan: Plan, mode: str | None) -> Picture:
        return Picture(pixels, plan, mode or self.config.mode)

    def _prepared(
        self, sample: EncodedSample, pixels: Sequence[np.ndarray], plans: Sequence[Plan], mode: str | None
    ) -> Prepared:
        pictures = tuple(self._picture(image, plan, mode) for image, plan in zip(pixels, plans, strict=True))
        return Prepared(sample, pictures, self.config.tower.patch_size)

    def _batch(self, prepared: Prepared, mode: str | None) -> Batch:
        """A batch of one prompt; every static shape rounded up, so that similar prompts share a program."""
        views, patches = _views_and_patches(prepared.pictures)
        bucket = Bucket(
            rows=1,
            slots=room(views),
            tokens=room(len(prepared.token_ids), 32),
            patches=room(max(patches, 16), 16),
            patch_bytes=self.config.tower.patch_bytes,
        )
        slot_tokens = self.config.visual_tokens(bucket.patches, mode)
        return fill_batch([[(prepared.sample, prepared.views)]], bucket, slot_tokens)


_logits = jax.jit(uhd.logits, static_argnames=("config", "mode"))


def _checked_ids(token_ids: Any, vocab_size: int) -> np.ndarray:
    """int32[T]."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        kind = f"{ids.dtype}{list(ids.shape)}" if ids.size else "empty"
        raise PromptError(f"token_ids must be one list of at least one integer, but is {kind}")
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        place = outside[0]
        raise PromptError(f"token_ids[{place}] is {ids[place]}, but the model's ids go from 0 to {vocab_size - 1}")
    return ids.astype(np.int32)


def _views_and_patches(pictures: Sequence[Picture]) -> tuple[int, int]:
    """How many views pictures have together, and the patches of the largest."""
    views = [view.patch_grid.area for picture in pictures for view in picture.plan.views]
    return len(views), max(views, default=0)


def load(directory: str | Path, max_length: int = 32_768, dtype: str | None = None) -> Assistant:
    """Loads a model to talk to.

    Args:
      directory: a training workdir, a saved model, or a checkpoint folder of a whole model in PyTorch's layouts, such
        as MiniCPM-V 4.6 of transformers.
      max_length: as in `Assistant`.
      dtype: "float32", "bfloat16", or "float64" for parameters and computation in double, to be compared with a
        reference in double, which wants `jax_enable_x64`; pixels, weights of resizing and rotary angles stay
        float32, as PyTorch's do. None: what the model's config says.

    Raises:
      CheckpointError, ConvertError, TokenizerError: what is missing or does not fit, and where.
      ValueError: an unknown dtype, or float64 without `jax_enable_x64`.
    """
    if dtype not in (None, "float32", "bfloat16", "float64"):
        raise ValueError(f"no dtype {dtype!r}; there are float32, bfloat16 and float64")
    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError('dtype float64 needs jax.config.update("jax_enable_x64", True) first')
    directory = Path(directory)
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {problem}; give the folder of a training run or of a model")
    if (directory / "config.json").exists():  # no folder of ours has one
        with open_source(directory) as source:
            config, params = _imported(source)
        tokenizer = foreign_tokenizer(directory, config.chat)
    else:
        params, config = load_model(directory)
        tokenizer = load_tokenizer(directory / "tokenizer", config.chat)
    if dtype:
        config = dataclasses.replace(config, dtype=dtype)
        params = jax.tree.map(lambda leaf: leaf.astype("float64"), params) if dtype == "float64" else params
    return Assistant(config, params, tokenizer, max_length)


def foreign_tokenizer(folder: Path, chat: ChatConfig | None = None) -> Tokenizer:
    """The tokenizer of a foreign checkpoint, of SentencePiece's kind too; `chat` as in `load_tokenizer`."""
    if (folder / "tokenizer.json").is_file() or not sentencepiece.has_tokenizer(folder):
        return load_tokenizer(folder, chat)
    return Tokenizer(sentencepiece.tokenizer_json(folder), str(folder))


def _imported(source: Source) -> tuple[ModelConfig, Any]:
    """Config and float32 parameters of a whole model in a foreign layout, read tensor by tensor."""
    family = find_family(source)
    if set(family.parts) != {"tower", "connector", "decoder"}:
        raise tables.ConvertError(
            f"{source.path}: of the family {family.name}, which is no whole model that can answer"
        )
    config = family.config(source)
    abstract, dropped = _abstract_params(config), drops(family.dropped(config))
    moves = tables.match(family.table(config), source.tensors, abstract, dropped)
    params = {move.path: jnp.asarray(tables.load(move, source.read, np.float32)) for move in moves}
    return config, tables.unflatten(params)


def _abstract_params(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))
