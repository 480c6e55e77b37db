"""The pixels of a picture as an array, without a copy where Pillow lets its memory be read.

Pillow keeps RGB in four bytes per pixel, and packs it into three for every array that is made of it: as long a work as
cutting patches out of it. Its memory is read through the Arrow C data interface (https://arrow.apache.org/docs/format/
CDataInterface.html), the only one of Pillow's that shares it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from PIL import Image

PIXEL_BYTES = 4  # of an RGB picture: red, green, blue, and one without meaning


class _ArrowArray(ctypes.Structure):
    """`struct ArrowArray` up to its children."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class _Memory:
    """Memory of a picture, kept alive by the arrays that are made of it."""

    def __init__(self, picture: Image.Image):
        _, self._capsule = picture.__arrow_c_array__()
        pixels = _ArrowArray.from_address(_pointer(self._capsule, b"arrow_array"))
        width, height = picture.size
        if (pixels.length, pixels.offset, pixels.n_children) != (width * height, 0, 1):
            raise ValueError("not a list of pixels")
        values = pixels.children[0].contents
        if (values.length, values.offset, values.n_buffers) != (width * height * PIXEL_BYTES, 0, 2):
            raise ValueError("not four bytes per pixel")
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": (height, width, PIXEL_BYTES),
            "data": (values.buffers[1], True),  # read only
        }


def pixels_of(picture: Image.Image) -> np.ndarray:
    """The pixels of an RGB picture: uint8[H, W, 4], read-only; red, green, blue, and one byte that means nothing."""
    try:
        return np.asarray(_Memory(picture))
    except (AttributeError, ValueError):  # a Pillow that does not share, or memory in several pieces
        shape = (picture.height, picture.width, PIXEL_BYTES)
        return np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint8).reshape(shape)
