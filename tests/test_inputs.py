"""The pictures of a request: the sizes that follow them, how they are put there, and what is refused."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import latent_error
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from flux_engine import Control, InvalidRequest, Request, RequestCancelled
from flux_engine.engine import Engine
from flux_engine.inputs.room import OVERLAP
from flux_engine.request import Job
from flux_engine.specs import (
    DEMO_DEV,
    FLUX_CANNY,
    FLUX_DEV,
    FLUX_FILL,
    FLUX_KONTEXT,
    SDXL,
    ControlNetSpec,
    ModelSpec,
)

FOLLOWS = replace(
    DEMO_DEV, controlnets=(ControlNetSpec(name="edges", kinds={"canny": None}),), image_prompts=True, name="all"
)
"""Takes everything a request may bring."""
RED, GREY = (255, 0, 0), (127, 127, 127)


def plain(*size: int, color: Any = RED) -> Image.Image:
    return Image.new("RGB", size, color)


def halves(*size: int) -> Image.Image:
    """Red left, blue right."""
    image = plain(*size)
    image.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return image


def hole(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def job(spec: ModelSpec, **asked: Any) -> Job:
    return Request(prompt="x", **asked).resolve(spec)


def size_of(spec: ModelSpec, **asked: Any) -> tuple[int, int]:
    done = job(spec, **asked)
    return done.width, done.height


def refused(spec: ModelSpec, **asked: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        job(spec, **asked)
    return caught.value


# Sizes that follow a picture


@pytest.mark.parametrize(
    ("sent", "size"),
    [
        ((3000, 2000), (1440, 960)),
        ((1500, 1000), (1440, 960)),
        ((2000, 3000), (960, 1440)),
        ((1024, 768), (1024, 768)),
        ((1000, 700), (992, 704)),
        ((769, 1080), (768, 1088)),
        ((20, 20), (128, 128)),
        ((60, 40), (192, 128)),
    ],
)
def test_flux_scales_down_to_1440_and_rounds_to_16(sent: tuple[int, int], size: tuple[int, int]) -> None:
    assert size_of(FLUX_DEV, image=plain(*sent)) == size


@pytest.mark.parametrize(
    ("megapixels", "size"),
    [(None, (1248, 832)), ("1", (1248, 832)), (0.25, (608, 416)), ("match_input", (1440, 960))],
)
def test_fill_takes_an_area_and_rounds_down_to_32(megapixels: Any, size: tuple[int, int]) -> None:
    asked = {"image": plain(3000, 2000), "mask": Image.new("L", (3000, 2000), 255), "megapixels": megapixels}
    assert size_of(FLUX_FILL, **asked) == size


def test_a_control_picture_gives_the_size_where_nothing_else_does() -> None:
    edges = Control(kind="canny", image=plain(1600, 900), preprocess=False)
    assert size_of(FLUX_CANNY, control=edges) == (1344, 768)
    assert size_of(FLUX_CANNY, control=edges, megapixels="match_input") == (1440, 800)
    assert size_of(FLUX_CANNY, control=edges, aspect_ratio="1:1") == (1024, 1024)
    assert size_of(FLUX_CANNY, control=edges, width=512, height=768) == (512, 768)


@pytest.mark.parametrize(
    ("sent", "size"),
    [((1500, 1000), (1248, 832)), ((64, 64), (1024, 1024)), ((1920, 1080), (1392, 752)), ((100, 1000), (672, 1568))],
)
def test_kontext_draws_and_reads_the_trained_size_of_the_nearest_shape(
    sent: tuple[int, int], size: tuple[int, int]
) -> None:
    done = job(FLUX_KONTEXT, image=plain(*sent))
    assert (done.width, done.height) == size
    assert done.inputs.reference is not None
    assert done.inputs.reference.size == size
    other = job(FLUX_KONTEXT, image=plain(*sent), aspect_ratio="1:1")
    assert (other.width, other.height) == (1024, 1024)
    assert other.inputs.reference is not None
    assert other.inputs.reference.size == size
    assert done.inputs.image is None


@pytest.mark.parametrize(
    ("sent", "size"),
    [((1536, 1024), (1536, 1024)), ((1000, 700), (1000, 704)), ((4096, 2048), (2048, 1024)), ((50, 100), (128, 256))],
)
def test_sdxl_keeps_a_size_and_rounds_to_8(sent: tuple[int, int], size: tuple[int, int]) -> None:
    assert size_of(SDXL, image=plain(*sent)) == size


@pytest.mark.parametrize("spec", [FLUX_DEV, FLUX_FILL, FLUX_CANNY, SDXL, DEMO_DEV], ids=lambda spec: spec.name)
@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
@example(width=127, height=129)
@example(width=1, height=16)
def test_every_size_that_follows_is_one_the_model_draws(spec: ModelSpec, width: int, height: int) -> None:
    from flux_engine.inputs.following import following

    sizes = spec.sizes
    for megapixels in (None, "1", "match_input"):
        try:
            size = following((width, height), sizes, megapixels)
        except InvalidRequest as error:
            by_area = megapixels == "1" or (megapixels is None and sizes.follow == "area")
            most = (sizes.max_side * sizes.divisor / 1024) ** 2 if by_area else sizes.max_side / sizes.min_side
            assert error.field == "image"
            assert max(width, height) / min(width, height) > most * 0.9
            continue
        assert all(side % sizes.multiple == 0 and sizes.min_side <= side <= sizes.max_side for side in size)
        if max(width, height) <= sizes.min_side:  # scaled up, and each side to a multiple only
            grown = size[0] / width, size[1] / height
            assert max(grown) / min(grown) <= 1 + 2 * sizes.multiple / sizes.min_side


@pytest.mark.parametrize("spec", [FLUX_DEV, SDXL], ids=lambda spec: spec.name)
def test_tiny_pictures_are_scaled_up_to_what_is_drawn(spec: ModelSpec) -> None:
    for sent in ((1, 1), (10, 15), (127, 127), (40, 100), (100, 40)):
        size = size_of(spec, image=plain(*sent))
        assert min(size) == spec.sizes.min_side
        grown = spec.sizes.min_side / min(sent)
        assert all(abs(side - there * grown) <= spec.sizes.multiple / 2 for side, there in zip(size, sent, strict=True))


def test_too_narrow_a_picture_is_refused() -> None:
    for sent in ((2000, 20), (20, 2000), (1, 100)):
        error = refused(FLUX_DEV, image=plain(*sent))
        assert error.field == "image"
        assert "too narrow" in str(error)
    assert size_of(FLUX_DEV, image=plain(2000, 20), width=1024, height=128) == (1024, 128)


def test_megapixels_and_aspect_ratio_beside_a_picture() -> None:
    image = plain(1500, 1000)
    assert size_of(FLUX_DEV, image=image, megapixels="1") == (1248, 832)
    assert size_of(FLUX_DEV, image=image, megapixels=0.25) == (608, 416)
    assert size_of(FLUX_DEV, image=image, megapixels="match_input") == (1440, 960)
    assert size_of(FLUX_DEV, image=image, aspect_ratio="match_input_image") == (1440, 960)
    assert size_of(FLUX_DEV, image=image, aspect_ratio="16:9") == (1344, 768)
    assert size_of(FLUX_DEV, image=image, aspect_ratio="16:9", megapixels="0.25") == (672, 384)
    assert refused(FLUX_DEV, image=image, megapixels="2").field == "megapixels"
    assert refused(FLUX_DEV, image=image, aspect_ratio="7:5").field == "aspect_ratio"
    assert refused(FLUX_DEV, image=image, width=512).field == "height"


# Bringing a picture to a size


def test_stretch_says_so_where_it_shows() -> None:
    done = job(FLUX_DEV, image=halves(300, 100), width=256, height=256)
    assert done.inputs.image is not None
    assert done.inputs.image.size == (256, 256)
    assert any("stretched to 256x256" in note for note in done.notes)
    assert job(FLUX_DEV, image=halves(260, 256), width=256, height=256).notes == ()
    assert refused(FLUX_DEV, image=halves(300, 100), width=256, height=256, strict=True)


def test_cover_cuts_both_sides_alike_and_the_mask_with_them() -> None:
    mask = hole((400, 200), (100, 0, 150, 200))
    done = job(FLUX_DEV, image=halves(400, 200), mask=mask, width=256, height=256, resize="cover")
    image, holes = np.asarray(done.inputs.image), np.asarray(done.inputs.mask)
    assert tuple(image[128, 120]) == RED
    assert tuple(image[128, 136]) == (0, 0, 255)
    assert holes[128, 1:60].min() == 255  # 100 of 400 is the left edge now
    assert holes[128, 70:].max() == 0
    assert done.notes == ()


def test_contain_shows_all_of_it_and_repaints_no_edge() -> None:
    mask = Image.new("L", (400, 200), 255)
    done = job(FLUX_DEV, image=halves(400, 200), mask=mask, width=256, height=256, resize="contain")
    image, holes = np.asarray(done.inputs.image), np.asarray(done.inputs.mask)
    assert tuple(image[20, 128]) == (255, 255, 255) == tuple(image[-20, 128])
    assert tuple(image[128, 10]) == RED
    assert holes[:63].max() == 0
    assert holes[65:191].min() == 255


def test_none_takes_the_size_as_it_is_or_not_at_all() -> None:
    done = job(FLUX_DEV, image=halves(1024, 768), resize="none")
    assert (done.width, done.height) == (1024, 768)
    assert np.array_equal(np.asarray(done.inputs.image), np.asarray(halves(1024, 768)))
    assert size_of(FLUX_DEV, image=halves(1600, 1024), resize="none") == (
        1600,
        1024,
    )  # over 1440, which only scaling is
    for sent in ((1000, 768), (1024, 700)):
        error = refused(FLUX_DEV, image=halves(*sent), resize="none")
        assert error.field == "resize"
        assert f"image is {sent[0]}x{sent[1]}" in str(error)
    error = refused(FLUX_DEV, image=halves(1024, 768), resize="none", width=512, height=512)
    assert error.field == "resize"
    assert size_of(FLUX_DEV, image=halves(512, 512), resize="none", width=512, height=512) == (512, 512)
    edges = Control(kind="canny", image=plain(256, 256), preprocess=False)
    assert refused(FOLLOWS, image=halves(128, 128), control=edges, resize="none").field == "resize"


# Masks


def test_transparency_is_the_mask_and_said() -> None:
    image = halves(256, 256).convert("RGBA")
    image.putalpha(Image.eval(hole((256, 256), (0, 0, 100, 256)), lambda value: 255 - value))
    done = job(FLUX_DEV, image=image)
    assert np.array_equal(np.asarray(done.inputs.mask), np.asarray(hole((256, 256), (0, 0, 100, 256))))
    assert done.inputs.image is not None
    assert done.inputs.image.mode == "RGB"
    assert (done.inputs.strength, done.inputs.paste_back) == (1.0, True)
    assert any("alpha" in note for note in done.notes)
    assert job(FLUX_FILL, image=image).inputs.mask is not None
    assert "strict" in str(refused(FLUX_DEV, image=image, strict=True))
    told = job(FLUX_DEV, image=image, mask=Image.new("L", (256, 256), 0))
    assert told.inputs.mask is not None
    assert told.inputs.mask.getextrema() == (0, 0)
    assert [note.split(",")[0] for note in told.notes] == ["mask is black everywhere"]


def test_a_mask_of_another_size_is_scaled_and_said() -> None:
    done = job(FLUX_DEV, image=plain(512, 256), mask=hole((128, 64), (64, 0, 128, 64)))
    holes = np.asarray(done.inputs.mask)
    assert holes.shape == (256, 512)
    assert holes[:, :250].max() == 0
    assert holes[:, 262:].min() == 255
    assert done.notes == ("mask 128x64 scaled to the picture's 512x256",)
    assert "mask 128x64" in str(refused(FLUX_DEV, image=plain(512, 256), mask=plain(128, 64), strict=True))


def test_a_soft_mask_stays_soft() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    for mask in (ramp, Image.fromarray(ramp), ramp.astype(np.float32) / 255, torch.from_numpy(ramp.copy())):
        assert np.array_equal(np.asarray(job(FLUX_DEV, image=plain(256, 256), mask=mask).inputs.mask), ramp)


# Outpainting


def noise(width: int, height: int) -> Image.Image:
    """A picture of which no two rows or columns are alike."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def placed(image: Image.Image) -> tuple[int, int, int, int]:
    """Where a picture of noise lies on its canvas, where room repeats its edges."""
    pixels = np.asarray(image).astype(int)
    rows = np.flatnonzero(np.diff(pixels, axis=0).any(axis=(1, 2)))
    columns = np.flatnonzero(np.diff(pixels, axis=1).any(axis=(0, 2)))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 2, int(rows[-1]) + 2


