"""Images into views: plan, pixels, text layout and picture. NumPy and Pillow only."""

from uhd_jax.slicing.image_io import open_image, read_size
from uhd_jax.slicing.layout import Separator, ViewRun, block_text, visual_block
from uhd_jax.slicing.pixels import cut_views, merge_order, view_pixels
from uhd_jax.slicing.plan import Grid, ImageRefused, Plan, Size, ViewPlan, check_size, make_plan, plan_image
from uhd_jax.slicing.viewer import draw_slices

__all__ = [
    "Grid",
    "ImageRefused",
    "Plan",
    "Separator",
    "Size",
    "ViewPlan",
    "ViewRun",
    "block_text",
    "check_size",
    "cut_views",
    "draw_slices",
    "make_plan",
    "plan_image",
    "merge_order",
    "open_image",
    "read_size",
    "view_pixels",
    "visual_block",
]
