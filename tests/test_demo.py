"""The embedded dataset: split by image, pages that align with slices, answers, scoring, stages."""

import zlib

import numpy as np
import pytest

from uhd_jax.cli.configs import load_file
from uhd_jax.config import ChatConfig, ConfigError, DataConfig, SlicingConfig
from uhd_jax.data import demo
from uhd_jax.data.chat import encode_chat
from uhd_jax.data.demo import DigitPages, digit_accuracy, split_digits, transcription
from uhd_jax.data.sources import make_source
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.slicing.pixels import view_pixels
from uhd_jax.slicing.plan import Grid, Size, make_plan, plan_image

SLICING = SlicingConfig(scale_resolution=112)
DEFAULT_SHAPES = DigitPages().options.shapes


def plan_of(size, max_slices=None):
    return make_plan(size, SLICING, 14, 2, max_slices)


def test_no_digit_image_is_in_both_splits():
    train, held_out = split_digits("train"), split_digits("held_out")
    assert (len(train), len(held_out)) == (1400, 397)
    assert set(train) | set(held_out) == set(range(1797)) and not set(train) & set(held_out)
    assert len(np.unique(demo._digits()[1][held_out])) == 10


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_pages_hold_digits_of_their_split_only(split):
    pages = DigitPages({"split": split})
    used = np.concatenate([pages._page(i).cells.reshape(-1) for i in range(100)])
    assert set(used.tolist()) <= set(split_digits(split).tolist())
    assert len(set(used.tolist())) > 300