def check_room(spec: ModelSpec, size: tuple[int, int], room: tuple[int, ...]) -> tuple[Job, tuple[int, int, int, int]]:
    """What holds of every outpainting."""
    sent = noise(*size)
    done = job(spec, image=sent, outpaint=room)
    image, mask = done.inputs.image, done.inputs.mask
    assert image is not None
    assert mask is not None
    whole = done.width, done.height
    assert image.size == mask.size == whole
    assert all(s % spec.sizes.multiple == 0 and spec.sizes.min_side <= s <= spec.sizes.max_side for s in whole)
    box = placed(image)
    width, height = box[2] - box[0], box[3] - box[1]
    if size[0] >= size[1]:
        assert abs(height - width * size[1] / size[0]) <= 1
    else:
        assert abs(width - height * size[0] / size[1]) <= 1
    scaled = sent if (width, height) == size else sent.resize((width, height), Image.Resampling.LANCZOS)
    around = ((box[1], whole[1] - box[3]), (box[0], whole[0] - box[2]), (0, 0))
    assert np.array_equal(np.asarray(image), np.pad(np.asarray(scaled), around, mode="edge"))
    bare = box[0], box[1], whole[0] - box[2], whole[1] - box[3]
    kept = [
        edge + (OVERLAP if margin else 0) * sign for edge, margin, sign in zip(box, bare, (1, 1, -1, -1), strict=True)
    ]
    expected = np.full(whole[::-1], 255, np.uint8)
    if kept[0] < kept[2] and kept[1] < kept[3]:
        expected[kept[1] : kept[3], kept[0] : kept[2]] = 0
    assert np.array_equal(np.asarray(mask), expected)
    return done, bare


