"""`jit`: Triton's decorator of that name, put off until a kernel is launched, so that an op's file has its kernel and
can be imported where there is no Triton. In a kernel `tl` is `triton.language`; it may call others under `jit`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any, overload

import torch
from torch import Tensor

from flux_kernels.errors import ArgumentError


@dataclass(frozen=True)
class Launch:
    """What would be launched."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time arguments, and num_warps and num_stages."""


_recorder: ContextVar[list[Launch] | None] = ContextVar("recorder", default=None)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, nothing is launched; the list has what would be, on tensors that need no numbers."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


class Kernel:
    """A function in Triton's language. `kernel.launch(grid, *arguments, **options)` runs it."""

    def __init__(self, function: Callable[..., Any], do_not_specialize: tuple[str, ...]) -> None:
        self.function, self.do_not_specialize = function, do_not_specialize

    def __call__(self, *arguments: Any) -> Any:
        """Only for the type checker: inside of a kernel this is Triton's function."""
        raise TypeError(f"{self.function.__qualname__} is Triton's language and runs on a card: launch it")

    @cached_property
    def jitted(self) -> Any:
        """Triton's function: the same code, that finds `tl` and the jitted functions which it calls."""
        import triton
        import triton.language as tl

        function = self.function
        assert isinstance(function, FunctionType)
        called = {name: function.__globals__.get(name) for name in function.__code__.co_names}
        found = {name: value.jitted for name, value in called.items() if isinstance(value, Kernel)}
        made = FunctionType(function.__code__, function.__globals__ | found | {"tl": tl}, function.__name__)
        made.__annotations__, made.__module__ = function.__annotations__, function.__module__
        made.__qualname__ = function.__qualname__
        return triton.jit(do_not_specialize=self.do_not_specialize)(made)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Run on the device of the first argument. A grid of nothing is nothing to do."""
        # Said, because Triton 3.9 warns that it will no longer be what goes without saying.
        options = {"enable_fp_fusion": True, **options}
        launches = _recorder.get()
        if launches is not None:
            launches.append(Launch(self, grid, arguments, options))
        elif 0 not in grid:
            first: Tensor = arguments[0]
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):
                    self.jitted[grid](*arguments, **options)
                return
            if not first.is_cuda and not interpreting():
                raise ArgumentError(f"{self.function.__module__} is for CUDA, and a tensor is on {first.device}")
            self.jitted[grid](*arguments, **options)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of the CPU. As Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@overload
def jit(function: Callable[..., Any]) -> Kernel: ...
@overload
def jit(*, do_not_specialize: tuple[str, ...]) -> Callable[[Callable[..., Any]], Kernel]: ...
def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """`do_not_specialize` names what depends on a picture's size: no value of it makes Triton compile anew."""
    if function is None:
        return lambda function: Kernel(function, do_not_specialize)
    return Kernel(function, do_not_specialize)
