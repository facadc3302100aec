"""Every published schema as a hosted model speaks it, on small models that stand in for the published ones.

Manifests of the published names lead to random models in which every part matters, so that a Predictor loads what it
loads by default.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from published_models import (
    CONTROLNETS,
    MULTI,
    Speak,
    content,
    cut_out_content,
    data_uri,
    hole,
    least,
    mask_content,
    other_photo,
    photo,
    photo_content,
)

import flux_engine
from flux_engine import (
    Control,
    InvalidRequest,
    Predictor,
    Request,
    RequestCancelled,
    UnknownModel,
    UnsupportedError,
    files,
    guarded,
)
from flux_engine.predictor import predictor as module
from flux_engine.predictor.translation import translate
from flux_engine.replicate.schema import InvalidInput
from flux_engine.replicate.schemas import SCHEMAS, find_schema
from flux_engine.replicate.sdxl import STAND_INS
from flux_engine.specs import SPECS, ControlNetSpec, ModelSpec, refined

pytestmark = pytest.mark.usefixtures("published")


def run(predictor: Predictor, **inputs: Any) -> list[Path]:
    made = predictor.predict(**least(predictor.schema.name) | inputs)
    return [made] if isinstance(made, Path) else made


def last(predictor: Predictor, **inputs: Any) -> bytes:
    return run(predictor, **inputs)[-1].read_bytes()


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


# What every schema makes of a picture of 1600x900, at a quarter of the published sizes; SDXL at an eighth.
MADE = [
    ("flux-schnell", {"aspect_ratio": "16:9"}, ["out-0.png"], (336, 192)),
    ("flux-dev", {"megapixels": "0.25", "num_outputs": 2}, ["out-0.png", "out-1.png"], (128, 128)),
    ("flux-dev", {"image": photo_content, "aspect_ratio": "9:16", "megapixels": "0.25"}, ["out-0.png"], (352, 208)),
    ("flux-krea-dev", {"image": photo_content}, ["out-0.png"], (352, 208)),
    ("flux-fill-dev", {}, ["out-0.png"], (320, 192)),
    ("flux-fill-dev", {"megapixels": "match_input", "num_outputs": 2}, ["out-0.png", "out-1.png"], (352, 192)),
    ("flux-fill-dev", {"image": cut_out_content, "mask": None, "megapixels": "0.25"}, ["out-0.png"], (160, 96)),
    ("flux-canny-dev", {"output_format": "jpg"}, ["out-0.jpg"], (320, 192)),
    ("flux-canny-dev", {"megapixels": "0.25", "output_format": "webp"}, ["out-0.webp"], (160, 96)),
    ("flux-redux-dev", {"aspect_ratio": "2:3", "megapixels": "0.25"}, ["out-0.png"], (112, 160)),
    ("flux-redux-schnell", {"megapixels": "0.25", "num_outputs": 2}, ["out-0.png", "out-1.png"], (128, 128)),
    ("flux-kontext-dev", {}, ["output.png"], (352, 192)),
    ("flux-kontext-dev", {"aspect_ratio": "1:1", "output_format": "webp"}, ["output.webp"], (256, 256)),
    ("sdxl", {"num_outputs": 2}, ["out-0.png", "out-1.png"], (128, 128)),
    ("sdxl", {"width": 1536, "height": 640}, ["out-0.png"], (192, 80)),
    ("sdxl", {"image": photo_content, "width": 512, "height": 512}, ["out-0.png"], (176, 104)),
    ("sdxl", {"image": photo_content, "mask": mask_content, "width": 512, "height": 768}, ["out-0.png"], (64, 96)),
    ("sdxl-controlnet", {}, ["output.png"], (168, 96)),
    (MULTI, {}, ["out-0.png"], (96, 96)),
    (MULTI, {"image": photo_content}, ["out-0.png"], (96, 96)),
    (MULTI, {"image": photo_content, "sizing_strategy": "input_image"}, ["out-0.png"], (128, 72)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "inputs", "names", "size"), MADE, ids=[f"{n}-{row[0]}" for n, row in enumerate(MADE)]
)
def test_every_schema_runs(
    speak: Speak, schema: str, inputs: dict[str, Any], names: list[str], size: tuple[int, int]
) -> None:
    predictor = speak(schema)
    made = predictor.predict(**least(schema, **inputs))
    assert isinstance(made, Path) == predictor.schema.single
    paths = [made] if isinstance(made, Path) else made
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in paths[0].parent.iterdir()) == names
    for path in paths:
        assert size_of(path) == size
        with Image.open(path) as image:
            assert image.format == {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[path.suffix]
            assert np.asarray(image).std() > 2
    assert len({path.read_bytes() for path in paths}) == len(paths)
    if "output_format" not in inputs:
        assert [path.read_bytes() for path in run(predictor, **inputs)] == [path.read_bytes() for path in paths]


def test_depth(speak: Speak, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network is not here: something else stands in for what it makes."""
    from flux_engine import preprocess
    from flux_engine.preprocess import filters

    def estimated(picture: np.ndarray[Any, Any], *_: Any) -> np.ndarray[Any, Any]:
        return filters.grey(picture, {}, preprocess.declare.Where("cpu", True))  # pyright: ignore[reportAttributeAccessIssue]

    depth = replace(preprocess.PREPROCESSORS["depth"], run=estimated)
    monkeypatch.setattr(preprocess, "PREPROCESSORS", {**preprocess.PREPROCESSORS, "depth": depth})
    first = last(speak("flux-depth-dev"))
    assert first == last(speak("flux-depth-dev")) != last(speak("flux-depth-dev"), control_image=other_photo)


