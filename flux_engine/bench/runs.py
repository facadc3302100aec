"""What is to be measured, as data that is checked before torch is imported; and what is worth it on which card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from flux_engine.config import COMPILE, DTYPES, QUANTIZATIONS
from flux_engine.errors import InvalidRequest, did_you_mean
from flux_engine.request import Request
from flux_engine.specs import FLUX_DEV, FLUX_SCHNELL, SDXL, ModelSpec

SYNTHETIC: Mapping[str, ModelSpec] = MappingProxyType(
    {"flux": FLUX_SCHNELL, "flux-dev": FLUX_DEV, "sdxl": SDXL, "vae": FLUX_SCHNELL, "sdxl-vae": SDXL}
)
"""Name -> whose widths it has; "vae" is the way from a latent to a picture."""
SWEEPS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"batch": (1, 2, 4, 8), "size": (256, 512, 768, 1024), "steps": (1, 2, 4, 8)}
)
"""What is varied -> the points: pictures at once, pixels along a side, steps."""
VARIED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"batch": ("pictures",), "size": ("width", "height"), "steps": ("steps",)}
)
"""The same -> the fields of a run that are."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One thing to measure."""

    model: str | None = None
    """A model to load and draw with; else `synthetic` is given."""
    synthetic: str | None = None
    depth: tuple[int, int] | None = None
    """Double and single blocks of a synthetic FLUX.1; None for all of them."""
    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    memory: str | None = None
    compile: str | None = None
    width: int | None = None
    height: int | None = None
    pictures: int = 1
    steps: int | None = None
    repeats: int = 3
    warm_up: int = 1
    ceilings: bool = True
    """Whether the machine's own speeds are measured, and so the floor."""

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what cannot be run."""
        if (self.model is None) == (self.synthetic is None):
            raise InvalidRequest("name either a model or --synthetic, not both; as in: flux-engine bench demo-schnell")
        if self.synthetic is not None and self.synthetic not in SYNTHETIC:
            known = ", ".join(SYNTHETIC)
            raise InvalidRequest(f"--synthetic {self.synthetic!r} is not one of {known}")
        if self.depth is not None and self.synthetic not in ("flux", "flux-dev"):
            raise InvalidRequest("--depth is for --synthetic flux and flux-dev: others are as deep as they are")
        for name, value, among in (
            ("dtype", self.dtype, DTYPES),
            ("quantization", self.quantization, QUANTIZATIONS),
            ("compile", self.compile, COMPILE),
        ):
            if value is not None and value not in among:
                raise InvalidRequest(f"--{name} {value!r} is not one of {', '.join(among)}")
        if self.synthetic and self.quantization == "both":
            raise InvalidRequest("--quantization 'both' is for models: measure 'none' and 'int8' one after the other")
        for name, least in (("pictures", 1), ("repeats", 1), ("warm_up", 0), ("steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidRequest(f"--{name.replace('_', '-')} {value} is below {least}")
        if self.synthetic:
            request_of(SYNTHETIC[self.synthetic], self)

    @property
    def name(self) -> str:
        """Of what is measured."""
        if self.model is not None:
            return self.model
        depth = f" {self.depth[0]}+{self.depth[1]}" if self.depth else ""
        return f"synthetic {self.synthetic}{depth}"


def request_of(spec: ModelSpec, run: Run) -> Request:
    """What a run draws, checked against a model's own limits. Raises InvalidRequest."""
    request = Request(
        prompt="a large red circle on a blue background",
        seed=0,
        width=run.width,
        height=run.height,
        num_outputs=run.pictures,
        num_inference_steps=run.steps,
        strict=True,
    )
    request.resolve(spec)
    return request


def parse_depth(said: str) -> tuple[int, int]:
    """ "2+4" -> double and single blocks. Raises InvalidRequest."""
    double, plus, single = said.partition("+")
    if not (plus and double.isdecimal() and single.isdecimal() and len(said) < 9 and int(double) + int(single)):
        raise InvalidRequest(f"--depth {said!r} is not as 2+4, double and single blocks")
    return int(double), int(single)


