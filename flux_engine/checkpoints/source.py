"""One reader for weight files.

Everything that needs weights asks a `WeightSource` for rows of a named tensor, in the stored dtype or another one.
Only safetensors files are read: the format holds plain arrays and cannot run code.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_engine.errors import WeightsError


class WeightSource:
    """The tensors of one safetensors file, read on demand. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise WeightsError(f"{path} does not exist") from None
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(self._file.get_slice(name).get_shape())
            for name in self._file.keys()  # noqa: SIM118 (not a dict)
        }

    def __enter__(self) -> WeightSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file = None

    def rows(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Rows start to stop of a tensor along its first axis; all of them by default.

        Raises WeightsError for a name that is not in the file.
        """
        if name not in self.shapes:
            raise WeightsError(f"{self.path} has no tensor {name!r}")
        whole = start == 0 and stop is None
        tensor = self._file.get_tensor(name) if whole else self._file.get_slice(name)[start:stop]
        return tensor if dtype is None else tensor.to(dtype)
