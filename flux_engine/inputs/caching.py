"""Step caches as they are asked for: which calls of a network may be answered without computing all of it.

A cache is an object (`FirstBlockCache()`, `TaylorCache(interval=4)`) or the same as a text,
`NAME[:KEY=VALUE[,KEY=VALUE]...]`: "first-block", "taylor:interval=4,order=1".
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from flux_engine.checks import integer, named_options, number, shown
from flux_engine.errors import InvalidRequest
from flux_engine.specs import ModelSpec, SDXLSpec

MOST_CALLS = 1_000


@dataclass(frozen=True)
class FirstBlockCache:
    """Compute the first block of a transformer; if that changed little since the last whole call, add what the other
    blocks added then.

    Source: ParaAttention's first block cache (chengzeyi/ParaAttention), after TeaCache (arXiv 2411.19108).
    """

    name: ClassVar[str] = "first-block"
    kept: ClassVar[int] = 4
    """How many times the picture's tokens it keeps, and makes beside."""
    threshold: float = 0.08
    """The other blocks are left out while mean|r - r'| / mean|r'| is below this: r is what the first block adds to the
    picture's tokens, r' what it added at the last whole call. 0 leaves out nothing."""
    max_skips: int = 3
    """Most calls in a row that are answered so."""

    def checked(self) -> FirstBlockCache:
        """The same in plain numbers. Raises InvalidRequest."""
        return FirstBlockCache(
            number(f"step_cache {self.name}: threshold", self.threshold, 0, 10, field="step_cache"),
            integer(f"step_cache {self.name}: max_skips", self.max_skips, 0, MOST_CALLS, field="step_cache"),
        )

    def __str__(self) -> str:
        return _text(self)


@dataclass(frozen=True)
class TaylorCache:
    """Compute every `interval`-th call, and foresee the predictions between from those before.

    After TaylorSeer (arXiv 2503.06923), which foresees what every block gives, from finite differences; here it is the
    prediction itself, which costs no block and next to no memory, from the polynomial through what is known. The last
    call is computed. It loses most with schedulers that draw noise on the way.
    """

    name: ClassVar[str] = "taylor"
    kept: ClassVar[int] = 1
    """At most: a prediction is much smaller than the tokens of a block."""
    interval: int = 3
    """One call in so many is computed."""
    order: int = 1
    """Of the polynomial in the number of the call that goes through the last order + 1 computed predictions: 0 takes
    the last one again, 1 is a line, 2 a parabola."""
    warmup: int = 4
    """Calls at the start that are all computed."""

    def checked(self) -> TaylorCache:
        """The same in plain numbers. Raises InvalidRequest."""
        said = f"step_cache {self.name}:"
        return TaylorCache(
            integer(f"{said} interval", self.interval, 1, MOST_CALLS, field="step_cache"),
            integer(f"{said} order", self.order, 0, 2, field="step_cache"),
            integer(f"{said} warmup", self.warmup, 0, MOST_CALLS, field="step_cache"),
        )

    def __str__(self) -> str:
        return _text(self)


StepCache = FirstBlockCache | TaylorCache
CACHES: dict[str, type[StepCache]] = {kind.name: kind for kind in (FirstBlockCache, TaylorCache)}


def checked_step_cache(asked: object, spec: ModelSpec) -> StepCache | None:
    """What was asked for, as an object. Raises InvalidRequest for what is no cache, or none for this model."""
    if asked is None:
        return None
    cache = _parsed(asked) if isinstance(asked, str) else asked
    if not isinstance(cache, StepCache):
        raise InvalidRequest(
            f"step_cache {shown(asked)} is no FirstBlockCache, TaylorCache or text as 'taylor:interval=3'",
            field="step_cache",
        )
    cache = cache.checked()
    if isinstance(cache, FirstBlockCache) and isinstance(spec, SDXLSpec):
        raise InvalidRequest(
            f"step_cache {cache.name!r} is for FLUX.1: in the UNet of {spec.name} no first block tells of the rest. "
            f"Say {TaylorCache.name!r}",
            field="step_cache",
        )
    return cache


def checked_interval(asked: Any) -> tuple[float, float] | None:
    """guidance_interval. Raises InvalidRequest for what is no pair of shares."""
    if asked is None:
        return None
    if not isinstance(asked, tuple | list) or len(asked) != 2:
        raise InvalidRequest(
            f"guidance_interval {shown(asked)} is no pair of shares, as (0.2, 0.8)", field="guidance_interval"
        )
    start, end = (
        number(f"guidance_interval: {name}", value, 0, 1, field="guidance_interval")
        for name, value in zip(("start", "end"), asked, strict=True)
    )
    if start >= end:
        raise InvalidRequest(f"guidance_interval: start {start:g} is not before end {end:g}", field="guidance_interval")
    return start, end


def _text(cache: StepCache) -> str:
    options = ",".join(f"{field.name}={getattr(cache, field.name):g}" for field in fields(cache))
    return f"{cache.name}:{options}"


def _parsed(text: str) -> StepCache:
    kind, said = named_options(text, CACHES, "step_cache", "step_cache")
    return kind(**{key: _number(value) for key, value in said.items()})  # pyright: ignore[reportArgumentType]


def _number(text: str) -> int | float | str:
    """A number if it is one: what it has to be, `checked` says."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
