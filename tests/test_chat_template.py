"""Chat templates of checkpoints: kept with the tokenizer, and the one that an export writes."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest

from uhd_jax.config import ChatConfig, SlicingConfig
from uhd_jax.convert.minicpmv46_files import chat_template
from uhd_jax.data.chat import ImagePart, Message, encode_chat
from uhd_jax.data.tokenizer import Tokenizer, TokenizerError, byte_tokenizer, load_tokenizer
from uhd_jax.slicing.plan import Size, make_plan

PLAN = make_plan(Size(60, 80), SlicingConfig(scale_resolution=56), 14, 2)
TURNS = [
    Message("user", ("What is this?", ImagePart(0))),
    Message("assistant", (" A seven. ",)),
    Message("user", ("Sure?",)),
    Message("assistant", ("Yes",)),
]


@pytest.mark.parametrize("system", ["", "Be kind."])
@pytest.mark.parametrize(
    "chat",
    [
        ChatConfig(),
        ChatConfig(empty_think=True),
        ChatConfig(empty_think=True, open_think=True),
        ChatConfig(open_think=True, images_first=True),
    ],
    ids=["plain", "empty_think", "both", "open_think"],
)
def test_the_exported_template_is_the_form_chatml(chat, system):
    chat = dataclasses.replace(chat, system=system)
    plain = byte_tokenizer(chat)
    tokenizer = Tokenizer(plain._definition, "bytes", chat_template(chat))
    conversations = [
        TURNS[:1],
        [Message("user", (" x ", ImagePart(0), "", "y"))],
        [Message("system", ("s",)), *TURNS],
        [*TURNS[:2], Message("user", ("\n z",))],
    ]
    for messages in conversations:
        plans = [PLAN] * sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
        for generate, thinking in ((True, None), (True, True), (True, False), (False, None)):
            if generate and messages[-1].role == "assistant":
                continue
            forms = [
                encode_chat(messages, plans, tokenizer, dataclasses.replace(chat, template=form), generate, thinking)
                for form in ("chatml", "jinja")
            ]
            assert tokenizer.decode(forms[0].tokens, False) == tokenizer.decode(forms[1].tokens, False)
            np.testing.assert_array_equal(forms[0].tokens, forms[1].tokens)
            np.testing.assert_array_equal(forms[0].trained, forms[1].trained)


def test_a_tokenizer_keeps_its_template(tmp_path):
    made = Tokenizer(byte_tokenizer()._definition, "bytes", "{{ messages }}")
    made.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"
    assert pickle.loads(pickle.dumps(made)).chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path).chat_template == ""
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    for value, expected in (("text", "text"), (named, "d"), (None, "")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert load_tokenizer(tmp_path).chat_template == expected
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [3]}))
    with pytest.raises(TokenizerError, match="tokenizer_config.json: chat_template is neither a text nor a list"):
        load_tokenizer(tmp_path)


def test_the_form_jinja_needs_a_template():
    with pytest.raises(TokenizerError, match="has no chat_template.jinja"):
        encode_chat(TURNS[:1], [PLAN], byte_tokenizer(), ChatConfig("jinja"), True)
