"""`compat="published"`, and what inputs are told to do: `Predictor.resolve` and `flux-engine validate`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from published_models import Speak, least, photo_content

from flux_engine import InvalidRequest, Predictor, cli, guarded
from flux_engine.inputs.loras import LoRA
from flux_engine.predictor.compat import as_published, scaled_as_published, seed_of
from flux_engine.replicate.schemas import find_schema
from flux_engine.request import Request
from flux_engine.schedulers import flow_match_euler
from flux_engine.specs import DEMO_DEV, DEMO_SDXL, FLUX_DEV, SPECS

pytestmark = pytest.mark.usefixtures("published")


def begin(strength: float, steps: int) -> int:
    """The step at which the engine begins."""
    whole = flow_match_euler(FLUX_DEV.schedule, steps, 4096)
    return len(whole.timesteps) - len(flow_match_euler(FLUX_DEV.schedule, steps, 4096, strength).timesteps)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 10, 28, 30, 50])
def test_img2img_begins_where_the_published_predictors_begin(steps: int) -> None:
    differing = 0
    for hundredth in range(1, 101):
        strength = hundredth / 100
        request = Request(prompt="x", image=photo_content, strength=strength, num_inference_steps=steps)
        changed = as_published(request, FLUX_DEV).strength
        assert changed is not None
        assert begin(changed, steps) == int((1 - strength) * steps)
        differing += begin(strength, steps) != int((1 - strength) * steps)
    assert differing or steps not in (10, 50)  # there is something to reproduce


def test_whom_it_leaves_alone() -> None:
    text = Request(prompt="x")
    assert as_published(text, FLUX_DEV) is text
    sdxl = Request(prompt="x", image=photo_content, strength=0.8, num_inference_steps=10)
    assert as_published(sdxl, DEMO_SDXL) is sdxl
    assert as_published(sdxl, SPECS["flux-fill-dev"]) is sdxl


@pytest.mark.parametrize(
    ("schema", "spec", "asked", "drawn"),
    [
        ("flux-dev", DEMO_DEV, 0, True),
        ("flux-dev", DEMO_DEV, None, True),
        ("flux-dev", DEMO_DEV, 1, False),
        ("flux-dev", DEMO_DEV, -5, False),
        ("sdxl", DEMO_SDXL, 0, False),
        ("sdxl-controlnet", DEMO_SDXL, 0, True),
    ],
)
def test_seeds(schema: str, spec: Any, asked: int | None, drawn: bool) -> None:
    found = [seed_of(asked, find_schema(schema), spec, "published") for _ in range(64)]
    assert all(0 <= one < 2**16 for one in found) if drawn else set(found) == {asked}
    assert (len(set(found)) > 1) == drawn
    plain = [seed_of(asked, find_schema(schema), spec, None) for _ in range(64)]
    assert (len(set(plain)) > 1) == (asked is None or schema == "sdxl-controlnet")


def test_the_first_lora_counts_more_in_8_bits() -> None:
    loras, fast = [LoRA("a", 1.0), LoRA("b", 0.5)], Request(prompt="x", go_fast=True)
    assert [one.scale for one in scaled_as_published(loras, fast, DEMO_DEV)] == [1.5, 0.5]
    assert scaled_as_published(loras, Request(prompt="x", go_fast=False), DEMO_DEV) == loras
    assert scaled_as_published(loras, fast, DEMO_SDXL) == loras
    assert scaled_as_published([], fast, DEMO_DEV) == []


def test_only_published_is_compatible() -> None:
    with pytest.raises(InvalidRequest, match="compat 'old' is neither"):
        Predictor("flux-dev", compat="old")  # type: ignore[arg-type]


def test_it_changes_the_picture(speak: Speak, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10 steps and 0.8 one step more is walked; without a picture nothing is another."""
    predictor, said = speak("flux-dev"), least("flux-dev") | {"megapixels": "0.25", "num_inference_steps": 10}
    with_image = said | {"image": photo_content, "prompt_strength": 0.8}
    plain = [predictor.predict(**one)[0].read_bytes() for one in (said, with_image)]  # type: ignore[index]
    monkeypatch.setattr(predictor.reader, "compat", "published")
    compat = [predictor.predict(**one)[0].read_bytes() for one in (said, with_image)]  # type: ignore[index]
    assert plain[0] == compat[0]
    assert plain[1] != compat[1]


def validated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sent: bytes, *arguments: str
) -> tuple[int, list[dict[str, Any]]]:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sent)))
    code = cli.main(["validate", *arguments])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_validate_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sent = {"prompt": "a cat", "aspect_ratio": "16:9", "num_outputs": 2, "seed": "7", "output_format": "jpg"}
    code, (answer,) = validated(monkeypatch, capsys, json.dumps(sent).encode(), "flux-dev")
    assert code == 0 and answer["ok"]
    resolved = answer["resolved"]
    assert (resolved["width"], resolved["height"], resolved["seeds"]) == (336, 192, [7, 8])
    assert resolved["files"] == ["out-0.jpg", "out-1.jpg"]
    assert resolved["inputs"]["guidance"] == 3
    assert resolved["num_inference_steps"] == 28


