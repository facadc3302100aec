"""SDXL's invisible watermark, read back, and against diffusers'."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux_engine import Predictor, UnsupportedError, watermark

PHOTO = Path(__file__).parent / "data" / "grace_hopper.jpg"


def photo() -> Image.Image:
    with Image.open(PHOTO) as image:
        return image.convert("RGB")


def read(picture: Image.Image) -> float:
    """The share of the bits that are the watermark's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from imwatermark import WatermarkDecoder

    decoder = WatermarkDecoder("bits", len(watermark.BITS))
    pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1])
    return float((decoder.decode(pixels, watermark.METHOD) == np.array(watermark.BITS, bool)).mean())


def test_it_can_be_read_back() -> None:
    plain = photo()
    marked = watermark.mark(plain)
    assert read(marked) >= 0.95
    assert read(plain) <= 0.8  # the control
    assert marked.size == plain.size and marked.mode == "RGB"
    difference = np.abs(np.asarray(marked, float) - np.asarray(plain, float))
    assert 0 < difference.mean() < 4  # unseen


def test_it_is_diffusers_own() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.stable_diffusion_xl.watermark import WATERMARK_BITS, StableDiffusionXLWatermarker

    assert list(watermark.BITS) == WATERMARK_BITS
    plain = photo()
    pixels = torch.from_numpy(np.array(plain)).permute(2, 0, 1)[None].float() / 127.5 - 1
    theirs = StableDiffusionXLWatermarker().apply_watermark(pixels)[0].permute(1, 2, 0).numpy()
    difference = np.abs(np.asarray(watermark.mark(plain), float) - (theirs + 1) * 127.5)
    # They do not begin with whole numbers: here and there another coefficient is the largest of a block.
    assert (difference > 0.51).mean() <= 0.02
    control = np.abs(np.asarray(plain, float) - (theirs + 1) * 127.5)
    assert (control > 0.51).mean() >= 0.1


@pytest.mark.parametrize(
    ("size", "fits"), [((256, 256), True), ((255, 400), False), ((512, 160), True), ((384, 160), False)]
)
def test_small_pictures_have_no_room(size: tuple[int, int], fits: bool) -> None:
    assert watermark.fits(*size) == fits
    picture = photo().resize(size)
    if fits:
        assert watermark.mark(picture).size == size
    else:
        with pytest.raises(ValueError, match="too small"):
            watermark.mark(picture)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def predictor(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(
        "sdxl", model="demo-sdxl-turbo", device="cpu", output_dir=tmp_path_factory.mktemp("out"), say=lines.append
    )


@pytest.fixture
def draw(predictor: Predictor, lines: list[str]) -> Callable[..., tuple[Image.Image, str]]:
    def draw(**inputs: Any) -> tuple[Image.Image, str]:
        lines.clear()
        given = {"prompt": "a large green star on a blue background", "seed": 1, "num_inference_steps": 2}
        paths = predictor.predict(**given, **inputs)
        assert isinstance(paths, list)
        with Image.open(paths[0]) as image:
            image.load()
        return image, "\n".join(line for line in lines if line.startswith("apply_watermark"))

    return draw


def test_sdxl_marks_unless_told_not_to(draw: Callable[..., tuple[Image.Image, str]]) -> None:
    marked, said = draw()
    plain, _ = draw(apply_watermark=False)
    assert marked.size == (256, 256) and said == ""
    # Flat and saturated as it is, not all bits can be read back from it.
    assert marked.tobytes() == watermark.mark(plain).tobytes() != plain.tobytes()
    _, said = draw(width=512, height=512)  # which demo models draw at a quarter of that
    assert "no room" in said


def test_without_the_package(draw: Callable[..., tuple[Image.Image, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = draw(apply_watermark=False)
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    picture, said = draw()
    assert "pip install 'flux-engine[watermark]'" in said
    assert picture.tobytes() == plain.tobytes()
    assert draw(apply_watermark=False)[1] == ""
    with pytest.raises(UnsupportedError, match="--no-deps"):
        watermark.mark(photo())
