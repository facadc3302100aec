"""The flux-schnell schema: its published shape, its validation, and what a prediction does."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from flux_engine import InvalidRequest, OutputError, Predictor, RequestCancelled, UnknownModel, UnknownSchema
from flux_engine.replicate.schema import InvalidInput
from flux_engine.replicate.schemas import FLUX_SCHNELL, find_schema

PUBLISHED = [  # name, type, default, minimum, maximum, choices: as the hosted model shows them
    ("prompt", "string", None, None, None, None),
    ("aspect_ratio", None, "1:1", None, None,
     ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]),
    ("num_outputs", "integer", 1, 1, 4, None),
    ("num_inference_steps", "integer", 4, 1, 4, None),
    ("seed", "integer", None, None, None, None),
    ("output_format", None, "webp", None, None, ["webp", "jpg", "png"]),
    ("output_quality", "integer", 80, 0, 100, None),
    ("disable_safety_checker", "boolean", False, None, None, None),
    ("go_fast", "boolean", True, None, None, None),
    ("megapixels", None, "1", None, None, ["1", "0.25"]),
]  # fmt: skip
PROGRESS = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)")
"""What the official clients look for in a line of the log."""


def test_openapi_is_the_published_one() -> None:
    schemas = FLUX_SCHNELL.openapi()["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    assert schemas["Input"]["required"] == ["prompt"]
    assert [p["x-order"] for p in properties.values()] == list(range(len(PUBLISHED)))
    for name, kind, default, low, high, choices in PUBLISHED:
        found = properties[name]
        assert found.get("type") == kind
        assert found.get("default") == default
        assert (found.get("minimum"), found.get("maximum")) == (low, high)
        assert found["description"]
        if choices:
            assert found["allOf"] == [{"$ref": f"#/components/schemas/{name}"}]
            assert schemas[name]["enum"] == choices
    assert list(properties) == [row[0] for row in PUBLISHED]
    assert schemas["Output"]["items"] == {"type": "string", "format": "uri"}


def test_every_reference_resolves() -> None:
    document = FLUX_SCHNELL.openapi()
    text = str(document)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in document["components"]["schemas"]


def test_defaults_and_nulls() -> None:
    values = FLUX_SCHNELL.validate({"prompt": "x", "seed": None})
    assert values["seed"] is None
    assert values["num_outputs"] == 1
    assert FLUX_SCHNELL.validate({"prompt": "x", "seed": 0})["seed"] == 0
    assert FLUX_SCHNELL.validate({"prompt": "x", "num_outputs": 2.0})["num_outputs"] == 2


@pytest.mark.parametrize(
    ("given", "name", "message"),
    [
        ({}, "prompt", "Field required"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": 3}, "prompt", "valid string"),
        ({"prompt": "x", "num_outputs": 5}, "num_outputs", "less than or equal to 4"),
        ({"prompt": "x", "num_outputs": 0}, "num_outputs", "greater than or equal to 1"),
        ({"prompt": "x", "num_outputs": None}, "num_outputs", "valid integer"),
        ({"prompt": "x", "num_outputs": True}, "num_outputs", "valid integer"),
        ({"prompt": "x", "num_outputs": 1.5}, "num_outputs", "valid integer"),
        ({"prompt": "x", "seed": float("nan")}, "seed", "finite number"),
        ({"prompt": "x", "seed": float("inf")}, "seed", "finite number"),
        ({"prompt": "x", "go_fast": "maybe"}, "go_fast", "valid boolean"),
        ({"prompt": "x", "aspect_ratio": "1:2"}, "aspect_ratio", "'9:16' or '9:21'"),
        ({"prompt": "x", "megapixels": 1}, "megapixels", "valid string"),
        ({"prompt": "x", "guidance": 3}, "guidance", "Extra inputs are not permitted"),
    ],
)
def test_bad_input_is_refused(given: dict[str, object], name: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        FLUX_SCHNELL.validate(given)
    assert caught.value.detail[0]["loc"] == ["body", "input", name]
    assert message in caught.value.detail[0]["msg"]


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        FLUX_SCHNELL.validate({"num_outputs": 9, "seed": "x"})
    assert [d["loc"][-1] for d in caught.value.detail] == ["prompt", "num_outputs", "seed"]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def predictor(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    made = Predictor(
        "flux-schnell", model="demo-schnell", device="cpu", output_dir=tmp_path_factory.mktemp("out"), say=lines.append
    )
    made.setup()
    return made


def test_prediction(predictor: Predictor, lines: list[str]) -> None:
    lines.clear()
    paths = predictor.predict(prompt="a red circle", seed=0, num_outputs=2, megapixels="0.25")
    assert [p.name for p in paths] == ["out-0.webp", "out-1.webp"]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "WEBP"
            assert image.size == (128, 128)
            assert not image.getexif()  # hosted pictures carry no metadata
    assert lines[0] == "Using seed: 0"
    progress = [PROGRESS.match(line) for line in lines]
    assert [m.groups() for m in progress if m] == [
        ("25", "1", "4"), ("50", "2", "4"), ("75", "3", "4"), ("100", "4", "4"),
    ]  # fmt: skip
    assert [line.partition(" by ")[0] for line in lines[-2:]] == [f"safety: image {n} is safe" for n in (0, 1)]


def test_two_predictions_do_not_meet(predictor: Predictor) -> None:
    first = predictor.predict(prompt="a red circle", seed=0, num_inference_steps=1, output_format="png")
    second = predictor.predict(prompt="a blue star", seed=0, num_inference_steps=1, output_format="png")
    assert first[0] != second[0]
    assert first[0].read_bytes() != second[0].read_bytes()


def test_the_same_seed_gives_the_same_file(predictor: Predictor) -> None:
    one, two = (predictor.predict(prompt="a red circle", seed=5, output_format="png")[0] for _ in range(2))
    assert one.read_bytes() == two.read_bytes()


def test_a_drawn_seed_can_be_used_again(predictor: Predictor, lines: list[str]) -> None:
    lines.clear()
    path = predictor.predict(prompt="a red circle", output_format="png")[0]
    seed = int(lines[0].removeprefix("Using seed: "))
    assert predictor.predict(prompt="a red circle", seed=seed, output_format="png")[0].read_bytes() == path.read_bytes()


def test_any_integer_is_a_seed(predictor: Predictor, lines: list[str]) -> None:
    for seed in (-1, 0, 2**70):
        lines.clear()
        assert predictor.predict(prompt="a red circle", seed=seed, num_inference_steps=1)
        assert lines[0] == f"Using seed: {seed}"


@pytest.mark.parametrize("kind", ["webp", "jpg"])
def test_quality_matters(predictor: Predictor, kind: str) -> None:
    sizes = [
        predictor.predict(prompt="a red star", seed=0, output_format=kind, output_quality=quality)[0].stat().st_size
        for quality in (0, 100)
    ]
    assert sizes[0] < sizes[1]


def test_bad_input_does_no_work(predictor: Predictor, lines: list[str]) -> None:
    lines.clear()
    with pytest.raises(InvalidInput):
        predictor.predict(prompt="x", num_outputs=0)
    assert lines == []


def test_what_fails_leaves_no_folder(predictor: Predictor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class HostCancels(BaseException):
        pass

    def cancel(line: str) -> None:
        if "50%" in line:
            raise HostCancels

    assert predictor.output_dir is not None
    before = set(predictor.output_dir.iterdir())
    monkeypatch.setattr(predictor, "say", cancel)
    with pytest.raises(HostCancels):
        predictor.predict(prompt="a red circle")
    assert set(predictor.output_dir.iterdir()) == before
    monkeypatch.setattr(predictor, "say", lambda _: None)
    assert predictor.predict(prompt="a red circle", seed=0)[0].exists()

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(predictor, "output_dir", tmp_path / "file")
    with pytest.raises(OutputError, match="file"):
        predictor.predict(prompt="a red circle")


def test_cancelled(predictor: Predictor) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(RequestCancelled):
        predictor.predict(prompt="a red circle", cancel=cancel)
    assert predictor.predict(prompt="a red circle", seed=0)[0].exists()


def test_unknown_names() -> None:
    with pytest.raises(UnknownSchema, match="did you mean 'flux-schnell'"):
        find_schema("flux-schnel")
    with pytest.raises(UnknownModel):
        Predictor("flux-schnell", model="nothing")


def test_a_model_is_no_schema() -> None:
    with pytest.raises(UnknownSchema, match="'demo-dev' is a model and no schema: name a schema, and it as its model"):
        Predictor("demo-dev")
    with pytest.raises(UnknownSchema, match="a schema is named by a text, not by None"):
        Predictor(None)  # type: ignore[arg-type]


def test_where_predictions_go_may_be_a_text(tmp_path: Path) -> None:
    predictor = Predictor("flux-schnell", model="demo-schnell", output_dir=str(tmp_path / "a"), say=lambda _: None)
    [path] = predictor.predict(prompt="x", num_inference_steps=1, megapixels="0.25")  # type: ignore[misc]
    assert path.parent.parent == tmp_path / "a"
    with pytest.raises(InvalidRequest, match="output_dir is a path, not 3"):
        Predictor("flux-schnell", output_dir=3)  # type: ignore[arg-type]


def test_a_model_of_another_family_is_remarked(tmp_path: Path) -> None:
    lines: list[str] = []
    predictor = Predictor("flux-dev", model="demo-sdxl", device="cpu", output_dir=tmp_path, say=lines.append)
    remark = "flux-dev is published for flux models, and demo-sdxl is one of sdxl"
    assert predictor.resolve({"prompt": "x"})["notes"][0] == remark
    predictor.setup()
    assert lines == [remark]
    assert Predictor("sdxl", model="demo-sdxl").resolve({"prompt": "x"})["notes"][0] != remark


def test_setup_happens_on_the_first_prediction(tmp_path: Path) -> None:
    predictor = Predictor("flux-schnell", model="demo-schnell", output_dir=tmp_path / "deep" / "er", say=lambda _: None)
    assert predictor.predict(prompt="x", num_inference_steps=1)[0].parent.parent == tmp_path / "deep" / "er"


def test_go_fast_chooses_the_precision(tmp_path: Path) -> None:
    lines: list[str] = []
    predictor = Predictor(
        "flux-schnell", model="demo-schnell", device="cpu", quantization="both", output_dir=tmp_path, say=lines.append
    )
    asked = {"prompt": "a red circle", "seed": 5, "num_inference_steps": 2, "output_format": "png"}
    fast, slow = ([Path(p).read_bytes() for p in predictor.predict(go_fast=go, **asked)] for go in (True, False))
    assert fast != slow and not [line for line in lines if line.startswith("go_fast")]
    other = Predictor("flux-schnell", model="demo-schnell", device="cpu", output_dir=tmp_path, say=lines.append)
    assert [Path(p).read_bytes() for p in other.predict(go_fast=False, **asked)] == slow
    assert not [line for line in lines if line.startswith("go_fast")]
    other.predict(**asked)  # the schema's default is true, but nobody asked
    assert not [line for line in lines if line.startswith("go_fast")]
    other.predict(go_fast=True, **asked)
    assert "go_fast: no weights of 8 bits are loaded, demo-schnell ran in full precision" in lines


def test_what_had_to_come_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    predictor = Predictor(
        "flux-schnell",
        model="demo-schnell",
        device="cpu",
        dtype="float32",
        memory="40MB",
        output_dir=tmp_path,
        say=lines.append,
    )
    asked = {"seed": 5, "num_inference_steps": 2, "output_format": "png"}
    first = predictor.predict(prompt="a red circle", **asked)
    assert [line for line in lines if re.fullmatch(r"memory: \d+\.\d MB of weights came to the device for it", line)]
    whole = Predictor("flux-schnell", model="demo-schnell", device="cpu", dtype="float32", output_dir=tmp_path)
    made = [Image.open(paths[0]) for paths in (first, whole.predict(prompt="a red circle", **asked))]
    assert ImageChops.difference(*made).convert("L").getextrema()[1] <= 1
