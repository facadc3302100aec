"""What was asked (`Request`) and what will be done (`Job`).

`Request.resolve(spec)` turns one into the other: every default filled in, every value checked, before torch is needed
and before any weight moves. What it had to change (a size off the grid, a guidance the model does not take) it writes
into `Job.notes`; with `strict=True` a change is refused instead.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from flux_engine.checks import check_text, integer, number, pair
from flux_engine.errors import InvalidRequest, did_you_mean
from flux_engine.inputs import Brought, Inputs, PictureFields
from flux_engine.inputs.caching import StepCache, checked_interval, checked_step_cache
from flux_engine.inputs.loras import LoRA, checked_loras
from flux_engine.specs import LCM_STEPS, REFINER_STRENGTH, SCHEDULERS, ModelSpec, SDXLSpec

OutputType = Literal["pil", "np", "pt", "latent"]
RefineMode = Literal["expert_ensemble_refiner", "base_image_refiner"]
NO_REFINER = "no_refiner"

MATCH_INPUT_IMAGE = "match_input_image"
"""What aspect_ratio also may say: as the picture that comes with the request, which is the default."""
MAX_SEED = 2**64 - 1
MAX_OUTPUTS = 64
"""Most pictures one request may hold, prompts times num_outputs: a guard against a slip of the keyboard."""


@dataclass(frozen=True, kw_only=True)
class Request(PictureFields):
    """A wish for pictures. Only `prompt` is required; None means the model's default."""

    prompt: str | Sequence[str]
    """One prompt, or several: each gets `num_outputs` pictures, all in one batch."""
    negative_prompt: str | None = None
    """What to move away from, by true classifier-free guidance. Costs a second network pass per step."""
    aspect_ratio: str | None = None
    """A name from the published table, as "16:9". Not together with width and height. Default "1:1"."""
    megapixels: str | float | None = None
    """"1" or "0.25", with aspect_ratio. Default "1"."""
    width: int | None = None
    height: int | None = None
    """Size in pixels, both or neither; rounded up to the model's grid."""
    num_outputs: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """Strength of guidance: of the embedding of guidance-distilled models (FLUX.1 dev, LCM), or of classifier-free
    guidance with SDXL, where up to 1 is off."""
    true_cfg_scale: float | None = None
    """Scale of true classifier-free guidance for models that are not SDXL; 1 is off. Default: on if there is a negative
    prompt."""
    guidance_interval: tuple[float, float] | None = None
    """Classifier-free guidance only at the calls of the network that lie whole between these shares of all calls, as
    (0.2, 0.8); the others cost half. None is all of them (arXiv 2404.07724)."""
    scheduler: str | None = None
    """SDXL: a name from `specs.SCHEDULERS`."""
    refine: str | None = None
    """SDXL with a refiner: "expert_ensemble_refiner" (it takes over at high_noise_frac), "base_image_refiner" (it goes
    over the whole picture), "no_refiner" (the default)."""
    high_noise_frac: float | None = None
    """Share of the way from noise that the base goes before the refiner. Default 0.8."""
    refine_steps: int | None = None
    """Steps of the base_image_refiner, of which it walks the last three tenths. Default: num_inference_steps."""
    original_size: tuple[int, int] | None = None
    """SDXL is told how large (height, width) its picture was before it was cut. Default: as large as it is."""
    crop_top_left: tuple[int, int] | None = None
    """SDXL is told where (top, left) it was cut from. Default: the corner."""
    target_size: tuple[int, int] | None = None
    """SDXL is told its size (height, width). Default: the true one."""
    prompt_weights: bool = False
    """SDXL: read (word), (word:1.3) and [word] as more and less weight, as AUTOMATIC1111 does."""
    prompt_chunks: bool = False
    """SDXL: read all of a prompt over 77 tokens, 75 at a time, instead of cutting it."""
    seed: int | None = None
    """Seed of the first picture; picture k has seed + k. 0 is a seed. None draws one."""
    output_type: OutputType = "pil"
    """"pil", "np" (H, W, 3 uint8), "pt" (3, H, W in [0, 1]) or "latent" (C, h, w)."""
    loras: Sequence[LoRA | str | os.PathLike[str]] | None = None
    """LoRAs of this request, in the place of those that the engine has set: paths, or LoRA(path, scale), as
    `engine.lora.set` takes them. None for those that are set, an empty list for none."""
    go_fast: bool | None = None
    """Run in 8 bits, or in full precision, where both are loaded (`quantization="both"`); else in what there is, which
    is reported."""
    step_cache: StepCache | str | None = None
    """Leave out what changes little from call to call, at a loss (benchmarks/README.md has figures):
    FirstBlockCache(threshold=0.08) or "first-block:threshold=0.08" (FLUX.1), TaylorCache(interval=3) or
    "taylor:interval=3"; `inputs/caching.py` tells all they take. None computes every call."""
    strict: bool = False
    """Refuse what would otherwise be adjusted and reported."""

    def resolve(self, spec: ModelSpec) -> Job:
        """Check every field against the model and fill in the defaults. Raises InvalidRequest, or returns the Job."""
        notes: list[str] = []
        prompts = _prompts(self.prompt)
        num_outputs = integer("num_outputs", self.num_outputs, 1, MAX_OUTPUTS)
        total = len(prompts) * num_outputs
        if total > MAX_OUTPUTS:
            raise InvalidRequest(
                f"{len(prompts)} prompts with {num_outputs} outputs each are {total} pictures; "
                f"at most {MAX_OUTPUTS} fit one request, send several",
                field="num_outputs",
            )
        brought = self._pictures(spec, notes)
        width, height = self._size(spec, brought, notes)
        inputs = brought.at((width, height), spec, notes) if brought else Inputs()
        steps = (
            spec.num_inference_steps
            if self.num_inference_steps is None
            else integer(
                "num_inference_steps",
                self.num_inference_steps,
                1,
                spec.max_inference_steps,
            )
        )
        seed = secrets.randbits(32) if self.seed is None else integer("seed", self.seed, 0, MAX_SEED)
        if self.output_type not in get_args(OutputType):
            raise InvalidRequest(
                f"output_type {self.output_type!r} is not one of {', '.join(get_args(OutputType))}",
                field="output_type",
            )
        guidance_scale, true_cfg_scale = self._guidance(spec, notes)
        guidance_interval = self._guidance_interval(true_cfg_scale, notes)
        scheduler = self._scheduler(spec, steps)
        refine = self._refine(spec, steps, notes)
        told = self._told(spec, width, height, notes)
        if self.strict and notes:
            raise InvalidRequest("strict: " + "; ".join(notes), field="strict")
        return Job(
            spec=spec,
            prompts=tuple(prompt for prompt in prompts for _ in range(num_outputs)),
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            seeds=tuple((seed + k) & MAX_SEED for k in range(total)),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            guidance_interval=guidance_interval,
            scheduler=scheduler,
            refine=refine,
            told=told,
            inputs=inputs,
            prompt_weights=self.prompt_weights,
            prompt_chunks=self.prompt_chunks,
            output_type=self.output_type,
            loras=None if self.loras is None else checked_loras(self.loras),
            go_fast=self._fast(),
            step_cache=checked_step_cache(self.step_cache, spec),
            strict=self.strict,
            notes=tuple(notes),
        )

    def _fast(self) -> bool | None:
        if not isinstance(self.go_fast, bool | None):
            raise InvalidRequest(f"go_fast {self.go_fast!r} is neither True nor False", field="go_fast")
        return self.go_fast

    def _size(self, spec: ModelSpec, brought: Brought | None, notes: list[str]) -> tuple[int, int]:
        """(width, height), after the picture that was brought if nothing is said."""
        said = [name for name in ("width", "height", "aspect_ratio", "megapixels") if getattr(self, name) is not None]
        if self.outpaint is not None and said:
            raise InvalidRequest(f"{said[0]} and outpaint exclude each other: outpaint says the size", field=said[0])
        sizes = spec.sizes
        if self.width is None and self.height is None:
            ratio, megapixels = self.aspect_ratio, _text_of(self.megapixels)
            match = isinstance(ratio, str) and ratio == MATCH_INPUT_IMAGE
            if (ratio is None or match) and brought is not None and brought.leading is not None:
                leading = brought.leading.size
                if brought.resize == "none":
                    return self._checked_size(spec, *leading, [])
                from flux_engine.inputs.following import following  # needs PIL, which nothing else here does

                return following(leading, sizes, megapixels)
            if match:
                raise InvalidRequest(f"aspect_ratio {ratio!r}: there is no picture to match", field="aspect_ratio")
            return sizes.named("1:1" if ratio is None else ratio, megapixels)
        if self.width is None or self.height is None:
            missing = "width" if self.width is None else "height"
            raise InvalidRequest(
                f"{missing} is missing: give width and height, or an aspect_ratio",
                field=missing,
            )
        if self.aspect_ratio is not None or self.megapixels is not None:
            name = "aspect_ratio" if self.aspect_ratio is not None else "megapixels"
            raise InvalidRequest(f"{name} and width/height exclude each other: give one", field=name)
        return self._checked_size(spec, self.width, self.height, notes)

    def _checked_size(self, spec: ModelSpec, width: object, height: object, notes: list[str]) -> tuple[int, int]:
        sizes = spec.sizes
        sides: list[int] = []
        for name, value in (("width", width), ("height", height)):
            asked = integer(name, value, sizes.min_side, sizes.max_side)
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

    def _guidance(self, spec: ModelSpec, notes: list[str]) -> tuple[float | None, float]:
        """The embedded guidance scale, and the scale of classifier-free guidance."""
        check_text("negative_prompt", self.negative_prompt)
        asked = None if self.guidance_scale is None else number("guidance_scale", self.guidance_scale, 0, 100)
        true = None if self.true_cfg_scale is None else number("true_cfg_scale", self.true_cfg_scale, 1, 100)
        embedded = None
        if spec.guidance_scale is None:
            if asked is not None:
                notes.append(f"guidance_scale {asked:g} ignored: {spec.name} takes no guidance")
        elif spec.guidance_embedded:
            embedded = spec.guidance_scale if asked is None else asked
        if spec.guidance_embedded:
            scale = (spec.true_cfg_scale if self.negative_prompt else 1.0) if true is None else true
        else:
            if true is not None:
                raise InvalidRequest(
                    f"true_cfg_scale {true:g}: {spec.name} has no other guidance; say guidance_scale",
                    field="true_cfg_scale",
                )
            scale = max(1.0, (spec.guidance_scale if asked is None else asked) if spec.guidance_scale else 1.0)
        if self.negative_prompt and scale == 1.0:
            notes.append("negative_prompt ignored: without classifier-free guidance there is nothing to move away from")
        return embedded, scale

    def _guidance_interval(self, scale: float, notes: list[str]) -> tuple[float, float] | None:
        interval = checked_interval(self.guidance_interval)
        if interval and scale == 1.0:
            notes.append("guidance_interval ignored: there is no classifier-free guidance to leave out")
            return None
        return interval

    def _scheduler(self, spec: ModelSpec, steps: int) -> str | None:
        if not isinstance(spec, SDXLSpec):
            if self.scheduler is not None:
                raise InvalidRequest(
                    f"scheduler {self.scheduler!r}: {spec.name} has one schedule; leave it out", field="scheduler"
                )
            return None
        name = spec.schedule.scheduler if self.scheduler is None else self.scheduler
        if name not in SCHEDULERS:
            near = did_you_mean(name, SCHEDULERS) if isinstance(name, str) else "."
            raise InvalidRequest(f"no scheduler {name!r}{near} Known: {', '.join(SCHEDULERS)}", field="scheduler")
        if name == "LCM" and steps > LCM_STEPS:
            raise InvalidRequest(
                f"num_inference_steps {steps}: the LCM scheduler takes at most {LCM_STEPS}", field="num_inference_steps"
            )
        return name

    def _refine(self, spec: ModelSpec, steps: int, notes: list[str]) -> Refine | None:
        mode = NO_REFINER if self.refine is None else self.refine
        modes = (NO_REFINER, *get_args(RefineMode))
        if mode not in modes:
            raise InvalidRequest(f"refine {mode!r} is not one of {', '.join(modes)}", field="refine")
        fraction = 0.8 if self.high_noise_frac is None else number("high_noise_frac", self.high_noise_frac, 0, 1)
        asked = self.refine_steps
        refine_steps = steps if asked is None else integer("refine_steps", asked, 1, spec.max_inference_steps)
        given = {"high_noise_frac": self.high_noise_frac, "refine_steps": asked}
        refiner = spec.refiner if isinstance(spec, SDXLSpec) else None
        if refiner is None:
            for name, value in (("refine", None if mode == NO_REFINER else mode), *given.items()):
                if value is not None:
                    how = f"load({spec.name!r}, refiner=...)" if isinstance(spec, SDXLSpec) else "leave it out"
                    raise InvalidRequest(f"{name} {value!r}: {spec.name} has no refiner; {how}", field=name)
            return None
        if mode == "base_image_refiner" and int(refine_steps * REFINER_STRENGTH) < 1:
            raise InvalidRequest(
                f"refine_steps {refine_steps} are too few: {REFINER_STRENGTH:.0%} of them are walked, so say 4 or more",
                field="refine_steps",
            )
        wanted = {"expert_ensemble_refiner": "high_noise_frac", "base_image_refiner": "refine_steps"}.get(mode)
        notes += [f"{name} {v} ignored by {mode}" for name, v in given.items() if v is not None and name != wanted]
        return None if mode == NO_REFINER else Refine(mode, fraction, refine_steps)  # pyright: ignore[reportArgumentType]

    def _told(self, spec: ModelSpec, width: int, height: int, notes: list[str]) -> SizesTold | None:
        pairs = ("original_size", "crop_top_left", "target_size")
        if not isinstance(spec, SDXLSpec):
            given = [name for name in (*pairs, "prompt_weights", "prompt_chunks") if getattr(self, name)]
            notes += [f"{name} ignored: {spec.name} has no use for it" for name in given]
            return None
        for name in ("prompt_weights", "prompt_chunks"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name} {getattr(self, name)!r} is neither True nor False", field=name)
        original, crop, target = (pair(name, getattr(self, name)) for name in pairs)
        return SizesTold(original or (height, width), crop or (0, 0), target or (height, width))


