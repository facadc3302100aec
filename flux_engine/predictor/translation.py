"""Inputs of a published schema -> a Request, without what does not apply, as the hosted models drop it.

A picture is read, or fetched, once and only if something depends on it. No weight is touched here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from flux_engine import pictures
from flux_engine.errors import FluxEngineError, InvalidRequest
from flux_engine.inputs import Control
from flux_engine.inputs.following import divided
from flux_engine.lora.finding import family_of, refer
from flux_engine.references import Reference
from flux_engine.replicate.schema import CUSTOM, InvalidInput, Schema, Steering
from flux_engine.request import NO_REFINER, Request
from flux_engine.specs import ModelSpec, SDXLSpec

Size = tuple[int, int]
"""(width, height)."""
NO_CONTROL = "none"
LINK = re.compile(r"\s*https?://", re.I)
STAND_IN = (1024, 1024)
USED_BY = {"high_noise_frac": "expert_ensemble_refiner", "refine_steps": "base_image_refiner"}
"""Field -> the only way to refine that it says something of."""
TABLES: Mapping[str, tuple[Size, ...]] = {
    "buckets": pictures.SDXL_BUCKETS,
    "1024 wide": tuple((1024, height) for height in range(512, 2049, 64)),
}


@dataclass(frozen=True)
class Wanted:
    """A LoRA that an input names."""

    input: str
    reference: Reference | None
    """None for the model's own."""
    scale: float


@dataclass(frozen=True)
class Translated:
    """What validated inputs stand for."""

    request: Request
    loras: tuple[Wanted, ...]
    """What the request is to have, once it is here."""
    notes: tuple[str, ...]
    """A line for what was asked for and does not count."""
    unread: tuple[str, ...] = ()
    """Inputs whose links were not fetched."""


def translate(
    schema: Schema,
    values: Mapping[str, Any],
    spec: ModelSpec,
    *,
    seed: int,
    own: bool = False,
    local: bool = False,
    fetch: bool = True,
) -> Translated:
    """The request that validated inputs stand for. `own` says that there is a LoRA of the model's own, which counts
    where the first input for one names none; `local` that texts may name pictures and LoRAs by paths. Without `fetch`
    a blank square stands for the picture of a link, which `Translated.unread` tells.

    Raises InvalidInput that lists every input that is wrong, or InvalidRequest for a model that cannot do what the
    schema is for.
    """
    if schema.edits and spec.reads != "reference":
        raise InvalidRequest(
            f"{spec.name} does not change a picture as the prompt says, which {schema.name} is for: "
            f"Predictor({schema.name!r}, model=...)",
            field="model",
        )
    work = _Translation(schema, values, spec, local, fetch)
    fields = work.fields()
    loras = work.loras(own)
    if work.problems:
        raise InvalidInput(work.problems)
    # The schema sets a seed no limits; torch counts seeds modulo 2^64, so that -1 is its largest.
    fields["seed"] = seed % 2**64
    if fields["seed"] != seed:
        work.notes.append(f"seed {seed} is taken for {fields['seed']}: seeds have 64 bits, and without one it is drawn")
    return Translated(Request(**fields), loras, tuple(work.notes), tuple(work.unread))


