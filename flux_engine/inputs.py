"""The pictures that a request brings: read and checked against the model, then put at the size of the job.

What they mean:

    image            where to start from (img2img); with a mask what is kept; for FLUX.1 Kontext what to change
    mask             white is repainted, black is kept
    outpaint         room around the picture, which is repainted
    control          pictures that say where things are: of ControlNets, or of FLUX.1 Canny and Depth
    image_prompt     pictures that say what to draw (FLUX.1 Redux)

Everything here is PIL's, and nothing needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from flux_engine.checks import integer, number
from flux_engine.errors import InvalidRequest, did_you_mean
from flux_engine.specs import MATCH_INPUT, FluxSpec, ModelSpec, SizeTable

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]
"""(width, height)."""

IMG2IMG_STRENGTH = 0.8
MAX_SCALE = 10.0
OVERLAP = 8
"""Pixels of the picture, along each side with room, that are repainted too, so that the room goes on from it."""
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
class Brought:
    """What a request brought, read but not at any size yet."""

    image: Image | None = None
    mask: Image | None = None
    strength: float = 1.0
    paste_back: bool = False
    reference: Image | None = None
    controls: tuple[ControlInput, ...] = ()
    prompts: tuple[Image, ...] = ()
    prompt_strength: float = 1.0
    resize: str = "stretch"

    @property
    def leading(self) -> Image | None:
        """The picture whose size the job follows, if it says none itself."""
        first = self.controls[0].image if self.controls else None
        return self.image or self.reference or first

    def at(self, size: Size, spec: ModelSpec, notes: list[str]) -> Inputs:
        """Put at the size of the job. Raises InvalidRequest if nothing may be scaled and a size differs."""
        from flux_engine import pictures

        def fit(image: Image, name: str) -> Image:
            wide, high = image.size[0] / size[0], image.size[1] / size[1]
            if self.resize == "stretch" and max(wide, high) / min(wide, high) > 1.05:
                notes.append(
                    f"{name} {image.size[0]}x{image.size[1]} stretched to {size[0]}x{size[1]}; resize='cover' cuts it, "
                    "'contain' puts edges round it"
                )
            return pictures.fit(image, size, self.resize, field="resize" if self.resize == "none" else name)

        reference = self.reference
        if reference is not None:
            sizes = [_divided(one, spec.sizes) for one in pictures.KONTEXT_SIZES]
            reference = pictures.fit(reference, pictures.nearest_aspect(reference.size, sizes), "stretch")
        return Inputs(
            image=None if self.image is None else fit(self.image, "image"),
            mask=None if self.mask is None else pictures.fit(self.mask, size, self.resize),
            strength=self.strength,
            paste_back=self.paste_back,
            reference=reference,
            controls=tuple(replace(one, image=fit(one.image, f"control {one.kind}")) for one in self.controls),
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
    """How much of the picture is given up: 1 draws anew, 0 changes nothing. Default 0.8, and 1 with a mask."""
    outpaint: Sequence[int] | None = None
    """Room to paint around the picture: pixels (left, top, right, bottom), or (width, height) to come to."""
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
        if not any(self._sent(one.name) for one in fields(PictureFields) if one.name != "allow_urls"):
            _check_complete(spec, Brought())
            return None
        self._check_fit(spec)
        from flux_engine import pictures

        how = "stretch" if self.resize is None else self.resize
        if how not in pictures.RESIZES:
            raise InvalidRequest(f"resize {how!r} is not one of {', '.join(pictures.RESIZES)}", field="resize")
        for name in ("paste_back", "allow_urls"):
            if getattr(self, name) not in (None, True, False):
                raise InvalidRequest(f"{name} {getattr(self, name)!r} is neither True nor False", field=name)
        image, mask = self._image_and_mask(spec, notes)
        begins = image is not None and mask is None and spec.reads != "reference"
        default = IMG2IMG_STRENGTH if begins else 1.0
        strength = default if self.strength is None else number("strength", self.strength, 0, 1)
        told = self.image_prompt_strength
        brought = Brought(
            image=None if spec.reads == "reference" else image,
            reference=image if spec.reads == "reference" else None,
            mask=mask,
            strength=strength,
            paste_back=mask is not None and self.paste_back is not False,
            controls=tuple(self._controls(spec)),
            prompts=tuple(self._prompts()),
            prompt_strength=1.0 if told is None else number("image_prompt_strength", told, 0, MAX_SCALE),
            resize=how,
        )
        _check_complete(spec, brought)
        return brought

    def _sent(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and not (isinstance(value, (tuple, list)) and not value)

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
            return self._with_room(pictures.flatten(image), spec)
        mask = None
        if self.mask is not None:
            mask = pictures.read_mask(self.mask, "mask", urls=self.allow_urls)
            if mask.size != image.size:
                notes.append(
                    f"mask {mask.size[0]}x{mask.size[1]} scaled to the picture's {image.size[0]}x{image.size[1]}"
                )
                mask = pictures.fit(mask, image.size, "stretch")
        elif spec.reads != "reference" and (mask := pictures.alpha_mask(image)) is not None:
            notes.append("the transparent part of image is repainted: its alpha is the mask")
            return image.convert("RGB"), mask
        return pictures.flatten(image), mask

    def _with_room(self, image: Image, spec: ModelSpec) -> tuple[Image, Image]:
        """The picture with room around it, and the room's mask."""
        from PIL import Image as pil

        room = self.outpaint
        if not isinstance(room, (tuple, list)) or len(room) not in (2, 4):
            raise InvalidRequest(
                f"outpaint {room!r} is neither (left, top, right, bottom) nor (width, height)", field="outpaint"
            )
        limit, multiple = spec.sizes.max_side, spec.sizes.multiple
        sides = [integer("outpaint", side, 0, 16 * limit) for side in room]
        if len(sides) == 2:
            extra = [sides[0] - image.size[0], sides[1] - image.size[1]]
            if min(extra) < 0:
                raise InvalidRequest(
                    f"outpaint to {sides[0]}x{sides[1]}: the picture is larger, {image.size[0]}x{image.size[1]}",
                    field="outpaint",
                )
            sides = [extra[0] // 2, extra[1] // 2, extra[0] - extra[0] // 2, extra[1] - extra[1] // 2]
        if not any(sides):
            raise InvalidRequest(f"outpaint {tuple(room)} leaves no room to paint", field="outpaint")
        left, top, right, bottom = sides
        width, height = image.size[0] + left + right, image.size[1] + top + bottom
        shrink = min(1.0, (spec.sizes.follow_limit // spec.sizes.divisor) / max(width, height))
        if shrink < 1:
            image = image.resize((max(1, round(image.size[0] * shrink)), max(1, round(image.size[1] * shrink))))
            left, top, width, height = (round(side * shrink) for side in (left, top, width, height))
        # Room to the grid goes where there is room already: the picture itself is not stretched.
        wanted = max(width, image.size[0]), max(height, image.size[1])
        more = [-(-side // multiple) * multiple for side in wanted]
        if not right and left:
            left = more[0] - image.size[0]
        if not bottom and top:
            top = more[1] - image.size[1]
        canvas = pil.new("RGB", (more[0], more[1]), (127, 127, 127))
        canvas.paste(image, (left, top))
        mask = pil.new("L", canvas.size, 255)
        box = [left, top, left + image.size[0], top + image.size[1]]
        inner = [
            box[0] + (OVERLAP if box[0] > 0 else 0),
            box[1] + (OVERLAP if box[1] > 0 else 0),
            box[2] - (OVERLAP if box[2] < canvas.size[0] else 0),
            box[3] - (OVERLAP if box[3] < canvas.size[1] else 0),
        ]
        if inner[0] < inner[2] and inner[1] < inner[3]:
            mask.paste(0, (inner[0], inner[1], inner[2], inner[3]))
        return canvas, mask

    def _controls(self, spec: ModelSpec) -> list[ControlInput]:
        from flux_engine import pictures

        sent = [self.control] if isinstance(self.control, (Control, Mapping)) else self.control
        if not isinstance(sent, Sequence) or isinstance(sent, (str, bytes)):
            raise InvalidRequest(f"control {sent!r} is no list of Control(kind=..., image=...)", field="control")
        found: list[ControlInput] = []
        for one in sent:
            control = _as_control(one)
            if control.kind not in spec.controls:
                near = did_you_mean(str(control.kind), spec.controls) if spec.controls else "."
                known = (
                    f"Known: {', '.join(spec.controls)}" if spec.controls else "load(..., controlnets=...)"
                )
                raise InvalidRequest(f"{spec.name} has no control {control.kind!r}{near} {known}", field="control")
            own = spec.reads == "structure" and control.kind == spec.structure
            if own and (control.scale, control.start, control.end) != (1.0, 0.0, 1.0):
                whole = (
                    f"control {control.kind}: {spec.name} always reads it whole; leave out scale, start and end"
                )
                raise InvalidRequest(whole, field="control")
            start, end = (number(f"control's {name}", getattr(control, name), 0, 1) for name in ("start", "end"))
            if start > end:
                raise InvalidRequest(f"control {control.kind}: start {start:g} is after end {end:g}", field="control")
            preprocessor, options = _preprocessor(control, own=own)
            found.append(
                ControlInput(
                    kind=control.kind,
                    image=pictures.flatten(pictures.read_picture(control.image, "control", urls=self.allow_urls)),
                    preprocessor=preprocessor,
                    options=options,
                    scale=number("control's scale", control.scale, 0, MAX_SCALE),
                    start=start,
                    end=end,
                )
            )
        return found

    def _prompts(self) -> list[Image]:
        from flux_engine import pictures

        if self.image_prompt is None:
            return []
        several = self.image_prompt if isinstance(self.image_prompt, (tuple, list)) else [self.image_prompt]
        read = (pictures.read_picture(one, "image_prompt", urls=self.allow_urls) for one in several)
        return [pictures.flatten(one) for one in read]


def _as_control(one: Any) -> Control:
    known = [f.name for f in fields(Control)]
    if isinstance(one, Control):
        return one
    if not isinstance(one, Mapping) or not {"kind", "image"} <= one.keys() <= set(known):
        raise InvalidRequest(
            f"a control is a Control, or has kind and image, and may have {', '.join(known[2:])}; not {one!r:.80}",
            field="control",
        )
    return Control(**{str(key): value for key, value in one.items()})


def _preprocessor(control: Control, *, own: bool) -> tuple[str | None, Mapping[str, Any]]:
    """What makes the control picture, and how. Raises InvalidRequest for one that is not known."""
    from flux_engine.preprocess import PREPROCESSORS as KNOWN

    if control.preprocess is False:
        return None, {}
    asked = PREPROCESSORS.get(control.kind, control.kind) if control.preprocess is True else control.preprocess
    if asked not in KNOWN:
        raise InvalidRequest(
            f"no preprocessor {asked!r}{did_you_mean(str(asked), KNOWN)} Known: {', '.join(KNOWN)}; preprocess=False "
            "takes the picture as it is",
            field="control",
        )
    options = control.options or (CANNY_OF_FLUX if own and asked == "canny" else {})
    return asked, options


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


def following(picture: Size, sizes: SizeTable, megapixels: str | None) -> Size:
    """The size of a job that follows a picture's. `megapixels` is one of the table's, or "match_input".

    Raises InvalidRequest for a picture of a shape that the model cannot draw.
    """
    from flux_engine import pictures

    limit = sizes.follow_limit // sizes.divisor
    if megapixels is None and sizes.follow == "preferred":
        return pictures.nearest_aspect(picture, [_divided(one, sizes) for one in pictures.KONTEXT_SIZES])
    if megapixels == MATCH_INPUT:
        size = pictures.within(picture, limit, 2 * sizes.multiple, floor=True)
    elif megapixels is not None or sizes.follow == "area":
        megapixels = sizes.classes[0] if megapixels is None else megapixels
        sizes.named("1:1", megapixels)  # refuses what is not in the table
        pixels = int(float(megapixels) * 1024 * 1024) // sizes.divisor**2
        size = pictures.of_area(picture, pixels, 2 * sizes.multiple)
    else:
        size = pictures.within(picture, limit, sizes.multiple)
    short = min(size)
    if short < sizes.min_side:
        multiple, grown = sizes.multiple, sizes.min_side / min(picture)
        size = tuple(max(sizes.min_side, round(side * grown / multiple) * multiple) for side in picture)
    if max(size) > sizes.max_side:
        raise InvalidRequest(
            f"a picture of {picture[0]}x{picture[1]} is too narrow: at {size[0]}x{size[1]} a side is over "
            f"{sizes.max_side}; cut it, or give width and height",
            field="image",
        )
    return size[0], size[1]


def _divided(size: Size, sizes: SizeTable) -> Size:
    """A published size as a small model has it."""
    width, height = (int(side / sizes.divisor / sizes.multiple + 0.5) * sizes.multiple for side in size)
    return width, height