@pytest.mark.parametrize("spec", [FLUX_DEV, FLUX_FILL, SDXL], ids=lambda spec: spec.name)
@pytest.mark.parametrize("side", range(4))
def test_room_on_one_side(spec: ModelSpec, side: int) -> None:
    room = tuple(64 if number == side else 0 for number in range(4))
    _, bare = check_room(spec, (512, 256), room)
    assert bare == room


def test_room_on_all_sides_and_to_a_size() -> None:
    done, bare = check_room(FLUX_DEV, (512, 256), (32, 48, 96, 16))
    assert bare == (32, 48, 96, 16)
    assert (done.width, done.height) == (640, 320)
    done, bare = check_room(FLUX_DEV, (512, 256), (640, 512))
    assert (done.width, done.height) == (640, 512)
    assert bare == (64, 128, 64, 128)
    _, bare = check_room(FLUX_DEV, (512, 255), (512, 512))
    assert bare == (0, 128, 0, 129)
    assert (done.inputs.strength, done.inputs.paste_back) == (1.0, True)


def test_room_off_the_grid_goes_where_there_is_room() -> None:
    _, bare = check_room(FLUX_DEV, (500, 300), (0, 0, 10, 0))
    assert bare == (0, 0, 12, 4)  # nothing was asked for above or below: 300 is no multiple of 16
    _, bare = check_room(FLUX_DEV, (500, 304), (10, 0, 0, 0))
    assert bare == (12, 0, 0, 0)
    _, bare = check_room(FLUX_DEV, (40, 40), (0, 8, 0, 0))
    assert bare == (0, 88, 88, 0)  # 128 is the least that is drawn


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (2043, 2043), (1999, 7), (4086, 100)])
def test_a_picture_larger_than_the_model_draws_is_scaled_down_with_its_room(size: tuple[int, int]) -> None:
    for room in ((size[0] // 2, 0, size[0] // 2, 0), (3, 0, 7, 0)):
        done, bare = check_room(FLUX_DEV, size, room)
        assert max(done.width, done.height) <= FLUX_DEV.sizes.max_side
        assert bare[0] > 0
        assert bare[2] > 0


@settings(max_examples=120, deadline=None)
@given(
    size=st.tuples(st.integers(8, 700), st.integers(8, 700)),  # of fewer pixels, scaled down, none are left to find
    room=st.tuples(*[st.integers(0, 300)] * 4).filter(any),
    spec=st.sampled_from([DEMO_DEV, SDXL, FLUX_FILL]),
)
@example(size=(511, 3), room=(1, 0, 1, 1), spec=DEMO_DEV)
@example(size=(511, 511), room=(1, 1, 1, 1), spec=DEMO_DEV)
@example(size=(8, 8), room=(1, 0, 0, 0), spec=SDXL)
def test_every_canvas_is_one_the_model_draws(
    size: tuple[int, int], room: tuple[int, int, int, int], spec: ModelSpec
) -> None:
    done, bare = check_room(spec, size, room)
    shrunk = min(1.0, spec.sizes.max_side / max(size[0] + room[0] + room[2], size[1] + room[1] + room[3]))
    assert all(there >= asked * shrunk - 1 for there, asked in zip(bare, room, strict=True))
    if shrunk == 1:
        assert (done.width - bare[0] - bare[2], done.height - bare[1] - bare[3]) == size


def test_what_outpainting_draws_otherwise_than_asked_for_is_said() -> None:
    assert job(DEMO_DEV, image=plain(256, 256), outpaint=(0, 0, 64, 0)).notes == ()
    (note,) = job(DEMO_DEV, image=plain(256, 256), outpaint=(0, 0, 37, 0)).notes
    assert note == "outpaint to 293x256 enlarged to 304x256, which the model draws"
    (note,) = job(DEMO_DEV, image=plain(256, 256), outpaint=(0, 0, 5000, 0)).notes
    assert note == "image 256x256 scaled to 24x24: with its room it is 5256x256, larger than the model draws"
    assert "enlarged" in str(refused(DEMO_DEV, image=plain(256, 256), outpaint=(0, 0, 37, 0), strict=True))


def test_a_mask_that_repaints_nothing_is_said() -> None:
    for mask in (plain(64, 64, color=(0, 0, 0)), np.ones((64, 64), np.uint8)):
        (note,) = job(DEMO_DEV, image=plain(64, 64), mask=mask).notes
        assert note.startswith("mask is black everywhere")


def test_outpaint_says_the_size_and_makes_the_mask() -> None:
    asked: dict[str, Any] = {"image": plain(256, 256), "outpaint": (64, 0, 0, 0)}
    for more, field in (
        ({"width": 512, "height": 512}, "width"),
        ({"aspect_ratio": "1:1"}, "aspect_ratio"),
        ({"megapixels": "1"}, "megapixels"),
        ({"mask": plain(256, 256)}, "mask"),
        ({"outpaint": (200, 300)}, "outpaint"),
        ({"outpaint": (256, 256)}, "outpaint"),
        ({"outpaint": (10**6, 0, 0, 0)}, "outpaint"),
    ):
        assert refused(FLUX_DEV, **(asked | more)).field == field
    edges = Control(kind="canny", image=plain(256, 256), preprocess=False)
    done = job(FOLLOWS, **asked, control=edges)
    assert done.inputs.controls[0].image.size == (done.width, done.height) == (320, 256)


# Attacks


def test_nothing_of_this_needs_torch() -> None:
    code = """if True:
        import sys
        from PIL import Image
        from dataclasses import replace
        from flux_engine import Control, Request
        from flux_engine.specs import DEMO_DEV, FLUX_KONTEXT, ControlNetSpec
        spec = replace(DEMO_DEV, controlnets=(ControlNetSpec(name="c", kinds={"canny": None}),), image_prompts=True)
        image = Image.new("RGB", (300, 200), "red")
        control = Control(kind="canny", image=image)
        Request(prompt="", image=image, mask=image, strength=0.5, control=control, image_prompt=image).resolve(spec)
        Request(prompt="", image=image, outpaint=(8, 8, 8, 8)).resolve(spec)
        Request(prompt="", image=image).resolve(FLUX_KONTEXT)
        print([name for name in ("torch", "transformers", "diffusers") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def pictures_one_by_one() -> Iterator[Image.Image]:
    yield plain(64, 64)


IMAGE = plain(128, 96)
NOT_NUMBERS: list[Any] = ["0.5", b"0.5", True, [0.5], {"a": 1}, object(), math.nan, math.inf, -0.1, 10**30, 1j]
NOT_PICTURES: list[Any] = [
    3, 0.5, math.nan, True, {}, {"a": 1}, [], (), [[]], [[[IMAGE]]], "", " ", "\0", "nothing.png", "data:", "data:,",
    "x" * 5000, b"", b"GIF89a", object(), object, print, set(), 10**5000, pictures_one_by_one(), io.StringIO("x"),
    io.BytesIO(b""), np.zeros((0, 4)), np.zeros(4), np.zeros((2, 2, 7)), np.full((8, 8), np.nan), np.array(["a"]),
    Image.Image(), Image.new("RGB", (0, 5)), "https://example.com/a.png", "file:///etc/passwd", "/dev/zero", "/",
]  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "image": ({}, NOT_PICTURES),
    "mask": ({"image": IMAGE}, NOT_PICTURES),
    "strength": ({"image": IMAGE}, [*NOT_NUMBERS, 1.1]),
    "outpaint": (
        {"image": IMAGE},
        [8, "8,8,8,8", b"1234", True, math.nan, [], (), [8], [8] * 3, [8] * 5, [8.0] * 4, ["8"] * 4, [True] * 4,
         [None] * 4, [-8, 8, 8, 8], [0] * 4, [10**30] * 4, [[8]] * 4, {"x": 1, "y": 2}, range(4), np.arange(4),
         10**5000, memoryview(b"1234"), (127, 96), (128, 96), pictures_one_by_one()],
    ),
    "paste_back": ({"image": IMAGE, "mask": IMAGE}, [0, 1, "yes", [], {}, math.nan, np.zeros(3), 10**5000, object()]),
    "control": (
        {},
        [3, "canny", b"canny", True, {}, {"kind": "canny"}, {"image": IMAGE}, {"kind": "canny", "image": IMAGE, "x": 1},
         {1: 2, "kind": "canny", "image": IMAGE}, ["canny"], [[]], [None], [IMAGE], IMAGE, pictures_one_by_one(),
         math.nan, 10**5000, np.zeros(3), set()],
    ),
    "image_prompt": ({}, [one for one in NOT_PICTURES if not (isinstance(one, (list, tuple)) and not one)]),
    "image_prompt_strength": ({"image_prompt": IMAGE}, [*NOT_NUMBERS, 11]),
    "resize": ({"image": IMAGE}, ["", "squeeze", "Cover", 3, True, [], ["cover"], {}, b"cover", np.zeros(3), 10**5000]),
    "allow_urls": ({"image": IMAGE}, [0, 1, None, "yes", [], {}, math.nan, np.zeros(3), 10**5000, object()]),
}  # fmt: skip


@pytest.mark.parametrize("field", BAD)
def test_bad_values_are_refused_by_name(field: str) -> None:
    base, values = BAD[field]
    for value in values:
        for more in (base, {}):
            error = refused(FOLLOWS, **(more | {field: value}))
            assert error.field == field, (type(value), str(error))
            assert field in str(error)
            assert len(str(error)) < 400


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": ["canny"]}, {"kind": None}, {"kind": 10**5000}, {"kind": np.zeros(3)}, {"kind": ""},
        {"kind": "x" * 999},
        {"image": None}, {"image": [IMAGE]}, {"image": "nothing.png"}, {"image": 3}, {"image": b""},
        {"scale": "1"}, {"scale": True}, {"scale": math.nan}, {"scale": -1}, {"scale": 10.1}, {"scale": [1]},
        {"start": -0.1}, {"start": 1.1}, {"end": math.inf}, {"start": 0.6, "end": 0.5}, {"start": None},
        {"preprocess": None}, {"preprocess": 1}, {"preprocess": "cany"}, {"preprocess": ["canny"]}, {"preprocess": {}},
        {"options": 5}, {"options": [1]}, {"options": {5: 1}}, {"options": {"low": math.nan}},
        {"options": {"low": "1"}},
        {"options": {"high": [1]}}, {"options": {"device": "cuda"}}, {"options": {"image": IMAGE}},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_bad_control_pictures_are_refused(changed: dict[str, Any]) -> None:
    error = refused(FOLLOWS, control=[replace(Control(kind="canny", image=IMAGE), **changed)])
    assert error.field == "control"
    assert len(str(error)) < 400


def test_what_goes_with_nothing_is_refused() -> None:
    for asked, field in (
        ({"mask": IMAGE}, "mask"),
        ({"strength": 0.5}, "strength"),
        ({"outpaint": (8, 8, 8, 8)}, "outpaint"),
        ({"paste_back": True}, "paste_back"),
        ({"image_prompt_strength": 1}, "image_prompt_strength"),
        ({"resize": "none", "image": IMAGE, "width": 64, "height": 64}, "resize"),
    ):
        assert refused(FOLLOWS, **asked).field == field
    assert refused(SDXL, image_prompt=IMAGE).field == "image_prompt"
    error = refused(FLUX_KONTEXT, image=IMAGE, control=Control(kind="canny", image=IMAGE))
    assert error.field == "control"
    assert "takes no control pictures" in str(error)


def scene(color: str = "green") -> Image.Image:
    image = plain(128, 96, color="white")
    ImageDraw.Draw(image).ellipse((32, 16, 96, 80), fill=color)
    return image


def run(engine: Engine, **asked: Any) -> torch.Tensor:
    said: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "output_type": "latent", "image": scene()}
    return torch.stack(list(engine("a red circle", **(said | asked))))


def test_a_picture_changed_while_the_engine_runs_changes_nothing(engine: Engine) -> None:
    mask = hole((128, 96), (32, 16, 96, 80))
    calm = engine("x", image=scene(), mask=mask, seed=3, num_inference_steps=2)
    for image in (scene(), np.array(scene()), torch.from_numpy(np.array(scene()).transpose(2, 0, 1))):
        holes = mask.copy()

        def change(step: object, image: Any = image, holes: Image.Image = holes) -> None:
            holes.paste(255, (0, 0, 128, 96))
            if isinstance(image, Image.Image):
                image.paste((0, 0, 0), (0, 0, 128, 96))
            else:
                image[:] = 0

        changed = engine("x", image=image, mask=holes, seed=3, num_inference_steps=2, on_step=change)
        assert np.array_equal(np.asarray(changed.image), np.asarray(calm.image))


def test_a_picture_may_be_its_own_mask_and_is_left_alone(engine: Engine) -> None:
    image = scene("black")
    before = image.tobytes()
    same = run(engine, image=image, mask=image)
    assert torch.equal(same, run(engine, image=scene("black"), mask=scene("black")))
    assert (image.tobytes(), image.mode, image.info) == (before, "RGB", {})


def test_a_cancelled_request_leaves_nothing_behind(engine: Engine) -> None:
    mask = hole((128, 96), (32, 16, 96, 80))
    before = run(engine, mask=mask)
    cancel = threading.Event()
    with pytest.raises(RequestCancelled):
        run(engine, image=scene("blue"), cancel=cancel, on_step=lambda step: cancel.set())
    assert torch.equal(run(engine, mask=mask), before)


def test_two_callers_with_pictures_of_their_own_get_their_own(engine: Engine) -> None:
    asked: list[dict[str, Any]] = [
        {"image": scene("blue"), "strength": 0.7},
        {"image": scene("red"), "mask": hole((128, 96), (0, 0, 64, 96))},
    ]
    alone = [run(engine, **one) for one in asked]
    found: list[list[torch.Tensor]] = [[], []]

    def call(number: int) -> None:
        for _ in range(3):
            found[number].append(run(engine, **asked[number]))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(found[number]) == 3
        assert all(torch.equal(one, alone[number]) for one in found[number])


def test_64_outputs_from_one_picture(engine: Engine) -> None:
    asked: dict[str, Any] = {"image": scene().resize((32, 32)), "num_inference_steps": 2, "strength": 0.5}
    many = run(engine, num_outputs=64, **asked)
    assert len(many) == 64
    assert latent_error(many[-1:], run(engine, seed=66, **asked)) <= 1e-5


def test_latents_with_a_mask_keep_what_is_kept(engine: Engine) -> None:
    mask = hole((128, 96), (32, 16, 96, 80))
    latents = run(engine, mask=mask, num_outputs=2)
    assert latents.shape == (2, 16, 12, 16)
    kept = torch.ones(12, 16, dtype=torch.bool)
    kept[2:10, 4:12] = False
    assert torch.equal(latents[0][:, kept], latents[1][:, kept])
    assert not torch.equal(latents[0], latents[1])
    whole = run(engine, image=scene(), mask=Image.new("L", (128, 96), 0))
    assert torch.equal(latents[0][:, kept], whole[0][:, kept])
