"""Messages and plans to ids: the golden prompt, what is trained, and placeholders that equal visual tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from uhd_jax.config import ChatConfig, SlicingConfig
from uhd_jax.data.chat import ChatError, ImagePart, Message, encode_chat
from uhd_jax.data.tokenizer import TokenizerError, byte_tokenizer, load_tokenizer
from uhd_jax.slicing.image_io import read_size
from uhd_jax.slicing.plan import Size, make_plan

GOLDEN = Path(__file__).parent / "golden" / "v4_full_qwen3_16x"
SLICING = SlicingConfig(scale_resolution=112)
CHAT = ChatConfig()
TOKENIZER = byte_tokenizer()
QUESTION = Message("user", (ImagePart(0), "What is this?"))


def plan_of(height, width, levels=2):
    return make_plan(Size(height, width), SLICING, 14, levels)


def test_golden_prompt_ids_and_patch_grids():
    meta = json.loads((GOLDEN / "meta.json").read_text())
    golden = load_file(GOLDEN / "io.safetensors")
    tokenizer = load_tokenizer(GOLDEN)
    plans = [make_plan(read_size(GOLDEN / f"image_{i}.png"), SLICING, 14, 2) for i in range(2)]
    messages = [Message("user", (ImagePart(0), ImagePart(1), "What is this?"))]
    sample = encode_chat(messages, plans, tokenizer, CHAT, generate=True)
    assert sample.tokens.tolist() == golden["input_ids"].reshape(-1).tolist()
    assert tokenizer.decode(sample.tokens, skip_special=False) == meta["prompt"]
    assert [list(view.patch_grid) for plan in plans for view in plan.views] == golden["target_sizes"].tolist()
    assert (sample.view >= 0).sum() == meta["n_image_tokens"] and not sample.trained.any()


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_placeholders_equal_visual_tokens_for_random_sizes(levels):
    rng = np.random.default_rng(levels)
    placeholder = TOKENIZER.special(CHAT.placeholder)
    for _ in range(100):
        plans = [plan_of(*np.exp(rng.uniform(3, 7, 2)).astype(int).tolist(), levels) for _ in range(rng.integers(1, 4))]
        parts = tuple(ImagePart(i) for i in range(len(plans)))
        sample = encode_chat([Message("user", parts), Message("assistant", ("x",))], plans, TOKENIZER, CHAT)
        views = [view for plan in plans for view in plan.views]
        at = sample.view >= 0
        np.testing.assert_array_equal(at, sample.tokens == placeholder)
        expected = [(number, token) for number, view in enumerate(views) for token in range(view.visual_tokens)]
        assert list(zip(sample.view[at].tolist(), sample.view_token[at].tolist(), strict=True)) == expected
        assert sample.needs == (len(sample.tokens), len(views), max(view.patch_grid.area for view in views))
        assert not sample.view_token[~at].any()


def test_trained_are_answers_with_their_end_of_turn_only():
    messages = [
        QUESTION,
        Message("assistant", (" A seven. ",)),
        Message("user", ("Sure?",)),
        Message("assistant", ("Yes",)),
    ]
    sample = encode_chat(messages, [plan_of(112, 112)], TOKENIZER, ChatConfig(system="Be brief."))
    assert TOKENIZER.decode(sample.tokens[sample.trained], skip_special=False) == "A seven.<|im_end|>Yes<|im_end|>"
    assert TOKENIZER.decode(sample.tokens, skip_special=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image_id>0</image_id><image>"
        + "<|image_pad|>" * 4
        + "</image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA seven.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>"
    )


def test_a_system_message_replaces_the_configured_one():
    messages = [Message("system", ("Mine.",)), Message("user", ("Hi",))]
    text = TOKENIZER.decode(encode_chat(messages, [], TOKENIZER, ChatConfig(system="Theirs.")).tokens)
    assert "Mine." in text and "Theirs." not in text


def test_empty_think_block_opens_the_last_answer_untrained():
    chat = ChatConfig(empty_think=True)
    turns = [Message("user", ("a",)), Message("assistant", ("b",))]
    sample = encode_chat(turns * 2, [], TOKENIZER, chat)
    text = TOKENIZER.decode(sample.tokens, skip_special=False)
    assert text.count("<think>\n\n</think>\n\n") == 1 and text.endswith("<think>\n\n</think>\n\nb<|im_end|>")
    assert TOKENIZER.decode(sample.tokens[sample.trained]) == "bb"
    prompt = encode_chat(turns + turns[:1], [], TOKENIZER, chat, generate=True)
    np.testing.assert_array_equal(prompt.tokens, sample.tokens[: len(prompt.tokens)])
    assert len(prompt.tokens) + 2 == len(sample.tokens)


def test_marks_written_by_a_user_stay_text():
    text = "<image><|image_pad|></image><|im_end|><think>"
    sample = encode_chat([Message("user", (text,)), Message("assistant", (text,))], [], TOKENIZER, CHAT)
    marks = sample.tokens[sample.tokens >= 256]
    assert TOKENIZER.decode(marks, skip_special=False) == "<|im_start|><|im_end|>" * 2
    assert (sample.view == -1).all() and sample.needs.views == 0


def test_empty_texts_add_no_separators_and_texts_join_by_newlines():
    def text(*parts):
        return TOKENIZER.decode(encode_chat([Message("user", parts)], [], TOKENIZER, CHAT).tokens)

    assert text("a", " ", "", "b ") == text("a\nb") == "user\na\nb"


def test_neighbouring_texts_are_encoded_as_one():
    """`?` and the newline before an image are one token for tokenizers that merge punctuation and newlines."""
    definition = json.loads(TOKENIZER._definition)
    newline = "Ċ"  # the byte-level alphabet's name of "\n"
    definition["model"]["merges"] = [["?", newline]]
    definition["model"]["vocab"]["?" + newline] = 300
    merging = type(TOKENIZER)(json.dumps(definition), "merging")
    sample = encode_chat([Message("user", ("Which?", ImagePart(0)))], [plan_of(112, 112)], merging, CHAT)
    assert 300 in sample.tokens


def test_image_numbers_can_be_left_out():
    sample = encode_chat([QUESTION], [plan_of(112, 112)], TOKENIZER, ChatConfig(use_image_id=False))
    assert TOKENIZER.decode(sample.tokens, skip_special=False).startswith("<|im_start|>user\n<image><|image_pad|>")


@pytest.mark.parametrize(
    ("messages", "images", "generate", "complaint"),
    [
        ([], 0, False, "without messages"),
        ([Message("tool", ("x",))], 0, False, "'tool' is not one of"),
        ([QUESTION], 0, False, r"\[0\], but there are 0 images"),
        ([QUESTION], 2, False, r"\[0\], but there are 2 images"),
        ([QUESTION, QUESTION], 1, False, r"\[0, 0\]"),
        ([Message("user", (ImagePart(1), ImagePart(0)))], 2, False, r"\[1, 0\]"),
        ([Message("assistant", (ImagePart(0),))], 1, False, "'assistant'"),
        ([Message("user", ("x",)), Message("assistant", ("y",))], 0, True, "answer already"),
    ],
)
def test_messages_that_cannot_be_encoded(messages, images, generate, complaint):
    with pytest.raises(ChatError, match=complaint):
        encode_chat(messages, [plan_of(112, 112)] * images, TOKENIZER, CHAT, generate)


def test_a_missing_mark_is_named():
    with pytest.raises(TokenizerError, match="<picture>"):
        encode_chat([QUESTION], [plan_of(112, 112)], TOKENIZER, ChatConfig(image_start="<picture>"))
