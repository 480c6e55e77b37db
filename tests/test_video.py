"""Which frames of a video are shown, and what their composites look like."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from golden_v4 import GOLDEN
from PIL import Image

from uhd_jax.config import ChatConfig, DecoderConfig, ModelConfig, SlicingConfig, VideoConfig
from uhd_jax.data.chat import ImagePart, Message, VideoPart, encode_chat
from uhd_jax.data.tokenizer import load_tokenizer
from uhd_jax.slicing.plan import ImageRefused, Size, plan_image
from uhd_jax.slicing.video import Video, composite, open_video, sample_indices

SAMPLING = json.loads((GOLDEN / "v4_video" / "video_sampling.json").read_text())


def frame(value: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def values(pictures: list[np.ndarray]) -> list[int]:
    """What the frames of `frame` were made with; -1 for a composite."""
    return [int(p.max()) if p.min() == p.max() else -1 for p in pictures]


@pytest.mark.parametrize("case", SAMPLING["sampling"], ids=lambda c: f"{c['total_num_frames']}_{c['stack_frames']}")
def test_sampled_indices_are_the_published_ones(case):
    video = VideoConfig(max_frames=case["max_num_frames"], stack_frames=case["stack_frames"])
    assert sample_indices(case["total_num_frames"], case["fps"], case["duration"], video) == case["indices"]


@pytest.mark.parametrize("case", SAMPLING["composites"], ids=lambda c: f"{c['frames']}of{c['h']}x{c['w']}")
def test_canvases_have_the_published_sizes(case):
    canvas = composite([frame(9, case["h"], case["w"])] * case["frames"])
    assert list(canvas.shape[:2]) == case["canvas_hw"]


def test_a_canvas_shows_frames_row_by_row_with_black_between():
    canvas = composite([frame(value) for value in (1, 2, 3, 4)])
    assert canvas.shape == (8 + 6 + 8, 12 + 6 + 12, 3)
    assert [canvas[0, 0, 0], canvas[0, 18, 0], canvas[14, 0, 0], canvas[14, 18, 0]] == [1, 2, 3, 4]
    assert not canvas[8:14].any() and not canvas[:, 12:18].any()


def test_a_frame_and_the_canvas_of_its_second_follow_each_other():
    frames = [frame(value) for value in range(1, 25)]  # 2.4 seconds
    pictures = open_video(Video(frames, fps=10.0), VideoConfig(stack_frames=3))
    assert values(pictures) == [1, -1, 11, -1, 21, 24]  # of the last second only 2.333 lies before the end
    np.testing.assert_array_equal(pictures[1], composite([frames[3], frames[6]]))


def test_timestamps_choose_the_frame_that_is_on_screen():
    frames = [frame(value) for value in (1, 2, 3, 4)]
    pictures = open_video(Video(frames, timestamps=(0.0, 0.9, 1.1, 2.5), duration=4.0))
    assert values(pictures) == [1, 2, 3, 4]
    assert values(open_video(Video(frames, timestamps=(0.0, 1.0, 2.0, 3.0)))) == [1, 2, 3, 4]
    assert values(open_video(Video(frames, timestamps=(0.0, 0.1, 0.2, 0.3)))) == [1]


def test_frames_without_times_are_all_taken():
    frames = [frame(value) for value in range(5)]
    assert values(open_video(frames, VideoConfig(max_frames=2, stack_frames=4))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_read_by_its_own_times(tmp_path, suffix):
    pictures = [Image.fromarray(frame(value, 16, 16)) for value in (10, 90, 170, 250)]
    path = tmp_path / f"clip.{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=500, lossless=True)
    assert values(open_video(path)) == [10, 170]
    assert values(open_video(path, VideoConfig(max_frames=1))) == [10]


def test_a_video_file_is_decoded_by_pyav(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "bgr0"
        for value in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(20 * value, 16, 32), format="rgb24")))
        container.mux(stream.encode())
    assert values(open_video(path)) == [0, 80, 160]


def test_without_pyav_a_video_file_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImageRefused, match=r"clip\.mp4.*pip install av.*Video\(frames, fps"):
        open_video(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Video([]), "without frames"),
        (lambda: Video([frame(1)], fps=0.0), "positive fps"),
        (lambda: Video([frame(1)], fps=1.0, timestamps=(0.0,)), "not both"),
        (lambda: Video([frame(1)] * 2, timestamps=(0.0,)), "2 frames with 1 timestamps"),
        (lambda: Video([frame(1)] * 2, timestamps=(1.0, 0.0)), "ascending"),
        (lambda: open_video([frame(1), frame(1, 9)]), r"differ in size.*\(8, 12\), \(9, 12\)"),
        (lambda: open_video("nowhere.mp4"), "nowhere.mp4: no such file"),
        (lambda: open_video([]), "without frames"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ImageRefused, match=message):
        make()


def test_something_else_is_no_video():
    with pytest.raises(TypeError, match="not int"):
        open_video(3)


PROMPTS = json.loads((GOLDEN / "v4_video" / "prompts.json").read_text())["cases"]


@pytest.mark.parametrize(
    "case", PROMPTS, ids=lambda c: f"{len(c['clips'])}_{c['stack_frames']}_{c['max_slices']}_{c['mode']}"
)
def test_prompts_are_those_of_the_published_processor(case):
    folder = GOLDEN / "v4_full_qwen3_16x"
    chat, slicing = ChatConfig(use_image_id=case["use_image_id"]), SlicingConfig(scale_resolution=112)
    video = VideoConfig(case["max_frames"], case["stack_frames"], case["max_slices"])
    config = ModelConfig(DecoderConfig(8, 8, 8, 1, 1, 1, 2), slicing=slicing, mode=case["mode"])
    plans, parts = [plan_image(Size(40, 50), config)], [ImagePart(0)]
    for count, fps, height, width in case["clips"]:
        pictures = open_video(Video([frame(1, height, width)] * count, fps=fps), video)
        parts.append(VideoPart(len(plans), len(pictures)))
        plans += [plan_image(Size(*p.shape[:2]), config, max_slices=video.max_slices) for p in pictures]
    sample = encode_chat([Message("user", (*parts, "When?"))], plans, load_tokenizer(folder), chat, generate=True)
    runs = [[int(i), len(list(group))] for i, group in itertools.groupby(sample.tokens)]
    assert runs == case["ids"]
    assert [list(view.patch_grid) for plan in plans[1:] for view in plan.views] == case["target_sizes"]