@dataclass
class _Translation:
    """One prediction's inputs on their way."""

    schema: Schema
    values: Mapping[str, Any]
    spec: ModelSpec
    local: bool
    fetch: bool
    unread: list[str] = field(default_factory=list[str])
    problems: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])
    _read: dict[str, Image.Image | None] = field(default_factory=dict[str, "Image.Image | None"])

    def fields(self) -> dict[str, Any]:
        """Every field of the request but the seed, as far as there are no problems."""
        schema, values = self.schema, self.values
        found = {one.field: one.name for one in schema.inputs if one.field and values[one.name] is not None}
        if "image" not in found:
            if "mask" in found:
                self.notes.append("mask ignored: there is no image")
            for name in ("mask", "strength"):
                found.pop(name, None)
        elif "mask" not in found or schema.with_mask_too:
            for name in schema.sizes_without_image:
                found.pop(name, None)
        asked = dict(schema.always)
        for name, source in found.items():
            asked[name] = self.picture(source) if self._is_picture(source) else values[source]
        self.problems |= {name: why for name, why in schema.agreements.items() if not values[name]}
        for name, why in schema.needs.items():
            if values[name] is None and not (name == "mask" and self._has_holes(asked.get("image"))):
                self.problems.setdefault(name, why)
        self._refine(asked)
        self._size(asked)
        controls = [control for one in schema.steering if (control := self._control(one)) is not None]
        return asked | {"control": controls}

    def loras(self, own: bool) -> tuple[Wanted, ...]:
        """What the inputs name, as far as they can be understood; nothing is fetched."""
        found: list[Wanted] = []
        for one in self.schema.loras:
            text, scale = (self.values[one.weights] or "").strip(), self.values[one.scale]
            if not text:
                if own and one is self.schema.loras[0]:
                    found.append(Wanted(one.weights, None, scale))
                continue
            try:
                reference = refer(text, self.schema.bare, local=self.local, field=one.weights)
            except FluxEngineError as error:
                self.problems[one.weights] = str(error).removeprefix(f"{one.weights} ")
                continue
            family = family_of(reference)
            if family not in (None, self.spec.family):
                self.problems[one.weights] = (
                    f"'{text}' is a LoRA for {family} models, and {self.spec.name} is one of {self.spec.family}"
                )
            elif any(reference == other.reference for other in found):
                self.notes.append(f"{one.weights} ignored: it is the same as {found[0].input}")
            else:
                found.append(Wanted(one.weights, reference, scale))
        return tuple(found)

    def picture(self, name: str) -> Image.Image | None:
        """An input's picture, read once. None for one that cannot be read, which is a problem."""
        if name not in self._read:
            self._read[name] = None
            value = self.values[name]
            if not self.fetch and isinstance(value, str) and LINK.match(value):
                self.unread.append(name)
                self._read[name] = Image.new("RGB", STAND_IN)
                return self._read[name]
            try:
                self._read[name] = pictures.read_picture(value, name, urls=True, paths=self.local)
            except InvalidRequest as error:
                self.problems[name] = str(error).removeprefix(f"{name} ")
        return self._read[name]

    def _is_picture(self, name: str) -> bool:
        return any(one.name == name and one.type == "uri" for one in self.schema.inputs)

    def _has_holes(self, image: Image.Image | None) -> bool:
        """Also one that could not be read: that is said already."""
        return image is None or pictures.alpha_mask(image) is not None

    def _refine(self, asked: dict[str, Any]) -> None:
        """Only with a refiner, and only what the way of refining uses."""
        mode = asked.get("refine", NO_REFINER)
        if mode == NO_REFINER:
            asked.pop("refine", None)
        elif not (isinstance(self.spec, SDXLSpec) and self.spec.refiner):
            self.problems["refine"] = (
                f"'{mode}' needs a refiner, and none is loaded with {self.spec.name}: "
                f"Predictor({self.schema.name!r}, refiner=...)"
            )
        for name, user in USED_BY.items():
            if mode != user:
                asked.pop(name, None)
        if asked.get("refine_steps") == 0:
            del asked["refine_steps"]
            self.notes.append("refine_steps 0 is taken for as many as num_inference_steps")

    def _size(self, asked: dict[str, Any]) -> None:
        """Width and height: after a picture, or as said; for a small model divided like all published sizes."""
        self._custom(asked)
        sizes, sizing = self.spec.sizes, self.schema.sizing
        said = self.values.get(sizing.chosen) if sizing else None
        name = (sizing.images.get(said, "") if said else sizing.image) if sizing else ""
        if sizing and name and self.values[name] is None:
            if name not in self.schema.needs:
                self.problems.setdefault(name, f"{sizing.chosen} says that its size counts: give a picture")
        elif sizing and name:
            if (image := self.picture(name)) is not None:
                asked["width"], asked["height"] = divided(_nearest(image.size, TABLES[sizing.table]), sizes)
        elif sizes.divisor > 1 and "width" in asked and "height" in asked:
            width, height = asked["width"], asked["height"]
            asked["width"], asked["height"] = -(-width // sizes.divisor), -(-height // sizes.divisor)
            self.notes.append(
                f"{width}x{height} is drawn as {asked['width']}x{asked['height']}: {self.spec.name} has the published "
                f"sizes divided by {sizes.divisor}"
            )

    def _custom(self, asked: dict[str, Any]) -> None:
        """Width and height count where aspect_ratio is "custom", and only there."""
        ratio = next((one for one in self.schema.inputs if one.name == "aspect_ratio" and CUSTOM in one.choices), None)
        if ratio is None or "aspect_ratio" not in asked:
            return
        unused = ("aspect_ratio", "megapixels") if asked["aspect_ratio"] == CUSTOM else ("width", "height")
        for name in unused:
            asked.pop(name, None)
        if "aspect_ratio" not in asked:
            for name in ("width", "height"):
                if name not in asked:
                    self.problems[name] = "aspect_ratio is custom: say width and height"

    def _control(self, steering: Steering) -> Control | None:
        """A control picture, if one was asked for and is there."""
        kind, made_by = steering.kind, None
        if steering.chosen:
            made_by = str(self.values[steering.chosen])
            if made_by == NO_CONTROL:
                return None
            kinds = steering.kinds[made_by]
            kind = next((one for one in kinds if one in self.spec.controls), kinds[0])
            if kind not in self.spec.controls:
                loaded = ", ".join(self.spec.controls) or "none"
                self.problems[steering.chosen] = (
                    f"'{made_by}' needs a ControlNet for {kind}; loaded with {self.spec.name}: {loaded}"
                )
        if self.values[steering.image] is None:
            if steering.image not in self.schema.needs:
                self.problems[steering.image] = f"{steering.chosen} '{made_by}' needs a picture"
            return None
        image = self.picture(steering.image)
        stand_in = steering.stand_ins.get(made_by or "")
        if stand_in:
            self.notes.append(f"{steering.chosen} '{made_by}' is made by {stand_in}: its network is a pickle only")
        said = {name: self.values[source] for name, source in steering.settings.items()}
        if {"start", "end"} <= said.keys() and said["start"] > said["end"]:
            self.problems[steering.settings["end"]] = f"{said['end']:g} is before {said['start']:g}, where it begins"
        made_by = stand_in or made_by
        return Control(kind=kind, image=image, preprocess=made_by or True, options=steering.options, **said)


def _nearest(size: Size, table: tuple[Size, ...]) -> Size:
    """By the difference of the aspects, as published; the engine's own measure is their ratio."""
    aspect = size[0] / size[1]
    return min(table, key=lambda one: abs(one[0] / one[1] - aspect))