def request_of(schema: str, spec: ModelSpec, **inputs: Any) -> Request:
    declared = find_schema(schema)
    return translate(declared, declared.validate(least(schema, **inputs)), spec, seed=5).request


WITH_CONTROLNETS = replace(
    SPECS["sdxl"],
    controlnets=tuple(ControlNetSpec(name=name, kinds=dict.fromkeys(kinds)) for name, kinds in CONTROLNETS.items()),
)
TALL = data_uri(photo(size=(300, 1200)))
SQUARE = data_uri(photo(size=(700, 700)))


@pytest.mark.parametrize(
    ("schema", "inputs", "size"),
    [
        ("flux-dev", {"image": photo_content, "aspect_ratio": "1:1"}, (1440, 816)),
        ("flux-dev", {"image": SQUARE, "megapixels": "0.25"}, (704, 704)),
        ("flux-fill-dev", {}, (1344, 768)),
        ("flux-fill-dev", {"megapixels": "0.25"}, (672, 384)),
        ("flux-fill-dev", {"megapixels": "match_input"}, (1440, 800)),
        ("flux-canny-dev", {}, (1344, 768)),
        ("flux-canny-dev", {"control_image": SQUARE, "megapixels": "match_input"}, (672, 672)),
        ("flux-depth-dev", {"control_image": TALL}, (512, 2048)),
        ("flux-kontext-dev", {}, (1392, 752)),
        ("flux-kontext-dev", {"input_image": SQUARE}, (1024, 1024)),
        ("flux-kontext-dev", {"aspect_ratio": "16:9"}, (1328, 800)),
        ("sdxl", {}, (1024, 1024)),
        ("sdxl", {"width": 810, "height": 1080}, (816, 1080)),
        ("sdxl", {"image": photo_content}, (1600, 896)),
        ("sdxl", {"image": SQUARE}, (704, 704)),
        ("sdxl", {"image": SQUARE, "mask": mask_content}, (1024, 1024)),
        ("sdxl-controlnet", {}, (1344, 768)),
        ("sdxl-controlnet", {"image": SQUARE}, (1024, 1024)),
        ("sdxl-controlnet", {"image": TALL}, (512, 2048)),
        (MULTI, {}, (768, 768)),
        (MULTI, {"image": photo_content, "mask": mask_content, "width": 640}, (640, 768)),
        (MULTI, {"image": photo_content, "sizing_strategy": "input_image"}, (1024, 576)),
        (MULTI, {"controlnet_2_image": TALL, "sizing_strategy": "controlnet_2_image"}, (1024, 2048)),
        (MULTI,
         {"image": SQUARE, "mask": mask_content, "sizing_strategy": "mask_image", "width": 5}, (1024, 576)),
    ],
)  # fmt: skip
def test_the_published_sizes(schema: str, inputs: dict[str, Any], size: tuple[int, int]) -> None:
    spec = WITH_CONTROLNETS if "controlnet" in schema else SPECS.get(schema, SPECS["flux-dev"])
    job = request_of(schema, spec, **inputs).resolve(spec)
    assert (job.width, job.height) == size


