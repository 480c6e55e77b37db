"""The image opener: what it refuses, and that it refuses before decoding."""

import io
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from image_files import SAVE, declared, encode, photo, png_of, with_orientation
from PIL import Image

from uhd_jax.config import ImageLimits
from uhd_jax.slicing.image_io import FORMATS, open_image, read_size
from uhd_jax.slicing.plan import ImageRefused, Size

# Limits, before decoding


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
def test_bombs_are_refused_by_their_header(format):
    for width, height, limits, message in [
        (60000, 60000, ImageLimits(), "(?i)pixels"),
        (9000, 7000, ImageLimits(max_pixels=10**7), "size 7000x9000: 63000000 pixels are above max_pixels=10000000"),
        (9000, 7000, ImageLimits(max_side=8000), "size 7000x9000: a side is above max_side=8000"),
        (60, 20000, ImageLimits(), "size 20000x60: the aspect ratio 333 is above max_aspect_ratio=200"),
    ]:
        data = declared(format, width, height)
        for function in (read_size, open_image):
            with pytest.raises(ImageRefused, match=message) as refused:
                function(data, limits)
            assert str(refused.value).startswith("<bytes>: ") and "damaged" not in str(refused.value)


def test_a_strip_of_20000_by_20_is_refused():
    for size in ((20, 20000), (20000, 20)):
        with pytest.raises(ImageRefused, match="the aspect ratio 1000 is above max_aspect_ratio=200; crop"):
            open_image(encode(Image.new("RGB", size)))


def test_limits_hold_for_images_and_arrays_too():
    limits = ImageLimits(max_pixels=1000)
    for source in (photo(), np.asarray(photo())):
        with pytest.raises(ImageRefused, match="1961 pixels are above max_pixels=1000"):
            open_image(source, limits)


def test_byte_limit(tmp_path):
    data = encode(photo())
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    limits = ImageLimits(max_bytes=len(data) - 1)
    for source in (data, path, io.BytesIO(data)):
        with pytest.raises(ImageRefused, match=f"more than max_bytes={limits.max_bytes} bytes"):
            open_image(source, limits)
        open_image(source, ImageLimits(max_bytes=len(data)))


def test_an_endless_stream_is_not_read_to_its_end():
    class Endless(io.RawIOBase):
        def read(self, size=-1):
            assert 0 <= size <= 1001, "asked for everything"
            return bytes(size)

    with pytest.raises(ImageRefused, match="more than max_bytes=1000 bytes"):
        open_image(Endless(), ImageLimits(max_bytes=1000))


def test_pillows_own_warning_is_silenced():
    """A size between Pillow's warning and our limit is announced without a word."""
    program = (
        "import sys; from uhd_jax.slicing.image_io import read_size; print(read_size(sys.stdin.buffer.read()));"
        "assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-W", "error::Warning:PIL.Image", "-c", program]
    result = subprocess.run(command, input=png_of(12000, 9000), capture_output=True, check=False)
    assert (result.stdout.decode().strip(), result.stderr.decode()) == ("9000x12000", "")


def test_pillows_own_limit_becomes_a_refusal(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ImageRefused, match="<bytes>: Image size .1961 pixels. exceeds limit"):
        open_image(encode(photo()))


def test_the_size_needs_no_pixels():
    data = encode(photo(300, 400))
    broken = data[: data.index(b"IDAT") + 4] + b"no pixels here"
    assert read_size(broken) == Size(300, 400)
    with pytest.raises(ImageRefused, match="damaged"):
        open_image(broken)


# What is refused


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_files(format, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8))
    data = encode(noise, format, **SAVE[format])
    path = tmp_path / f"cut.{format.lower()}"
    for share in (0.02, 0.3, 0.6, 0.95):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageRefused, match=f"cut.{format.lower()}: "):
            open_image(path)


def test_files_that_are_no_images(tmp_path):
    files = {
        "text.png": b"this is not an image\n" * 100,
        "page.jpg": b"<!DOCTYPE html><html></html>",
        "drawing.webp": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "program.gif": b"\x7fELF" + bytes(100),
        "zeros.bmp": bytes(1000),
        "head.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        for function in (open_image, read_size):
            with pytest.raises(ImageRefused, match=f"{name}: not a readable JPEG, PNG, .* file; convert"):
                function(tmp_path / name)


@pytest.mark.parametrize("format", ["PPM", "PCX", "ICO", "TGA", "EPS", "PDF", "DDS"])
def test_other_formats_are_refused(format):
    with pytest.raises(ImageRefused, match="not a readable"):
        open_image(encode(photo(), format))


def test_paths_that_are_no_files(tmp_path):
    pipe, empty = tmp_path / "pipe.png", tmp_path / "empty.png"
    os.mkfifo(pipe)
    empty.touch()
    for path, message in [
        (tmp_path / "missing.png", "missing.png: no such file"),
        (tmp_path, "is a directory"),
        (empty, "empty.png: is empty"),
        (pipe, "pipe.png: is not a regular file"),
        ("/dev/zero", "/dev/zero: is not a regular file"),
        ("x" * 5000, "x{300}: "),
        ("nul\0byte.png", "embedded null"),
    ]:
        for function in (open_image, read_size):
            with pytest.raises(ImageRefused, match=message):
                function(path)
    with pytest.raises(ImageRefused, match="<bytes>: is empty"):
        open_image(b"")
    with pytest.raises(ImageRefused, match="open it in binary mode"):
        open_image(io.StringIO("text"))


@pytest.mark.parametrize("error", [SyntaxError, struct.error, ValueError, zlib.error, OSError, KeyError, MemoryError])
def test_whatever_pillow_raises_becomes_a_refusal(monkeypatch, error):
    def fail(self):
        raise error("from the decoder")

    data = encode(photo())
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    message = "not enough memory" if error is MemoryError else "damaged or unsupported .*from the decoder"
    with pytest.raises(ImageRefused, match=f"^<bytes>: {message}"):
        open_image(data)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_is_read_or_refused_but_never_crashes(format):
    """Every damaged file gives pixels of the announced size, or ImageRefused."""
    draw = random.Random(format)
    limits = ImageLimits(max_pixels=10**6, max_side=4000)
    original = with_orientation(format, 6) if format not in ("BMP", "GIF") else encode(photo(), format)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(original)
        for _ in range(draw.choice([1, 2, 8])):
            data[draw.randrange(min(len(data), draw.choice([64, 512, 10**6])))] = draw.randrange(256)
        try:
            image = open_image(bytes(data), limits)
        except ImageRefused:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert image.dtype == np.uint8 and read_size(bytes(data), limits) == image.shape[:2]
    assert all(outcomes.values()), outcomes
