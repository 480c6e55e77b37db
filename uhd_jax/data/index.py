"""An index of a source: sizes of all images and lengths of all texts, kept in a small file next to the data.

Sizes come from headers; no pixel is decoded. How many tokens a sample has follows from its text and the plans of its
images, and both parts are apart in the index: sizes serve every slicing, and a text is counted once per prompt form and
tokenizer, with each image as one view of one visual token. `data.known` and `analysis.data_stats` put them together
again, to plan rows and to describe the data.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uhd_jax.config import ChatConfig, ConfigError, DataConfig, ImageLimits, to_dict
from uhd_jax.data import workers
from uhd_jax.data.chat import ChatError, ImagePart, encode_chat
from uhd_jax.data.images import ImageFolder, images_below
from uhd_jax.data.known import REFERENCE
from uhd_jax.data.sources import SOURCES, Source, SourceError, check_data, facts_of, make_source
from uhd_jax.data.sources.files import DataFile, find_files, is_url
from uhd_jax.data.sources.mixture import MixtureOptions
from uhd_jax.data.tokenizer import Tokenizer, load_tokenizer
from uhd_jax.data.windows import MALFORMED, REFUSED, says_something
from uhd_jax.slicing.plan import ImageRefused, Size

SUFFIX = ".uhd-index.npz"
STRETCH = 512  # samples that a worker reads at a time
_VERSION = 1
_COMPARED = 256  # samples read anew before an index is used again: what stands in a folder shows no time of change
_READERS = 16  # threads for that


class Trouble(NamedTuple):
    """Why a sample cannot be used."""

    counter: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Texts:
    """Lengths of N samples in one prompt form and tokenizer, their images as `REFERENCE`."""

    tokens: np.ndarray  # int32[N]; 0 for a sample that is in trouble
    trained: np.ndarray  # int32[N]
    troubles: dict[int, Trouble]  # by the number of the sample


@dataclasses.dataclass(frozen=True)
class DataIndex:
    """Sizes of the images of N samples, and their texts by `chat_key`."""

    starts: np.ndarray  # int64[N + 1]: images of sample i are sizes[starts[i]:starts[i + 1]]
    sizes: np.ndarray  # int32[images, 2], (height, width)
    answered: np.ndarray  # bool[N]: every answer says something
    troubles: dict[int, Trouble]  # samples whose images cannot be opened, or whose record is malformed
    texts: dict[str, Texts]
    parts: tuple[int, ...] = ()  # of a mixture: samples of each part

    def __len__(self) -> int:
        return len(self.starts) - 1

    @functools.cached_property
    def images(self) -> np.ndarray:
        """int64[N]: images per sample; 0 for one in trouble."""
        return np.diff(self.starts)

    def sizes_of(self, sample: int) -> list[Size]:
        """The sizes of a sample's images."""
        return [Size(*size) for size in self.sizes[self.starts[sample] : self.starts[sample + 1]].tolist()]


def chat_key(chat: ChatConfig, tokenizer: Tokenizer) -> str:
    """Names a prompt form with its tokenizer. A tokenizer that has moved is the same one."""
    facts = to_dict(dataclasses.replace(chat, tokenizer=""))
    definition, _, template = tokenizer.__reduce__()[1]
    return hashlib.sha256(json.dumps([facts, definition, template], sort_keys=True).encode()).hexdigest()[:16]


def index_path(data: DataConfig) -> Path | None:
    """Where an index is kept: in the file that `data` names, else beside the file, or in the folder, that the source
    names; None where it names none.

    Raises:
      ConfigError: the file that `data` names lies in a bucket.
    """
    if data.index:
        if is_url(data.index):
            raise ConfigError(f"index: {data.index}: is written and read on a local disk; name a path there")
        return Path(data.index)
    name = data.options.get("path")
    if not isinstance(name, str) or not (os.path.exists(name) or _matches(name)):
        return None
    path = Path(name)
    return path / f"data{SUFFIX}" if path.is_dir() else path.with_name(re.sub(r"[*?\[\]]+", "_", path.name) + SUFFIX)


def _matches(pattern: str) -> list[str]:
    """Files that a pattern in a folder names; none for a pattern of folders, which has no place of its own."""
    folder, name = os.path.split(pattern)
    return glob.glob(os.path.join(glob.escape(folder), name)) if os.path.isdir(folder or ".") else []


