"""Control pictures without a network: edges, lines, small details taken away."""

from __future__ import annotations

import numpy as np
from PIL import Image

from flux_engine.preprocess.declare import Options, Pixels, Where, need


def canny(picture: Pixels, options: Options, where: Where) -> Pixels:
    """Canny's edges, white on black, one pixel wide. Of three colours the one that changes most counts."""
    return need("cv2", "canny").Canny(picture, options["low"], options["high"])


def lineart_standard(picture: Pixels, options: Options, where: Where) -> Pixels:
    """What is darker than what is around it, in all three colours, white on black (the preprocessor of that name).

    Lines are made as strong as the median of those that are not faint.
    """
    bright = picture.astype(np.float32)
    around = need("cv2", "lineart_standard").GaussianBlur(bright, (0, 0), options["sigma"])
    darker = (around - bright).min(axis=2).clip(0, 255)
    lines = darker[darker > options["threshold"]]
    usual = max(16.0, float(np.median(lines))) if lines.size else 16.0
    return (darker * (127 / usual)).clip(0, 255).astype(np.uint8)


def tile(picture: Pixels, options: Options, where: Where) -> Pixels:
    """The picture without what is smaller than `down_sampling_rate` pixels: made smaller, and as large again."""
    image = Image.fromarray(picture)
    width, height = (max(1, round(side / options["down_sampling_rate"])) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def grey(picture: Pixels, options: Options, where: Where) -> Pixels:
    """Brightness only, as the networks for QR codes and illusions read it."""
    return np.asarray(Image.fromarray(picture).convert("L"))


def as_it_is(picture: Pixels, options: Options, where: Where) -> Pixels:
    """Nothing is done."""
    return picture
