"""The image opener: what it makes of every kind of image."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_files import SAVE, encode, photo, png_chunk, png_chunks, with_orientation
from PIL import Image, ImageDraw

from uhd_jax.config import SlicingConfig
from uhd_jax.slicing.image_io import FORMATS, open_image, read_size
from uhd_jax.slicing.pixels import cut_views
from uhd_jax.slicing.plan import ImageRefused, Size, make_plan

OPAQUE = {
    "JPEG": ["RGB", "L", "CMYK", "YCbCr"],
    "PNG": ["RGB", "L", "1", "P"],
    "WEBP": ["RGB"],
    "BMP": ["RGB", "L", "1", "P"],
    "GIF": ["RGB", "L", "1", "P"],
    "TIFF": ["RGB", "L", "1", "P", "CMYK", "YCbCr"],
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format in FORMATS for mode in OPAQUE[format]])
def test_opaque_images_equal_pillow(format, mode):
    data = encode(photo().convert(mode), format, **SAVE[format])
    image = open_image(data)
    np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert image.dtype == np.uint8 and image.shape == (37, 53, 3)
    assert read_size(data) == Size(37, 53)
    if mode == "RGB" and format not in ("JPEG", "GIF"):
        np.testing.assert_array_equal(image, np.asarray(photo()))


def test_every_kind_of_source(tmp_path):
    data, expected = encode(photo()), np.asarray(photo())
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    with open(path, "rb") as file:
        sources = [str(path), path, data, bytearray(data), memoryview(data), file, io.BytesIO(data), photo(), expected]
        for source in sources:
            assert read_size(source) == Size(37, 53)
            np.testing.assert_array_equal(open_image(source), expected)  # also after read_size moved the file on
    with pytest.raises(TypeError, match="not int"):
        open_image(3)


def test_stream_that_cannot_seek():
    class Stream(io.RawIOBase):
        def __init__(self, data):
            self.inner = io.BytesIO(data)

        def read(self, size=-1):
            return self.inner.read(size)

        def seekable(self):
            return False

    np.testing.assert_array_equal(open_image(Stream(encode(photo()))), np.asarray(photo()))


def test_arrays():
    grey = np.asarray(photo())[..., 0]
    np.testing.assert_array_equal(open_image(grey), np.repeat(grey[..., None], 3, axis=2))
    transposed = np.asarray(photo()).transpose(1, 0, 2)
    np.testing.assert_array_equal(open_image(transposed), transposed)
    assert (open_image(np.zeros((4, 5, 4), np.uint8)) == 255).all()
    bad = [
        np.zeros((4, 5), np.float32),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((0, 5), np.uint8),
    ]
    for array in bad:
        with pytest.raises(ImageRefused, match="<array>"):
            open_image(array)


def test_the_content_decides_not_the_extension(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(photo()))
    np.testing.assert_array_equal(open_image(path), np.asarray(photo()))


def test_one_pixel():
    image = open_image(encode(Image.new("RGB", (1, 1), (1, 2, 3))))
    assert image.tolist() == [[[1, 2, 3]]]
    plan = make_plan(Size(1, 1), SlicingConfig(), 14, 2)
    (patches,) = cut_views(image, plan, 14)
    assert patches.shape == (1024, 784)
    assert (patches.reshape(1024, 196, 4)[..., :3] == [1, 2, 3]).all()


# Orientation

ORIENTED = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("value", ORIENTED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format, value):
    stored = open_image(encode(photo(), format, **SAVE[format]))
    data = with_orientation(format, value)
    image = open_image(data)
    np.testing.assert_array_equal(image, ORIENTED[value](stored))
    assert read_size(data) == image.shape[:2] == ((37, 53) if value < 5 else (53, 37))
    with Image.open(io.BytesIO(data)) as opened:
        assert read_size(opened) == image.shape[:2]
        np.testing.assert_array_equal(open_image(opened), image)
        np.testing.assert_array_equal(open_image(opened), image)  # the caller's image was left as it was


def test_orientation_behind_the_pixels_of_a_png():
    chunks = png_chunks(with_orientation("PNG", 6))
    (exif,) = (chunk for chunk in chunks if chunk[4:8] == b"eXIf")
    chunks.remove(exif)
    data = b"\x89PNG\r\n\x1a\n" + b"".join([*chunks[:-1], exif, chunks[-1]])
    assert read_size(data) == Size(53, 37)
    np.testing.assert_array_equal(open_image(data), np.rot90(np.asarray(photo()), -1))


def test_orientation_of_palette_with_transparency():
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    exif = Image.Exif()
    exif[274] = 6
    rgb = open_image(encode(image, transparency=0, exif=exif))
    assert rgb.shape == (4, 2, 3)
    assert rgb[0, 1].tolist() == [255, 255, 255] and (rgb.reshape(-1, 3) == [0, 0, 255]).all(axis=1).sum() == 7


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\xff\xff\xff\xff", b"", b"MM\0*\0\0\0\x08\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_image_as_stored(exif, format):
    data = encode(photo(), format, exif=b"Exif\0\0" + exif, **SAVE[format])
    assert read_size(data) == Size(37, 53)
    np.testing.assert_array_equal(open_image(data), open_image(encode(photo(), format, **SAVE[format])))


# Transparency, depth, frames


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white(format):
    rgba = photo().convert("RGBA")
    alpha = np.linspace(0, 255, 37 * 53).astype(np.uint8).reshape(37, 53)
    rgba.putalpha(Image.fromarray(alpha))
    options = SAVE[format] | ({"exact": True} if format == "WEBP" else {})
    weight = alpha[..., None] / 255
    expected = np.asarray(photo()) * weight + 255 * (1 - weight)
    assert np.abs(open_image(encode(rgba, format, **options)) - expected).max() <= 1


def test_opaque_alpha_changes_nothing():
    np.testing.assert_array_equal(open_image(encode(photo().convert("RGBA"))), np.asarray(photo()))


@pytest.mark.parametrize("mode", ["LA", "La"])
def test_grey_with_alpha(mode):
    image = Image.new("LA", (2, 1), (100, 0))
    image.putpixel((1, 0), (100, 255))
    source = image if mode == "La" else encode(image)
    assert open_image(source.convert("La") if mode == "La" else source).tolist() == [[[255] * 3, [100] * 3]]


@pytest.mark.parametrize(
    ("image", "transparency"),
    [
        (Image.frombytes("P", (2, 1), b"\0\1"), 0),
        (Image.frombytes("P", (2, 1), b"\0\1"), b"\0\xff"),
        (Image.frombytes("L", (2, 1), b"\0\7"), 0),
        (Image.frombytes("1", (2, 1), b"\x40"), 0),
        (Image.frombytes("RGB", (2, 1), b"\0\0\0\7\7\7"), (0, 0, 0)),
        (Image.frombytes("I;16", (2, 1), b"\0\0\7\7"), 0),
    ],
    ids=["P-index", "P-bytes", "L", "1", "RGB", "I;16"],
)
def test_transparent_colours_become_white(image, transparency):
    if image.mode == "P":
        image.putpalette([10, 20, 30, 7, 7, 7])
    pixels = open_image(encode(image, transparency=transparency))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == ([255] * 3 if image.mode == "1" else [7] * 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "I;16", "I;16B", "I"])
def test_sixteen_bits_keep_their_range(kind):
    values = np.array([[0, 128, 129, 385, 386, 25700, 32768, 65406, 65407, 65535]], np.uint16)
    if kind in SAVE:
        source = encode(Image.fromarray(values), kind)
    elif kind == "I;16B":
        source = Image.frombytes("I;16B", (values.shape[1], 1), values.astype(">u2").tobytes())
    else:
        source = Image.fromarray(values.astype(np.int32) if kind == "I" else values)
        assert source.mode == kind
    assert open_image(source)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 2, 100, 128, 254, 255, 255)]


def test_sixteen_bit_colour_uses_the_high_byte():
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + bytes([1, 255, 128, 0, 255, 255]))
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")
    assert open_image(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).tolist() == [[[1, 128, 255]]]


def tiff(width, height, bits, pixels, sample_format=1):
    """An uncompressed little-endian grey TIFF."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 146, 277: 1, 278: height, 279: len(pixels)}
    tags[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return (b"II*\0" + struct.pack("<I", 8) + directory).ljust(146, b"\0") + pixels


def test_twelve_bit_grey_keeps_its_range():
    assert open_image(tiff(2, 1, 12, b"\xff\xf8\x00"))[0].tolist() == [[255] * 3, [128] * 3]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Image.new("F", (2, 2)), "float pixels have no defined white"),
        (encode(Image.new("F", (2, 2)), "TIFF"), "float pixels have no defined white"),
        (encode(Image.new("I", (2, 2)), "TIFF"), "32 bits have no defined white"),
        (Image.new("I", (2, 2), 70000), "70000 are outside 0 to 65535"),
        (Image.new("I", (2, 2), -1), "-1 to -1 are outside"),
        (tiff(1, 1, 16, b"\xff\xff", sample_format=2), "-1 to -1 are outside"),
    ],
    ids=["F", "F-tiff", "I-tiff", "I-above", "I-below", "signed"],
)
def test_depths_without_a_defined_white_are_refused(source, message):
    with pytest.raises(ImageRefused, match=message):
        open_image(source)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several(format):
    frames = []
    for colour in ("red", "lime", "blue"):
        frames.append(Image.new("RGB", (30, 20), colour))
        ImageDraw.Draw(frames[-1]).point((len(frames), 0), "white")
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(open_image(data), np.asarray(frames[0]))


def test_transparent_gif_is_white_where_transparent():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((2, 1), 1)
    pixels = open_image(encode(image, "GIF", transparency=0))
    assert pixels[1, 2].tolist() == [255, 0, 0] and (pixels == 255).all(axis=2).sum() == 15
