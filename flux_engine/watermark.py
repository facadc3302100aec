"""SDXL's invisible watermark: 48 bits that the hosted model hides in its pictures, by the package invisible-watermark.

The same bits, by the same method (DWT and DCT), as Stability AI's code and diffusers' pipelines. A JPEG of ordinary
quality loses it, and it proves nothing: anyone can put it into any picture.
"""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image

from flux_engine.errors import UnsupportedError

MESSAGE = 0b101100111110110010010000011110111011000110011110
"""What Stability AI's generative-models puts in."""
BITS = tuple(int(bit) for bit in f"{MESSAGE:b}")
METHOD = "dwtDct"
LEAST = 256
"""Pixels: pictures that are narrower, or have less than the square of it in all, are too small for it."""
INSTALL = (
    "pip install 'flux-engine[watermark]' && pip install --no-deps invisible-watermark==0.2.0 "
    "(--no-deps: it asks for an OpenCV that replaces the headless one)"
)


def fits(width: int, height: int) -> bool:
    """Whether a picture of this size can be marked."""
    return width >= LEAST and width * height >= LEAST**2


def mark(picture: Image.Image) -> Image.Image:
    """The same picture with the watermark in it.

    Raises UnsupportedError without the package, ValueError for a picture that is too small.
    """
    if not fits(*picture.size):
        raise ValueError(f"a picture of {picture.width}x{picture.height} is too small for a watermark")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports and does not need here
            from imwatermark import WatermarkEncoder
    except ImportError as error:
        raise UnsupportedError(f"a watermark needs packages that are not installed ({error}): {INSTALL}") from None
    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", BITS)  # pyright: ignore[reportArgumentType]
    pixels = np.asarray(picture.convert("RGB"), np.float32)[:, :, ::-1]  # OpenCV's order
    marked = encoder.encode(np.ascontiguousarray(pixels), METHOD)[:, :, ::-1]
    return Image.fromarray(np.rint(marked).clip(0, 255).astype(np.uint8))
