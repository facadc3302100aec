"""LoRAs of predictions: what names them, whose they are, and that no prediction has another's."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora_files as files
import pytest
import torch
from lora_files import as_diffusers, modules
from PIL import Image
from safetensors.torch import save, save_file
from test_inversion import a_tar, pti

import flux_engine
from flux_engine import InvalidRequest, LoRA, Predictor, WeightsError
from flux_engine.predictor import predictor as module
from flux_engine.predictor.translation import translate
from flux_engine.replicate.schema import InvalidInput
from flux_engine.replicate.schemas import SCHEMAS, find_schema
from flux_engine.specs import DEMO_DEV

NAMES = [f"single_transformer_blocks.{i}.{name}" for i in range(4) for name in ("proj_mlp", "proj_out", "attn.to_q")]
SMALL: dict[str, Any] = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 1, "megapixels": "0.25"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three LoRAs for demo-dev, a.safetensors to c.safetensors."""
    made = tmp_path_factory.mktemp("loras")
    net = flux_engine.load("demo-dev", dtype="float32", device="cpu")._pipeline.family.net
    weights = as_diffusers(net, 192)
    for seed, name in enumerate("abc"):
        tensors, _ = files.peft("transformer.")(modules(weights, NAMES, seed, 0.3))
        save_file(tensors, made / f"{name}.safetensors")
    return made


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLUX_ENGINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def speak(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Callable[..., Predictor]:
    made: dict[str, Predictor] = {}

    def speak(schema: str, **options: Any) -> Predictor:
        key = json.dumps([schema, {name: str(value) for name, value in options.items()}])
        if key not in made:
            options = {"model": "demo-dev", "local_files": True, "safety": None} | options
            folder = tmp_path_factory.mktemp("out")
            made[key] = Predictor(schema, device="cpu", dtype="float32", output_dir=folder, say=lines.append, **options)
        return made[key]

    return speak


def draw(predictor: Predictor, **inputs: Any) -> bytes:
    (path,) = predictor.predict(**SMALL | {"output_format": "png"} | inputs)  # pyright: ignore[reportGeneralTypeIssues]
    return path.read_bytes()


def test_each_of_two_matters_and_so_does_its_scale(speak: Callable[..., Predictor], folder: Path) -> None:
    a, b = str(folder / "a.safetensors"), str(folder / "b.safetensors")
    dev = speak("flux-dev-lora")
    plain = draw(dev)
    asked: list[dict[str, Any]] = [
        {"lora_weights": a},
        {"lora_weights": a, "lora_scale": 0.5},
        {"lora_weights": a, "lora_scale": -1},
        {"lora_weights": a, "extra_lora": b},
        {"lora_weights": a, "extra_lora": b, "extra_lora_scale": 0.5},
        {"extra_lora": b},
        {"lora_weights": b, "extra_lora": a},
    ]
    drawn = [draw(dev, **each) for each in asked]
    assert len({plain, *drawn[:-1]}) == 7
    assert Image.open(io.BytesIO(drawn[-1])).size == Image.open(io.BytesIO(drawn[3])).size
    assert draw(dev) == plain, "a LoRA stayed"
    assert draw(dev, lora_weights=a, lora_scale=0) == plain
    assert draw(dev, lora_weights="  ", extra_lora=None) == plain
    assert draw(dev, lora_weights=b) == drawn[5]


def test_the_same_twice_counts_once(speak: Callable[..., Predictor], folder: Path, lines: list[str]) -> None:
    a, dev = str(folder / "a.safetensors"), speak("flux-dev-lora")
    once = draw(dev, lora_weights=a)
    assert draw(dev, lora_weights=a, extra_lora=f" {a} ") == once
    assert "extra_lora ignored: it is the same as lora_weights" in lines


def test_a_data_uri(speak: Callable[..., Predictor], folder: Path, tmp_path: Path) -> None:
    content = (folder / "a.safetensors").read_bytes()
    tar = a_tar(tmp_path / "a.tar", {"output/flux_train_replicate/lora.safetensors": content, "config.yaml": b"x"})
    uri = "data:application/x-tar;base64," + base64.b64encode(tar.read_bytes()).decode()
    dev = speak("flux-dev-lora")
    assert draw(dev, lora_weights=uri) == draw(dev, lora_weights=str(folder / "a.safetensors"))


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"lora_weights": "/etc/passwd"}, "lora_weights", "is a path, which is not read here"),
    ({"lora_weights": "no name"}, "lora_weights", "Understood are"),
    ({"extra_lora": "ftp://a/b.safetensors"}, "extra_lora", "https is fetched"),
    ({"lora_weights": 3}, "lora_weights", "valid string"),
    ({"lora_scale": 3.5}, "lora_scale", "less than or equal to 3"),
    ({"hf_api_token": 7}, "hf_api_token", "not (a secret)"),
]


