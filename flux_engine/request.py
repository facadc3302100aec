"""What was asked (`Request`) and what will be done (`Job`).

`Request.resolve(spec)` turns one into the other: every default filled in, every value checked, before torch is needed
and before any weight moves. What it had to change (a size off the grid, a guidance the model does not take) it writes
into `Job.notes`; with `strict=True` a change is refused instead.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from flux_engine.errors import InvalidRequest
from flux_engine.specs import ModelSpec

OutputType = Literal["pil", "np", "pt", "latent"]

MAX_SEED = 2**64 - 1
MAX_OUTPUTS = 64
"""Most pictures one request may hold, prompts times num_outputs: a guard against a slip of the keyboard."""
MAX_PROMPT_CHARACTERS = 100_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """A wish for pictures. Only `prompt` is required; None means the model's default."""

    prompt: str | Sequence[str]
    """One prompt, or several: each gets `num_outputs` pictures, all in one batch."""
    negative_prompt: str | None = None
    """What to move away from, by true classifier-free guidance. Costs a second network pass per step."""
    aspect_ratio: str | None = None
    """A name from the published table, as "16:9". Not together with width and height. Default "1:1"."""
    megapixels: str | None = None
    """"1" or "0.25", with aspect_ratio. Default "1"."""
    width: int | None = None
    height: int | None = None
    """Size in pixels, both or neither; rounded up to the model's grid."""
    num_outputs: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """Strength of the guidance embedding of guidance-distilled models (FLUX.1 dev)."""
    true_cfg_scale: float | None = None
    """Scale of true classifier-free guidance; 1 is off. Default: on if there is a negative prompt."""
    seed: int | None = None
    """Seed of the first picture; picture k has seed + k. 0 is a seed. None draws one."""
    output_type: OutputType = "pil"
    """"pil", "np" (H, W, 3 uint8), "pt" (3, H, W in [0, 1]) or "latent" (C, h, w)."""
    strict: bool = False
    """Refuse what would otherwise be adjusted and reported."""

    def resolve(self, spec: ModelSpec) -> Job:
        """Check every field against the model and fill in the defaults. Raises InvalidRequest, or returns the Job."""
        notes: list[str] = []
        prompts = _prompts(self.prompt)
        num_outputs = _integer("num_outputs", self.num_outputs, 1, MAX_OUTPUTS)
        total = len(prompts) * num_outputs
        if total > MAX_OUTPUTS:
            raise InvalidRequest(
                f"{len(prompts)} prompts with {num_outputs} outputs each are {total} pictures; "
                f"at most {MAX_OUTPUTS} fit one request, send several",
                field="num_outputs",
            )
        width, height = self._size(spec, notes)
        steps = (
            spec.num_inference_steps
            if self.num_inference_steps is None
            else _integer(
                "num_inference_steps",
                self.num_inference_steps,
                1,
                spec.max_inference_steps,
            )
        )
        seed = secrets.randbits(32) if self.seed is None else _integer("seed", self.seed, 0, MAX_SEED)
        if self.output_type not in get_args(OutputType):
            raise InvalidRequest(
                f"output_type {self.output_type!r} is not one of {', '.join(get_args(OutputType))}",
                field="output_type",
            )
        guidance_scale = self._guidance(spec, notes)
        true_cfg_scale = self._true_cfg(spec)
        if self.strict and notes:
            raise InvalidRequest("strict: " + "; ".join(notes))
        return Job(
            spec=spec,
            prompts=tuple(prompt for prompt in prompts for _ in range(num_outputs)),
            negative_prompt=self.negative_prompt or "",
            width=width,
            height=height,
            seeds=tuple((seed + k) & MAX_SEED for k in range(total)),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            output_type=self.output_type,
            strict=self.strict,
            notes=tuple(notes),
        )

    def _size(self, spec: ModelSpec, notes: list[str]) -> tuple[int, int]:
        sizes = spec.sizes
        if self.width is None and self.height is None:
            return sizes.named(
                "1:1" if self.aspect_ratio is None else self.aspect_ratio,
                "1" if self.megapixels is None else self.megapixels,
            )
        if self.width is None or self.height is None:
            missing = "width" if self.width is None else "height"
            raise InvalidRequest(
                f"{missing} is missing: give width and height, or an aspect_ratio",
                field=missing,
            )
        if self.aspect_ratio is not None or self.megapixels is not None:
            name = "aspect_ratio" if self.aspect_ratio is not None else "megapixels"
            raise InvalidRequest(f"{name} and width/height exclude each other: give one", field=name)
        sides: list[int] = []
        for name, value in (("width", self.width), ("height", self.height)):
            asked = _integer(name, value, sizes.min_side, sizes.max_side)
            side = -(-asked // sizes.multiple) * sizes.multiple
            if side != asked:
                notes.append(f"{name} {asked} rounded up to {side}, a multiple of {sizes.multiple}")
            sides.append(side)
        if sides[0] * sides[1] > sizes.max_pixels:
            raise InvalidRequest(
                f"{sides[0]}x{sides[1]} is {sides[0] * sides[1]:,} pixels; {spec.name} draws at most "
                f"{sizes.max_pixels:,}",
                field="width",
            )
        return sides[0], sides[1]

    def _guidance(self, spec: ModelSpec, notes: list[str]) -> float | None:
        asked = None if self.guidance_scale is None else _number("guidance_scale", self.guidance_scale, 0, 100)
        if spec.guidance_scale is None:
            if asked is not None:
                notes.append(f"guidance_scale {asked:g} ignored: {spec.name} takes no guidance")
            return None
        return spec.guidance_scale if asked is None else asked

    def _true_cfg(self, spec: ModelSpec) -> float:
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise InvalidRequest(
                f"negative_prompt is a {type(self.negative_prompt).__name__}, not a string",
                field="negative_prompt",
            )
        _check_length("negative_prompt", self.negative_prompt or "")
        if self.true_cfg_scale is None:
            return spec.true_cfg_scale if self.negative_prompt else 1.0
        return _number("true_cfg_scale", self.true_cfg_scale, 1, 100)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request with nothing left open. Tuples have one entry per picture."""

    spec: ModelSpec
    prompts: tuple[str, ...]
    negative_prompt: str
    width: int
    height: int
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float | None
    true_cfg_scale: float
    output_type: OutputType = "pil"
    strict: bool = False
    notes: tuple[str, ...] = field(default=())

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        return (
            self.height // self.spec.vae.downscale,
            self.width // self.spec.vae.downscale,
        )


def _prompts(prompt: object) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequest(
            f"prompt is a {type(prompt).__name__}, not a string or a list of strings",
            field="prompt",
        )
    if not prompts:
        raise InvalidRequest("prompt is an empty list", field="prompt")
    checked: list[str] = []
    for one in prompts:
        if not isinstance(one, str):
            raise InvalidRequest(f"prompt holds a {type(one).__name__}, not a string", field="prompt")
        _check_length("prompt", one)
        checked.append(one)
    return checked


def _check_length(name: str, text: str) -> None:
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(
            f"{name} has {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read",
            field=name,
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} is not valid Unicode: {error.reason} at {error.start}", field=name) from None


def _integer(name: str, value: object, low: int, high: int) -> int:
    """Accepts what stands for an integer (numpy's, too) and nothing that only looks like one (True, 3.5, "3")."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequest(f"{name} {value!r} is not an integer", field=name)
    number = value.__index__()  # pyright: ignore[reportAttributeAccessIssue]
    if not low <= number <= high:
        raise InvalidRequest(f"{name} {number} is outside {low} to {high}", field=name)
    return number


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise InvalidRequest(f"{name} {value!r} is not a number", field=name)
    number = float(value)  # pyright: ignore[reportArgumentType]
    if not math.isfinite(number) or not low <= number <= high:
        raise InvalidRequest(f"{name} {number} is outside {low:g} to {high:g}", field=name)
    return number
