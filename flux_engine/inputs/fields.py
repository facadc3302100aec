"""The fields of a request that bring pictures, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from flux_engine.checks import number
from flux_engine.errors import InvalidRequest
from flux_engine.inputs.control import MAX_SCALE, Control, ControlInput, read_controls
from flux_engine.specs import FluxSpec, ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
"""(width, height)."""
IMG2IMG_STRENGTH = 0.8


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The pictures of a job."""

    image: Image | None = None
    """RGB, at the job's size."""
    mask: Image | None = None
    """L, at the job's size: white is repainted."""
    strength: float = 1.0
    """Share of the schedule that is walked: 1 starts from pure noise, 0 walks nothing."""
    paste_back: bool = False
    """Whether pixels that the mask keeps are the picture's own in the end."""
    reference: Image | None = None
    """RGB, at a size of its own: what the network reads behind its own tokens."""
    controls: tuple[ControlInput, ...] = ()
    prompts: tuple[Image, ...] = ()
    """RGB, of any size."""
    prompt_strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Brought(Inputs):
    """What a request brought, read but not at any size yet."""

    resize: str = "stretch"
    resize_controls: str = "stretch"

    @property
    def leading(self) -> Image | None:
        """The picture whose size the job follows, if it says none itself."""
        first = self.controls[0].image if self.controls else None
        return self.image or self.reference or first

    def at(self, size: Size, spec: ModelSpec, notes: list[str]) -> Inputs:
        """Put at the size of the job. Raises InvalidRequest if nothing may be scaled and a size differs."""
        from flux_engine import pictures
        from flux_engine.inputs.following import preferred

        def fit(image: Image, name: str, how: str) -> Image:
            wide, high = image.size[0] / size[0], image.size[1] / size[1]
            if how == "stretch" and max(wide, high) / min(wide, high) > 1.05:
                notes.append(
                    f"{name} {image.size[0]}x{image.size[1]} stretched to {size[0]}x{size[1]}; resize='cover' cuts it, "
                    "'contain' puts edges round it"
                )
            if how == "none" and image.size != size:
                raise InvalidRequest(
                    f"{name} is {image.size[0]}x{image.size[1]}, and {size[0]}x{size[1]} is drawn: with resize='none' "
                    f"they have to be one, and multiples of {spec.sizes.multiple}; or choose stretch, cover or contain",
                    field="resize",
                )
            return pictures.fit(image, size, how)

        reference = self.reference
        if reference is not None:
            size_of_its_own = pictures.nearest_aspect(reference.size, preferred(spec.sizes))
            reference = pictures.fit(reference, size_of_its_own, "stretch")
        return Inputs(
            image=None if self.image is None else fit(self.image, "image", self.resize),
            mask=None if self.mask is None else pictures.fit(self.mask, size, self.resize, background=0),
            strength=self.strength,
            paste_back=self.paste_back,
            reference=reference,
            controls=tuple(
                replace(one, image=fit(one.image, f"control {one.kind}", self.resize_controls)) for one in self.controls
            ),
            prompts=self.prompts,
            prompt_strength=self.prompt_strength,
        )