@pytest.mark.parametrize(("inputs", "name", "words"), REFUSED, ids=[row[1] + str(n) for n, row in enumerate(REFUSED)])
def test_what_names_none_is_refused_before_anything(
    monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any], name: str, words: str
) -> None:
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(InvalidInput) as caught:
        Predictor("flux-dev-lora", model="demo-dev").predict(**SMALL | inputs)
    assert caught.value.field == name
    assert words in str(caught.value)


def test_what_cannot_be_had_is_said_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    said: list[str] = []
    predictor = Predictor("flux-dev-lora", model="demo-dev", say=said.append)
    with pytest.raises(WeightsError, match=r"the Replicate model owner/name .*offline"):
        predictor.predict(**SMALL, lora_weights="owner/name", civitai_api_token="hush", hf_api_token="hush")
    assert said == []


def test_a_secret_is_what_cog_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Secret:
        def get_secret_value(self) -> str:
            return "hush"

    tokens: list[Any] = []

    def finder(config: Any, **_: Any) -> Any:
        tokens.append((config.hf_token, config.civitai_api_token))
        raise WeightsError("here")

    monkeypatch.setattr(module, "finder", finder)
    predictor = Predictor("flux-dev-lora", model="demo-dev")
    for token in ("hush", Secret()):
        with pytest.raises(WeightsError, match="here"):
            predictor.predict(**SMALL, lora_weights="owner/name", civitai_api_token=token)
    assert tokens == [(None, "hush")] * 2


def test_a_wrong_file_is_refused_and_the_next_prediction_is_right(
    speak: Callable[..., Predictor], folder: Path, tmp_path: Path
) -> None:
    dev = speak("flux-dev-lora")
    plain = draw(dev)
    wrong = tmp_path / "wrong.safetensors"
    save_file({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(4, 4)}, wrong)
    with pytest.raises(WeightsError, match=r"SDXL|Stable Diffusion"):
        draw(dev, lora_weights=str(wrong))
    assert draw(dev) == plain


def test_a_fine_tunes_own_lora(speak: Callable[..., Predictor], folder: Path) -> None:
    a, b, c = (str(folder / f"{name}.safetensors") for name in "abc")
    tuned = speak("flux-finetune", lora=a)
    other = speak("flux-dev-lora")
    small = {"model": "dev", "guidance_scale": 3}
    assert draw(tuned, **small) == draw(other, lora_weights=a, go_fast=False)
    assert draw(tuned, **small, lora_scale=0.5) == draw(other, lora_weights=a, lora_scale=0.5)
    assert draw(tuned, **small, extra_lora=c) == draw(other, lora_weights=a, extra_lora=c)
    assert draw(tuned, **small, replicate_weights=b) == draw(other, lora_weights=b)
    with pytest.raises(InvalidRequest, match="takes no LoRA"):
        Predictor("flux-dev", model="demo-dev", lora=a)


