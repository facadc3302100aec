"""Which picture sizes a model has: the published tables, and how a size follows a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from flux_engine.checks import shown
from flux_engine.errors import InvalidRequest

PUBLISHED_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "1:1": (1024, 1024),
        "16:9": (1344, 768),
        "21:9": (1536, 640),
        "3:2": (1216, 832),
        "2:3": (832, 1216),
        "4:5": (896, 1088),
        "5:4": (1088, 896),
        "3:4": (896, 1152),
        "4:3": (1152, 896),
        "9:16": (768, 1344),
        "9:21": (640, 1536),
    }
)
"""Aspect ratio -> (width, height) at one megapixel, as the hosted FLUX models publish them."""

KONTEXT_RATIOS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "1:1": (1024, 1024),
        "16:9": (1328, 800),
        "21:9": (1568, 672),
        "3:2": (1248, 832),
        "2:3": (832, 1248),
        "4:5": (944, 1104),
        "5:4": (1104, 944),
        "3:4": (880, 1184),
        "4:3": (1184, 880),
        "9:16": (800, 1328),
        "9:21": (672, 1568),
    }
)
"""The same, as FLUX.1 Kontext has it."""

MEGAPIXELS = ("1", "0.25")
MATCH_INPUT = "match_input"
"""What megapixels also may say where the size follows a picture's area: as large as the picture."""

Follow = Literal["within", "area", "preferred"]
"""How a picture's size becomes the model's: scaled down to the longest side and rounded; scaled to the megapixels asked
for and rounded down (FLUX.1 Fill, Canny and Depth); the trained size that is nearest in shape (Kontext)."""


@dataclass(frozen=True, kw_only=True)
class SizeTable:
    """Which picture sizes a model has. Every side is in pixels."""

    divisor: int = 1
    """The published sizes are divided by this. 1 for published models; small demo models have more."""
    multiple: int = 16
    """Sides are multiples of this: 8 for the autoencoder, 2 for the transformer's patches."""
    classes: tuple[str, ...] = MEGAPIXELS
    """The megapixels that a model draws; the first is what it draws if nothing is said."""
    min_side: int = 128
    max_side: int = 2048
    max_pixels: int = 2048 * 2048
    follow: Follow = "within"
    """How a size follows that of a picture which comes with the request, if it says none itself."""
    follow_limit: int = 1440
    """Longest side that follows a picture, before the divisor."""
    table: Literal["flux", "kontext"] = "flux"
    """Which aspect ratios it has."""

    @property
    def ratios(self) -> Mapping[str, tuple[int, int]]:
        """Aspect ratio -> (width, height) at one megapixel."""
        return KONTEXT_RATIOS if self.table == "kontext" else PUBLISHED_SIZES

    def named(self, aspect_ratio: str, megapixels: str | None = None) -> tuple[int, int]:
        """(width, height) of a published aspect ratio. Raises InvalidRequest for a name that is not in the table."""
        megapixels = self.classes[0] if megapixels is None else megapixels
        if not isinstance(aspect_ratio, str) or aspect_ratio not in self.ratios:
            raise InvalidRequest(
                f"aspect_ratio {shown(aspect_ratio)} is not one of {', '.join(self.ratios)}; "
                "for another size give width and height",
                field="aspect_ratio",
            )
        if not isinstance(megapixels, str) or megapixels not in self.classes:
            raise InvalidRequest(
                f"megapixels {shown(megapixels)} is not one of {', '.join(map(repr, self.classes))}",
                field="megapixels",
            )
        divisor = self.divisor * (1 if megapixels == "1" else 2)
        width, height = self.ratios[aspect_ratio]
        return self._round(width / divisor), self._round(height / divisor)

    def _round(self, side: float) -> int:
        return int(side / self.multiple + 0.5) * self.multiple
