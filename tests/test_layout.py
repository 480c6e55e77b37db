"""The visual block: a prompt of the published processor, layouts A and B by hand and by the published table."""

import json
from pathlib import Path

import pytest

from uhd_jax.config import ChatConfig, ConfigError, ImageLimits, SlicingConfig
from uhd_jax.slicing.layout import Separator, ViewRun, block_text, visual_block
from uhd_jax.slicing.plan import Size, make_plan

EXAMPLES = json.loads((Path(__file__).parent / "golden" / "v1v2_partition_examples.json").read_text())["examples"]
PAD = "<|image_pad|>"
COMMA, NEWLINE = Separator(","), Separator("\n")


def small_plan(height, width, levels=2, **options):
    return make_plan(Size(height, width), SlicingConfig(scale_resolution=112, **options), 14, levels)


def test_prompt_of_the_published_processor():
    """The prompt of golden/v4_full_qwen3_16x: an image of 120x200 in two slices, one of 80x90 unsliced."""
    sliced, unsliced = small_plan(120, 200), small_plan(80, 90)
    blocks = [visual_block(sliced, ChatConfig(), 0), visual_block(unsliced, ChatConfig(), 1)]
    text = "\n".join(block_text(block, PAD) for block in blocks)
    assert text == (
        f"<image_id>0</image_id><image>{PAD * 6}</image><slice>{PAD * 4}</slice><slice>{PAD * 4}</slice>"
        f"\n<image_id>1</image_id><image>{PAD * 4}</image>"
    )


def test_rows_are_joined_by_newlines():
    plan = small_plan(300, 200)
    assert plan.grid == (3, 2)
    chat = ChatConfig(use_image_id=False)
    text = block_text(visual_block(plan, chat, 0), ".")
    one = "<slice>" + "." * plan.slice.visual_tokens + "</slice>"
    assert text == "<image>" + "." * plan.thumbnail.visual_tokens + "</image>" + "\n".join([one * 2] * 3)


def test_every_view_stands_once_in_order():
    plan = small_plan(200, 300, levels=1)
    block = visual_block(plan, ChatConfig(), 12)
    runs = [part for part in block if isinstance(part, ViewRun)]
    assert runs == [ViewRun(index, view.visual_tokens) for index, view in enumerate(plan.views)]
    assert [isinstance(part, ViewRun) for part in block] == [False, True] * len(runs) + [False]
    assert block[0] == "<image_id>12</image_id><image>"


def test_marks_come_from_the_configuration():
    chat = ChatConfig(
        image_start="[I]", image_end="[/I]", slice_start="[S]", slice_end="[/S]", image_id_start="#", image_id_end=":"
    )
    text = block_text(visual_block(small_plan(120, 180), chat, 3), "")
    assert text == "#3:[I][/I][S][/S][S][/S]"


def test_marks_without_a_thumbnail():
    block = visual_block(small_plan(120, 180, overview=False), ChatConfig(), 3)
    assert block_text(block, "") == "<image_id>3</image_id><slice></slice><slice></slice>"
    assert [part.view for part in block if isinstance(part, ViewRun)] == [0, 1]
    alone = visual_block(small_plan(80, 90, overview=False), ChatConfig(use_image_id=False), 0)
    assert block_text(alone, "") == "<image></image>"


def v1_plan(height, width, queries=4, **options):
    slicing = SlicingConfig(rule="v1", scale_resolution=112, **options)
    return make_plan(Size(height, width), slicing, 14, 0, 7, queries)


def test_layout_a_by_hand():
    plan = v1_plan(220, 320)
    assert plan.grid == (2, 3)
    assert visual_block(plan, ChatConfig(layout="A"), 0) == (
        *(ViewRun(1, 4), COMMA, ViewRun(2, 4), COMMA, ViewRun(3, 4), NEWLINE),
        *(ViewRun(4, 4), COMMA, ViewRun(5, 4), COMMA, ViewRun(6, 4), NEWLINE),
        ViewRun(0, 4),
    )


