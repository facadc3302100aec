"""What goes wrong before a kernel is launched."""

from __future__ import annotations


class KernelUnavailable(RuntimeError):
    """A kernel is not for this card, or not for this dtype on it; says why, and what to use instead."""


class ArgumentError(ValueError):
    """A tensor has a shape, dtype, stride or device that a kernel does not take; names the tensor."""
