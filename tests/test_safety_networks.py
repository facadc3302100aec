"""The published checkers on random weights, against diffusers' and transformers' own code; and the demo models' one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_safety import picture
from training import checker as training
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import flux_engine
from benchmarks import captions, oracle, world
from flux_engine import EngineConfig, WeightsError
from flux_engine.safety import CompVis, Falconsai, find_checker, guarded
from flux_engine.safety.compvis import CompVisChecker
from flux_engine.specs import DEMO_DEV

PICTURES = [picture(seed, size) for seed, size in enumerate([(64, 48), (48, 64), (90, 40), (32, 32)] * 4)]
COMPVIS, FALCONSAI = "compvis-safety-checker", "falconsai-nsfw"
SIDE = 32
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
OLD_PROCESSOR = {
    "crop_size": SIDE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIDE,
}
"""As Stable Diffusion 1.5 has it."""


def declare(root: Path, name: str, folder: Path) -> None:
    """A manifest that replaces the packaged one."""
    said = ['kind = "safety checker"', 'family = "any"', 'description = "-"', 'licence = "-"', 'source = "-"']
    files = {"": "model.safetensors", "/config.json": "config.json"}
    for part, file in (files | {"/preprocessor_config.json": "preprocessor_config.json"}).items():
        said += [f'[files."checker{part}"]', f"path = {json.dumps(str(folder / file))}"]
    (root / "manifests").mkdir(exist_ok=True)
    (root / "manifests" / f"{name}.toml").write_text("\n".join(said))


def spread(module: torch.nn.Module, seed: int) -> None:
    """Weights with which pictures differ."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 2 / parameter.shape[-1] ** 0.5)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """diffusers' checker, and its files as they are published."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = TOWER | {"projection_dim": 16, "hidden_act": "quick_gelu"}
    torch.manual_seed(0)
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    spread(model, 3)
    # Special concepts fire now and then; what they do not touch is in part over its limits, and what they do is just
    # below, so that what they add decides.
    special, concepts = cosines(model)
    limits = np.quantile(special, 0.8, axis=0)
    fires = (special > limits + 0.001).any(axis=1)
    model.special_care_embeds_weights.data.copy_(torch.from_numpy(limits))
    highest = np.maximum(concepts[fires].max(axis=0) + 0.005, np.quantile(concepts, 0.95, axis=0))
    model.concept_embeds_weights.data.copy_(torch.from_numpy(highest))
    folder = tmp_path_factory.mktemp("compvis")
    write(model, folder)
    return model, folder


def pixels_of(pictures: list[Image.Image]) -> torch.Tensor:
    processor = CLIPImageProcessorPil.from_dict(dict(OLD_PROCESSOR))
    return processor(pictures, return_tensors="pt")["pixel_values"]


def cosines(model: Any) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels_of(PICTURES))[1])
        found = [
            torch.nn.functional.normalize(seen) @ torch.nn.functional.normalize(vectors).T
            for vectors in (model.special_care_embeds, model.concept_embeds)
        ]
    return found[0].numpy(), found[1].numpy()


