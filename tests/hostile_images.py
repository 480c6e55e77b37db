"""Image files that are not what they seem: damaged, of odd kinds, huge by their header or by what unpacks from them."""

from __future__ import annotations

import functools
import io
import zlib

import numpy as np
from hypothesis import strategies as st
from image_files import SAVE, declared, encode, photo, png_chunk, png_chunks, with_orientation
from PIL import Image


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Files to begin with; the first third of them are sound."""
    picture = photo()
    sound = [encode(picture, form, **options) for form, options in SAVE.items()]
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        odd = Image.new(mode, (30, 20), 3) if mode == "I;16" else picture.convert(mode)
        sound.append(encode(odd, transparency=2) if mode == "P" else encode(odd))
    sound += [encode(picture.convert("CMYK"), "JPEG"), encode(picture, "JPEG", progressive=True)]
    frames = [picture.rotate(90 * turn) for turn in range(3)]
    sound += [encode(picture, form, save_all=True, append_images=frames) for form in ("GIF", "WEBP", "TIFF", "PNG")]
    sound += [encode(picture, "TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    sound += [encode(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF")]
    sound += [with_orientation(form, value) for form in ("JPEG", "PNG", "TIFF") for value in (6, 9)]
    sizes = (60_000, 60_000), (0, 0), (1, 9000)
    lying = [declared(form, *size) for form in ("PNG", "JPEG", "GIF", "BMP") for size in sizes]
    lying += [encode(Image.new("1", size)) for size in ((1, 4000), (4000, 1), (1, 1), (30_000, 30_000), (1200, 1400))]
    chunks = png_chunks(encode(picture))
    packed = zlib.compress(bytes(70_000_000), 9)
    for kind, content in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        bomb = png_chunk(kind, content + packed)
        lying.append(b"\x89PNG\r\n\x1a\n" + chunks[0] + bomb + b"".join(chunks[1:]))
    lying.append(b"\x89PNG\r\n\x1a\n" + chunks[0] + png_chunk(b"IDAT", packed) + chunks[-1])
    others = [b"", b"\0" * 64, b"%PDF-1.4", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
    others += [b"GIF89a", b"BM", b"II*\0", b"RIFF"]
    others += [_of(form) for form in ("PPM", "ICO", "TGA", "JPEG2000", "PCX", "PDF")]
    return (*sound, *lying, *others)


def _of(form: str) -> bytes:
    file = io.BytesIO()
    photo().save(file, form)
    return file.getvalue()


@st.composite
def hostile_files(draw) -> bytes:
    """One of them with bytes changed, cut off, put in, or of another put behind."""
    content = bytearray(draw(st.sampled_from(seeds())))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3])) if len(content) < 100_000 else 0):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    change = draw(st.integers(0, 7))
    at = draw(st.integers(0, len(content)))
    if change == 0:
        del content[at:]
    elif change == 1:
        content[at:at] = draw(st.binary(max_size=20))
    elif change == 2:
        content[at:] = draw(st.sampled_from(seeds()[:12]))[at:]
    return bytes(content)
