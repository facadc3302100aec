"""Soft edges, and scribbles made of them, by a network (hed.py)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from flux_engine.preprocess import kept
from flux_engine.preprocess.declare import Options, Pixels, Where, need

ELONGATED = 4
"""The network sees no side that is longer than so many times `detect_resolution`."""
STROKE = 3.0
"""Of a scribble: how far edges are smoothed before they are thinned, and lines thickened after, in the pixels that the
network sees."""
SURE, FAINT = 127, 4
"""What counts as an edge, and how dark a blurred line may become and still belong to the stroke."""


def soft_edge(picture: Pixels, options: Options, where: Where) -> Pixels:
    """How sure HED is of an edge, white on black."""
    height, width = picture.shape[:2]
    return _resized(_edges(picture, options["detect_resolution"], where), width, height)


def scribble(picture: Pixels, options: Options, where: Where) -> Pixels:
    """HED's edges as if drawn with a thick pen, white or black: thinned to lines, which are thickened evenly."""
    height, width = picture.shape[:2]
    lines = thinned(_edges(picture, options["detect_resolution"], where))
    strokes = np.where(need("cv2", "scribble").GaussianBlur(lines, (0, 0), STROKE) > FAINT, 255, 0).astype(np.uint8)
    return np.where(_resized(strokes, width, height) > 127, 255, 0).astype(np.uint8)


def thinned(edges: Pixels) -> Pixels:
    """The ridges of an edge map, 255 or 0: what is sure, and highest along one of four lines through it."""
    cv2 = need("cv2", "scribble")
    smooth = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), STROKE)
    along = np.eye(3, dtype=np.uint8)
    across = np.zeros_like(along)
    across[1] = 1
    lines = (along, np.ascontiguousarray(along[::-1]), across, np.ascontiguousarray(across.T))
    ridge = np.logical_or.reduce([smooth == cv2.dilate(smooth, line) for line in lines])
    return np.where(ridge & (smooth > SURE), 255, 0).astype(np.uint8)


def _edges(picture: Pixels, resolution: int, where: Where) -> Pixels:
    """HED's answer, at the resolution it is asked at: thin edges in small pictures, thick ones in large."""
    from flux_engine.hardware import pick_device
    from flux_engine.preprocess import hed

    height, width = picture.shape[:2]
    scale = min(resolution / min(width, height), ELONGATED * resolution / max(width, height))
    seen = _resized(picture, max(1, round(width * scale)), max(1, round(height * scale)))
    device = pick_device(where.device)
    return hed.edges(kept.get(("hed", str(device)), lambda: hed.load(device)), seen, device)


def _resized(picture: Pixels, width: int, height: int) -> Pixels:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
