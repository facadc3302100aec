"""What a LoRA adds to a weight: the forms there are, and their arithmetic, in float32.

Every change is a difference from the base weight W, so that several add up and their order does not matter:
W + sum of scale_k difference_k(W). Sources: LoRA (arXiv 2106.09685), LoHa (arXiv 2108.06098), LoKr (arXiv 2309.14859,
KohakuBlueleaf/LyCORIS), DoRA (arXiv 2402.09353).

Shapes: N rows and K columns of a weight, r rank; (N, K, kh, kw) where it is a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Form(Protocol):
    """How the numbers of a change are kept."""

    def shape(self) -> Shape:
        """Of the difference. Raises ValueError if the tensors do not fit one another."""
        ...

    def difference(self, base: Tensor) -> Tensor:
        """What is added to `base`, in float32, of its number of elements."""
        ...

    def tensors(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class LowRank:
    """up times down, with CP decomposition (`mid`) where a convolution has one."""

    down: Tensor
    """(r, K) or (r, K, kh, kw)."""
    up: Tensor
    """(N, r) or (N, r, 1, 1)."""
    mid: Tensor | None = None
    """(r, r, kh, kw)."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def shape(self) -> Shape:
        if self.down.ndim not in (2, 4) or self.up.ndim not in (2, 4) or any(side != 1 for side in self.up.shape[2:]):
            raise ValueError(f"down {list(self.down.shape)} and up {list(self.up.shape)} are no low-rank pair")
        if self.up.shape[1] != self.rank:
            raise ValueError(f"down has rank {self.rank}, up {self.up.shape[1]}")
        if self.mid is None:
            return (self.up.shape[0], *self.down.shape[1:])
        square = self.mid.ndim == 4 and self.mid.shape[:2] == (self.rank, self.rank)
        if not square or self.down.shape[2:] not in ((), (1, 1)):
            raise ValueError(f"mid {list(self.mid.shape)} does not stand between ranks of {self.rank}")
        return (self.up.shape[0], self.down.shape[1], *self.mid.shape[2:])

    def difference(self, base: Tensor) -> Tensor:
        down, up = _matrix(self.down, base), _matrix(self.up, base)
        if self.mid is None:
            return up @ down
        down = down[:, : self.down.shape[1]]
        return torch.einsum("nr,rshw,sk->nkhw", up, _like(self.mid, base), down)

    def tensors(self) -> Sequence[Tensor]:
        return [tensor for tensor in (self.down, self.up, self.mid) if tensor is not None]


@dataclass(frozen=True)
class Hadamard:
    """LoHa: (w1_a w1_b) times (w2_a w2_b), element by element; with t1 and t2 a Tucker decomposition."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def shape(self) -> Shape:
        shapes = [_product_shape(*parts) for parts in self._factors()]
        if shapes[0] != shapes[1]:
            raise ValueError(f"its two products are {list(shapes[0])} and {list(shapes[1])}")
        return shapes[0]

    def difference(self, base: Tensor) -> Tensor:
        first, second = (_product(*parts, like=base) for parts in self._factors())
        return first.mul_(second)

    def _factors(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        return [(self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)]

    def tensors(self) -> Sequence[Tensor]:
        return [tensor for parts in self._factors() for tensor in parts if tensor is not None]


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of two matrices, each whole or a product itself."""

    w1: Tensor | tuple[Tensor, Tensor]
    w2: Tensor | tuple[Tensor, Tensor]
    t2: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """None where both are whole: then no alpha counts."""
        for pair in (self.w1, self.w2):
            if isinstance(pair, tuple):
                return pair[1].shape[0]
        return None

    def shape(self) -> Shape:
        first, second = _whole_shape(self.w1, None), _whole_shape(self.w2, self.t2)
        if len(first) != 2:
            raise ValueError(f"its first factor is {list(first)}, no matrix")
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def difference(self, base: Tensor) -> Tensor:
        first, second = _whole(self.w1, None, base), _whole(self.w2, self.t2, base)
        first = first.reshape(*first.shape, *(1 for _ in second.shape[2:]))
        return torch.kron(first, second.contiguous())

    def tensors(self) -> Sequence[Tensor]:
        found: list[Tensor] = [] if self.t2 is None else [self.t2]
        for part in (self.w1, self.w2):
            found += part if isinstance(part, tuple) else [part]
        return found


@dataclass(frozen=True)
class Whole:
    """All numbers of the difference, or of what stands in the weight's place."""

    values: Tensor
    instead: bool = False

    rank = None

    def shape(self) -> Shape:
        return tuple(self.values.shape)

    def difference(self, base: Tensor) -> Tensor:
        values = _like(self.values, base).reshape(base.shape)
        return values - base if self.instead else values.clone()

    def tensors(self) -> Sequence[Tensor]:
        return [self.values]


