"""The files of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from flux_engine import files, images, watermark
from flux_engine.errors import UnsupportedError
from flux_engine.provenance import Signer, signed
from flux_engine.replicate.schema import Schema
from flux_engine.result import Result


def write(
    folder: Path,
    schema: Schema,
    result: Result,
    kept: Sequence[int],
    values: Mapping[str, Any],
    *,
    signer: Signer | None,
    say: Callable[[str], None],
) -> list[Path] | Path:
    """Write the pictures with these numbers, after the control pictures where the schema returns them.

    Raises OutputError, or UnsupportedError for a signature without the package for it.
    """
    quality = values.get("output_quality", 95)

    def put(name: str, picture: Image, by: Signer | None) -> Path:
        path = folder / name
        kind = files.image_format(path, None)
        content = images.encode(picture, kind, quality=quality)
        files.write(path, content if by is None else signed(content, kind, by, title=name))
        return path

    controls = result.controls if schema.returns_controls else ()
    written = [put(f"control-{index}.png", picture, None) for index, picture in enumerate(controls)]
    names = schema.file_names(values, len(result))
    pictures = {index: result[index] for index in kept}
    if values.get("apply_watermark"):
        pictures = _marked(pictures, say)
    written += [put(names[index], picture, signer) for index, picture in pictures.items()]
    return written[0] if schema.single else written


def _marked(pictures: Mapping[int, Image], say: Callable[[str], None]) -> dict[int, Image]:
    """With the watermark, where there is what makes it; it is on by default, so that it cannot be an error."""
    if not all(watermark.fits(*picture.size) for picture in pictures.values()):
        say(f"apply_watermark: pictures of less than {watermark.LEAST} pixels have no room for one, these have none")
        return dict(pictures)
    try:
        return {index: watermark.mark(picture) for index, picture in pictures.items()}
    except UnsupportedError as error:
        say(f"apply_watermark: these pictures have none. {error}")
        return dict(pictures)