@dataclass(frozen=True)
class Refine:
    """What a refiner does."""

    mode: RefineMode
    high_noise_frac: float
    steps: int


@dataclass(frozen=True)
class SizesTold:
    """What SDXL is told of its picture's size, in pixels."""

    original_size: tuple[int, int]
    """(height, width)."""
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]
    """(height, width)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request with nothing left open. Tuples have one entry per picture."""

    spec: ModelSpec
    prompts: tuple[str, ...]
    negative_prompt: str | None
    width: int
    height: int
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float | None
    """What the network is told; None if it is told none."""
    true_cfg_scale: float
    """Scale of classifier-free guidance; 1 is off."""
    guidance_interval: tuple[float, float] | None = None
    """Shares of all calls between which there is guidance; None for all of them, or where there is none at all."""
    scheduler: str | None = None
    refine: Refine | None = None
    told: SizesTold | None = None
    inputs: Inputs = field(default_factory=Inputs, repr=False)
    prompt_weights: bool = False
    prompt_chunks: bool = False
    output_type: OutputType = "pil"
    loras: tuple[LoRA, ...] | None = None
    """None for those that the engine has set."""
    go_fast: bool | None = None
    step_cache: StepCache | None = None
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
        check_text("prompt", one)
        checked.append(one)
    return checked


def _text_of(megapixels: object) -> str | None:
    """0.25 is as good as "0.25"."""
    is_number = isinstance(megapixels, int | float) and not isinstance(megapixels, bool) and abs(megapixels) < 1e6
    return f"{megapixels:g}" if is_number else megapixels  # pyright: ignore[reportReturnType]
