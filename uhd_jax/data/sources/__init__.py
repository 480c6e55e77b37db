"""Sources of samples: what a `DataConfig` can name, and records of the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from uhd_jax.config import ConfigError, DataConfig, ImageLimits, from_config_dict, to_dict
from uhd_jax.data.demo import DigitPages, DigitPagesOptions
from uhd_jax.data.images import ImageFolder, ImagesOptions
from uhd_jax.data.sources.array_record import ArrayRecordOptions, ArrayRecords
from uhd_jax.data.sources.arrow import ArrowDataset, ArrowOptions
from uhd_jax.data.sources.json_file import JsonFiles, JsonOptions
from uhd_jax.data.sources.mixture import Mixture, MixtureOptions
from uhd_jax.data.sources.parquet import Parquet, ParquetOptions
from uhd_jax.data.sources.protocol import Source, SourceError, pictures_of
from uhd_jax.data.sources.records import Records, RecordsOptions
from uhd_jax.data.sources.size_mix import SizeMix, SizeMixOptions
from uhd_jax.data.sources.tar import TarOptions, TarShards

__all__ = [
    "SOURCES",
    "Records",
    "Source",
    "SourceError",
    "SourceKind",
    "check_data",
    "facts_of",
    "make_source",
    "pictures_of",
]


class SourceKind(NamedTuple):
    """A source that a `DataConfig` can name."""

    options: type  # a dataclass: what `DataConfig.options` must be
    open: Callable[[Any, ImageLimits], Source]  # from these options


# By the name that `DataConfig.source` uses; programs may add their own.
SOURCES: dict[str, SourceKind] = {
    "array_record": SourceKind(ArrayRecordOptions, ArrayRecords),
    "arrow": SourceKind(ArrowOptions, ArrowDataset),
    "digit_pages": SourceKind(DigitPagesOptions, lambda options, limits: DigitPages(options)),
    "images": SourceKind(ImagesOptions, ImageFolder),
    "json": SourceKind(JsonOptions, JsonFiles),
    "mixture": SourceKind(MixtureOptions, lambda options, limits: _mix(options, limits)),
    "parquet": SourceKind(ParquetOptions, Parquet),
    "records": SourceKind(
        RecordsOptions, lambda options, limits: Records.from_jsonl(options.path, limits, options.image_root)
    ),
    "size_mix": SourceKind(SizeMixOptions, SizeMix),
    "tar": SourceKind(TarOptions, TarShards),
}


def check_data(data: DataConfig, key: str = "data") -> Any:
    """The checked options of the source that a config names, and of all parts of a mixture; nothing is opened.

    Args:
      data: source and options.
      key: where they stand, for errors: `config.train.stages[0].data`.

    Raises:
      ConfigError: an unknown source or option; the message holds the full key.
    """
    if data.source not in SOURCES:
        raise ConfigError(f"{key}.source: {data.source!r} is not one of {', '.join(SOURCES)}")
    options = from_config_dict(data.options, SOURCES[data.source].options, f"{key}.options")
    if isinstance(options, MixtureOptions):
        if data.index:
            raise ConfigError(f"{key}.index: a mixture has none of its own; name one in each of options.parts")
        for number, part in enumerate(options.parts):
            if part.source == "mixture":
                raise ConfigError(f"{key}.options.parts[{number}].source: a mixture cannot be part of another")
            check_data(DataConfig(part.source, part.options), f"{key}.options.parts[{number}]")
    return options


def facts_of(data: DataConfig) -> dict[str, Any]:
    """A source and its options as JSON types, without indices: with one or without, the samples are the same."""
    facts = to_dict(data)
    for one in (facts, *(facts["options"].get("parts", ()) if data.source == "mixture" else ())):
        one.pop("index", None)
    return json.loads(json.dumps(facts))


def make_source(data: DataConfig, limits: ImageLimits = ImageLimits(), key: str = "data") -> Source:
    """The source that a config names; `key` as in `check_data`.

    Raises:
      ConfigError: an unknown source or option.
      SourceError: a file of the source is unreadable or malformed.
    """
    options = check_data(data, key)
    return SOURCES[data.source].open(options, limits)


def _mix(options: MixtureOptions, limits: ImageLimits) -> Mixture:
    return Mixture(options, [make_source(DataConfig(part.source, part.options), limits) for part in options.parts])
