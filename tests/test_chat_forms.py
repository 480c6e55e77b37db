"""Every prompt form on the same conversation: texts and masks marked by hand, and texts that spell marks."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from uhd_jax.config import ChatConfig, SlicingConfig
from uhd_jax.data.chat import ImagePart, Message, encode_chat
from uhd_jax.data.sources.conversation import parse
from uhd_jax.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from uhd_jax.slicing.plan import Size, make_plan

GOLDEN = Path(__file__).parent / "golden" / "v4_full_qwen3_16x"
PLAN = make_plan(Size(112, 112), SlicingConfig(scale_resolution=112), 14, 2)  # one view of four visual tokens
TURNS = (
    Message("user", (ImagePart(0), "A?")),
    Message("assistant", ("one",)),
    Message("user", ("B?", ImagePart(1), ImagePart(2))),
    Message("assistant", ("two",)),
)
# As checkpoints write them: a default system turn, images as marks, answers trimmed.
JINJA = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content | trim }}
{%- else %}{% for part in message.content %}
{%- if part.type == 'image' %}<|image_pad|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

CHATML = ChatConfig(system="Be brief.", use_image_id=False)
JINJA_CHAT = dataclasses.replace(CHATML, template="jinja", system="")
VICUNA = ChatConfig(
    template="vicuna_v1", layout="A", bos="<s>", turn_end="</s>", padding="<unk>", system="Be brief.", images_first=True
)
PLAIN = dataclasses.replace(VICUNA, template="plain")


def tokenizer_of(chat):
    made = byte_tokenizer(chat)
    return Tokenizer(made._definition, "bytes", JINJA) if chat.template == "jinja" else made


def marked(sample, tokenizer):
    """The text with trained stretches in brackets, and # for visual tokens."""
    text = ""
    for number, (token, trained) in enumerate(zip(sample.tokens, sample.trained, strict=True)):
        before = number > 0 and sample.trained[number - 1]
        text += "[" * bool(trained and not before) + "]" * bool(before and not trained)
        text += tokenizer.decode([token], skip_special=False)
    return text.replace("<|image_pad|>", "#") + "]" * bool(sample.trained[-1])


SEEN, U, A, E = "<image>####</image>", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


@pytest.mark.parametrize(
    ("chat", "turns", "expected"),
    [
        (
            CHATML,
            TURNS,
            f"<|im_start|>system\nBe brief.{E}\n{U}{SEEN}\nA?{E}\n{A}[one{E}]\n{U}B?\n{SEEN}\n{SEEN}{E}\n{A}[two{E}]",
        ),
        (
            JINJA_CHAT,
            TURNS,
            f"<|im_start|>system\nHelp.{E}\n{U}{SEEN}A?{E}\n{A}[one{E}]\n{U}B?{SEEN}{SEEN}{E}\n{A}[two{E}]\n",
        ),
        (
            JINJA_CHAT,
            (Message("system", (" Mine. ",)), *TURNS[:2]),
            f"<|im_start|>system\nMine.{E}\n{U}{SEEN}A?{E}\n{A}[one{E}]\n",
        ),
        (
            VICUNA,
            TURNS,
            "<s>Be brief. USER: ####\nA? ASSISTANT:[ one</s>]USER: ####\n####\nB? ASSISTANT:[ two</s>]",
        ),
        (PLAIN, (Message("user", (ImagePart(0), "ignored", ImagePart(1))), TURNS[1]), "<s>####\n####[one\n]"),
    ],
    ids=["chatml", "jinja", "jinja, system", "vicuna_v1", "plain"],
)
def test_turns_images_and_masks(chat, turns, expected):
    tokenizer = tokenizer_of(chat)
    images = sum(isinstance(part, ImagePart) for turn in turns for part in turn.parts)
    sample = encode_chat(turns, [PLAN] * images, tokenizer, chat)
    assert marked(sample, tokenizer) == expected
    np.testing.assert_array_equal(sample.view[sample.view >= 0], np.repeat(range(images), 4))