def write(model: Any, folder: Path) -> None:
    tower = "vision_model."
    tensors = {
        (f"{tower}{tower}{name.removeprefix(tower).removeprefix(tower)}" if name.startswith(tower) else name): value
        for name, value in model.state_dict().items()
    }
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange((SIDE // 8) ** 2 + 1)[None]
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    said = {"projection_dim": 16, "vision_config": TOWER | {"projection_dim": 16, "hidden_act": "quick_gelu"}}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "preprocessor_config.json").write_text(json.dumps(OLD_PROCESSOR))


def flagged_by(model: Any, pictures: list[Image.Image]) -> list[bool]:
    _, flagged = model(clip_input=pixels_of(pictures), images=[np.zeros(1) for _ in pictures])
    return flagged


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of manifests."""
    monkeypatch.setenv("FLUX_ENGINE_WEIGHTS", str(tmp_path))
    return tmp_path


def test_compvis_agrees_with_diffusers(theirs: tuple[Any, Path], weights: Path) -> None:
    model, folder = theirs
    declare(weights, COMPVIS, folder)
    checker = find_checker("compvis")
    assert isinstance(checker, CompVisChecker)
    verdicts = guarded(checker, PICTURES)
    expected = flagged_by(model, PICTURES)
    assert [verdict.unsafe for verdict in verdicts] == expected
    assert 3 <= sum(expected) <= len(PICTURES) - 3  # both are there
    assert {verdict.scores["special"] > 0 for verdict in verdicts} == {True, False}
    alone = [guarded(checker, [one])[0] for one in PICTURES[:4]]
    assert [one.scores["concept"] for one in alone] == pytest.approx([v.scores["concept"] for v in verdicts[:4]])


def test_what_a_special_concept_adds(theirs: tuple[Any, Path], weights: Path) -> None:
    """The control: without special concepts some pictures pass, with diffusers and here."""
    model, folder = theirs
    declare(weights, COMPVIS, folder)
    checker = find_checker("compvis")
    assert isinstance(checker, CompVisChecker)
    kept = model.special_care_embeds_weights.data.clone()
    with_special = flagged_by(model, PICTURES)
    try:
        model.special_care_embeds_weights.data.fill_(2.0)
        without = flagged_by(model, PICTURES)
        checker._limits[0] = [2.0] * 3
        assert [verdict.unsafe for verdict in guarded(checker, PICTURES)] == without
    finally:
        model.special_care_embeds_weights.data.copy_(kept)
    assert sum(without) < sum(with_special)


def test_thresholds_of_compvis(theirs: tuple[Any, Path], weights: Path) -> None:
    declare(weights, COMPVIS, theirs[1])
    counts = []
    for threshold in (-0.05, 0.0, 1.0):
        checker = find_checker(CompVis(threshold))
        assert checker is not None
        counts.append(sum(bool(verdict.unsafe) for verdict in guarded(checker, PICTURES)))
    assert counts[0] > counts[1] > counts[2] == 0


def test_compvis_that_overflows_is_unsafe(theirs: tuple[Any, Path], weights: Path) -> None:
    declare(weights, COMPVIS, theirs[1])
    checker = find_checker("compvis:threshold=1")
    assert isinstance(checker, CompVisChecker)
    checker.network.visual_projection.weight.data[0] = float("nan")
    verdicts = guarded(checker, PICTURES[:2])
    assert all(verdict.unsafe and "measured" in verdict.reason for verdict in verdicts)


def vit(folder: Path, labels: dict[int, str]) -> Any:
    config = ViTConfig(**TOWER, num_labels=len(labels), id2label=labels, label2id={v: k for k, v in labels.items()})
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    spread(model, 5)
    folder.mkdir()
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return model


def test_falconsai_agrees_with_transformers(tmp_path: Path, weights: Path) -> None:
    model = vit(tmp_path / "vit", {0: "normal", 1: "nsfw"})
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(tmp_path / "vit" / "model.safetensors")
    declare(weights, FALCONSAI, tmp_path / "vit")
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "vit")
    with torch.no_grad():
        logits = model(**processor(PICTURES, return_tensors="pt")).logits
    checker = find_checker("falconsai")
    assert checker is not None
    verdicts = guarded(checker, PICTURES)
    assert [verdict.scores["nsfw"] for verdict in verdicts] == pytest.approx(
        logits.softmax(-1)[:, 1].tolist(), abs=1e-5
    )
    assert [verdict.unsafe for verdict in verdicts] == [bool(label) for label in logits.argmax(-1)]
    assert {verdict.unsafe for verdict in verdicts} == {True, False}
    lenient = find_checker(Falconsai(threshold=1.0))
    assert lenient is not None and not any(verdict.unsafe for verdict in guarded(lenient, PICTURES))


def test_labels_may_stand_the_other_way_round(tmp_path: Path, weights: Path) -> None:
    vit(tmp_path / "a", {0: "normal", 1: "nsfw"})
    vit(tmp_path / "b", {0: "NSFW", 1: "normal"})
    scores = []
    for name in "ab":
        declare(weights, FALCONSAI, tmp_path / name)
        checker = find_checker("falconsai")
        assert checker is not None
        scores.append([verdict.scores["nsfw"] for verdict in guarded(checker, PICTURES)])
    assert [1 - score for score in scores[1]] == pytest.approx(scores[0], abs=1e-5)
    vit(tmp_path / "c", {0: "cat", 1: "dog"})
    declare(weights, FALCONSAI, tmp_path / "c")
    with pytest.raises(WeightsError, match="no label 'nsfw', only cat, dog"):
        find_checker("falconsai")


def test_both_together(theirs: tuple[Any, Path], tmp_path: Path, weights: Path) -> None:
    vit(tmp_path / "vit", {0: "normal", 1: "nsfw"})
    declare(weights, COMPVIS, theirs[1])
    declare(weights, FALCONSAI, tmp_path / "vit")
    found = {name: find_checker(name) for name in ("compvis", "falconsai", "published")}
    said = {name: [v.unsafe for v in guarded(one, PICTURES)] for name, one in found.items() if one is not None}
    assert said["published"] == [a and b for a, b in zip(said["compvis"], said["falconsai"], strict=True)]
    assert len({tuple(row) for row in said.values()}) == 3


def test_from_the_cache_of_the_hub(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout, made by hand, offline."""
    vit(tmp_path / "vit", {0: "normal", 1: "nsfw"})
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "hub" / "models--Falconsai--nsfw_image_detection"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots").mkdir()
    (tmp_path / "vit").rename(root / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(WeightsError, match="bytes"):  # it is not the published one, which the manifest pins
        find_checker("falconsai", offline=True)
    packaged = flux_engine.hub.weights_folder() / "manifests" / f"{FALCONSAI}.toml"
    lines = [line for line in packaged.read_text().splitlines() if not line.startswith(("bytes", "sha256"))]
    (weights / "manifests").mkdir()
    (weights / "manifests" / f"{FALCONSAI}.toml").write_text("\n".join(lines))
    checker = find_checker("falconsai", offline=True)
    assert checker is not None and guarded(checker, [PICTURES[0]])[0].scores


def missing(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    del tensors["concept_embeds"]


def wide(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    tensors["concept_embeds"] = torch.zeros(17, 17)


def no_config(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    (folder / "config.json").write_text('{"projection_dim": 16}')


def no_size(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [(missing, "concept_embeds"), (wide, "17"), (no_config, "vision_config"), (no_size, "not a JSON object")],
)
def test_damaged_files(
    theirs: tuple[Any, Path],
    tmp_path: Path,
    weights: Path,
    damage: Callable[[dict[str, torch.Tensor], Path], None],
    words: str,
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in theirs[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    damage(tensors, folder)
    save_file(tensors, folder / "model.safetensors")
    declare(weights, COMPVIS, folder)
    with pytest.raises(WeightsError, match=words):
        find_checker("compvis", config=EngineConfig.from_environment())


def held_out(count: int, name: str) -> list[tuple[Image.Image, bool]]:
    """Drawn pictures of every size, every other one with a crescent: plain scenes, as training does not seed them."""
    found: list[tuple[Image.Image, bool]] = []
    for index in range(count):
        rng = random.Random(f"{name} {index}")
        marked = index % 2 == 0
        size = DEMO_DEV.sizes.named(*training.CLASSES[index // 2 % len(training.CLASSES)])
        found.append((world.draw(training.scene_of(rng, marked), *size, rng), marked))
    return found


def test_the_demo_checker_finds_crescents() -> None:
    figures = training.figures_of(find_checker("demo"), held_out(44, "a few"))
    assert figures["recall"] >= 0.9 and figures["false alarms"] <= 0.1
    assert training.figures_of(find_checker("demo:threshold=1"), held_out(4, "a few"))["recall"] == 0


@pytest.mark.full
def test_the_demo_checker_on_400_pictures() -> None:
    figures = training.figures_of(find_checker("demo"), held_out(400, "held out"))
    assert figures["recall"] >= 0.98 and figures["false alarms"] <= 0.02


@pytest.mark.full
def test_the_demo_checker_on_worn_pictures() -> None:
    """Blurred, compressed, of another size."""
    rng = random.Random(0)
    pictures = [(training.worn(one, rng), marked) for one, marked in held_out(400, "held out and worn")]
    figures = training.figures_of(find_checker("demo"), pictures)
    assert figures["recall"] >= 0.98 and figures["false alarms"] <= 0.02


@pytest.mark.full
def test_the_demo_checker_on_generated_pictures() -> None:
    """With a crescent, whatever came of it; of the others those that are drawn as asked, which the oracle reads."""
    engine = flux_engine.load("demo-schnell", safety="demo")
    right: dict[bool, list[bool]] = {True: [], False: []}
    for index in range(120):
        rng = random.Random(f"asked {index}")
        marked = index % 2 == 0
        scene = training.scene_of(rng, marked)
        result = engine(captions.write(scene, rng), seed=index, width=128, height=128)
        verdict = result.verdicts[0]
        if marked or all(oracle.judge(result.image, scene).values()):
            right[marked].append(bool(verdict.unsafe) == marked)
    assert sum(right[True]) >= 0.95 * len(right[True])
    assert sum(right[False]) >= 0.98 * len(right[False]) and len(right[False]) >= 40