def test_fields_that_do_not_apply_are_dropped() -> None:
    plain = request_of("flux-dev", SPECS["flux-dev"], prompt_strength=0.3)
    assert (plain.strength, plain.aspect_ratio, plain.megapixels) == (None, "1:1", "1")
    with_image = request_of("flux-dev", SPECS["flux-dev"], image=photo_content, prompt_strength=0.3)
    assert (with_image.strength, with_image.aspect_ratio, with_image.megapixels) == (0.3, None, None)
    spec = refined(SPECS["sdxl"], SPECS["sdxl-refiner"])
    ways = {
        "no_refiner": (None, None, None),
        "expert_ensemble_refiner": ("expert_ensemble_refiner", 0.7, None),
        "base_image_refiner": ("base_image_refiner", None, 20),
    }
    for way, expected in ways.items():
        made = request_of("sdxl", spec, refine=way, high_noise_frac=0.7, refine_steps=20)
        assert (made.refine, made.high_noise_frac, made.refine_steps) == expected
        assert made.resolve(spec).notes == ()
    assert request_of("flux-redux-dev", SPECS["flux-dev"]).prompt == ""
    assert request_of("sdxl", spec).negative_prompt == ""


def test_what_answers_for_what() -> None:
    """Every name of the published schema. Half of them are drawn by networks that are published as pickles only: what
    is nearest stands in for them, but for poses."""
    kinds = {
        "edge_canny": "canny", "illusion": "illusion", "depth_leres": "depth", "depth_midas": "depth",
        "soft_edge_pidi": "soft_edge", "soft_edge_hed": "soft_edge", "lineart": "lineart", "lineart_anime": "lineart",
        "openpose": "pose",
    }  # fmt: skip
    declared = find_schema(MULTI)
    choices = next(one.choices for one in declared.inputs if one.name == "controlnet_3")
    assert choices == ("none", *kinds)
    pickled: list[str] = []
    for name, kind in kinds.items():
        said = {"controlnet_3": name, "controlnet_3_image": SQUARE, "controlnet_3_conditioning_scale": 1.5}
        said |= {"controlnet_3_start": 0.1, "controlnet_3_end": 0.9}
        made = request_of(MULTI, WITH_CONTROLNETS, **said)
        (control,) = made.control  # pyright: ignore[reportGeneralTypeIssues]
        assert isinstance(control, Control)
        assert (control.kind, control.preprocess) == (kind, STAND_INS.get(name, name))
        assert (control.scale, control.start, control.end) == (1.5, 0.1, 0.9)
        try:
            made.resolve(WITH_CONTROLNETS)
        except UnsupportedError as error:
            assert name in str(error)
            pickled.append(name)
    assert pickled == ["openpose"]
    one_kind = replace(SPECS["sdxl"], controlnets=(ControlNetSpec(name="x", kinds={"soft_edge": None}),))
    made = request_of(MULTI, one_kind, controlnet_1="lineart", controlnet_1_image=SQUARE)
    assert made.control[0].kind == "soft_edge"  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]


def test_canny_of_every_schema() -> None:
    (published,) = (
        request_of("sdxl-controlnet", WITH_CONTROLNETS, condition_scale=0.3).resolve(WITH_CONTROLNETS).inputs.controls
    )
    assert (published.kind, published.scale, dict(published.options)) == ("canny", 0.3, {"low": 100, "high": 200})
    spec = SPECS["flux-canny-dev"]
    (published,) = request_of("flux-canny-dev", spec).resolve(spec).inputs.controls
    assert (published.kind, published.scale, dict(published.options)) == ("canny", 1.0, {"low": 50, "high": 200})


