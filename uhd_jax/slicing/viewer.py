"""A picture of what becomes of an image: slice grid, thumbnail, and the slices as the tower sees them."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from uhd_jax.slicing.pixels import view_pixels
from uhd_jax.slicing.plan import Grid, Plan, Size, ViewPlan

PAGE_WIDTH = 1200
_MARGIN, _GAP, _SLICE_GAP = 40, 32, 8
_INNER = PAGE_WIDTH - 2 * _MARGIN
_PAIR_HEIGHT, _SHEET_HEIGHT = 460, 920  # most room in height for image and thumbnail, and for the sheet of slices
_BADGE, _INSET = 20, 6  # height of a number, and its distance from the corner
_PAPER, _INK, _MUTED, _BORDER, _ACCENT = "#ffffff", "#1f2933", "#616e7c", "#cbd2d9", "#c2410c"


def draw_slices(image: np.ndarray, plan: Plan, title: str = "") -> Image.Image:
    """Draws an image, its thumbnail and its slices with sizes, patch grids and visual tokens.

    Args:
      image: uint8[H, W, 3] of the size the plan was made for.
      plan: what becomes of the image.
      title: headline, e.g. the name of the file.

    Returns:
      An RGB picture, `PAGE_WIDTH` pixels wide and as high as needed.

    Raises:
      ValueError: the image is not of the plan's size.
    """
    views = [Image.fromarray(view) for view in view_pixels(image, plan)]
    thumbnail = views.pop(0) if plan.thumbnail else None
    body = _pair(Image.fromarray(image), thumbnail, plan)
    if views:
        body = _with_sheet(body, views, plan)
    page = _stack([_header(plan, title), body], vertical=True)
    canvas = Image.new("RGB", (PAGE_WIDTH, page.height + 2 * _MARGIN), _PAPER)
    canvas.paste(page, (_MARGIN, _MARGIN))
    return canvas


def _header(plan: Plan, title: str) -> Image.Image:
    number = len(plan.views)
    totals = f"{number} view{'s' if number > 1 else ''}, {plan.patches} patches, {plan.visual_tokens} visual tokens"
    note = "Sizes are height x width in pixels, grids rows x columns."
    return _text([(title, 32, _INK), (totals, 22, _ACCENT), (note, 15, _MUTED)])


def _pair(image: Image.Image, thumbnail: Image.Image | None, plan: Plan) -> Image.Image:
    """Image and thumbnail side by side, or one above the other when that shows the image larger."""
    beside = Size(_PAIR_HEIGHT, (_INNER - _GAP) // 2 if thumbnail else _INNER)
    above = Size(_PAIR_HEIGHT // 2, _INNER)
    stacked = _fit(plan.image, above).width > _fit(plan.image, beside).width
    box = above if stacked else beside
    details = [str(plan.image), f"grid {plan.grid}" if plan.slices else "not sliced"]
    if plan.resized != plan.image:
        details.insert(1, f"first resized to {plan.resized}")
    figures = [_figure(_with_grid(_scaled(image, _fit(plan.image, box)), plan.grid), "Image", *details)]
    if thumbnail and plan.thumbnail:
        name = "Thumbnail" if plan.slices else "The only view"
        figures.append(_figure(_scaled(thumbnail, _fit(plan.thumbnail.size, box)), name, *_describe(plan.thumbnail)))
    return _stack(figures, vertical=stacked)


def _with_sheet(pair: Image.Image, slices: list[Image.Image], plan: Plan) -> Image.Image:
    """Puts the sheet of slices below the pair, or beside it where a narrow pair leaves nearly as much room."""
    name = "1 slice" if len(slices) == 1 else f"{len(slices)} slices" + (", each" if plan.slice else "")
    kinds = dict.fromkeys(plan.slices)  # different ones at most four: those of the last row and column
    details = [", ".join(_describe(view)) for view in kinds]
    beside, below = (_columns(plan, width) for width in (_INNER - pair.width - _GAP, _INNER))
    next_to = beside[1] > 0.75 * below[1]
    sheet = _figure(_sheet(slices, *(beside if next_to else below)), name, *details)
    return _stack([pair, sheet], vertical=not next_to)


def _columns(plan: Plan, room: int) -> tuple[int, float]:
    """Columns and scale of a sheet: the grid's own columns unless other ones show the slices nearly twice as large."""
    height, width = (max(sides) for sides in zip(*(view.size for view in plan.slices), strict=True))
    count = plan.grid.area

    def scale(cols: int) -> float:
        rows = math.ceil(count / cols)
        across = (room - _SLICE_GAP * (cols - 1)) / (cols * width)
        down = (_SHEET_HEIGHT - _SLICE_GAP * (rows - 1)) / (rows * height)
        return min(across, down, 1.0)

    best = max(range(1, count + 1), key=scale)
    cols = best if scale(best) > 1.9 * scale(plan.grid.cols) else plan.grid.cols
    return cols, scale(cols)