def test_layout_b_by_hand():
    """The rows of the two slices side by side, one after the other; after the last row the first separator."""
    plan = v1_plan(100, 200)
    assert plan.grid == (1, 2)
    assert visual_block(plan, ChatConfig(layout="B"), 0) == (
        *(ViewRun(1, 2, 0), ViewRun(2, 2, 0), NEWLINE),
        *(ViewRun(1, 2, 2), ViewRun(2, 2, 2), NEWLINE),
        *(COMMA, ViewRun(0, 4)),
    )
    upright = visual_block(v1_plan(200, 100), ChatConfig(layout="B"), 0)
    assert block_text(upright, ".") == "..\n" * 4 + "\n...."


@pytest.mark.parametrize("limit", [7, 9])
@pytest.mark.parametrize("row", EXAMPLES, ids=lambda row: f"{row['width']}x{row['height']}")
def test_separators_and_lengths_of_the_published_table(row, limit):
    expected = row[f"max{limit}"]
    slicing = SlicingConfig(rule="v1", scale_resolution=336, limits=ImageLimits(max_aspect_ratio=1e6))
    plan = make_plan(Size(row["height"], row["width"]), slicing, 14, 0, limit, 144)
    blocks = {layout: visual_block(plan, ChatConfig(layout=layout), 0) for layout in ("A", "B")}
    ids = {COMMA: 29892, NEWLINE: 13}
    assert [ids[part] for part in blocks["A"] if isinstance(part, Separator)] == expected["separators"]
    for layout, key in (("A", "llm_tokens_sep_per_slice"), ("B", "llm_tokens_spatially_consistent")):
        assert len(block_text(blocks[layout], ".")) == expected[key]


@pytest.mark.parametrize("layout", ["A", "B"])
@pytest.mark.parametrize("overview", [True, False])
@pytest.mark.parametrize("schema", [True, False])
@pytest.mark.parametrize("size", [(80, 90), (250, 100), (300, 400), (60, 700)])
def test_every_visual_token_stands_once(size, layout, overview, schema):
    plan = v1_plan(*size, queries=9, overview=overview)
    block = visual_block(plan, ChatConfig(layout=layout, schema=schema), 0)
    runs = [part for part in block if isinstance(part, ViewRun)]
    places = [(run.view, run.start + token) for run in runs for token in range(run.tokens)]
    assert sorted(places) == [(view, token) for view in range(len(plan.views)) for token in range(9)]
    if plan.thumbnail:
        assert block[-1] == ViewRun(0, 9)
    if not schema:
        assert len(block) == len(runs)


def test_a_block_without_overview_is_the_block_without_its_end():
    for layout, end in (("A", 1), ("B", 2)):
        chat = ChatConfig(layout=layout)
        whole, part = (visual_block(v1_plan(300, 400, overview=overview), chat, 0) for overview in (True, False))
        shifted = [run._replace(view=run.view + 1) if isinstance(run, ViewRun) else run for run in part]
        assert list(whole[:-end]) == shifted


def test_legacy_slices_in_layout_a():
    """Even one slice has its thumbnail behind it."""
    slicing = SlicingConfig(rule="v1_legacy", scale_resolution=112, max_slices=6)
    plan = make_plan(Size(110, 110), slicing, 14, 0, None, 4)
    assert plan.grid == (1, 1)
    assert visual_block(plan, ChatConfig(layout="A"), 0) == (ViewRun(1, 4), NEWLINE, ViewRun(0, 4))
    assert visual_block(plan, ChatConfig(layout="A", schema=False), 0) == (ViewRun(1, 4), ViewRun(0, 4))


def test_layout_b_needs_square_maps():
    plan = make_plan(Size(300, 400), SlicingConfig(rule="v1", scale_resolution=112), 14, 0)
    with pytest.raises(ConfigError, match=r"chat\.layout: 'B'.*query_side"):
        visual_block(plan, ChatConfig(layout="B"), 0)