@dataclass(frozen=True)
class Change:
    """What a LoRA does to some rows of a parameter."""

    form: LowRank | Hadamard | Kronecker | Whole
    rows: tuple[tuple[int, int], ...] | None = None
    """Where its rows lie among those of the parameter, first to last; None for all."""
    factor: float = 1.0
    """alpha / r."""
    magnitude: Tensor | None = field(default=None, compare=False)
    """DoRA's: the length that each row (N, 1) is to have, or each column (1, K)."""

    @property
    def bytes(self) -> int:
        held = [*self.form.tensors(), *([] if self.magnitude is None else [self.magnitude])]
        return sum(tensor.nbytes for tensor in held)

    def fits(self, shape: Shape) -> str | None:
        """Why it does not fit a parameter of a shape; None if it does. Linears and 1x1 convolutions are the same."""
        count = shape[0] if self.rows is None else sum(stop - start for start, stop in self.rows)
        wanted = (count, *shape[1:])
        try:
            given = self.form.shape()
        except (ValueError, IndexError) as error:
            return str(error)
        flat = len(given) == 2  # LyCORIS multiplies what a convolution has as a matrix
        if given[:1] != wanted[:1] or prod(given) != prod(wanted) or not (flat or given[1:2] == wanted[1:2]):
            return f"it changes {list(given)}, and the weight is {list(wanted)}"
        if self.magnitude is not None and _sides(self.magnitude) not in ((wanted[0], 1), (1, *wanted[1:2])):
            return f"its magnitudes are {list(self.magnitude.shape)}, and the weight is {list(wanted)}"
        return None

    @property
    def by_rows(self) -> bool:
        """Whether rows can be changed without the others at hand."""
        return isinstance(self.form, LowRank) and self.form.mid is None and self.magnitude is None

    def add_to_rows(self, weight: Tensor, start: int, scale: float) -> None:
        """As `add_to`, to rows from `start` on, where `by_rows`: a product of a few rows stays in the cache."""
        assert isinstance(self.form, LowRank)
        down, stop, at = _matrix(self.form.down, weight), start + len(weight), 0
        for first, last in self.rows or ((0, self.form.up.shape[0]),):
            a, b = max(first, start), min(last, stop)
            if a < b:
                up = _matrix(self.form.up[at + a - first : at + b - first], weight)
                rows = weight[a - start : b - start].view(b - a, -1)
                rows.addmm_(up, down, alpha=scale * self.factor)
            at += last - first

    def add_to(self, weight: Tensor, base: Tensor, scale: float) -> None:
        """Add scale times the difference to `weight`, in place; both float32, of the parameter's shape."""
        if self.rows is None:
            weight.add_(self._difference(base), alpha=scale)
            return
        parts = [base[start:stop] for start, stop in self.rows]
        difference = self._difference(parts[0] if len(parts) == 1 else torch.cat(parts))
        at = 0
        for start, stop in self.rows:
            weight[start:stop].add_(difference[at : at + stop - start], alpha=scale)
            at += stop - start

    def _difference(self, base: Tensor) -> Tensor:
        difference = self.form.difference(base).reshape(base.shape)
        if self.factor != 1.0:
            difference = difference.mul_(self.factor)
        if self.magnitude is None:
            return difference
        changed = difference.add_(base)
        axis = 0 if _sides(self.magnitude)[0] > 1 or len(base) == 1 else 1
        others = [i for i in range(base.ndim) if i != axis]
        length = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        wanted = _like(self.magnitude, base).reshape(length.shape)
        # A row of zeros has no direction to stretch.
        return changed.mul_(wanted / length.clamp_min(torch.finfo(torch.float32).tiny)).sub_(base)


def _sides(magnitude: Tensor) -> Shape:
    """(N, 1) or (1, K), whatever stands behind."""
    return (magnitude.shape[0] if magnitude.ndim else 1, prod(magnitude.shape[1:]))


def _like(tensor: Tensor, base: Tensor) -> Tensor:
    return tensor.to(device=base.device, dtype=torch.float32)


def _matrix(tensor: Tensor, base: Tensor) -> Tensor:
    return _like(tensor, base).flatten(1)


def _product_shape(a: Tensor, b: Tensor, core: Tensor | None) -> Shape:
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"{list(a.shape)} and {list(b.shape)} are no pair of matrices")
    if core is None:
        if a.shape[1] != b.shape[0]:
            raise ValueError(f"{list(a.shape)} cannot be multiplied by {list(b.shape)}")
        return (a.shape[0], b.shape[1])
    if core.ndim != 4 or core.shape[:2] != (a.shape[0], b.shape[0]):
        raise ValueError(f"{list(core.shape)} does not stand between {list(a.shape)} and {list(b.shape)}")
    return (a.shape[1], b.shape[1], *core.shape[2:])


def _product(a: Tensor, b: Tensor, core: Tensor | None, *, like: Tensor) -> Tensor:
    a, b = _like(a, like), _like(b, like)
    return a @ b if core is None else torch.einsum("rshw,rn,sk->nkhw", _like(core, like), a, b)


def _whole_shape(part: Tensor | tuple[Tensor, Tensor], core: Tensor | None) -> Shape:
    return _product_shape(*part, core) if isinstance(part, tuple) else tuple(part.shape)


def _whole(part: Tensor | tuple[Tensor, Tensor], core: Tensor | None, like: Tensor) -> Tensor:
    return _product(*part, core, like=like) if isinstance(part, tuple) else _like(part, like)
