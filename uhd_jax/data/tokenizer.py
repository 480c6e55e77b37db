"""Text to ids and back: a thin class over the `tokenizers` library.

A *mark* is an added token that steers the model: `<|im_end|>`, `<image>`, `<think>`. A mark inside a text is text, so
`encode` never makes one; whoever means a mark asks for it by name with `special`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from uhd_jax.config import ChatConfig
from uhd_jax.data import chat_template

TEMPLATE_FILE = "chat_template.jinja"
THINK_START = "<think>"
THINK_END = "</think>"
_REMEMBERED = 256  # texts whose ids are kept: a sample that does not fit is encoded again and again


class TokenizerError(ValueError):
    """The tokenizer cannot be read, lacks a mark, or would let text pass for a mark."""


class Tokenizer:
    """Encodes and decodes with one tokenizer.json.

    Args:
      definition: the text of a tokenizer.json.
      name: how errors call this tokenizer, e.g. the path of the file.
      chat_template: the Jinja template that came with it, for `ChatConfig.template` "jinja"; empty: none.

    Raises:
      TokenizerError: the text is no tokenizer, or its model reads one of its own marks out of plain text.
    """

    def __init__(self, definition: str, name: str, chat_template: str = ""):
        self.name = name
        self.chat_template = chat_template
        self._definition = definition
        try:
            content = json.loads(definition)
            if not (isinstance(content, dict) and isinstance(content.get("added_tokens"), list)):
                raise ValueError("no JSON object with a list added_tokens")
            added = content["added_tokens"]
            # Only tokens flagged special are neutralised by the library; think tags usually are not, but they steer.
            content["added_tokens"] = [token | {"special": _is_mark(token)} for token in added]
            self._library = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"tokenizer {name}: not a tokenizer.json ({error})") from None
        self._library.encode_special_tokens = True  # that is: encode them as the text they are
        self._ids_of = functools.lru_cache(_REMEMBERED)(self._encode)
        self._marks = {token["content"]: token["id"] for token in added if _is_mark(token)}
        self._hidden = {token["id"] for token in added if token["special"]}
        ids = set(self._marks.values())
        for mark in self._marks:
            if not ids.isdisjoint(self.encode(mark)):
                raise TokenizerError(f"tokenizer {name}: the plain text {mark!r} encodes to a mark; it cannot be used")
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values())

    def __reduce__(self):
        return Tokenizer, (self._definition, self.name, self.chat_template)

    @property
    def marks(self) -> tuple[str, ...]:
        """All of them, the longest first."""
        return tuple(sorted(self._marks, key=lambda mark: -len(mark)))

    def encode(self, text: str) -> list[int]:
        """Ids of a text; marks written in it are encoded like any other characters."""
        return self._ids_of(text).tolist()

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.int32)

    def special(self, text: str) -> int:
        """Id of a mark, e.g. `<|im_end|>`.

        Raises:
          TokenizerError: the tokenizer has no such mark.
        """
        if text not in self._marks:
            raise TokenizerError(
                f"tokenizer {self.name}: has no special token {text!r}; add it or change config.model.chat"
            )
        return self._marks[text]

    def has(self, text: str) -> bool:
        """Whether `special` knows this mark."""
        return text in self._marks

    def extended(self, marks: Sequence[str]) -> Tokenizer:
        """The same tokenizer with more marks; those that are no words of it yet get the ids after its last."""
        if not marks:
            return self
        library = tokenizers.Tokenizer.from_str(self._definition)
        library.add_special_tokens([tokenizers.AddedToken(mark, normalized=False, special=True) for mark in marks])
        return Tokenizer(library.to_str(), self.name, self.chat_template)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids. `skip_special` leaves out the tokens that the tokenizer itself flags as special."""
        kept = [int(i) for i in ids if not (skip_special and int(i) in self._hidden)]
        return self._library.decode(kept, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes `folder/tokenizer.json`, and the chat template if any, so that `load_tokenizer` makes the same."""
        Path(folder, "tokenizer.json").write_text(self._definition, encoding="utf-8")
        if self.chat_template:
            Path(folder, TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")


class StreamDecoder:
    """Text of a growing list of ids, in pieces that never end in half a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []  # ids of the last piece: some decoders look at the token before
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Adds one id; returns the text that became certain with it, often empty."""
        self._pending.append(int(token))
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What is left at the end; an unfinished character comes out as U+FFFD."""
        text = self._new_text()
        self._pending = []
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context, self._skip_special)
        return self._tokenizer.decode(self._context + self._pending, self._skip_special)[len(before) :]


def byte_tokenizer(chat: ChatConfig | None = None) -> Tokenizer:
    """The built-in tokenizer: id = byte for 0 to 255, then the marks of `chat`, the think tags and `chat.words`."""
    chat = chat or ChatConfig()
    marks = (
        *(chat.padding, chat.turn_start, chat.turn_end, chat.placeholder),
        *(chat.image_start, chat.image_end, chat.slice_start, chat.slice_end, chat.image_id_start, chat.image_id_end),
        *((chat.bos,) if chat.bos else ()),
        *(THINK_START, THINK_END),
    )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + i, "content": text, "special": text in marks[:-2], **flags}
            for i, text in enumerate(dict.fromkeys((*marks, *chat.words)))
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": {char: byte for byte, char in enumerate(_byte_alphabet())}, "merges": []},
    }
    return Tokenizer(json.dumps(definition), "bytes")


def load_tokenizer(path: str | Path, chat: ChatConfig | None = None) -> Tokenizer:
    """The tokenizer of `ChatConfig.tokenizer`: "bytes", a tokenizer.json, or a folder that holds one.

    With a folder comes its chat template: `chat_template.jinja`, or as older ones have it in tokenizer_config.json.

    Raises:
      TokenizerError: the file is missing or is not a tokenizer, or `chat` needs its chat template and that is no Jinja.
    """
    if str(path) == "bytes":
        return byte_tokenizer(chat)
    file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    try:
        template = _chat_template(Path(path)) if Path(path).is_dir() else ""
        if template and chat is not None and chat.template == "jinja":
            chat_template.compiled(template)
        return Tokenizer(file.read_text(encoding="utf-8"), str(file), template)
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"tokenizer {file}: cannot be read ({error})") from None
    except chat_template.TemplateError as error:
        raise TokenizerError(f"tokenizer {file}: {error}") from None


def _chat_template(folder: Path) -> str:
    """The chat template of a folder; empty where it has none."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    try:
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") or ""
    except FileNotFoundError:
        return ""
    except (ValueError, AttributeError) as error:
        raise TokenizerError(f"tokenizer {config}: not a JSON object ({error})") from None
    if isinstance(template, str):
        return template
    try:
        return {one["name"]: one["template"] for one in template}.get("default", "")
    except (KeyError, TypeError):
        raise TokenizerError(f"tokenizer {config}: chat_template is neither a text nor a list of named ones") from None


def _is_mark(token: dict) -> bool:
    """Whether an added token is a mark rather than a word or a run of blanks added to the vocabulary."""
    return token["special"] or (token["content"].startswith("<") and token["content"].endswith(">"))


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]