@dataclass(frozen=True, kw_only=True)
class PictureFields:
    """The fields of a request that bring pictures.

    A picture is a path, a PIL image, an array, bytes, a data URI, bare base64, or with `allow_urls` a link.
    """

    image: Any = None
    """The picture to start from, or to change. Where it is transparent it is repainted."""
    mask: Any = None
    """White is repainted, black is kept, grey in part; scaled to the picture."""
    strength: float | None = None
    """How much of the picture is given up: 1 draws anew, 0 is the autoencoder's round trip. Default 0.8, and 1
    with a mask."""
    outpaint: Sequence[int] | None = None
    """Room to paint around the picture: pixels (left, top, right, bottom), or (width, height) to come to. The picture's
    edges go on into it, which a strength below 1 begins from; its last 8 pixels before the room are repainted too."""
    paste_back: bool | None = None
    """Whether pixels that the mask keeps are exactly the picture's. Default True."""
    control: Sequence[Control | Mapping[str, Any]] | Control = ()
    """Control pictures, of ControlNets or of FLUX.1 Canny and Depth."""
    image_prompt: Any = None
    """FLUX.1 with Redux: a picture, or several, that say what to draw beside the prompt, which may be empty."""
    image_prompt_strength: float | None = None
    """Weight of their tokens. Default 1."""
    resize: str | None = None
    """How pictures are put at the size of the job: "stretch" (the default), "cover" (cut), "contain" (with edges),
    "none" (they have to have it)."""
    allow_urls: bool = False
    """Fetch pictures that are links."""

    def _pictures(self, spec: ModelSpec, notes: list[str]) -> Brought | None:
        """Read every picture, or None where none was sent. Raises InvalidRequest."""
        self._check_types()
        if not any(self._sent(one.name) for one in fields(PictureFields) if one.name != "allow_urls"):
            _check_complete(spec, Brought())
            return None
        self._check_fit(spec)
        image, mask = self._image_and_mask(spec, notes)
        begins = image is not None and mask is None and spec.reads != "reference"
        default = IMG2IMG_STRENGTH if begins else 1.0
        strength = default if self.strength is None else number("strength", self.strength, 0, 1)
        told = self.image_prompt_strength
        how = "stretch" if self.resize is None else self.resize
        brought = Brought(
            image=None if spec.reads == "reference" else image,
            reference=image if spec.reads == "reference" else None,
            mask=mask,
            strength=strength,
            paste_back=mask is not None and self.paste_back is not False,
            controls=tuple(read_controls(self.control, spec, urls=self.allow_urls)),
            prompts=tuple(self._prompts()),
            prompt_strength=1.0 if told is None else number("image_prompt_strength", told, 0, MAX_SCALE),
            resize="none" if self.outpaint is not None else how,  # a canvas is of the job's size already
            resize_controls=how,
        )
        _check_complete(spec, brought)
        return brought

    def _sent(self, name: str) -> bool:
        value = getattr(self, name)
        none = name in ("control", "image_prompt") and isinstance(value, (tuple, list)) and not value
        return value is not None and not none

    def _check_types(self) -> None:
        for name, value in (("paste_back", self.paste_back), ("allow_urls", self.allow_urls)):
            if not isinstance(value, bool) and (name != "paste_back" or value is not None):
                raise InvalidRequest(f"{name} is a {type(value).__name__}, not True or False", field=name)
        if self.resize is None:
            return
        from flux_engine.pictures import RESIZES

        if not isinstance(self.resize, str) or self.resize not in RESIZES:
            said = repr(self.resize)[:40] if isinstance(self.resize, str) else f"(a {type(self.resize).__name__})"
            raise InvalidRequest(f"resize {said} is not one of {', '.join(RESIZES)}", field="resize")

    def _check_fit(self, spec: ModelSpec) -> None:
        """Whether what was sent goes together, and with the model."""
        for name in ("mask", "strength", "outpaint"):
            if self._sent(name) and not self._sent("image"):
                raise InvalidRequest(f"{name} without image: say which picture", field=name)
            if self._sent(name) and spec.reads == "reference":
                raise InvalidRequest(f"{name}: {spec.name} changes the whole picture as the prompt says", field=name)
        if self._sent("paste_back") and not (self._sent("mask") or self._sent("outpaint") or self._sent("image")):
            raise InvalidRequest("paste_back without image: there is nothing to keep", field="paste_back")
        if self._sent("mask") and self._sent("outpaint"):
            raise InvalidRequest("mask and outpaint exclude each other: outpaint makes its own mask", field="mask")
        if self._sent("image_prompt_strength") and not self._sent("image_prompt"):
            raise InvalidRequest("image_prompt_strength without image_prompt", field="image_prompt_strength")
        if self._sent("image_prompt") and not (isinstance(spec, FluxSpec) and spec.image_prompts):
            how = f"load({spec.name!r}, redux=...)" if isinstance(spec, FluxSpec) else "only FLUX.1 can"
            raise InvalidRequest(f"image_prompt: {spec.name} reads no pictures as prompts; {how}", field="image_prompt")

    def _image_and_mask(self, spec: ModelSpec, notes: list[str]) -> tuple[Image | None, Image | None]:
        """RGB and L, of one size."""
        from flux_engine import pictures

        if self.image is None:
            return None, None
        image = pictures.read_picture(self.image, "image", urls=self.allow_urls)
        if self.outpaint is not None:
            from flux_engine.inputs.room import with_room

            return with_room(pictures.flatten(image), self.outpaint, spec.sizes, notes)
        mask = None
        if self.mask is not None:
            mask = pictures.read_mask(self.mask, "mask", urls=self.allow_urls)
            if mask.size != image.size:
                notes.append(
                    f"mask {mask.size[0]}x{mask.size[1]} scaled to the picture's {image.size[0]}x{image.size[1]}"
                )
                mask = pictures.fit(mask, image.size, "stretch")
            if pictures.extremes(mask)[1] <= 1:
                notes.append("mask is black everywhere, of 255 at most 1, and black is kept: nothing is repainted")
        elif spec.reads != "reference" and (mask := pictures.alpha_mask(image)) is not None:
            notes.append("the transparent part of image is repainted: its alpha is the mask")
            return image.convert("RGB"), mask
        return pictures.flatten(image), mask

    def _prompts(self) -> list[Image]:
        from flux_engine import pictures

        if self.image_prompt is None:
            return []
        several = self.image_prompt if isinstance(self.image_prompt, (tuple, list)) else [self.image_prompt]
        read = (pictures.read_picture(one, "image_prompt", urls=self.allow_urls) for one in several)
        return [pictures.flatten(one) for one in read]


def _check_complete(spec: ModelSpec, brought: Brought) -> None:
    """Whether the model gets what it cannot do without."""
    if spec.reads == "fill" and (brought.image is None or brought.mask is None):
        lacking = "image" if brought.image is None else "mask"
        raise InvalidRequest(
            f"{spec.name} fills holes: give image, and mask or outpaint; {lacking} is missing", field=lacking
        )
    if spec.reads == "structure" and spec.structure not in [one.kind for one in brought.controls]:
        raise InvalidRequest(
            f"{spec.name} reads a control picture: give control=[Control(kind={spec.structure!r}, image=...)]",
            field="control",
        )
    if spec.reads == "reference" and brought.reference is None:
        raise InvalidRequest(f"{spec.name} changes a picture: give image", field="image")
