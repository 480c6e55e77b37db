"""Image files made on the fly for the tests of the opener: of every format, turned, lying about their size."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SAVE = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "GIF": {},
    "TIFF": {},
}


def channels_first(patches):
    """Patches of `cut_views`, uint8[P, 4 * side**2], as towers have them: [P, 3 * side**2], (channel, y, x)."""
    pixels = patches.reshape(len(patches), -1, 4)[..., :3]
    return pixels.swapaxes(1, 2).reshape(len(patches), -1)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(height=37, width=53):
    """A smooth, asymmetric RGB picture."""
    y, x = np.mgrid[:height, :width]
    channels = [255 * x / width, 255 * y / height, 255 * (x + y) / (height + width)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_chunks(data):
    position, chunks = 8, []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        chunks.append(data[position : position + length + 12])
        position += length + 12
    return chunks


def png_of(width, height):
    """A PNG whose header declares a size that its few pixels do not have."""
    chunks = png_chunks(encode(photo()))
    header = struct.pack(">II", width, height) + chunks[0][16:21]
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks[1:])


def declared(format, width, height):
    """The file of a small image with another size written into its header."""
    data = bytearray(encode(photo(), format, **SAVE[format]))
    if format == "PNG":
        return png_of(width, height)
    if format == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    if format == "GIF":
        struct.pack_into("<HH", data, 6, width, height)
    if format == "BMP":
        struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


def with_orientation(format, value):
    if format == "TIFF":
        return encode(photo(), "TIFF", tiffinfo={274: value})
    exif = Image.Exif()
    exif[274] = value
    return encode(photo(), format, exif=exif, **SAVE[format])