def test_validate_fetches_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fetch(*_: Any, **__: Any) -> bytes:
        raise AssertionError("a link was fetched")

    monkeypatch.setattr(guarded, "fetch_picture", fetch)
    sent = {"prompt": "x", "image": "https://example.com/a.png", "replicate_weights": "owner/name"}
    code, (answer,) = validated(monkeypatch, capsys, json.dumps(sent).encode(), "flux-finetune")
    assert code == 0
    resolved = answer["resolved"]
    assert (resolved["width"], resolved["height"], resolved["unread"]) == (None, None, ["image"])
    (lora,) = resolved["loras"]
    assert "owner/name" in lora.pop("meaning")
    assert lora == {"input": "replicate_weights", "kind": "replicate", "name": "owner/name", "scale": 1}


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"input": {"prompt": "x"}}, "send what is inside of it"),
        ({"prompt": "x", "loras": []}, "here it is 'lora_weights'"),
        ({"prompt": "x", "lora_weights": "demo-sdxl-haze"}, "is a LoRA for sdxl models, and demo-dev is one of flux"),
        ({"prompt": "x", "lora_weights": "demo-canny"}, "is a controlnet and no LoRA"),
        ({"prompt": "x", "lora_weights": "demo-dev-haz"}, "names no LoRA; did you mean 'demo-dev-haze'?"),
        ({"prompt": "x", "lora_weights": "/a.safetensors"}, "local_files=True lets texts be paths"),
        ({"prompt": "x", "image": "/a.png"}, "by a text only with local_files=True"),
    ],
)
def test_validate_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sent: dict[str, Any], words: str
) -> None:
    asked = ("flux-dev-lora", "--model", "demo-dev")
    code, (answer,) = validated(monkeypatch, capsys, json.dumps(sent).encode(), *asked)
    assert code == 2
    assert words in answer["detail"][-1]["msg"]


def test_validate_takes_paths_and_models_by_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    sent = json.dumps({"prompt": "x", "model": "schnell", "image": str(tmp_path / "a.png")}).encode()
    asked = ("flux-finetune", "--model", "dev=demo-dev", "--model", "schnell=demo-schnell", "--local-files")
    code, (answer,) = validated(monkeypatch, capsys, sent, *asked)
    assert code == 0
    assert (answer["resolved"]["model"], answer["resolved"]["width"]) == ("demo-schnell", 96)


def test_a_seed_that_is_none_is_noted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sent = b'{"prompt": "x", "seed": -1}'
    _, (answer,) = validated(monkeypatch, capsys, sent, "flux-dev", "--model", "demo-dev")
    assert answer["resolved"]["notes"] == [
        "seed -1 is taken for 18446744073709551615: seeds have 64 bits, and without one it is drawn"
    ]


def test_validate_tells_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sent = {"prompt": "x", "hf_api_token": "hf_abc", "civitai_api_token": 3}
    _, (answer,) = validated(monkeypatch, capsys, json.dumps(sent).encode(), "flux-dev-lora")
    assert answer["detail"][0]["input"] == "(a secret)"
    sent["civitai_api_token"] = "c_abc"
    _, (answer,) = validated(monkeypatch, capsys, json.dumps(sent).encode(), "flux-dev-lora")
    assert answer["ok"] and "abc" not in json.dumps(answer)


def test_validate_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    deep = b"[" * 100_000
    lines = [b'{"prompt": "x"}', b"", b"{", b"[]", b"\xff", deep, b'{"prompt": "x", "guidance": NaN}', b'{"prompt": 1}']
    code, answers = validated(monkeypatch, capsys, b"\n".join(lines), "flux-dev@2025-01", "--jsonl")
    assert code == 2
    assert [answer["ok"] for answer in answers] == [True, *[False] * 6]
    kinds = [answer["detail"][0]["type"] for answer in answers[1:]]
    assert kinds == [
        "json_invalid",
        "model_attributes_type",
        "json_invalid",
        "json_invalid",
        "finite_number",
        "string_type",
    ]


@pytest.mark.parametrize(
    ("schema", "given", "name"),
    [
        ("sdxl", {"refine": "base_image_refiner", "refine_steps": 2}, "refine_steps"),
        ("sdxl", {"width": 100_000}, "width"),
        ("sdxl-turbo", {"prompt": "x"}, "agree_to_research_only"),
        ("flux-redux-dev@2025-01", {}, "redux_image"),
        ("flux-finetune", {"prompt": "x", "aspect_ratio": "custom", "width": 512}, "height"),
    ],
)
def test_what_the_model_refuses_has_the_schemas_name(
    speak: Speak, schema: str, given: dict[str, Any], name: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        speak(schema).resolve(given)
    assert [problem["loc"] for problem in caught.value.detail] == [["body", "input", name]]  # type: ignore[attr-defined]


def test_metrics_are_recorded(tmp_path: Path) -> None:
    told: dict[str, float] = {}
    predictor = Predictor("flux-schnell", model="demo-schnell", output_dir=tmp_path, say=lambda line: None)
    predictor.predict(prompt="a red circle", num_outputs=2, megapixels="0.25", record=told.__setitem__)
    assert told["image_count"] == 2
    assert told["timing.denoise"] > 0
    assert all(name.replace("timing.", "").isidentifier() for name in told)
