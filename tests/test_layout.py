"""The visual block against a prompt made by the published processor."""

from uhd_jax.config import ChatConfig, SlicingConfig
from uhd_jax.slicing.layout import ViewRun, block_text, visual_block
from uhd_jax.slicing.plan import Size, make_plan

PAD = "<|image_pad|>"


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
