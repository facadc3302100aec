"""Pictures as users send them, and the sizes they are brought to. No weight is touched here, and no torch.

Whatever is sent (`read_picture`, `read_mask`) comes out as a picture of its own in plain sRGB, upright, or as an
InvalidRequest that names what was sent, shortened, and what to send instead.
"""

from flux_engine.pictures.arrays import MAX_BYTES, MAX_PIXELS, MAX_SIDE, Size
from flux_engine.pictures.decoding import FORMATS, extremes
from flux_engine.pictures.reading import alpha_mask, flatten, read_mask, read_picture
from flux_engine.pictures.sizing import (
    KONTEXT_SIZES,
    RESIZES,
    SDXL_BUCKETS,
    Resize,
    fit,
    nearest_aspect,
    of_area,
    place,
    within,
)

__all__ = [
    "FORMATS",
    "KONTEXT_SIZES",
    "MAX_BYTES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "RESIZES",
    "SDXL_BUCKETS",
    "Resize",
    "Size",
    "alpha_mask",
    "extremes",
    "fit",
    "flatten",
    "nearest_aspect",
    "of_area",
    "place",
    "read_mask",
    "read_picture",
    "within",
]
