"""What training knows of its samples from the indices that were made of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from uhd_jax.config import ChatConfig, ConfigError, DataConfig, ImageLimits
from uhd_jax.data.index import DataIndex, chat_key, index_path, index_stamp, kept_index, parts_of
from uhd_jax.data.known import Known, bits_of
from uhd_jax.data.sources import Source, check_data
from uhd_jax.data.sources.mixture import MixtureOptions
from uhd_jax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def known_samples(
    data: DataConfig, source: Source, chat: ChatConfig, tokenizer: Tokenizer, limits: ImageLimits = ImageLimits()
) -> Known | None:
    """What is known of a source's samples from the indices that were made of it; nothing is made here.

    Args:
      data: names the source, and its index unless that lies beside it.
      source: opened from it.
      chat: prompt form of the stage.
      tokenizer: of that prompt form.
      limits: what an image may be.

    Returns:
      None where there is no index. What is wrong with one that `data` does not name is said in the log.

    Raises:
      ConfigError: an index that `data` names is not there, or not one of this data and prompt form.
    """
    options = check_data(data)
    mixed = isinstance(options, MixtureOptions)
    parts = list(zip(parts_of(options), source.sources, strict=True)) if mixed else [(data, source)]
    key = chat_key(chat, tokenizer)
    found = [_usable(part, opened, {key: (chat, tokenizer)}, limits) for part, opened in parts]
    if all(index is None for index in found):
        return None
    starts, sizes, tokens, bits = [np.zeros(1, np.int64)], [], [], []
    for (_, opened), index in zip(parts, found, strict=True):
        first, count = starts[-1][-1], len(opened)
        if index is None:
            starts.append(np.full(count, first))
            tokens.append(np.zeros(count, np.int32))
            bits.append(bits_of(np.zeros(count, bool), np.zeros(count, np.int32), range(count)))
            continue
        texts = index.texts[key]
        starts.append(first + index.starts[1:])
        sizes.append(index.sizes)
        tokens.append(texts.tokens)
        bits.append(bits_of(index.answered, texts.trained, [*index.troubles, *texts.troubles]))
    return Known(*map(np.concatenate, (starts, sizes, tokens, bits)))


def _usable(
    data: DataConfig, source: Source, form: Mapping[str, tuple[ChatConfig, Tokenizer]], limits: ImageLimits
) -> DataIndex | None:
    """The index of a source that is no mixture, if it is right and has the lengths of a prompt form, by its key."""
    path = index_path(data)
    if path is None or not (data.index or path.is_file()):
        return None
    index = kept_index(path, index_stamp(data, len(source), limits), source, form)
    if index is not None and form.keys() <= index.texts.keys():
        return index
    if index is not None:
        trouble = "has no lengths of texts in this stage's prompt form"
    else:
        trouble = "is no index of this data as it is now" if path.is_file() else "is not there"
    if data.index:
        raise ConfigError(f"index: {path} {trouble}; make it with uhd-jax data index --anew")
    logger.warning(
        "%s %s, and is not used; uhd-jax data index --anew makes it anew, or in another place that data.index names",
        path,
        trouble,
    )
    return None
