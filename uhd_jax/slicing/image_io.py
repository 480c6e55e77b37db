"""The one opener of images: every file, upload or array becomes checked RGB uint8 here, or is refused.

Limits are checked on the header, before a pixel is decoded. Orientation follows EXIF; of an animation or a multi-page
file the first frame is used; transparency is composited on white, because the towers never saw an alpha channel.
Grey images of 16 bits keep their full range (value / 257, never stretched to the image's own minimum and maximum).
Colour images of 16 bits per channel are read by Pillow through their high byte. Colour profiles are not applied. All
else is what `PIL.Image.convert("RGB")` gives, as in the published processors.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from uhd_jax.config import ImageLimits
from uhd_jax.slicing.plan import ImageRefused, Size, check_size

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

Source = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_TIFF_BITS_PER_SAMPLE = 258

# Pillow warns at half the size that `ImageLimits` accepts by default; that limit, checked below, takes its place.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(source: Source, limits: ImageLimits = ImageLimits()) -> np.ndarray:
    """Opens, checks and decodes an image.

    Args:
      source: a path, the bytes of a file, a binary file (read from its start if it can seek), a `PIL.Image.Image` (its
        current frame) or a uint8 array [H, W], [H, W, 3] or [H, W, 4].
      limits: what the image may be. Pillow's own decompression-bomb limit holds besides.

    Returns:
      uint8[H, W, 3], RGB, upright; possibly read-only.

    Raises:
      ImageRefused: unreadable, truncated, of another format, or outside the limits; the message names the file.
      TypeError: `source` is none of the above.
    """
    with _opened(source, limits) as image:
        return np.asarray(_to_rgb(image))


def open_picture(source: Source, limits: ImageLimits = ImageLimits(), least: Size | None = None) -> Image.Image:
    """As `open_image`, but gives Pillow's own picture, of which views are cut without a copy between.

    Args:
      source: as of `open_image`.
      limits: what the image may be.
      least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as it is no smaller than this.
        That saves most of the time of large photographs, and changes pixels: the decoder averages blocks where a
        resize would weigh them. None: decoded as it is.

    Returns:
      An upright picture of mode RGB; sides decoded at 1/N are rounded up.
    """
    with _opened(source, limits) as image:
        if least is not None and image.format == "JPEG":
            turned = _orientation(image) in _SWAPS_SIDES
            image.draft(None, tuple(least) if turned else (least.width, least.height))
        return _to_rgb(image)


def read_size(source: Source, limits: ImageLimits = ImageLimits()) -> Size:
    """The size that `open_image` would give, from the headers alone; raises as `open_image` except for bad pixels.

    A binary file that cannot seek is consumed.
    """
    with _opened(source, limits) as image:
        width, height = image.size
        return Size(width, height) if _orientation(image) in _SWAPS_SIDES else Size(height, width)


def read_bytes(source: Source, limits: ImageLimits = ImageLimits()) -> bytes:
    """The file of an image as it is, its header checked; a PNG of what has no file. Raises as `read_size`."""
    with _opened(source, limits) as image:
        if isinstance(source, (Image.Image, np.ndarray)):
            buffer = io.BytesIO()
            _to_rgb(image).save(buffer, "PNG")
            return buffer.getvalue()
        image.fp.seek(0)
        return image.fp.read()


@contextlib.contextmanager
def _opened(source: Source, limits: ImageLimits) -> Iterator[Image.Image]:
    """Yields the image, header read and checked; whatever goes wrong in here or in the body becomes `ImageRefused`."""
    name = _name(source)
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, Image.Image):
                image = source
            elif isinstance(source, np.ndarray):
                image = _from_array(source)
            else:
                file = stack.enter_context(_binary_file(source, limits))
                image = stack.enter_context(Image.open(file, formats=FORMATS))
            check_size(Size(image.height, image.width), limits)
            yield image
    except ImageRefused as error:
        raise ImageRefused(f"{name}: {error}") from None
    except FileNotFoundError:
        raise ImageRefused(f"{name}: no such file; check the path") from None
    except UnidentifiedImageError:
        message = f"{name}: not a readable {', '.join(FORMATS)} file; convert it to one of these"
        raise ImageRefused(message) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRefused(f"{name}: {error} Shrink the image") from None
    except MemoryError:
        raise ImageRefused(f"{name}: not enough memory to decode it; lower the image limits or shrink it") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error...
        message = f"{name}: damaged or unsupported ({type(error).__name__}: {error}); save it again or leave it out"
        raise ImageRefused(message) from error


def _name(source: Source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return f"{os.fspath(source)!s:.300}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "<bytes>"
    if isinstance(source, np.ndarray):
        return "<array>"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "<image>"
    if hasattr(source, "read"):
        return str(getattr(source, "name", "<file>"))
    kind = type(source).__name__
    raise TypeError(f"an image is a path, bytes, a binary file, a PIL image or a uint8 array, not {kind}")


def _binary_file(source: Source, limits: ImageLimits) -> BinaryIO:
    """A seekable file of at least one and at most `limits.max_bytes` bytes, to be closed by the caller."""
    if isinstance(source, (str, os.PathLike)):
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could block for ever
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ImageRefused(f"is {kind}; name an image file")
        _check_bytes(status.st_size, limits)
        return open(source, "rb")
    if hasattr(source, "read"):
        if source.seekable():
            source.seek(0)
        source = source.read(limits.max_bytes + 1)
        if isinstance(source, str):
            raise ImageRefused("is a text file object; open it in binary mode")
    _check_bytes(len(source), limits)
    return io.BytesIO(source)


def _check_bytes(count: int, limits: ImageLimits) -> None:
    if count == 0:
        raise ImageRefused("is empty; nothing to decode")
    if count > limits.max_bytes:
        raise ImageRefused(f"has more than max_bytes={limits.max_bytes} bytes; shrink the image")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageRefused(
            f"{array.dtype}{list(array.shape)} is not an image; give uint8 of shape [H, W], [H, W, 3] or [H, W, 4]"
        )
    return Image.fromarray(array)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation that is still to be applied, 1 to 8, without decoding; 1 when absent or unreadable."""
    if ExifTags.Base.Orientation in getattr(image, "tag_v2", ()):
        return 1  # Pillow turns a TIFF file while loading, and its size is announced accordingly
    if image.format == "PNG" and "exif" not in image.info and image.fp is not None:
        exif = _late_png_exif(image.fp)
        if exif:
            image.info["exif"] = exif
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's own method would decode the image
        return value if value in _UPRIGHT else 1
    except Exception:  # damaged metadata does not make the pixels wrong: shown as stored, as browsers do
        return 1