def _sheet(slices: list[Image.Image], cols: int, scale: float) -> Image.Image:
    """All slices in raster order, numbered."""
    shown = [Size(max(1, int(picture.height * scale)), max(1, int(picture.width * scale))) for picture in slices]
    down, across = (max(sides) + _SLICE_GAP for sides in zip(*shown, strict=True))
    rows = math.ceil(len(slices) / cols)
    sheet = Image.new("RGB", (cols * across - _SLICE_GAP, rows * down - _SLICE_GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (picture, size) in enumerate(zip(slices, shown, strict=True)):
        row, col = divmod(index, cols)
        sheet.paste(_scaled(picture, size), (col * across, row * down))
        _badge(draw, col * across + _INSET, row * down + _INSET, index + 1)
    return sheet


def _with_grid(picture: Image.Image, grid: Grid) -> Image.Image:
    """Draws the borders of the slices and their numbers; beside the picture where it is too thin for numbers."""
    if not grid.area:
        return picture
    height, width = picture.height / grid.rows, picture.width / grid.cols
    thin = min(height, width) < 2 * _BADGE
    left = _BADGE + _INSET if thin and width < height else 0
    top = _BADGE + _INSET if thin and not left else 0
    block = Image.new("RGB", (picture.width + left, picture.height + top), _PAPER)
    block.paste(picture, (left, top))
    draw = ImageDraw.Draw(block)
    for line_width, colour in ((4, "white"), (2, _ACCENT)):
        for row in range(1, grid.rows):
            y = top + round(row * height)
            draw.line((left, y, block.width, y), colour, line_width)
        for col in range(1, grid.cols):
            x = left + round(col * width)
            draw.line((x, top, x, block.height), colour, line_width)
    for index in range(grid.area):
        row, col = divmod(index, grid.cols)
        _badge(draw, 0 if left else round(col * width) + _INSET, 0 if top else round(row * height) + _INSET, index + 1)
    return block


def _badge(draw: ImageDraw.ImageDraw, x: int, y: int, number: int) -> None:
    font = ImageFont.load_default(14)
    width = max(_BADGE, math.ceil(font.getlength(str(number))) + 10)
    draw.rounded_rectangle((x, y, x + width, y + _BADGE), 5, fill=_ACCENT)
    draw.text((x + width / 2, y + _BADGE / 2), str(number), "white", font, anchor="mm")


def _describe(view: ViewPlan) -> tuple[str, str]:
    return f"{view.size}, {view.patch_grid} patches", f"{view.visual_tokens} visual tokens"


def _figure(picture: Image.Image, name: str, *details: str) -> Image.Image:
    label = _text([(name, 18, _INK), *((line, 15, _MUTED) for line in details)])
    block = Image.new("RGB", (max(picture.width, label.width), label.height + 6 + picture.height), _PAPER)
    block.paste(label, (0, 0))
    block.paste(picture, (0, label.height + 6))
    return block


def _text(lines: list[tuple[str, int, str]]) -> Image.Image:
    """Lines of (text, points, colour) under each other, none wider than the page."""
    lines = [(text, ImageFont.load_default(points), colour) for text, points, colour in lines if text]
    lines = [(_shortened(text, font), font, colour) for text, font, colour in lines]
    heights = [round(1.4 * font.size) for _, font, _ in lines]
    width = max(math.ceil(font.getlength(text)) for text, font, _ in lines)
    block = Image.new("RGB", (width, sum(heights)), _PAPER)
    draw = ImageDraw.Draw(block)
    for index, (text, font, colour) in enumerate(lines):
        draw.text((0, sum(heights[:index])), text, colour, font)
    return block


def _shortened(text: str, font: ImageFont.FreeTypeFont) -> str:
    text = " ".join(text[:1000].split())
    if font.getlength(text) <= _INNER:
        return text
    while font.getlength(text + "...") > _INNER:
        text = text[:-1]
    return text + "..."


def _stack(blocks: list[Image.Image], vertical: bool) -> Image.Image:
    gaps = _GAP * (len(blocks) - 1)
    widths, heights = [block.width for block in blocks], [block.height for block in blocks]
    size = (max(widths), sum(heights) + gaps) if vertical else (sum(widths) + gaps, max(heights))
    page, position = Image.new("RGB", size, _PAPER), 0
    for block in blocks:
        page.paste(block, (0, position) if vertical else (position, 0))
        position += (block.height if vertical else block.width) + _GAP
    return page


def _fit(size: Size, box: Size) -> Size:
    """The largest size of the same aspect ratio inside the box."""
    scale = min(box.height / size.height, box.width / size.width)
    return Size(max(1, round(size.height * scale)), max(1, round(size.width * scale)))


def _scaled(picture: Image.Image, size: Size) -> Image.Image:
    """Resized for display and framed; the pixels of a much enlarged picture stay visible as squares."""
    enlarged = size.width > 2 * picture.width
    resample = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    scaled = picture.resize((size.width, size.height), resample)
    if min(size) > 8:
        ImageDraw.Draw(scaled).rectangle((0, 0, size.width - 1, size.height - 1), outline=_BORDER)
    return scaled
