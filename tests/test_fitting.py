"""What is given up of a sample that is too large for a row: slices, then whole rounds, and nothing more than needed."""

import itertools

import numpy as np
import pytest

from uhd_jax.config import BucketConfig, ChatConfig, SlicingConfig
from uhd_jax.data.chat import ImagePart, Message, VideoPart, encode_chat
from uhd_jax.data.fitting import Reduction, cuttable, reduce_to_fit, without_oldest
from uhd_jax.data.packing import fits
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.slicing.plan import Size, make_plan

SYSTEM = Message("system", ("Be brief.",))
SLICING = SlicingConfig(scale_resolution=112)


def turns(*said):
    """Users and assistants in turn: `"u:text"`, `"a:text"`, `"s:text"`; `#` is the next image."""
    images = itertools.count()
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return tuple(
        Message(roles[turn[0]], tuple(ImagePart(next(images)) if part == "#" else part for part in turn[2:].split("|")))
        for turn in said
    )


CONVERSATION = (SYSTEM, *turns("u:#|one", "a:1", "u:two", "u:#|#|and", "a:2", "a:more", "u:#|three", "a:3", "u:four"))


def test_rounds_go_whole_with_their_images_and_the_system_prompt_stays():
    assert cuttable(CONVERSATION) == 2  # the last round has no answer, so the one before stays too
    assert without_oldest(CONVERSATION, 0) == (CONVERSATION, 0)
    kept, images = without_oldest(CONVERSATION, 1)
    assert images == 1
    assert kept == (SYSTEM, *turns("u:two", "u:#|#|and", "a:2", "a:more", "u:#|three", "a:3", "u:four"))
    assert without_oldest(CONVERSATION, 2) == ((SYSTEM, *turns("u:#|three", "a:3", "u:four")), 3)


@pytest.mark.parametrize(
    ("messages", "rounds"),
    [
        ((), 0),
        ((SYSTEM,), 0),
        (turns("u:a"), 0),
        (turns("u:a", "a:b"), 0),
        (turns("u:a", "a:b", "u:c"), 0),
        (turns("a:b", "u:c", "a:d"), 1),
        (turns("u:a", "a:b", "s:new rules", "u:c", "a:d"), 1),
    ],
)
def test_how_many_rounds_may_go(messages, rounds):
    assert cuttable(messages) == rounds
    kept, _ = without_oldest(messages, rounds)
    assert len(kept) == 3 if "new" in str(messages) else kept[-2:] == messages[-2:]


def test_pictures_of_a_video_keep_their_places():
    messages = (*turns("u:#|a", "a:b"), Message("user", (VideoPart(1, 3), "c")), *turns("a:d"))
    assert without_oldest(messages, 1) == ((Message("user", (VideoPart(0, 3), "c")), *turns("a:d")), 1)


def test_slices_go_first_then_the_fewest_rounds_then_as_many_slices_as_fit_again():
    asked = []

    def room(tokens):
        def fits(reduction):
            asked.append(reduction)
            return 100 * (5 - reduction.rounds) + 10 * reduction.max_slices <= tokens

        return fits

    assert reduce_to_fit(room(600), "cut_turns", 9, 4) == Reduction(9)
    assert asked == [Reduction(9)]
    assert reduce_to_fit(room(560), "cut_turns", 9, 4) == Reduction(6)
    assert reduce_to_fit(room(509), "cut_turns", 9, 4) == Reduction(9, 1)  # one slice needs 510
    assert reduce_to_fit(room(450), "cut_turns", 9, 4) == Reduction(5, 1)
    assert reduce_to_fit(room(115), "cut_turns", 9, 4) == Reduction(1, 4)
    assert reduce_to_fit(room(105), "cut_turns", 9, 4) is None
    assert reduce_to_fit(room(560), "fewer_slices", 9, 4) == Reduction(6)
    assert reduce_to_fit(room(450), "fewer_slices", 9, 4) is None
    assert reduce_to_fit(room(590), "drop", 9, 4) == Reduction(9)
    assert reduce_to_fit(room(580), "drop", 9, 4) is None


def test_the_fewest_rounds_are_found_by_halving():
    asked = []

    def fits(reduction):
        asked.append(reduction)
        return reduction.rounds >= needed

    for needed in range(1, 1000, 37):
        asked.clear()
        assert reduce_to_fit(fits, "cut_turns", 1, 999) == Reduction(1, needed)
        assert len(asked) <= 13


def test_what_is_left_of_a_conversation_is_encoded_as_one_of_its_own():
    """Never inside a visual block: the blocks that are left are whole, numbered from 0."""
    chat, tokenizer = ChatConfig(), byte_tokenizer()
    plans = [make_plan(Size(112, 112 * (1 + n)), SLICING, 14, 2) for n in range(4)]
    whole = encode_chat(CONVERSATION, plans, tokenizer, chat)
    for rounds in range(3):
        kept, first = without_oldest(CONVERSATION, rounds)
        sample = encode_chat(kept, plans[first:], tokenizer, chat)
        text = tokenizer.decode(sample.tokens, skip_special=False)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("3<|im_end|>\n<|im_start|>user\nfour<|im_end|>")
        assert [f"<image_id>{n}</image_id>" in text for n in range(5)] == [n < 4 - first for n in range(5)]
        assert (sample.view >= 0).sum() == sum(plan.visual_tokens for plan in plans[first:])
        assert fits(sample.needs, BucketConfig(*(whole.needs[i] for i in (1, 0, 2))))
        trained = tokenizer.decode(sample.tokens[sample.trained], skip_special=False)
        assert trained.split("<|im_end|>") == ["1", "2", "more", "3", ""][{0: 0, 1: 1, 2: 3}[rounds] :]
        np.testing.assert_array_equal(sample.tokens[-20:], whole.tokens[-20:])