def _late_png_exif(file: BinaryIO) -> bytes:
    """The eXIf chunk of a PNG wherever it stands, also behind the pixels, where Pillow sees it only after decoding."""
    position = file.tell()
    try:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, os.SEEK_CUR)
        return b""
    finally:
        file.seek(position)


def _to_rgb(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    white = _white_level(image)
    image.load()
    if orientation != 1:
        image = image.transpose(_UPRIGHT[orientation])
    if white:
        return _grey_to_rgb(image, white)
    if image.mode == "La":  # Pillow has no direct way from premultiplied grey to RGBA and would drop the alpha
        image = image.convert("LA")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(pixels, mask=pixels)
    return image if image.mode == "RGB" else image.convert("RGB")


def _white_level(image: Image.Image) -> int:
    """The value of white in a grey image of more than 8 bits; 0 for every other mode."""
    if image.mode == "F":
        raise ImageRefused("float pixels have no defined white; convert the image to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return 0
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
    if bits not in (12, 16):
        raise ImageRefused(f"integer pixels of {bits} bits have no defined white; convert the image to 8 or 16 bits")
    return 2**bits - 1


def _grey_to_rgb(image: Image.Image, white: int) -> Image.Image:
    values = np.asarray(image).astype(np.int32)
    low, high = values.min(), values.max()
    if low < 0 or high > white:
        raise ImageRefused(f"grey values {low} to {high} are outside 0 to {white}; convert the image to 8 bits")
    grey = ((values * 255 + white // 2) // white).astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")
