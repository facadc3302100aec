"""The small JSON files beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flux_engine.errors import WeightsError


def read_json(path: Path) -> dict[str, Any]:
    """Settings by name. Raises WeightsError for a file that cannot be read, or holds none."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None
    if not isinstance(said, dict):
        raise WeightsError(f"{path} is not a JSON object but holds a {type(said).__name__}")
    return said