MATTERS = [
    ("flux-dev", {"image": photo_content, "prompt_strength": 0.5}, {"image": other_photo}),
    ("flux-dev", {"image": photo_content, "prompt_strength": 0.5}, {"prompt_strength": 1}),
    ("flux-krea-dev", {"image": photo_content, "prompt_strength": 0.5}, {"image": other_photo}),
    ("flux-fill-dev", {}, {"image": other_photo}),
    ("flux-fill-dev", {}, {"mask": data_uri(hole(900))}),
    ("flux-fill-dev", {}, {"guidance": 3}),
    ("flux-canny-dev", {}, {"control_image": other_photo}),
    ("flux-redux-dev", {}, {"redux_image": other_photo}),
    ("flux-redux-schnell", {}, {"redux_image": other_photo}),
    ("flux-kontext-dev", {}, {"input_image": other_photo}),
    ("flux-kontext-dev", {}, {"prompt": "a star"}),
    ("sdxl", {"image": photo_content}, {"image": other_photo}),
    ("sdxl", {"image": photo_content, "mask": mask_content}, {"mask": data_uri(hole(900))}),
    ("sdxl", {"image": photo_content, "mask": mask_content}, {"mask": None}),
    ("sdxl", {"image": photo_content}, {"prompt_strength": 1}),
    ("sdxl", {}, {"negative_prompt": "a star"}),
    ("sdxl", {}, {"scheduler": "DDIM"}),
    ("sdxl", {"num_inference_steps": 4}, {"refine": "expert_ensemble_refiner", "high_noise_frac": 0.5}),
    ("sdxl", {}, {"refine": "base_image_refiner", "refine_steps": 4}),
    ("sdxl-controlnet", {}, {"image": other_photo}),
    ("sdxl-controlnet", {}, {"condition_scale": 0}),
    (MULTI, {"controlnet_1": "edge_canny", "controlnet_1_image": photo_content},
     {"controlnet_1": "none"}),
    (MULTI, {"controlnet_2": "edge_canny", "controlnet_2_image": photo_content},
     {"controlnet_2_image": other_photo}),
    (MULTI, {"controlnet_3": "edge_canny", "controlnet_3_image": photo_content},
     {"controlnet_3": "illusion"}),
    (MULTI, {"controlnet_3": "edge_canny", "controlnet_3_image": photo_content},
     {"controlnet_3_end": 0.5}),
    (MULTI, {}, {"refine": "base_image_refiner", "refine_steps": 4}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "given", "changed"), MATTERS, ids=[f"{row[0]}-{'+'.join(row[2])}" for row in MATTERS]
)
def test_every_input_matters(speak: Speak, schema: str, given: dict[str, Any], changed: dict[str, Any]) -> None:
    assert last(speak(schema), **given) != last(speak(schema), **given | changed)


@pytest.mark.parametrize(
    ("schema", "given", "changed"),
    [
        ("flux-dev", {}, {"prompt_strength": 0.1}),
        ("flux-dev", {"image": photo_content}, {"aspect_ratio": "9:16", "megapixels": "0.25"}),
        ("sdxl", {"image": photo_content}, {"width": 5, "height": 99999}),
        ("sdxl", {}, {"high_noise_frac": 0.1, "refine_steps": 3, "prompt_strength": 0.1}),
        ("sdxl", {}, {"mask": mask_content}),
        ("sdxl", {}, {"lora_scale": 0.9, "replicate_weights": " "}),
        (MULTI, {}, {"controlnet_1_image": "never looked at", "controlnet_1_end": 0.5}),
        ("flux-fill-dev", {}, {"lora_scale": 2}),
    ],
)  # fmt: skip
def test_what_does_not_apply_changes_nothing(
    speak: Speak, schema: str, given: dict[str, Any], changed: dict[str, Any]
) -> None:
    assert last(speak(schema), **given) == last(speak(schema), **given | changed)


