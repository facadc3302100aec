"""How near things are, by a network; and which way surfaces face, by how that changes.

The networks answer with inverse depth, near is large, without a unit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flux_engine.preprocess.declare import Options, Pixels, Where

MODELS = {"large": "depth-anything-large", "small": "depth-anything-v2-small"}
MIDAS = "dpt-hybrid-midas"
FLAT = 1e-6
"""A range of depths that is smaller than this part of the largest is rounding."""
Depths = np.ndarray[Any, np.dtype[np.float32]]
"""(H, W)."""


def depth(picture: Pixels, options: Options, where: Where) -> Pixels:
    """Near is white, far is black."""
    return shades(_nearness(MODELS[options["model"]], picture, where, resized=True))


def depth_midas(picture: Pixels, options: Options, where: Where) -> Pixels:
    """The same, as MiDaS sees it."""
    return shades(_nearness(MIDAS, picture, where, resized=True))


def normal(picture: Pixels, options: Options, where: Where) -> Pixels:
    """Normals of what MiDaS sees."""
    near = _nearness(MIDAS, picture, where, resized=False)
    return normals(near, strength=options["strength"], background=options["bg_threshold"])


def shades(near: Depths) -> Pixels:
    """The nearest white, the farthest black; black where all is as near."""
    return (_unit(near) * 255).round().astype(np.uint8)


def normals(near: Depths, *, strength: float, background: float) -> Pixels:
    """(h, w) -> (h, w, 3): red what faces left, green what faces up, blue what faces the viewer, as ControlNets for
    normals were taught. A larger `strength` makes all flatter. What is as far as `background` (of 0 to 1) is flat.
    """
    padded = np.pad(near, 1, mode="reflect" if min(near.shape) > 1 else "edge")
    smooth_y, smooth_x = (_tent(padded, axis) for axis in (0, 1))
    right = smooth_y[:, 2:] - smooth_y[:, :-2]  # Sobel's derivatives
    down = smooth_x[2:] - smooth_x[:-2]
    here = _unit(near) >= background
    facing = np.stack([right * here, down * here, np.full_like(near, strength)], axis=2)
    facing /= np.linalg.norm(facing, axis=2, keepdims=True)
    return (facing * 127.5 + 127.5).round().clip(0, 255).astype(np.uint8)


def _tent(values: Depths, axis: int) -> Depths:
    """1 2 1 along an axis, which becomes shorter by two."""
    at = [np.take(values, range(start, values.shape[axis] - 2 + start), axis) for start in range(3)]
    return at[0] + 2 * at[1] + at[2]


def _unit(near: Depths) -> Depths:
    least, most = float(near.min()), float(near.max())
    if most - least <= FLAT * max(abs(least), abs(most)):
        return np.zeros_like(near)
    return (near - least) / (most - least)


def _nearness(name: str, picture: Pixels, where: Where, *, resized: bool) -> Depths:
    """As the network answers, or as large as the picture."""
    import torch.nn.functional as F

    from flux_engine.preprocess import networks

    near = networks.finite(networks.find(name, where).look(picture).predicted_depth.float(), name)[None]
    if resized:
        near = F.interpolate(near, picture.shape[:2], mode="bicubic", align_corners=False, antialias=True)
    return near[0, 0].cpu().numpy()
