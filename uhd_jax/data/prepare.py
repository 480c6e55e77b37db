"""One sample as a stage trains on it: what chance does to its images, what is left of it in a row, and its pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uhd_jax.config import BucketConfig, ModelConfig, StageConfig
from uhd_jax.config.checks import require
from uhd_jax.data.augment import Alteration, Drawn, alter, draw
from uhd_jax.data.chat import EncodedSample, Message, Needs, encode_chat, needs_of
from uhd_jax.data.fitting import Reduction, cuttable, reduce_to_fit, without_oldest
from uhd_jax.data.known import BlockTokens, KnownSample
from uhd_jax.data.packing import fits
from uhd_jax.data.sources.mixture import Mixture
from uhd_jax.data.sources.protocol import Source, SourceError, pictures_of
from uhd_jax.data.tokenizer import Tokenizer
from uhd_jax.slicing.pixels import cut_views, least_size
from uhd_jax.slicing.plan import Plan, plan_image
from uhd_jax.slicing.sizes import Size


class Prepared(NamedTuple):
    """A sample before its pixels are read."""

    index: int  # in the source
    sample: EncodedSample | None  # None: planned from an index, its text is not read yet
    plans: tuple[Plan, ...]  # of its images
    needs: Needs  # of a row
    reduction: Reduction
    first_image: int  # of the sample in the source; those before it went with their turns
    alterations: tuple[Alteration, ...]  # one per image that is left


def check_ocr_parts(stage: StageConfig, parts: Sequence[str]) -> None:
    """Raises `ConfigError` where augment.ocr_parts names what is none of a mixture's parts; no parts: no mixture."""
    for name in stage.augment.ocr_parts:
        known = f"the parts of its mixture are {', '.join(parts)}" if parts else "its data is no mixture"
        require(name in parts, f"stage {stage.name!r}: augment.ocr_parts", f"{name!r}: {known}")