def points_of(run: Run, sweep: str) -> list[tuple[int, Run]]:
    """The runs of a sweep, with what is varied. Raises InvalidRequest for one that cannot be."""
    if sweep not in SWEEPS:
        raise InvalidRequest(f"--sweep {sweep!r} is not one of {', '.join(SWEEPS)}{did_you_mean(sweep, SWEEPS)}")
    if sweep == "steps" and run.synthetic in ("vae", "sdxl-vae"):
        raise InvalidRequest("--sweep steps: an autoencoder decodes once; sweep batch or size")
    varied = VARIED[sweep]
    if any(getattr(run, name) != getattr(Run, name) for name in varied):
        raise InvalidRequest(f"--sweep {sweep} varies {' and '.join(varied)} itself: leave them out")
    return [(n, replace(run, **dict.fromkeys(varied, n), ceilings=False)) for n in SWEEPS[sweep]]


def _cells(*cells: tuple[str, str, str], dtype: str, depth: tuple[int, int] | None = None) -> tuple[Run, ...]:
    """(synthetic, quantization, how many pixels along a side) each."""
    return tuple(
        Run(
            synthetic=kind,
            quantization=scheme,
            dtype=dtype,
            width=int(side),
            height=int(side),
            depth=depth if kind.startswith("flux") else None,
        )
        for kind, scheme, side in cells
    )


_DECODING = (("vae", "none", "1024"),)
PRESETS: Mapping[str, tuple[Run, ...]] = MappingProxyType(
    {
        # 15.8 GB: all of FLUX.1 in int8 alone; a third of its blocks in float16.
        "T4": (
            *_cells(("flux-dev", "int8", "1024"), ("flux-dev", "int8", "512"), dtype="float16"),
            *_cells(("flux-dev", "none", "1024"), dtype="float16", depth=(6, 12)),
            *_cells(("sdxl", "none", "1024"), ("sdxl", "int8", "1024"), *_DECODING, dtype="float16"),
        ),
        "A40": _cells(
            ("flux-dev", "none", "1024"), ("flux-dev", "int8", "1024"), ("flux", "int8", "1024"),
            ("sdxl", "none", "1024"), ("sdxl", "int8", "1024"), *_DECODING, dtype="bfloat16",
        ),
        "A100": _cells(
            ("flux-dev", "none", "1024"), ("flux-dev", "int8", "1024"), ("flux", "int8", "1024"),
            ("sdxl", "none", "1024"), ("sdxl", "int8", "1024"), *_DECODING, dtype="bfloat16",
        ),
        "H100": _cells(
            ("flux-dev", "none", "1024"), ("flux-dev", "fp8", "1024"), ("flux", "fp8", "1024"),
            ("sdxl", "none", "1024"), ("sdxl", "fp8", "1024"), *_DECODING, dtype="bfloat16",
        ),
        # A slice, as a processor takes minutes for a step of all.
        "cpu": (
            *_cells(("flux", "none", "512"), ("flux", "int8", "512"), dtype="auto", depth=(1, 2)),
            *_cells(("sdxl", "none", "512"), ("sdxl", "int8", "512"), ("vae", "none", "512"), dtype="auto"),
        ),
    }
)  # fmt: skip
"""Card -> what is measured on it: published sizes and all blocks, where they fit."""
LIKE = {"A10": "A40", "L4": "H100", "RTX 4090": "H100", "L40S": "H100", "H200": "H100"}
"""Cards without a preset of their own -> the preset that multiplies what they do. What does not fit is told."""


def preset_for(card: str) -> str:
    """The preset of a card, by the name that its driver gives it. Raises InvalidRequest for one that none is for."""
    said = card.upper().replace("NVIDIA", "").replace("TESLA", "").replace("GEFORCE", "")
    words = said.replace("-", " ").split()
    for name in [*PRESETS, *LIKE]:
        if all(word in words for word in name.upper().split()):
            return LIKE.get(name, name)
    raise InvalidRequest(f"no preset is for {card!r}: say one of {', '.join(PRESETS)}")


def find_preset(name: str) -> tuple[Run, ...]:
    """Its runs. Raises InvalidRequest for a name that is none."""
    known = {each.lower(): runs for each, runs in PRESETS.items()}
    if name.lower() not in known:
        raise InvalidRequest(f"--preset {name!r} is not one of {', '.join(PRESETS)}, auto{did_you_mean(name, PRESETS)}")
    return known[name.lower()]
