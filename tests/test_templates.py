"""Prompt forms of v1 and v2: exact texts, what is trained, and the golden sequences of layouts A and B."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from uhd_jax.config import (
    ChatConfig,
    CompressorConfig,
    ConfigError,
    ConnectorConfig,
    DecoderConfig,
    ModelConfig,
    SlicingConfig,
)
from uhd_jax.data.chat import ChatError, ImagePart, Message, encode_chat, visual_places
from uhd_jax.data.tokenizer import Tokenizer, TokenizerError, byte_tokenizer
from uhd_jax.slicing.plan import Size, make_plan

GOLDEN = np.load(Path(__file__).parent / "golden" / "f_glue_layouts.npz")
SLICING = SlicingConfig(rule="v1", scale_resolution=112)
SYSTEM = "A chat."
VICUNA = ChatConfig(
    template="vicuna_v1",
    layout="A",
    bos="<s>",
    turn_end="</s>",
    padding="<unk>",
    placeholder="<#>",
    system=SYSTEM,
    images_first=True,
)
PLAIN = dataclasses.replace(VICUNA, template="plain")
QWEN = ChatConfig(layout="A", placeholder="<#>", train_turn_marks=True, system=SYSTEM, images_first=True)
TOKENIZER = byte_tokenizer(VICUNA)
TURNS = [
    Message("user", ("What is this?", ImagePart(0))),
    Message("assistant", (" A seven. ",)),
    Message("user", ("Sure?",)),
    Message("assistant", ("Yes",)),
]


def plan_of(height, width, queries=4, slicing=SLICING):
    return make_plan(Size(height, width), slicing, 14, 0, 7, queries)


SMALL, SLICED = plan_of(100, 100), plan_of(100, 200)


def marked(sample, tokenizer=TOKENIZER):
    """The text with trained stretches in square brackets."""
    text = ""
    for number, (token, trained) in enumerate(zip(sample.tokens, sample.trained, strict=True)):
        before = number > 0 and sample.trained[number - 1]
        text += "[" * bool(trained and not before) + "]" * bool(before and not trained)
        text += tokenizer.decode([token], skip_special=False)
    return text.replace("<#>", "#") + "]" * bool(sample.trained[-1])


def test_vicuna():
    sample = encode_chat(TURNS, [SMALL], TOKENIZER, VICUNA)
    assert marked(sample) == (
        "<s>A chat. USER: ####\nWhat is this? ASSISTANT:[ A seven.</s>]USER: Sure? ASSISTANT:[ Yes</s>]"
    )


def test_turn_marks_are_of_chatml_only():
    sample = encode_chat(TURNS, [SMALL], TOKENIZER, dataclasses.replace(VICUNA, train_turn_marks=True))
    np.testing.assert_array_equal(sample.trained, encode_chat(TURNS, [SMALL], TOKENIZER, VICUNA).trained)


def test_vicuna_with_slices_in_layouts_a_and_b():
    question = [Message("user", (ImagePart(0), "Q")), Message("assistant", ("a",))]
    for layout, block in (("A", "####,####\n####"), ("B", "####\n####\n,####")):
        sample = encode_chat(question, [SLICED], TOKENIZER, dataclasses.replace(VICUNA, layout=layout))
        assert marked(sample) == f"<s>A chat. USER: {block}\nQ ASSISTANT:[ a</s>]"


def test_vicuna_without_image_or_system_and_with_an_empty_answer():
    chat = dataclasses.replace(VICUNA, system="", bos="")
    text = [Message("user", ("Hi",)), Message("assistant", ("",))]
    assert marked(encode_chat(text, [], TOKENIZER, chat)) == "USER: Hi ASSISTANT:[</s>]"
    own = [Message("system", ("Mine.",)), *text]
    assert marked(encode_chat(own, [], TOKENIZER, VICUNA)) == "<s>Mine. USER: Hi ASSISTANT:[</s>]"
    with pytest.raises(ChatError, match="no place for a system message"):
        encode_chat([*text, *own], [], TOKENIZER, VICUNA)


def test_plain():
    sample = encode_chat(TURNS[:2], [SLICED], TOKENIZER, PLAIN)
    assert marked(sample) == "<s>####,####\n####[A seven.\n]"
    both = [Message("user", (ImagePart(0), ImagePart(1))), Message("assistant", ("",))]
    assert marked(encode_chat(both, [SMALL, SMALL], TOKENIZER, PLAIN)) == "<s>####\n####[\n]"


@pytest.mark.parametrize(
    ("messages", "images", "generate", "complaint"),
    [
        (TURNS, 1, False, "needs the turns.*'user', 'assistant', 'user'"),
        ([Message("user", ("x",)), TURNS[1]], 0, False, "at least one image, not .* and 0 images"),
        ([Message("system", ("x",)), *TURNS[:2]], 1, False, "needs the turns"),
        ([Message("user", (ImagePart(0),))], 1, False, "needs the turns"),
        (TURNS[:1], 1, True, "no place for a question"),
    ],
)
def test_turns_that_plain_has_no_place_for(messages, images, generate, complaint):
    with pytest.raises(ChatError, match=complaint):
        encode_chat(messages, [SMALL] * images, TOKENIZER, PLAIN, generate)


def test_chatml_with_trained_turn_marks():
    """As the released code for Qwen2: an answer's whole turn, and elsewhere turn marks and newlines, none of a block.

    The first token is not trained, as nothing stands before it.
    """
    tokenizer = byte_tokenizer(QWEN)
    sample = encode_chat(TURNS, [SLICED], tokenizer, QWEN)
    assert marked(sample, tokenizer) == (
        "<|im_start|>system[\n]A chat.[<|im_end|>\n<|im_start|>]user[\n]####,####\n####[\n]What is this?[<|im_end|>\n"
        "<|im_start|>assistant\nA seven.<|im_end|>\n<|im_start|>]user[\n]Sure?[<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n]"
    )


def test_chatml_without_trained_turn_marks():
    chat = dataclasses.replace(QWEN, train_turn_marks=False, bos="<s>", system="")
    tokenizer = byte_tokenizer(chat)
    sample = encode_chat(TURNS[:2], [SMALL], tokenizer, chat)
    assert marked(sample, tokenizer) == (
        "<s><|im_start|>user\n####\nWhat is this?<|im_end|>\n<|im_start|>assistant\n[A seven.<|im_end|>]"
    )


@pytest.mark.parametrize("chat", [VICUNA, PLAIN, QWEN], ids=lambda chat: chat.template)
def test_a_prompt_to_be_answered_is_how_its_training_sample_begins(chat):
    tokenizer = byte_tokenizer(chat)
    turns = TURNS[:2] if chat.template == "plain" else TURNS
    asked = [Message("user", (ImagePart(0),))] if chat.template == "plain" else TURNS[:-1]
    prompt = encode_chat(asked, [SLICED], tokenizer, chat, generate=True)
    sample = encode_chat(turns, [SLICED], tokenizer, chat)
    answer = {"plain": "A seven.\n", "vicuna_v1": " Yes</s>", "chatml": "Yes<|im_end|>\n"}[chat.template]
    assert tokenizer.decode(sample.tokens[len(prompt.tokens) :], skip_special=False) == answer
    for name in ("tokens", "view", "view_token"):
        np.testing.assert_array_equal(getattr(prompt, name), getattr(sample, name)[: len(prompt.tokens)])
    assert sample.trained[len(prompt.tokens) :].all()


def test_images_stand_first_only_on_request():
    mixed = [Message("user", ("a", ImagePart(0), "b", ImagePart(1)))]
    for first, text in ((True, "####\n####\na\nb"), (False, "a\n####\nb\n####")):
        sample = encode_chat(mixed, [SMALL] * 2, TOKENIZER, dataclasses.replace(VICUNA, images_first=first), True)
        assert marked(sample) == f"<s>A chat. USER: {text} ASSISTANT:"
        assert sample.view[sample.view >= 0].tolist() == [0] * 4 + [1] * 4


def sentencepiece_like():
    """A vocabulary in which a text begins with a space that its first token swallows, as Llama's."""
    words = ["\u2581A", "\u2581chat.", "\u2581USER", "\u2581ASSISTANT", "\u2581a"]
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += sorted({part for left, right in merges for part in (left, right, left + right)} | set(":Q,"))
    pieces = {word: number for number, word in enumerate(vocabulary)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": pieces[mark], "content": mark, **flags} for mark in ("</s>", "<s>", "<unk>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "model": {"type": "BPE", "vocab": pieces, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"},
    }
    return Tokenizer(json.dumps(definition), "llama"), vocabulary


def test_the_space_before_an_answer_belongs_to_its_first_token():
    """As the reference, which encodes question and answer as one text, and each side of an image by itself."""
    tokenizer, words = sentencepiece_like()
    chat = dataclasses.replace(VICUNA, placeholder="<unk>", separator_ids=(11, 10))
    messages = [Message("user", (ImagePart(0), "Q")), Message("assistant", ("a",))]
    sample = encode_chat(messages, [SMALL], tokenizer, chat)
    assert [words[token] for token in sample.tokens] == [
        *("<s>", "\u2581A", "\u2581chat.", "\u2581USER", ":", "\u2581"),
        *["<unk>"] * 4,
        *("\u2581", "<0x0A>", "Q", "\u2581ASSISTANT", ":", "\u2581a", "</s>"),
    ]
    assert [words[token] for token in sample.tokens[sample.trained]] == ["\u2581a", "</s>"]


def test_separators_have_given_ids_or_those_of_the_tokenizer():
    question = [Message("user", (ImagePart(0),))]
    own = encode_chat(question, [SLICED], TOKENIZER, VICUNA, True)
    given = encode_chat(question, [SLICED], TOKENIZER, dataclasses.replace(VICUNA, separator_ids=(7, 9)), True)
    differs = np.flatnonzero(own.tokens != given.tokens)
    assert TOKENIZER.decode(own.tokens[differs]) == ",\n" and given.tokens[differs].tolist() == [7, 9]
    tokenizer, _ = sentencepiece_like()
    chat = dataclasses.replace(VICUNA, placeholder="<unk>")
    with pytest.raises(TokenizerError, match=r"tokenizer llama: '\\n' is 2 ids, not one; set .*separator_ids"):
        encode_chat([Message("user", (ImagePart(0),))], [plan_of(200, 100)], tokenizer, chat, True)
    with pytest.raises(TokenizerError, match=r"'\\n' is 2 ids, not one; .*train_turn_marks"):
        encode_chat(question, [SMALL], tokenizer, dataclasses.replace(chat, template="chatml", train_turn_marks=True))
    without = dataclasses.replace(chat, schema=False)
    assert (encode_chat(question, [SLICED], tokenizer, without, True).view >= 0).sum() == 12


@pytest.mark.parametrize(
    ("chat", "complaint"),
    [
        ({"layout": "B"}, r"chat\.layout: 'B' .*'merging_mlp'"),
        ({"separator_ids": (5, 512)}, r"chat\.separator_ids: \(5, 512\) .*512"),
        ({"separator_ids": (5,)}, r"separator_ids: must be two ids"),
    ],
)
def test_impossible_mixes(chat, complaint):
    decoder = DecoderConfig(vocab_size=512, width=256, mlp_width=8, layers=1, heads=1, kv_heads=1, head_dim=8)
    with pytest.raises(ConfigError, match=complaint):
        ModelConfig(decoder, chat=ChatConfig(**chat))
    connector, compressor = ConnectorConfig("perceiver", query_side=8), CompressorConfig("none")
    ModelConfig(decoder, chat=ChatConfig(layout="B"), connector=connector, compressor=compressor, mode="4x")


@pytest.mark.parametrize("layout", ["v4", "A", "B"])
def test_visual_places_are_those_of_the_sample(layout):
    chat = dataclasses.replace(VICUNA, layout=layout)
    plans = [SLICED, SMALL, plan_of(300, 400)]
    sample = encode_chat([Message("user", tuple(map(ImagePart, range(3))))], plans, TOKENIZER, chat, True)
    at = sample.view >= 0
    view, view_token = visual_places(plans, chat)
    np.testing.assert_array_equal(view, sample.view[at])
    np.testing.assert_array_equal(view_token, sample.view_token[at])
    assert len(set(zip(view.tolist(), view_token.tolist(), strict=True))) == sum(plan.visual_tokens for plan in plans)
    assert [len(places) for places in visual_places([], chat)] == [0, 0]


class TableTokenizer:
    """Encodes the few texts of the golden samples to their ids."""

    name = "table"
    texts = {
        "USER: ": [101],
        "\nQ ASSISTANT:": [13, 102],
        "\nQ ASSISTANT: a": [13, 102, 103],
        "caption\n": [104, 2],
        "USER: Q ASSISTANT:": [105, 106],
        "USER: Q ASSISTANT: a": [105, 106, 107],
        "USER: Q\n": [108, 109],
        " ASSISTANT:": [],
    }
    marks = {"<s>": 1, "</s>": 2, "<#>": -200}

    def encode(self, text):
        return self.texts[text]

    def special(self, mark):
        return self.marks[mark]


@pytest.mark.parametrize(("layout", "name"), [("A", "layoutA_v1"), ("A", "layoutA_v2"), ("B", "layoutB_old7b")])
def test_golden_sequences(layout, name):
    """Embeddings and labels of four samples: a grid of 2x3, an unsliced image, text alone, a grid of 2x1."""
    image, question, answer = ImagePart(0), Message("user", (ImagePart(0), "Q")), Message("assistant", ("a",))
    chat = dataclasses.replace(VICUNA, system="", layout=layout, separator_ids=(29892, 13), images_first=False)
    plain = dataclasses.replace(chat, template="plain")
    samples = [
        (chat, [question, answer], plan_of(220, 320, 16)),
        (plain, [Message("user", (image,)), Message("assistant", ("caption",))], plan_of(100, 100, 16)),
        (chat, [Message("user", ("Q",)), answer], None),
        (chat, [Message("user", ("Q", image)), Message("assistant", ("",))], plan_of(200, 100, 16)),
    ]
    words = dict(zip(GOLDEN["embed_ids"].tolist(), GOLDEN["embed_rows"], strict=True))
    for number, (form, messages, plan) in enumerate(samples):
        sample = encode_chat(messages, [plan] if plan else [], TableTokenizer(), form)
        feats = np.roll(GOLDEN[f"feats_{number}"], 1, axis=0)  # the golden ones have the thumbnail last
        assert not plan or len(feats) == len(plan.views)
        embeds = np.stack(
            [
                words[token] if view < 0 else feats[view, place]
                for token, view, place in zip(sample.tokens.tolist(), sample.view, sample.view_token, strict=True)
            ]
        )
        mask = GOLDEN[f"{name}_maxNone_mask"][number]
        labels = np.where(sample.trained, sample.tokens, -100)
        np.testing.assert_array_equal(embeds, GOLDEN[f"{name}_maxNone_embeds"][number][mask])
        np.testing.assert_array_equal(labels, GOLDEN[f"{name}_maxNone_labels"][number][mask])
        assert not GOLDEN[f"{name}_maxNone_embeds"][number][~mask].any()