def test_a_fine_tunes_own_lora_is_looked_for_once(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    """What it means may be asked of the network; and before the model is loaded, which takes longer."""
    asked: list[str] = []
    finder = module.finder

    def counted(*arguments: Any, **options: Any) -> Any:
        find = finder(*arguments, **options)
        return lambda named: asked.append("lora") or find(named)

    load = module.load
    monkeypatch.setattr(module, "finder", counted)
    monkeypatch.setattr(module, "load", lambda *a, **o: asked.append("model") or load(*a, **o))
    tuned = Predictor("flux-finetune", model="demo-dev", lora=folder / "a.safetensors", safety=None,
                      output_dir=tmp_path, say=lambda _: None)  # fmt: skip
    tuned.setup()
    assert asked == ["lora", "model"]
    for _ in range(2):
        draw(tuned, model="dev", guidance_scale=3)
    assert asked == ["lora", "model"]


def test_a_fine_tune_draws_with_the_model_that_is_chosen(speak: Callable[..., Predictor]) -> None:
    both = speak("flux-finetune", model={"dev": "demo-dev", "schnell": "demo-schnell"})
    assert both.model == "demo-dev"
    dev, schnell = draw(both), draw(both, model="schnell")
    assert dev == draw(speak("flux-dev"), guidance=3)
    assert schnell == draw(speak("flux-schnell", model="demo-schnell"))
    with pytest.raises(InvalidInput, match="'schnell' is not loaded, only dev"):
        draw(speak("flux-finetune"), model="schnell")
    with pytest.raises(InvalidRequest, match="models for dev, schnell, not for pro"):
        Predictor("flux-finetune", model={"pro": "demo-dev"})
    with pytest.raises(InvalidRequest, match="takes one model"):
        Predictor("flux-dev", model={"dev": "demo-dev"})
    assert Predictor("flux-finetune").reader.models == {"dev": "flux-dev", "schnell": "flux-schnell"}


def test_sizes_of_a_fine_tune(tmp_path: Path) -> None:
    schema = find_schema("flux-finetune")
    image = tmp_path / "image.png"
    Image.new("RGB", (320, 160), "red").save(image)

    def size(**inputs: Any) -> tuple[int, int]:
        values = schema.validate({"prompt": "a circle"} | inputs)
        job = translate(schema, values, spec, seed=0).request.resolve(spec)
        return job.width, job.height

    spec = replace(DEMO_DEV, sizes=flux_engine.specs.FLUX_DEV.sizes)  # type: ignore[attr-defined]
    assert size() == (1024, 1024)
    assert size(aspect_ratio="16:9", width=300, height=1000) == (1344, 768)
    assert size(aspect_ratio="custom", width=300, height=1000, megapixels="0.25") == (304, 1008)
    assert size(aspect_ratio="custom", width=300, height=1000, image=image) == (320, 160)
    assert size(aspect_ratio="9:16", image=image, mask=image) == (320, 160)
    with pytest.raises(InvalidInput, match="height: aspect_ratio is custom: say width and height"):
        size(aspect_ratio="custom", width=300)
    with pytest.raises(InvalidInput, match="width: Input should be less than or equal to 1440"):
        size(aspect_ratio="custom", width=2000, height=300)


def test_two_at_once_have_their_own(speak: Callable[..., Predictor], folder: Path) -> None:
    dev = speak("flux-dev-lora")
    names = [str(folder / f"{name}.safetensors") for name in "abc"]
    alone = [draw(dev, lora_weights=name) for name in names]
    found: list[tuple[int, bytes]] = []

    def work(number: int) -> None:
        found.append((number % 3, draw(dev, lora_weights=names[number % 3])))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(alone[number] == picture for number, picture in found)


def test_loras_of_a_request_are_its_own(folder: Path) -> None:
    """And those that the engine has set are back after it."""
    engine = flux_engine.load("demo-dev", dtype="float32", device="cpu")
    small: dict[str, Any] = {"seed": 0, "num_inference_steps": 1, "megapixels": "0.25", "output_type": "latent"}

    def latent(**fields: Any) -> torch.Tensor:
        return engine("a red circle", **small | fields).image

    a, b = folder / "a.safetensors", folder / "b.safetensors"
    plain = latent()
    engine.lora.set([a])
    with_a = latent()
    with_b = latent(loras=[LoRA(b, 0.7)])
    result = engine("a red circle", seed=0, num_inference_steps=1, megapixels="0.25", loras=[LoRA(b, 0.7), a])
    assert result.loras == (("b.safetensors", 0.7), ("a.safetensors", 1.0))
    assert 'LoRAs: "b.safetensors: 0.7, a.safetensors: 1", Seed: 0' in result.parameters()
    assert engine.lora.active == (LoRA(a),)
    assert torch.equal(latent(loras=[]), plain)
    assert torch.equal(latent(), with_a)
    assert torch.equal(latent(loras=[LoRA(b, 0.7)]), with_b)
    assert not torch.equal(with_a, with_b)
    with pytest.raises(InvalidRequest, match="list of paths"):
        latent(loras=str(a))
    with pytest.raises(WeightsError, match="does not exist"):
        latent(loras=["/nowhere.safetensors"])
    engine.lora.clear()
    assert torch.equal(latent(), plain)


def test_a_mode_is_the_requests_own() -> None:
    engine = flux_engine.load("demo-sdxl", device="cpu", dtype="float32")
    job = engine("a red circle", seed=0, width=128, height=128, loras=["demo-sdxl-lcm"]).job
    assert (job.num_inference_steps, job.scheduler, job.true_cfg_scale) == (4, "LCM", 1.0)
    assert engine.spec.num_inference_steps == 25
    job = engine("a red circle", seed=0, width=128, height=128, num_inference_steps=2).job
    assert (job.scheduler, job.true_cfg_scale) == ("K_EULER", 2.0)


def test_tokens_that_come_with_a_lora_are_learned_with_it(tmp_path: Path) -> None:
    """What Replicate's SDXL trainer leaves: a LoRA, the rows of its tokens, and the word for them."""
    engine = flux_engine.load("demo-sdxl", device="cpu", dtype="float32")
    family: Any = engine._pipeline.family
    rows = [
        plain[reader.tokenizer("red").input_ids[1:-1]].detach().clone()
        for reader, plain in zip(family.text.readers, family.text.plain(), strict=True)
    ]
    weights = as_diffusers(family.net, 0, tuple(map(bool, engine.spec.unet.transformer_depth)))  # pyright: ignore
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1."
    lora, _ = files.processors("")(modules(weights, [f"{block}to_q", f"{block}to_v"], 0, 0.3))
    tar = a_tar(
        tmp_path / "trained.tar",
        {
            "lora.safetensors": save({name: t.contiguous() for name, t in lora.items()}),
            "embeddings.pti": pti(rows),
            "special_params.json": json.dumps({"TOK": "<s0>"}).encode(),
        },
    )

    def latent(prompt: str, **fields: Any) -> torch.Tensor:
        asked: dict[str, Any] = {
            "seed": 0,
            "num_inference_steps": 2,
            "width": 128,
            "height": 128,
        }
        return engine(prompt, output_type="latent", **asked | fields).image

    plain, unknown = latent("a red circle"), latent("a TOK circle")
    engine.lora.set([tar])
    assert torch.equal(latent("a TOK circle"), latent("a red circle"))
    assert not torch.equal(latent("a red circle"), plain)
    engine.lora.clear()
    assert torch.equal(latent("a TOK circle"), unknown)
    assert torch.equal(latent("a TOK circle", loras=[LoRA(tar, 0.5)]), latent("a red circle", loras=[LoRA(tar, 0.5)]))
    assert torch.equal(latent("a TOK circle"), unknown)
    assert torch.equal(latent("a red circle"), plain)


def test_every_schema_with_loras_says_so() -> None:
    named = {name: [one.weights for one in schema.loras] for name, schema in SCHEMAS.items() if schema.loras}
    for name, schema in SCHEMAS.items():
        inputs = {one.name for one in schema.inputs}
        weights = inputs & {"lora_weights", "replicate_weights", "extra_lora"}
        assert weights == set(named.get(name, []))
        assert all(one.scale in inputs for one in schema.loras)