def open_index(
    data: DataConfig,
    chats: Sequence[ChatConfig],
    limits: ImageLimits = ImageLimits(),
    path: Path | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, count: None,
    anew: bool = False,
) -> tuple[DataIndex, bool]:
    """The index of a source, from its file where that is still right, else made and written.

    Args:
      data: the source.
      chats: prompt forms whose lengths are wanted, with the tokenizers that they name; may be none.
      limits: what an image may be.
      path: the file of the index; None: not kept. The parts of a mixture are kept each in its own place.
      processes: that read the data.
      progress: called with samples done and samples in all.
      anew: make it in any case.

    Returns:
      The index, and whether it had to be made.

    Raises:
      ConfigError: the source is misconfigured, or the file is there and no index.
      SourceError, NoImages, TokenizerError: the source or a tokenizer cannot be opened.
      WorkerError: a process is gone.
      OSError: the file cannot be written.
    """
    options = check_data(data)
    if isinstance(options, MixtureOptions):
        return _open_parts(options, chats, limits, processes, progress, anew)
    source = make_source(data, limits)
    tokenizers = {
        key: (chat, tokenizer)
        for chat in chats
        for tokenizer in [load_tokenizer(chat.tokenizer, chat)]
        for key in [chat_key(chat, tokenizer)]
    }
    stamp = index_stamp(data, len(source), limits)
    if path and path.exists() and not path.name.endswith(SUFFIX) and not _is_index(path):
        raise ConfigError(f"index: {path} is there, but no index that can be read; name another file, or remove it")
    kept = kept_index(path, stamp, source, tokenizers) if path and not anew else None
    missing = [chat for key, (chat, _) in tokenizers.items() if kept is None or key not in kept.texts]
    if kept is not None and not missing:
        return kept, False
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)  # not only when all is read
    made = _make(_Job(data, limits, tuple(missing), kept is None), len(source), processes, progress)
    if kept is not None:
        lost = {row: trouble for row, trouble in made.troubles.items() if row not in kept.troubles}
        for texts in made.texts.values():
            for array in (texts.tokens, texts.trained):
                array[list(kept.troubles)] = 0  # whose images nobody has looked at this time
            texts.troubles.update(lost)  # rows that could be read the last time
        made = dataclasses.replace(kept, texts={**kept.texts, **made.texts})
    if path:
        _save(path, made, stamp)
    return made, True


def _open_parts(
    options: MixtureOptions,
    chats: Sequence[ChatConfig],
    limits: ImageLimits,
    processes: int,
    progress: Callable[[int, int], None],
    anew: bool,
) -> tuple[DataIndex, bool]:
    """The index of a mixture, out of those of its parts."""
    parts = parts_of(options)
    opened = [open_index(part, chats, limits, index_path(part), processes, progress, anew) for part in parts]
    indices = [index for index, _ in opened]
    firsts = np.cumsum([0, *map(len, indices)]).tolist()

    def joined(kinds: Iterable[dict[int, Trouble]]) -> dict[int, Trouble]:
        pairs = zip(firsts, kinds, strict=False)
        return {first + sample: trouble for first, kind in pairs for sample, trouble in kind.items()}

    texts = {
        key: Texts(
            np.concatenate([index.texts[key].tokens for index in indices]),
            np.concatenate([index.texts[key].trained for index in indices]),
            joined(index.texts[key].troubles for index in indices),
        )
        for key in {chat_key(chat, load_tokenizer(chat.tokenizer, chat)) for chat in chats}
    }
    images = np.concatenate([index.images for index in indices])
    index = DataIndex(
        starts=np.concatenate(([0], images.cumsum())),
        sizes=np.concatenate([index.sizes for index in indices]),
        answered=np.concatenate([index.answered for index in indices]),
        troubles=joined(index.troubles for index in indices),
        texts=texts,
        parts=tuple(map(len, indices)),
    )
    return index, any(made for _, made in opened)


def parts_of(options: MixtureOptions) -> list[DataConfig]:
    """The parts of a mixture as data of their own."""
    return [DataConfig(part.source, part.options, part.index) for part in options.parts]