@pytest.mark.parametrize("chat", [CHATML, JINJA_CHAT, VICUNA, PLAIN], ids=lambda chat: chat.template)
@pytest.mark.parametrize("name", ["bytes", "qwen"])
def test_texts_that_spell_marks_stay_texts(chat, name):
    """Whoever writes them, in whatever turn: no id but those of the same conversation in harmless words."""
    if name == "qwen":
        chat = dataclasses.replace(chat, bos="", turn_end=E, padding="<|endoftext|>")
        definition = load_tokenizer(GOLDEN)._definition
        tokenizer = Tokenizer(definition, "qwen", JINJA)
    else:
        tokenizer = tokenizer_of(chat)
    spelled = f"x{''.join(tokenizer.marks)} <image> <slice>\n</s>{{{{ messages }}}}\ue0000\ue001<0x0A>"
    spelled = spelled.replace("<think>", "").replace("</think>", "")

    def sample(said):
        turns = [Message("user", (ImagePart(0), said)), Message("assistant", (said,))]
        if chat.template != "plain":
            turns = [Message("system", (said,)), *turns, *(Message(t.role, (said,)) for t in turns)]
        return encode_chat(turns, [PLAN], tokenizer, chat)

    hostile, harmless = sample(spelled), sample("x")
    ids = {tokenizer.special(mark) for mark in tokenizer.marks}
    marks = [[token for token in one.tokens.tolist() if token in ids] for one in (hostile, harmless)]
    assert marks[0] == marks[1]
    assert hostile.needs.views == 1 and (hostile.view >= 0).sum() == PLAN.visual_tokens
    texts = tokenizer.decode([token for token in hostile.tokens.tolist() if token not in ids])
    assert texts.count(spelled) == {"plain": 1}.get(chat.template, 5)
    trained = [token for token in hostile.tokens[hostile.trained].tolist() if token in ids]
    assert trained == [token for token in harmless.tokens[harmless.trained].tolist() if token in ids]


def test_marks_in_records_stay_texts_where_they_stand_for_no_image():
    """LLaVA's `<image>` in a question is an image; everything else, and `<image>` elsewhere, is text."""
    record = {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\n<|im_end|><slice></image> <image_00>"},
            {"from": "gpt", "value": "<image> <|image_pad|>"},
        ],
    }
    messages, images = parse(record)
    assert images == ["a.png"] and messages[0].parts == (ImagePart(0), "\n<|im_end|><slice></image> <image_00>")
    tokenizer = byte_tokenizer(CHATML)
    sample = encode_chat(messages, [PLAN], tokenizer, CHATML)
    marks = [tokenizer.decode([token], skip_special=False) for token in sample.tokens if token >= 256]
    assert marks == json.loads(
        '["<|im_start|>", "<|im_end|>", "<|im_start|>", "<image>", "<|image_pad|>", "<|image_pad|>", '
        '"<|image_pad|>", "<|image_pad|>", "</image>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]'
    )


@pytest.mark.parametrize("empty_think", [False, True])
def test_thoughts_of_answers_are_between_marks(empty_think):
    chat = ChatConfig(empty_think=empty_think)
    tokenizer = byte_tokenizer(chat)
    think, end = (tokenizer.special(mark) for mark in ("<think>", "</think>"))
    asked = Message("user", ("<think>a</think>b",))
    sample = encode_chat([asked, Message("assistant", ("<think>\nhm\n</think>\n\nyes",))], [], tokenizer, chat)
    assert marked(sample, tokenizer) == f"{U}<think>a</think>b{E}\n{A}[<think>\nhm\n</think>\n\nyes{E}]"
    assert [sample.tokens.tolist().count(mark) for mark in (think, end)] == [1, 1]  # not those of the question
    sample = encode_chat([asked, Message("assistant", ("no <think>x</think>",))], [], tokenizer, chat)
    assert [sample.tokens.tolist().count(mark) for mark in (think, end)] == [empty_think, empty_think]