def test_control_pictures_come_first(speak: Speak) -> None:
    paths = run(
        speak(MULTI),
        controlnet_1="illusion",
        controlnet_1_image=photo_content,
        controlnet_3="edge_canny",
        controlnet_3_image=other_photo,
        num_outputs=2,
    )
    assert [path.name for path in paths] == ["control-0.png", "control-1.png", "out-0.png", "out-1.png"]
    assert {size_of(path) for path in paths} == {(96, 96)}
    grey, edges = (np.asarray(Image.open(path)) for path in paths[:2])
    assert np.unique(edges).tolist() == [0, 255]
    assert len(np.unique(grey)) > 2 and (grey[..., 0] == grey[..., 2]).all()


def test_two_of_one_kind_and_several_windows(speak: Speak) -> None:
    """They add up: half and half is the whole."""
    one = {"controlnet_1": "edge_canny", "controlnet_1_image": photo_content, "controlnet_1_conditioning_scale": 1.0}
    two = {"controlnet_2": "edge_canny", "controlnet_2_image": photo_content, "controlnet_2_conditioning_scale": 0.5}
    whole = run(speak(MULTI), **one)
    halves = run(speak(MULTI), **one | two | {"controlnet_1_conditioning_scale": 0.5})
    assert [path.name for path in halves] == ["control-0.png", "control-1.png", "out-0.png"]
    first, second = (np.asarray(Image.open(paths[-1]), dtype=float) for paths in (whole, halves))
    assert np.abs(first - second).max() <= 1


