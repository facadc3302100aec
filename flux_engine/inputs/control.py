"""Control pictures: what a request says of them, and what that means for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from flux_engine.checks import number
from flux_engine.errors import FluxEngineError, InvalidRequest, did_you_mean
from flux_engine.specs import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SCALE = 10.0
PREPROCESSORS: Mapping[str, str] = {
    "pose": "openpose",
    "soft_edge": "soft_edge_hed",
    "gray": "illusion",
    "blur": "tile",
    "low_quality": "none",
}
"""Kind of control picture -> what makes one, where that has another name."""
CANNY_OF_FLUX: Mapping[str, Any] = {"low": 50, "high": 200}
"""Thresholds of the edges that FLUX.1 Canny was taught (black-forest-labs/flux, flux/modules/image_embedders.py)."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A control picture of a request."""

    kind: str
    """"canny", "depth", ...: what was loaded for it answers, a ControlNet or the model itself."""
    image: Any
    """As a request's `image`."""
    scale: float = 1.0
    start: float = 0.0
    """Share of the calls after which it begins to count."""
    end: float = 1.0
    """Share of the calls after which it no longer does."""
    preprocess: bool | str = True
    """Make the control picture out of `image`; False if it is one already; or the name of another preprocessor."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the preprocessor takes: canny's `low` and `high`."""


@dataclass(frozen=True, kw_only=True)
class ControlInput:
    """A control picture, resolved."""

    kind: str
    image: Image
    """RGB, at the job's size."""
    preprocessor: str | None
    options: Mapping[str, Any]
    scale: float
    start: float
    end: float


def read_controls(sent: Any, spec: ModelSpec, *, urls: bool) -> list[ControlInput]:
    """Every control picture of a request. Raises InvalidRequest, and UnsupportedError for a preprocessor that lacks a
    package."""
    several = [sent] if isinstance(sent, (Control, Mapping)) else sent
    if not isinstance(several, (tuple, list)):
        raise InvalidRequest(
            f"control is a {type(sent).__name__}, no Control(kind=..., image=...) and no list of them", field="control"
        )
    return [_read(_as_control(one), spec, urls=urls) for one in several]


def _as_control(one: Any) -> Control:
    known = [f.name for f in fields(Control)]
    if isinstance(one, Control):
        return one
    if not isinstance(one, Mapping) or not {"kind", "image"} <= one.keys() <= set(known):
        found = ", ".join(map(str, one)) if isinstance(one, Mapping) else f"a {type(one).__name__}"
        raise InvalidRequest(
            f"a control is a Control, or has kind and image, and may have {', '.join(known[2:])}; not {found:.80}",
            field="control",
        )
    return Control(**{str(key): value for key, value in one.items()})


def _read(control: Control, spec: ModelSpec, *, urls: bool) -> ControlInput:
    from flux_engine import pictures

    kind = control.kind
    if not isinstance(kind, str):
        raise InvalidRequest(f"control: a kind is a {type(kind).__name__}, not a string", field="control")
    if spec.reads == "reference":
        raise InvalidRequest(
            f"control: {spec.name} takes no control pictures, only an image to change", field="control"
        )
    if kind not in spec.controls:
        near = did_you_mean(kind, spec.controls) if spec.controls else "."
        known = f"Known: {', '.join(spec.controls)}" if spec.controls else f"load(..., controlnets=[{kind[:40]!r}])"
        raise InvalidRequest(f"{spec.name} has no control {kind!r:.40}{near} {known}", field="control")
    own = spec.reads == "structure" and kind == spec.structure
    if own and (control.scale, control.start, control.end) != (1.0, 0.0, 1.0):
        raise InvalidRequest(
            f"control {kind}: {spec.name} always reads it whole; leave out scale, start and end", field="control"
        )
    scale = number(f"control {kind}: scale", control.scale, 0, MAX_SCALE, field="control")
    start = number(f"control {kind}: start", control.start, 0, 1, field="control")
    end = number(f"control {kind}: end", control.end, 0, 1, field="control")
    if start > end:
        raise InvalidRequest(f"control {kind}: start {start:g} is after end {end:g}", field="control")
    preprocessor, options = _preprocessor(control, own=own)
    image = pictures.flatten(pictures.read_picture(control.image, "control", urls=urls))
    return ControlInput(
        kind=kind, image=image, preprocessor=preprocessor, options=options, scale=scale, start=start, end=end
    )


def _preprocessor(control: Control, *, own: bool) -> tuple[str | None, Mapping[str, Any]]:
    """What makes the control picture, and how."""
    from flux_engine import preprocess

    if control.preprocess is False:
        return None, {}
    asked = PREPROCESSORS.get(control.kind, control.kind) if control.preprocess is True else control.preprocess
    options = control.options or (CANNY_OF_FLUX if own and asked == "canny" else {})
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InvalidRequest(f"control {control.kind}: options are no mapping of names to values", field="control")
    try:
        preprocess.check(asked, **options)
    except InvalidRequest as error:
        raise InvalidRequest(f"control {control.kind}: {error}", field="control") from None
    except FluxEngineError as error:
        raise type(error)(f"control {control.kind}: {error}") from None
    return str(asked), dict(options)
