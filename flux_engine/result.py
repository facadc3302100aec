"""What comes back from a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flux_engine import files, images
from flux_engine.errors import InvalidRequest
from flux_engine.provenance import Signer, signed
from flux_engine.request import Job
from flux_engine.verdicts import Verdict


@dataclass(frozen=True)
class Result:
    """Pictures, how they were made, and how long that took. `len`, indexing and iteration go over the pictures."""

    images: list[Any]
    """PIL pictures, arrays or tensors, as `output_type` asked."""
    job: Job
    """What was run, with every default filled in."""
    timings: Mapping[str, float]
    """Seconds in each stage: encode, denoise, decode."""
    notes: tuple[str, ...]
    """What was adjusted: a size off the grid, a prompt that was cut, an option the model does not have."""
    controls: tuple[Image.Image, ...] = ()
    """The control pictures that the networks read, as the preprocessors made them."""
    quantization: str = "none"
    """The scheme that the network ran in."""
    loras: tuple[tuple[str, float], ...] = ()
    """What names each LoRA that was applied, and its scale."""
    moved: int = 0
    """Bytes of weights that came to the device for it."""
    skipped: tuple[tuple[int, ...], ...] = ()
    """For each picture the network calls, from 1, at which `step_cache` left out some of the network."""
    verdicts: tuple[Verdict, ...] = ()
    """For each picture what the safety checker said; an engine without one says "unchecked"."""

    @property
    def image(self) -> Any:
        """The first picture."""
        return self.images[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """One for each picture."""
        return self.job.seeds

    @property
    def prompts(self) -> tuple[str, ...]:
        """One for each picture."""
        return self.job.prompts

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)

    def parameters(self, index: int = 0) -> str:
        """How picture `index` was made, in the text form that AUTOMATIC1111 started and viewers read."""
        job = self.job
        facts = {
            "Steps": job.num_inference_steps,
            "Sampler": job.scheduler or "Euler",
            "CFG scale": f"{job.true_cfg_scale:g}",
        }
        if job.guidance_scale is not None:
            facts["Distilled CFG Scale"] = f"{job.guidance_scale:g}"
        if job.guidance_interval is not None:
            facts["CFG interval"] = "{:g}-{:g}".format(*job.guidance_interval)
        if job.step_cache is not None:
            facts["Step cache"] = f'"{job.step_cache}"'
        if job.inputs.image is not None:
            facts["Denoising strength"] = f"{job.inputs.strength:g}"
        if self.loras:
            facts["LoRAs"] = '"' + ", ".join(f"{name}: {scale:g}" for name, scale in self.loras) + '"'
        facts |= {
            "Seed": job.seeds[index],
            "Size": f"{job.width}x{job.height}",
            "Model": job.spec.name,
            "Version": "flux-engine",
        }
        lines = [job.prompts[index]]
        if job.negative_prompt:
            lines.append(f"Negative prompt: {job.negative_prompt}")
        lines.append(", ".join(f"{key}: {value}" for key, value in facts.items()))
        return "\n".join(lines)

    def save(
        self,
        path: str | Path,
        index: int = 0,
        *,
        format: str | None = None,
        quality: int = 95,
        metadata: bool = True,
        c2pa: Signer | None = None,
    ) -> Path:
        """Write one picture, signed if `c2pa` says with what. The format follows the file's ending unless it is given;
        returns the path."""
        path = Path(path)
        kind = files.image_format(path, format)
        parameters = self.parameters(index) if metadata else None
        content = images.encode(self.pil(index), kind, quality=quality, parameters=parameters)
        if c2pa is not None:
            content = signed(content, kind, c2pa, title=path.name)
        files.write(path, content)
        return path

    def pil(self, index: int = 0) -> Image.Image:
        """A picture as PIL, whatever the output type was; latents cannot be shown."""
        picture = self.images[index]
        if isinstance(picture, Image.Image):
            return picture
        if isinstance(picture, np.ndarray):
            return Image.fromarray(picture)
        if self.job.output_type == "pt":
            return images.to_pil(picture * 2 - 1)
        raise InvalidRequest("latents are not a picture: ask for output_type 'pil'", field="output_type")

    def __repr__(self) -> str:
        job = self.job
        seconds = sum(self.timings.values())
        return (
            f"<Result: {len(self)} of {job.width}x{job.height} from {job.spec.name}, "
            f"seed {job.seeds[0]}, {job.num_inference_steps} steps, {seconds:.2f} s>"
        )

    def _repr_png_(self) -> bytes | None:
        """Notebooks show the pictures, side by side."""
        if self.job.output_type == "latent":
            return None
        pictures = [self.pil(index) for index in range(len(self))]
        return images.encode(images.contact_sheet(pictures, min(len(pictures), 4)), "png")