class Measured(NamedTuple):
    """What an index says of one sample."""

    sizes: list[Size]
    answered: bool
    trouble: Trouble | None
    texts: dict[str, tuple[int, int] | Trouble]  # tokens and trained tokens by `chat_key`


def _where(source: Source, sample: int) -> str:
    named = getattr(source, "where", None)  # a source of the user's own may lack it
    return named(sample) if named else ""


def measure(
    source: Source, sample: int, chats: Mapping[str, tuple[ChatConfig, Tokenizer]], sizes: bool = True
) -> Measured:
    """Looks at a sample; without `sizes`, not at its images."""
    try:
        messages = source.messages(sample)
        found = source.sizes(sample) if sizes else []
    except ImageRefused as error:
        return Measured([], False, Trouble(REFUSED, str(error)), {})
    except SourceError as error:
        return Measured([], False, Trouble(MALFORMED, str(error).removeprefix(f"{_where(source, sample)}: ")), {})
    parts = [part for message in messages for part in message.parts if not isinstance(part, str)]
    images = sum(1 if isinstance(part, ImagePart) else part.pictures for part in parts)
    if sizes and images != len(found):
        reason = f"{len(found)} images, but the messages show {images}"
        return Measured([], False, Trouble(MALFORMED, reason), {})
    lengths: dict[str, tuple[int, int] | Trouble] = {}
    for key, (chat, tokenizer) in chats.items():
        try:
            encoded = encode_chat(messages, [REFERENCE] * images, tokenizer, chat)
            lengths[key] = len(encoded.tokens), int(encoded.trained.sum())
        except ChatError as error:
            lengths[key] = Trouble(MALFORMED, str(error))
    return Measured(found, all(map(says_something, messages)), None, lengths)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Measures stretches of samples."""

    data: DataConfig
    limits: ImageLimits
    chats: tuple[ChatConfig, ...]
    sizes: bool

    def open(self) -> Callable[[range], list]:
        source = make_source(self.data, self.limits)
        chats = {}
        for chat in self.chats:
            tokenizer = load_tokenizer(chat.tokenizer, chat)
            chats[chat_key(chat, tokenizer)] = chat, tokenizer
        return lambda stretch: [measure(source, sample, chats, self.sizes) for sample in stretch]


def _make(job: _Job, count: int, processes: int, progress: Callable[[int, int], None]) -> DataIndex:
    images, answered = np.zeros(count, np.int64), np.zeros(count, bool)
    sizes: list[np.ndarray] = []
    troubles: dict[int, Trouble] = {}
    texts: dict[str, Texts] = {}
    for chat in job.chats:
        key = chat_key(chat, load_tokenizer(chat.tokenizer, chat))
        texts[key] = Texts(np.zeros(count, np.int32), np.zeros(count, np.int32), {})
    stretches = workers.stretches(count, STRETCH)
    for stretch, results in zip(stretches, workers.run(job, stretches, processes), strict=True):
        found = [size for measured in results for size in measured.sizes]
        sizes.append(np.array(found, np.int32).reshape(-1, 2))
        for sample, measured in zip(stretch, results, strict=True):
            images[sample], answered[sample] = len(measured.sizes), measured.answered
            if measured.trouble:
                troubles[sample] = measured.trouble
            for key, length in measured.texts.items():
                if isinstance(length, Trouble):
                    texts[key].troubles[sample] = length
                else:
                    texts[key].tokens[sample], texts[key].trained[sample] = length
        progress(stretch.stop, count)
    all_sizes = np.concatenate(sizes) if sizes else np.zeros((0, 2), np.int32)
    return DataIndex(np.concatenate(([0], images.cumsum())), all_sizes, answered, troubles, texts)


def index_stamp(data: DataConfig, count: int, limits: ImageLimits) -> dict[str, Any]:
    """By which an index is known to be of this data."""
    return {"version": _VERSION, "count": count, "data": data_stamp(data), "limits": to_dict(limits)}


def kept_index(
    path: Path, stamp: Mapping[str, Any], source: Source, forms: Mapping[str, tuple[ChatConfig, Tokenizer]]
) -> DataIndex | None:
    """The index of a file, if it is of this data and some samples are still what it says; nothing is made here.

    Args:
      path: the file.
      stamp: of the data (`index_stamp`).
      source: the data; no mixture.
      forms: prompt forms that are compared too, by `chat_key`, if the index has them.
    """
    kept = _load(path, stamp)
    return kept if kept is not None and _still_right(kept, source, forms) else None


def _still_right(kept: DataIndex, source: Source, tokenizers: Mapping[str, tuple[ChatConfig, Tokenizer]]) -> bool:
    """Whether some samples, evenly spread, are still what the index says."""
    known = {key: pair for key, pair in tokenizers.items() if key in kept.texts}
    spread = np.linspace(0, len(kept) - 1, min(len(kept), _COMPARED)).astype(int).tolist()
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:  # a bucket takes its time over each
        looked_at = list(pool.map(lambda sample: measure(source, sample, known), spread))
    for sample, measured in zip(spread, looked_at, strict=True):
        if measured.sizes != kept.sizes_of(sample) or (measured.trouble is None) == (sample in kept.troubles):
            return False
        for key, length in measured.texts.items():
            texts = kept.texts[key]
            said = texts.troubles.get(sample) or (int(texts.tokens[sample]), int(texts.trained[sample]))
            if length != said:
                return False
    return True


def data_stamp(data: DataConfig) -> list[Any]:
    """The options of a source, and sizes and states of the files that it reads its rows from, however deep they lie.

    Raises:
      SourceError: the path names no file.
    """
    facts: list[Any] = [facts_of(data)]
    parts = [(part["source"], part.get("options", {})) for part in data.options.get("parts", ())]
    for source, options in [(data.source, data.options), *parts]:
        if isinstance(path := options.get("path"), str):
            digest = hashlib.sha256()
            for name in _files_of(source, path):
                try:
                    file = DataFile(name)
                except SourceError:
                    if SOURCES[source].open is ImageFolder:  # a link to nowhere: its sample is in trouble
                        continue
                    raise
                digest.update(f"{name!r} {file.size} {file.stamp}\n".encode())
            facts.append(digest.hexdigest())
    return json.loads(json.dumps(facts))


def _files_of(source: str, path: str) -> list[str]:
    """The files that a source reads; of the user's own sources and of Arrow's the path, or all below that folder."""
    opened = SOURCES[source].open
    if opened is ImageFolder:
        return [os.path.join(path, name) for name in images_below(path)]
    if suffixes := getattr(opened, "suffixes", ()):
        return find_files(path, *suffixes)
    if os.path.isfile(path):
        return [path]
    found = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names]
    return sorted(name for name in found if not os.path.basename(name).startswith(".") and not name.endswith(SUFFIX))


def _save(path: Path, index: DataIndex, stamp: Mapping[str, Any]) -> None:
    arrays = {"starts": index.starts, "sizes": index.sizes, "answered": index.answered}
    meta = dict(stamp) | {"troubles": _to_json(index.troubles), "texts": {}}
    for key, texts in index.texts.items():
        arrays |= {f"{key}.tokens": texts.tokens, f"{key}.trained": texts.trained}
        meta["texts"][key] = _to_json(texts.troubles)
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _is_index(path: Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return "version" in json.loads(arrays["meta"].tobytes())
    except Exception:  # zipfile, zlib, NumPy and JSON have many words for damaged bytes
        return False


def _load(path: Path, stamp: Mapping[str, Any]) -> DataIndex | None:
    """The index of a file; None where there is none, or it is damaged or of other data."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            if any(meta.get(key) != value for key, value in stamp.items()):
                return None
            texts = {
                key: Texts(arrays[f"{key}.tokens"], arrays[f"{key}.trained"], _from_json(troubles))
                for key, troubles in meta["texts"].items()
            }
            troubles = _from_json(meta["troubles"])
            return DataIndex(arrays["starts"], arrays["sizes"], arrays["answered"], troubles, texts)
    except Exception:  # zipfile, zlib, NumPy and JSON have many words for damaged bytes
        return None


def _to_json(troubles: Mapping[int, Trouble]) -> list[list[Any]]:
    return [[sample, *trouble] for sample, trouble in troubles.items()]


def _from_json(values: Sequence[Sequence[Any]]) -> dict[int, Trouble]:
    return {sample: Trouble(*rest) for sample, *rest in values}
