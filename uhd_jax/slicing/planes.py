"""The channels of a picture as arrays, without a copy where Pillow lets its memory be read.

Pillow keeps RGB in four bytes per pixel and packs it for every array that is made of it. Its channels, split, are what
patches are cut from; their memory is read through the Arrow C data interface (https://arrow.apache.org/docs/format/
CDataInterface.html), the only one of Pillow's that shares it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from PIL import Image


class _ArrowArray(ctypes.Structure):
    """`struct ArrowArray` up to its buffers."""

    _fields_ = [
        ("length", ctypes.c_int64),
        ("null_count", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("n_buffers", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class _Memory:
    """Memory of a channel, kept alive by the arrays that are made of it."""

    def __init__(self, channel: Image.Image):
        _, self._capsule = channel.__arrow_c_array__()
        array = _ArrowArray.from_address(_pointer(self._capsule, b"arrow_array"))
        width, height = channel.size
        if (array.length, array.offset, array.n_buffers) != (width * height, 0, 2):
            raise ValueError("not one channel of bytes")
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": (height, width),
            "data": (array.buffers[1], True),  # read only
        }


def planes_of(picture: Image.Image) -> tuple[np.ndarray, ...]:
    """Red, green and blue of an RGB picture: uint8[H, W] each, read-only, each row contiguous."""
    return tuple(map(_plane, picture.split()))


def _plane(channel: Image.Image) -> np.ndarray:
    try:
        return np.asarray(_Memory(channel))
    except (AttributeError, ValueError):  # a Pillow that does not share, or memory in several pieces
        return np.asarray(channel)
