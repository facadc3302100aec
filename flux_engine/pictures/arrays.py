"""Pictures that are numbers: arrays, tensors and PIL's modes of more than 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from flux_engine.errors import InvalidRequest

MAX_BYTES = 64 * 2**20
"""Most bytes of an encoded picture."""
MAX_SIDE = 16_384
MAX_PIXELS = 100_000_000
"""Largest picture, checked before a pixel is decoded."""
Size = tuple[int, int]
"""(width, height)."""
Refuse = Callable[[str], InvalidRequest]
"""Makes the error: it knows the field and what was sent, and is told why."""


def check_size(size: Size, refuse: Refuse) -> None:
    """Raise unless a picture of that size is read."""
    width, height = size
    if width < 1 or height < 1:
        raise refuse(f"is empty: {width}x{height}")
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise refuse(
            f"is too large: {width}x{height}, where {MAX_SIDE:,} a side and {MAX_PIXELS:,} pixels are the most that is "
            "read; scale it down"
        )


def of_numbers(image: Image.Image, refuse: Refuse) -> Image.Image:
    """L, or LA, from 16 bits, or from floats in 0..1 or 0..255."""
    numbers = np.asarray(image)
    low, high = float(numbers.min()), float(numbers.max())
    top = 65535 if image.mode != "F" else 1 if high <= 1 else 255
    if not (low >= 0 and high <= top):
        raise refuse(f"has values from {low:g} to {high:g}: scale them to 0..{top}")
    grey = Image.fromarray(eight_bits(numbers, top))
    hole = image.info.get("transparency")
    if isinstance(hole, int):
        grey = Image.merge("LA", (grey, Image.fromarray(np.where(numbers == hole, 0, 255).astype(np.uint8))))
    grey.info = dict(image.info)
    return grey


def eight_bits(numbers: np.ndarray[Any, Any], top: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """0..top -> 0..255, rounded."""
    if top == 65535:
        return ((numbers.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.rint(np.clip(numbers.astype(np.float32) * (255 / top), 0, 255)).astype(np.uint8)


def of_tensor(tensor: Any, refuse: Refuse) -> np.ndarray[Any, Any]:
    """(H, W), (C, H, W) or (1, C, H, W) -> (H, W) or (H, W, C)."""
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if "float" in str(tensor.dtype) else tensor
    array = np.asarray(tensor.numpy())
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 2:
        return array
    if array.ndim != 3 or len(array) not in (1, 3, 4):
        raise refuse(f"has shape {array.shape}: give a tensor (C, H, W) of 1, 3 or 4 channels")
    return array.transpose(1, 2, 0)


def of_array(array: np.ndarray[Any, Any], refuse: Refuse) -> Image.Image:
    """L, RGB or RGBA from an array (H, W) or (H, W, 1|3|4), of a copy of its numbers."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        how = "move its channels last, array.transpose(1, 2, 0)" if channels_first else "give (H, W) or (H, W, 1|3|4)"
        raise refuse(f"is not of the shape of a picture: {how}")
    check_size((array.shape[1], array.shape[0]), refuse)
    kind = array.dtype.kind + str(array.dtype.itemsize)
    if kind == "b1":
        array = array.astype(np.uint8) * 255
    elif kind == "u2":
        array = eight_bits(array, 65535)
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if math.isnan(low):
            raise refuse("holds values that are not numbers (NaN)")
        if low < 0 or high > 1:
            how = (
                "send (x + 1) / 2"
                if low >= -1 and high <= 1
                else "send x / 255"
                if low >= 0 and high <= 255
                else "rescale"
            )
            raise refuse(f"has values from {low:g} to {high:g}, and floats go from 0 to 1: {how}")
        array = eight_bits(array, 1)
    elif kind != "u1":
        raise refuse("is not of uint8, uint16, bool or float: convert it with array.astype")
    return Image.fromarray(np.array(array, order="C"))