@pytest.mark.parametrize("shape", [(r, c) for r in range(1, 10) for c in range(1, 10) if 2 <= r * c <= 9])
def test_every_page_shape_is_cut_at_cell_borders_without_resampling(shape):
    page = DigitPages({"shapes": [shape]}).images(0)[0]
    plan = plan_of(Size(*page.shape[:2]))
    assert plan.grid == Grid(*shape) and plan.slice.size == Size(112, 112)
    slices = view_pixels(page, plan)[1:]
    for number, pixels in enumerate(slices):
        top, left = 112 * (number // shape[1]), 112 * (number % shape[1])
        np.testing.assert_array_equal(pixels, page[top : top + 112, left : left + 112])
    if shape in DEFAULT_SHAPES:
        assert max(view.patch_grid.area for view in plan.views) == 64


def test_a_page_of_one_digit_shows_different_images_of_it():
    pages, labels = DigitPages({"task": "same"}), demo._digits()[1]
    shown = [pages._page(i) for i in range(50)]
    for page in shown:
        assert page.cells.shape == (2, 2) and len(set(page.cells.reshape(-1))) > 1
        assert page.turns == ((demo.TRANSCRIBE, str(labels[page.cells[0, 0]])),)
        assert len(set(labels[page.cells.reshape(-1)])) == 1
    assert len({page.turns for page in shown}) == 10


@pytest.mark.parametrize("task, resolution", [("cell", 56), ("same", 112), ("view", 112)])
def test_pages_of_one_view_are_not_resampled(task, resolution):
    pages = DigitPages({"task": task})
    plan = make_plan(pages.sizes(0)[0], SlicingConfig(scale_resolution=resolution), 14, 2)
    assert plan.slice is None
    np.testing.assert_array_equal(view_pixels(pages.images(0)[0], plan)[0], pages.images(0)[0])


def test_a_slice_limit_of_one_leaves_the_thumbnail_alone():
    for shape in DEFAULT_SHAPES:
        page = DigitPages({"shapes": [shape]}).images(0)[0]
        size = Size(*page.shape[:2])
        sliced, thumbnail = view_pixels(page, plan_of(size)), view_pixels(page, plan_of(size, max_slices=1))
        assert len(thumbnail) == 1
        np.testing.assert_array_equal(thumbnail[0], sliced[0])


@pytest.mark.parametrize("task", ["cell", "same", "view", "page", "questions", "mixed"])
def test_pages_are_the_same_every_time_and_of_the_announced_size(task):
    pages, again = DigitPages({"task": task}), DigitPages({"task": task})
    for index in (0, 7, 99_999):
        [size], [image] = pages.sizes(index), pages.images(index)
        assert image.dtype == np.uint8 and image.shape == (*size, 3)
        np.testing.assert_array_equal(image, again.images(index)[0])
        assert pages.messages(index) == again.messages(index)
        other = DigitPages({"task": task, "seed": 1})
        assert other.images(index)[0].shape != image.shape or (other.images(index)[0] != image).any()


@pytest.mark.parametrize(
    ("task", "checksum"), [("cell", 3066225763), ("same", 261898241), ("view", 1387163202), ("page", 2100916043)]
)
def test_pages_are_those_of_every_published_figure(task, checksum):
    pages = DigitPages({"task": task})
    cells = np.concatenate([pages._page(index).cells.reshape(-1) for index in range(20)])
    assert zlib.crc32(cells.astype("<i8").tobytes()) == checksum


def test_the_answer_mirrors_the_visual_block():
    """Stripped of the thumbnail, the block is the answer with a placeholder in place of every digit."""
    chat, tokenizer = ChatConfig(), byte_tokenizer()
    pages = DigitPages()
    for index in range(20):
        messages = pages.messages(index)
        prompt = tokenizer.decode(
            encode_chat(messages[:1], [plan_of(pages.sizes(index)[0])], tokenizer, chat).tokens, skip_special=False
        )
        block = prompt.split("</image>")[1].rsplit("\n", 1)[0]
        answer = messages[1].parts[0]
        shape = "".join("#" if char.isdigit() else char for char in answer)
        assert block == shape.replace("[", "<slice>").replace("]", "</slice>").replace("#", "<|image_pad|>")


def test_answers_say_what_stands_on_the_page():
    labels = demo._digits()[1]
    pages = DigitPages({"task": "questions", "questions_per_page": 4})
    kinds = set()
    for index in range(50):
        digits = labels[pages._page(index).cells]
        for question, answer in pages._page(index).turns:
            numbers = [
                int(word)
                for word in question.replace("s?", "").replace("?", "").replace(",", "").split()
                if word.isdigit()
            ]
            if question.startswith("How many"):
                expected = str(sum(int(d) == numbers[0] for d in digits.flat))
            elif len(numbers) == 2:
                expected = str(digits[numbers[0] - 1, numbers[1] - 1])
            else:
                line = digits[numbers[0] - 1] if "row" in question else digits[:, numbers[0] - 1]
                expected = "".join(str(d) for d in line)
            assert answer == expected
            kinds.add((question.startswith("How"), len(numbers), "row" in question))
    assert len(kinds) == 4
    assert transcription(np.arange(8).reshape(2, 4)) == "[0145][2367]"
    assert transcription(np.arange(8).reshape(4, 2)) == "[0123]\n[4567]"
    assert transcription(np.arange(8).reshape(2, 4), "A") == "0145,2367"
    assert transcription(np.arange(8).reshape(4, 2), "A") == "0123\n4567"
    assert transcription(np.arange(8).reshape(2, 4), "B") == "0123\n4567"


@pytest.mark.parametrize("layout", ["v4", "A", "B"])
def test_digit_accuracy_of_a_layout(layout):
    digits = np.arange(16).reshape(4, 4) % 10
    answer = transcription(digits, layout)
    assert digit_accuracy(answer, answer, layout) == (16, 16)
    without = answer.replace("1", "", 1)  # the first group's second digit: the rest of that group moves up
    assert digit_accuracy(without, answer, layout) == (13, 16)


def test_a_cell_page_holds_one_digit_at_many_places():
    pages = DigitPages({"task": "cell"})
    centres = []
    for index in range(40):
        page, cells = pages.images(index)[0][..., 0].astype(float), pages._page(index).cells
        assert page.shape == (56, 56) and cells.shape == (1, 1)
        assert pages.messages(index)[1].parts == (str(demo._digits()[1][cells.item()]),)
        ink = np.maximum(np.median(page) - 25 - page, 0)
        centres.append([(ink.sum(axis) * np.arange(56)).sum() / ink.sum() for axis in (0, 1)])
    assert np.ptp(centres, axis=0).min() > 10


@pytest.mark.parametrize(("spread", "apart"), [((0.0, 0.0), (0, 1)), ((1.0, 1.0), (4, 8)), ((0.0, 1.0), (1.5, 6))])
def test_spread_moves_digits_out_of_the_middles_of_their_cells(spread, apart):
    pages = DigitPages({"task": "cell", "split": "held_out", "spread": spread})
    whole = DigitPages({"task": "cell", "split": "held_out", "spread": [0, 0]})
    shifts = []
    for index in range(40):
        ink, middle = (p.images(index)[0][..., 0].astype(float) for p in (pages, whole))
        ink, middle = (np.maximum(np.median(page) - 25 - page, 0) for page in (ink, middle))
        assert pages.messages(index) == whole.messages(index)
        shifts += [((ink.sum(a) / ink.sum() - middle.sum(a) / middle.sum()) * np.arange(56)).sum() for a in (0, 1)]
    low, high = apart
    assert low <= np.std(shifts) <= high


def test_rendered_digits_look_like_their_originals():
    """Held-out pages are not augmented: a crop of the ink, shrunk to 8 x 8, correlates with the digit image."""
    images = demo._digits()[0]
    pages = DigitPages({"task": "cell", "split": "held_out"})
    similar = []
    for index in range(40):
        cell = pages._page(index).cells
        ink = 255.0 - pages.images(index)[0][..., 0]
        ink = np.maximum(ink - np.median(ink) - 20, 0)
        original = np.kron(images[cell.item()], np.ones((4, 4)))
        shifted = np.fft.irfft2(np.fft.rfft2(ink) * np.conj(np.fft.rfft2(original, s=ink.shape)), s=ink.shape)
        similar.append(shifted.max() / np.linalg.norm(ink) / np.linalg.norm(original))
    assert np.mean(similar) > 0.8


def test_mixed_draws_both_kinds_and_every_shape():
    pages = DigitPages({"task": "mixed", "questions_fraction": 0.25})
    asked = [pages.messages(i)[0].parts[1] != demo.TRANSCRIBE for i in range(400)]
    assert 0.15 < np.mean(asked) < 0.35
    assert {pages.sizes(i)[0] for i in range(400)} == {Size(112 * r, 112 * c) for r, c in DEFAULT_SHAPES}


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("[1234][5678]", "[1234][5678]", (8, 8)),
        ("[1234][5679]\n[0", "[1234][5678]\n[0000]", (8, 12)),
        ("[123][5678]", "[1234][5678]", (7, 8)),
        ("[12345][5678]", "[1234][5678]", (8, 8)),
        ("", "[1234]", (0, 4)),
        ("1234", "[1234]", (0, 4)),
        ("472", "4712", (2, 4)),
    ],
)
def test_digit_accuracy_counts_by_position(answer, expected, score):
    assert digit_accuracy(answer, expected) == score


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tusk": "page"}, "data.options.tusk: unknown key"),
        ({"task": "book"}, "data.options.task: 'book'"),
        ({"shapes": [[1, 2, 3]]}, "data.options.shapes"),
        ({"shapes": []}, "data.options.shapes"),
        ({"samples": 0}, "data.options.samples"),
        ({"questions_fraction": 2.0}, "data.options.questions_fraction"),
        ({"spread": [0.5, 0.2]}, "data.options.spread"),
        ({"spread": [0.5]}, "data.options.spread"),
    ],
)
def test_bad_options_are_named(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make_source(DataConfig("digit_pages", options))


@pytest.mark.parametrize("options", ["v2", "v2,layout=A", "v2,pyramid=none", "v2,pyramid=bilinear"])
def test_the_demo_of_v2_reads_a_cell_per_token(options):
    config = load_file(f"configs/demo.py:{options}")
    stages, model = config.train.stages, config.model
    layout = "A" if options == "v2,layout=A" else "B"
    vdim = ["vdim"] if options in ("v2", "v2,layout=A") else []
    pages = ["squares", "wider", "taller", "pages"]
    assert [stage.name for stage in stages] == [*vdim, "same", "views", *pages]
    assert all("upsampler" not in stage.trainable for stage in stages[-6:])
    assert model.chat.layout == layout
    for stage in stages:
        parts = stage.data.options.get("parts", [{"options": stage.data.options}])
        found = [(part["options"]["task"], part["options"].get("layout")) for part in parts]
        one, page = ("same", None), ("page" if stage.name in pages else "view", layout)
        assert found == {"same": [one], "views": [one, page]}.get(stage.name, [page])
        source = make_source(stage.data)
        for index in range(8):  # of both parts of a mixture
            plan = plan_image(source.sizes(index)[0], model, max_slices=stage.max_slices)
            for view in plan.slices or plan.views:
                assert view.patch_grid == Grid(2, 2) and view.visual_tokens == 4
                assert view.size == (2 * demo.CELL, 2 * demo.CELL)
