"""LoRAs that have a model draw another way: in few steps, or after a control picture that it reads beside the latent.
They bring steps, guidance and a scheduler along, as defaults of requests.

No tensor says what such a file was trained for, so it is told by its name, or by whoever sets it. Sources: LCM-LoRA
(arXiv 2311.05556), SDXL-Lightning (arXiv 2402.13929, ByteDance/SDXL-Lightning), Hyper-SD (arXiv 2404.13686,
ByteDance/Hyper-SD), FLUX.1-Turbo-Alpha (alimama-creative), FLUX.1 Canny and Depth as LoRAs (black-forest-labs/flux).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from flux_engine.errors import InvalidRequest
from flux_engine.inputs.loras import LoRA
from flux_engine.specs import FluxSpec, ModelSpec, SDXLSpec

MOST_STEPS = 50


@dataclass(frozen=True)
class Mode:
    """What requests have by default while such a LoRA is set."""

    name: str
    steps: int | None
    """None leaves the model's own."""
    guidance_scale: float | None = None
    """None leaves the model's own; 1 is off for SDXL, and may be set higher in a request."""
    scheduler: str | None = None
    timestep_spacing: str = "trailing"
    sdxl: bool = True
    """Of SDXL, or else of FLUX.1."""
    structure: str = ""
    """The control picture that the network reads with it."""

    def of(self, spec: ModelSpec) -> ModelSpec:
        """The same model with these defaults. Raises InvalidRequest for a model of the other family."""
        if isinstance(spec, SDXLSpec) and self.sdxl:
            assert self.scheduler is not None
            schedule = replace(spec.schedule, scheduler=self.scheduler, timestep_spacing=self.timestep_spacing)
            steps = self.steps or spec.num_inference_steps
            return replace(spec, schedule=schedule, num_inference_steps=steps, guidance_scale=self.guidance_scale)
        if isinstance(spec, FluxSpec) and self.structure:
            if not spec.widened:
                raise InvalidRequest(
                    f"a LoRA for {self.structure} has the network read a control picture beside the latent, and it is "
                    f"widened for that when it is loaded: load({spec.name!r}, loras=[...])",
                    field="loras",
                )
            sizes, guidance = replace(spec.sizes, follow="area"), self.guidance_scale
            return replace(spec, reads="structure", structure=self.structure, guidance_scale=guidance, sizes=sizes)
        if isinstance(spec, FluxSpec) and not self.sdxl:
            return replace(spec, num_inference_steps=self.steps or spec.num_inference_steps)
        family = "SDXL" if self.sdxl else "FLUX.1"
        raise InvalidRequest(f"{self.name!r} is a mode of {family} models, and {spec.name} is none", field="loras")


MODES: Mapping[str, Mode] = MappingProxyType(
    {
        mode.name: mode
        for mode in (
            Mode("lcm", 4, 1.0, "LCM", "leading"),
            Mode("lightning", 4, 1.0, "K_EULER"),
            Mode("hyper", 4, 1.0, "DDIM"),
            Mode("hyper-flux", 8, sdxl=False),
            Mode("turbo-flux", 8, sdxl=False),
            Mode("canny-flux", None, 30.0, sdxl=False, structure="canny"),
            Mode("depth-flux", None, 10.0, sdxl=False, structure="depth"),
        )
    }
)
SIGNS: Sequence[tuple[str, str]] = (
    (r"lcm[-_. ]?(ssd[-_])?(lora|sdxl)|sdxl[-_]lcm|(^|[-_])lcm($|[-_.])", "lcm"),
    (r"lightning", "lightning"),
    (r"hyper[-_. ]?flux", "hyper-flux"),
    (r"hyper[-_. ]?(sdxl|sd)", "hyper"),
    (r"flux.*turbo[-_]alpha", "turbo-flux"),
    (r"flux.*canny.*lora", "canny-flux"),
    (r"flux.*depth.*lora", "depth-flux"),
)


def mode_of(said: str | None, path: str, spec: ModelSpec) -> Mode | None:
    """The mode that a LoRA brings: `said` is "auto", None for none, or a name of MODES, with steps behind it if need
    be, as "lightning-8". By its path it is told only for the family that it is of.

    Raises InvalidRequest for another name, or a mode of the other family.
    """
    if said is None:
        return None
    if said == "auto":
        last = "/".join(path.lower().replace("\\", "/").split("/")[-4:])
        name = next((mode for sign, mode in SIGNS if re.search(sign, last)), None)
        if name is None or MODES[name].sdxl != isinstance(spec, SDXLSpec):
            return None
        told = re.search(r"(\d{1,2})[-_ ]?steps?", last) if MODES[name].steps else None
        return _with_steps(MODES[name], int(told[1])) if told else MODES[name]
    match = re.fullmatch(r"(?P<name>[a-z]+(-flux)?)(-(?P<steps>\d{1,3}))?", said) if isinstance(said, str) else None
    if match is None or match["name"] not in MODES:
        raise InvalidRequest(
            f"a LoRA's mode is 'auto', None or one of {', '.join(MODES)} (with steps as 'lightning-8'), not {said!r}",
            field="loras",
        )
    mode = MODES[match["name"]]
    if match["steps"]:
        mode = _with_steps(mode, int(match["steps"]))
    if mode.sdxl != isinstance(spec, SDXLSpec):
        mode.of(spec)
    return mode


def mode_among(loras: Sequence[LoRA], spec: ModelSpec) -> Mode | None:
    """What one of them sets for requests. Raises InvalidRequest for two that do, or one of another family."""
    modes = [(lora, mode) for lora in loras if lora.scale and (mode := mode_of(lora.mode, str(lora.path), spec))]
    if len({mode for _, mode in modes}) > 1:
        told = " and ".join(f"{lora.path} ({mode.name}{f', {mode.steps} steps' if mode.steps else ''})"
                            for lora, mode in modes)  # fmt: skip
        raise InvalidRequest(f"only one LoRA sets the steps: {told}. Say mode=None for the others", field="loras")
    return modes[0][1] if modes else None


def widened_for(loras: Sequence[LoRA], spec: ModelSpec) -> ModelSpec:
    """The model with room beside its latent for the control picture that one of its LoRAs has it read, if one does.

    Raises as `mode_of`.
    """
    structures = [mode for lora in loras if (mode := mode_of(lora.mode, str(lora.path), spec)) and mode.structure]
    if not structures or not isinstance(spec, FluxSpec) or spec.reads != "nothing":
        return spec
    wide = replace(spec.transformer, in_channels=8 * spec.vae.latent_channels)
    return replace(spec, transformer=wide, widened=True)


def _with_steps(mode: Mode, steps: int) -> Mode:
    if not 1 <= steps <= MOST_STEPS:
        raise InvalidRequest(f"{mode.name} in {steps} steps: 1 to {MOST_STEPS}", field="loras")
    return replace(mode, steps=steps)