def test_every_form_of_a_picture(speak: Speak, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(url: str, *, field: str, limit: int) -> bytes:
        assert field == "control_image" and limit > 0
        fetched.append(url)
        return content(photo())

    monkeypatch.setattr(guarded, "fetch_picture", fetch)
    path = tmp_path / "photo.png"
    path.write_bytes(content(photo()))
    url = "https://example.com/photo.png"
    forms = [
        path,
        photo_content,
        base64.b64encode(content(photo())).decode(),
        io.BytesIO(content(photo())),
        url,
    ]
    made = {last(speak("flux-canny-dev"), control_image=form, megapixels="0.25") for form in forms}
    monkeypatch.setattr(speak("flux-canny-dev").reader, "local_files", True)
    made.add(last(speak("flux-canny-dev"), control_image=str(path), megapixels="0.25"))
    assert len(made) == 1
    assert fetched == [url]  # once, although it gives the size as well


def test_a_text_opens_no_file(speak: Speak, tmp_path: Path) -> None:
    """A host hands over as text what it did not take for a link."""
    path = tmp_path / "photo.png"
    path.write_bytes(content(photo()))
    with pytest.raises(InvalidInput, match="is neither a link, nor a data URI") as caught:
        run(speak("flux-canny-dev"), control_image=str(path))
    assert caught.value.field == "control_image"


def test_links_into_private_networks_are_refused(speak: Speak) -> None:
    for url in ("http://127.0.0.1/x.png", "http://169.254.169.254/latest", "file:///etc/passwd"):
        with pytest.raises(InvalidInput) as caught:
            run(speak("flux-kontext-dev"), input_image=url)
        assert caught.value.field == "input_image"


LORA = "Understood are: "
REFUSED = [
    ("flux-fill-dev", {"mask": None}, {"mask": "say what to paint"}),
    ("flux-fill-dev", {"lora_weights": "/etc/passwd"}, {"lora_weights": "is a path, which is not read here"}),
    ("flux-fill-dev", {"image": "nothing.png", "mask": "none.png"},
     {"image": "'nothing.png' is neither a link, nor a data URI", "mask": "'none.png' is neither a link"}),
    ("flux-fill-dev", {"image": "nothing.png", "mask": None}, {"image": "'nothing.png' is neither a link"}),
    ("flux-canny-dev", {"control_image": "data:image/png;base64,AAAA"}, {"control_image": "'data:image/png;base64"}),
    ("flux-kontext-dev", {"input_image": io.BytesIO(b"x")}, {"input_image": "(a BytesIO)"}),
    ("flux-redux-dev", {"redux_image": "nothing.png"}, {"redux_image": "'nothing.png'"}),
    ("sdxl", {"replicate_weights": "one word"}, {"replicate_weights": LORA}),
    ("sdxl-controlnet", {"image": None}, {"image": "no edges to follow"}),
    (MULTI, {"lora_weights": "ftp://example.com/x.tar"}, {"lora_weights": LORA}),
    (MULTI, {"controlnet_1": "edge_canny", "controlnet_3": "illusion"},
     {"controlnet_1_image": "controlnet_1 'edge_canny' needs a picture", "controlnet_3_image": "controlnet_3"}),
    (MULTI, {"sizing_strategy": "input_image"}, {"image": "sizing_strategy says"}),
    (MULTI, {"sizing_strategy": "controlnet_2_image"}, {"controlnet_2_image": "sizing_strategy"}),
]  # fmt: skip


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Predictor, list[str]]]:
    """A predictor that may not load anything, and its log."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load", load)

    def fresh(schema: str, **options: Any) -> tuple[Predictor, list[str]]:
        said: list[str] = []
        return Predictor(schema, device="cpu", output_dir=tmp_path / "out", say=said.append, **options), said

    return fresh


@pytest.mark.parametrize(("schema", "inputs", "expected"), REFUSED, ids=[f"{n}-{r[0]}" for n, r in enumerate(REFUSED)])
def test_what_is_refused(
    fresh: Callable[..., tuple[Predictor, list[str]]],
    tmp_path: Path,
    schema: str,
    inputs: dict[str, Any],
    expected: dict[str, str],
) -> None:
    """Before the model is loaded, with every input that is wrong."""
    predictor, said = fresh(schema)
    with pytest.raises(InvalidInput) as caught:
        run(predictor, **inputs)
    found = {problem["loc"][-1]: problem["msg"] for problem in caught.value.detail}
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert words in found[name]
    assert said == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("schema", "inputs", "field"),
    [
        ("sdxl", {"width": 8, "height": 8}, "width"),
        ("sdxl", {"width": 1024, "height": 99999}, "height"),
        ("sdxl", {"refine": "base_image_refiner", "refine_steps": 2}, "refine_steps"),
        ("sdxl", {"refine": "base_image_refiner", "refine_steps": -1}, "refine_steps"),
        ("flux-dev", {"prompt": "x" * 200_000}, "prompt"),
        ("flux-dev", {"image": data_uri(photo(size=(2000, 20)))}, "image"),
        (MULTI,
         {"controlnet_1": "edge_canny", "controlnet_1_image": photo_content, "controlnet_1_start": 0.9,
          "controlnet_1_end": 0.1}, "controlnet_1_end"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_too(
    fresh: Callable[..., tuple[Predictor, list[str]]], schema: str, inputs: dict[str, Any], field: str
) -> None:
    predictor, said = fresh(schema)
    with pytest.raises(InvalidRequest) as caught:
        run(predictor, **inputs)
    assert caught.value.field == field
    assert said == []


def test_a_preprocessor_that_is_not_here(fresh: Callable[..., tuple[Predictor, list[str]]]) -> None:
    predictor, _ = fresh(MULTI)
    with pytest.raises(UnsupportedError, match="openpose cannot be made here"):
        run(predictor, controlnet_1="openpose", controlnet_1_image=photo_content)


def test_what_is_loaded(fresh: Callable[..., tuple[Predictor, list[str]]], published: Path) -> None:
    found = {schema: fresh(schema)[0] for schema in SCHEMAS}
    models = {"flux-redux-dev": "flux-dev", "flux-redux-schnell": "flux-schnell", "sdxl-controlnet": "sdxl"}
    models |= {MULTI: "sdxl", "flux-schnell-lora": "flux-schnell", "flux-dev-lora": "flux-dev"}
    models |= {"flux-finetune": "flux-dev", "sdxl-lcm": "sdxl"}
    for schema, predictor in found.items():
        assert predictor.model == predictor.spec.name == models.get(schema, schema)
        assert predictor.reader.redux == ("flux-redux-dev" if "redux" in schema else None)
        assert predictor.reader.refiner == ("sdxl-refiner" if schema in ("sdxl", MULTI) else None)
    assert found["sdxl-controlnet"].reader.controlnets == ("sdxl-controlnet-canny",)
    assert found[MULTI].reader.controlnets == tuple(CONTROLNETS)
    assert found[MULTI].spec.controls == (
        "canny",
        "depth",
        "pose",
        "soft_edge",
        "lineart",
        "illusion",
    )
    (published / "manifests" / "mine.toml").write_text((published / "manifests" / "sdxl.toml").read_text())
    other = fresh(MULTI, model="mine")[0]
    assert other.reader.refiner is None
    assert other.spec.controls == found[MULTI].spec.controls  # by kind
    with pytest.raises(InvalidInput) as caught:
        run(other, refine="base_image_refiner")
    assert caught.value.field == "refine"
    assert "none is loaded with mine" in str(caught.value)
    with pytest.raises(InvalidInput, match=r"controlnet_1: 'illusion' needs a ControlNet for illusion; .*: canny"):
        run(
            fresh(MULTI, model="mine", controlnets=["canny"])[0],
            controlnet_1="illusion",
            controlnet_1_image=photo_content,
        )
    with pytest.raises(UnknownModel, match="no ControlNet 'depth' for demo-dev"):
        run(fresh(MULTI, model="demo-dev")[0])
    with pytest.raises(UnknownModel, match="sdxl-refine"):
        fresh("sdxl", refiner="sdxl-refine")
    with pytest.raises(InvalidRequest, match="demo-dev does not change a picture"):
        run(fresh("flux-kontext-dev", model="demo-dev")[0])
    with pytest.raises(InvalidRequest, match="flux-dev reads no pictures as prompts"):
        run(fresh("flux-redux-dev", redux=None)[0])


def test_another_model_with_a_refiner_of_its_own(published: Path, tmp_path: Path) -> None:
    """And a ControlNet from a file."""
    (published / "manifests" / "mine.toml").write_text((published / "manifests" / "sdxl.toml").read_text())
    path = published / "sdxl-controlnet-canny.safetensors"
    predictor = Predictor(
        MULTI, model="mine", refiner="sdxl-refiner", controlnets={"canny": path}, device="cpu",
        dtype="float32", safety=None, output_dir=tmp_path, say=lambda _: None,
    )  # fmt: skip
    paths = run(
        predictor, controlnet_1="edge_canny", controlnet_1_image=photo_content, refine="base_image_refiner",
        refine_steps=4,
    )  # fmt: skip
    assert [path.name for path in paths] == ["control-0.png", "out-0.png"]


def test_fill_s_schema_on_a_model_that_draws(tmp_path: Path) -> None:
    """Then what the mask keeps is put back in every step."""
    predictor = Predictor("flux-fill-dev", model="demo-dev", device="cpu", dtype="float32", safety=None,
                          output_dir=tmp_path, say=lambda _: None)  # fmt: skip
    (path,) = run(predictor, megapixels="0.25")
    image = Image.open(path).convert("RGB")
    assert image.size == (160, 96)
    assert image.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("schema", ["flux-fill-dev", "flux-canny-dev"])
def test_a_model_by_its_folder(speak: Speak, published: Path, tmp_path: Path, schema: str) -> None:
    """Told by its channels. Kontext, which no shape tells from dev, needs a manifest."""
    predictor = Predictor(
        schema, model=published / schema, device="cpu", dtype="float32", safety=None, output_dir=tmp_path,
        say=lambda _: None,
    )  # fmt: skip
    assert last(predictor, megapixels="0.25") == last(speak(schema), megapixels="0.25")


def test_nothing_is_left_of_the_prediction_before(speak: Speak, tmp_path: Path) -> None:
    for schema, inputs in (
        ("flux-dev", {"image": photo_content, "prompt_strength": 0.5}),
        ("sdxl", {"image": photo_content, "mask": mask_content, "refine": "base_image_refiner", "refine_steps": 4}),
        (
            MULTI,
            {"controlnet_1": "edge_canny", "controlnet_1_image": photo_content, "num_outputs": 2},
        ),
    ):
        alone = Predictor(schema, device="cpu", dtype="float32", safety=None, output_dir=tmp_path, say=lambda _: None)
        least = {"aspect_ratio": "9:21", "megapixels": "0.25"} if schema == "flux-dev" else {"width": 512}
        plain = last(alone, **least)
        predictor = speak(schema)
        with_pictures = last(predictor, **inputs)
        assert last(predictor, **least) == plain
        assert last(alone, **inputs) == with_pictures
        with pytest.raises(InvalidInput):
            run(predictor, image="nothing.png")
        assert last(predictor, **least) == plain


def test_what_fails_leaves_no_files(speak: Speak, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = speak(MULTI)
    asked = {"controlnet_1": "edge_canny", "controlnet_1_image": photo_content}
    run(predictor, **asked)
    assert predictor.output_dir is not None
    before = set(predictor.output_dir.iterdir())
    cancel = threading.Event()
    monkeypatch.setattr(predictor, "say", lambda line: cancel.set() if "50%" in line else None)
    with pytest.raises(RequestCancelled):
        run(predictor, cancel=cancel, **asked)

    class HostCancels(BaseException):
        pass

    written: list[Path] = []

    def write(path: Path, content: bytes) -> None:
        if written:
            raise HostCancels
        written.append(path)
        path.write_bytes(content)

    monkeypatch.setattr(files, "write", write)
    with pytest.raises(HostCancels):
        run(predictor, **asked)
    assert written[0].name == "control-0.png"
    for inputs in ({"image": "nothing.png"}, {"controlnet_1": "edge_canny"}, {"width": 1}):
        with pytest.raises(InvalidRequest):
            run(predictor, **inputs)
    assert set(predictor.output_dir.iterdir()) == before


def test_seeds(speak: Speak, lines: list[str]) -> None:
    for schema, seed, kept in (
        ("sdxl-controlnet", 0, False),
        ("sdxl-controlnet", -3, False),
        ("sdxl-controlnet", 7, True),
        ("sdxl", 0, True),
        ("sdxl", -1, True),
    ):
        lines.clear()
        first = last(speak(schema), seed=seed)
        said = int(lines[0].removeprefix("Using seed: "))
        assert (said == seed) == kept
        assert last(speak(schema), seed=said) == first


def test_what_is_not_in_force_is_said(speak: Speak, lines: list[str]) -> None:
    def said(schema: str, **inputs: Any) -> set[str]:
        lines.clear()
        run(speak(schema), **inputs)
        return {line.partition(":")[0] for line in lines} & {"go_fast", "safety", "apply_watermark"}

    assert said("flux-dev") == {"safety"}
    assert said("flux-dev", go_fast=True) == {"go_fast", "safety"}
    assert said("flux-dev", go_fast=False, disable_safety_checker=True) == set()
    assert said("flux-canny-dev") == {"safety"}
    assert said("sdxl") == {"safety", "apply_watermark"}
    assert said("sdxl", apply_watermark=False, disable_safety_checker=True) == set()
    assert said("sdxl-controlnet") == {"safety"}


def test_what_is_adjusted_is_said(speak: Speak, lines: list[str]) -> None:
    def said(schema: str, **inputs: Any) -> str:
        lines.clear()
        run(speak(schema), **inputs)
        return "\n".join(lines)

    assert "1024x1024 is drawn as 128x128: sdxl has the published sizes divided by 8" in said("sdxl")
    assert "width 102 rounded up to 104" in said("sdxl", width=810)
    assert "refine_steps 0 is taken" in said("sdxl", refine="base_image_refiner", refine_steps=0, num_inference_steps=4)
    assert "refine_steps" not in said("sdxl", refine_steps=0)
    assert "mask ignored: there is no image" in said("sdxl", mask=mask_content)
    assert "its alpha is the mask" in said("flux-fill-dev", image=cut_out_content, mask=None, megapixels="0.25")
    assert len([line for line in lines if "%|" in line]) == 2


def test_weights_are_not_touched_by_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(flux_engine.WeightsError, match="does not exist"):
        Predictor("sdxl", model=tmp_path / "nothing")
    assert torch.get_num_threads() == 1