class Preparer:
    """Prepares the samples of a source for a stage; pickled into worker processes.

    Args:
      source: the samples.
      stage: limits of slices and turns, augmentation.
      model: of the stage (`ModelConfig.for_stage`).
      tokenizer: of the model.
      seed: of the stage.
      jpeg_draft: whether JPEGs may be decoded smaller than they are (`TrainConfig.jpeg_draft`).

    Raises:
      ConfigError: augment.ocr_parts names what is no part of the source.
    """

    def __init__(
        self,
        source: Source,
        stage: StageConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        seed: int,
        jpeg_draft: bool = False,
    ):
        check_ocr_parts(stage, source.parts if isinstance(source, Mixture) else ())
        self.source, self.stage, self.model = source, stage, model
        self._tokenizer, self._seed, self._jpeg_draft = tokenizer, seed, jpeg_draft
        self._block_tokens = BlockTokens(tokenizer, model.chat)

    def prepare(
        self,
        index: int,
        epoch: int,
        messages: Sequence[Message],
        sizes: Sequence[Size],
        rows: Sequence[BucketConfig],
    ) -> Prepared | None:
        """What the stage trains on in an epoch.

        Args:
          index: of the sample.
          epoch: how often it came before.
          messages: its conversation.
          sizes: of its images.
          rows: the shapes of rows; one of them must have room for it.

        Returns:
          The sample; None when it fits into no row.

        Raises:
          ImageRefused: an image cannot be sliced.
          ChatError: the prompt form has no place for the conversation.
        """
        drawn = self.drawn(index, epoch, sizes)
        tried: dict[Reduction, Prepared] = {}

        def fits_somewhere(reduction: Reduction) -> bool:
            tried[reduction] = self._encode(index, messages, drawn, reduction)
            return any(fits(tried[reduction].needs, row) for row in rows)

        stage, whole = self.stage, Reduction(self.stage.max_slices)
        if fits_somewhere(whole):
            return tried[whole]
        found = reduce_to_fit(fits_somewhere, stage.too_long, stage.max_slices, cuttable(messages))
        return tried[found] if found else None

    def from_index(self, index: int, epoch: int, known: KnownSample, rows: Sequence[BucketConfig]) -> Prepared | None:
        """As `prepare`, unread: the same but for the text, if the sample fits whole; None: it has to be read.

        Raises:
          ImageRefused: an image cannot be sliced.
        """
        drawn = self.drawn(index, epoch, known.sizes)
        whole = Reduction(self.stage.max_slices)
        plans = self._plans(drawn, whole)
        needs = needs_of(known.tokens + sum(map(self._block_tokens.of, plans)), plans)
        if not any(fits(needs, row) for row in rows):
            return None
        return Prepared(index, None, plans, needs, whole, 0, tuple(one.alteration for one in drawn))

    def encoded(self, prepared: Prepared) -> EncodedSample:
        """The sample as ids, read now if it has not been.

        Raises:
          SourceError: as `Source.messages`, or it is not what its index says.
          ChatError: the prompt form has no place for the conversation.
        """
        if prepared.sample is not None:
            return prepared.sample
        messages = self.source.messages(prepared.index)
        sample = encode_chat(messages, prepared.plans, self._tokenizer, self.model.chat)
        if sample.needs != prepared.needs or not sample.trained.any():
            found, said = sample.needs, prepared.needs
            raise SourceError(
                f"its index says {said.tokens} tokens and {said.views} views, some of them trained, but it has "
                f"{found.tokens}, {found.views} and {sample.trained.sum()}: uhd-jax data index --anew"
            )
        return sample

    def smallest(self, index: int, epoch: int, messages: Sequence[Message], sizes: Sequence[Size]) -> Prepared:
        """The whole conversation with one view per image, whether it fits or not."""
        return self._encode(index, messages, self.drawn(index, epoch, sizes), Reduction(1))

    def drawn(self, index: int, epoch: int, sizes: Sequence[Size]) -> list[Drawn]:
        """What chance decides about the images of a sample."""
        stage = self.stage
        part = self.source.part(index) if isinstance(self.source, Mixture) else ""
        return draw(sizes, stage.augment, self.model.slicing, stage.max_slices, (self._seed, index, epoch), part)

    def images(self, prepared: Prepared) -> list[np.ndarray]:
        """The images that are left, altered: uint8[H, W, 3] each. Raises as `Source.images`."""
        images = self.source.images(prepared.index)[prepared.first_image :]
        return [alter(image, alteration) for image, alteration in zip(images, prepared.alterations, strict=True)]

    def views(self, prepared: Prepared, into: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """The patches of all views, written to `into` as of `cut_views`. Raises as `Source.images`."""
        rooms, views = iter(into or ()), []
        patch_size = self.model.tower.patch_size
        least: list[Size | None] = [None] * prepared.first_image
        if self._jpeg_draft and prepared.sample is None:
            # An image that has a half of the size it was planned with would pass for one that was decoded smaller.
            sizes = self.source.sizes(prepared.index)
            if sizes != [alteration.image for alteration in prepared.alterations]:
                raise ValueError(f"images are of {[tuple(size) for size in sizes]}, planned with other sizes")
        for plan, alteration in zip(prepared.plans, prepared.alterations, strict=True):
            least.append(least_size(plan) if self._jpeg_draft and not alteration.changes else None)
        pictures = pictures_of(self.source, prepared.index, least if self._jpeg_draft else ())[prepared.first_image :]
        for picture, plan, alteration in zip(pictures, prepared.plans, prepared.alterations, strict=True):
            image = alter(np.asarray(picture), alteration) if alteration.changes else picture
            room = None if into is None else list(itertools.islice(rooms, len(plan.views)))
            views += cut_views(image, plan, patch_size, room, self._jpeg_draft and not alteration.changes)
        return views

    def _encode(
        self, index: int, messages: Sequence[Message], drawn: Sequence[Drawn], reduction: Reduction
    ) -> Prepared:
        kept, first = without_oldest(messages, reduction.rounds)
        left = drawn[first:]
        plans = self._plans(left, reduction)
        sample = encode_chat(kept, plans, self._tokenizer, self.model.chat)
        alterations = tuple(one.alteration for one in left)
        return Prepared(index, sample, plans, sample.needs, reduction, first, alterations)

    def _plans(self, drawn: Sequence[Drawn], reduction: Reduction) -> tuple[Plan, ...]:
        limit = reduction.max_slices
        return tuple(plan_image(one.alteration.size, self.model, None, limit, one.refill) for one in drawn)
