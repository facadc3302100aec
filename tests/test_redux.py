"""Redux: pictures as prompts, against diffusers' and transformers' own, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise, relative_error
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5EncoderModel,
    T5Tokenizer,
)

from flux_engine import WeightsError, hub
from flux_engine.checkpoints.detect import what_is
from flux_engine.checkpoints.inspect import inspect
from flux_engine.checkpoints.source import WeightSource
from flux_engine.memory import Place
from flux_engine.models.redux import ReduxAdapter
from flux_engine.params import ReduxParams
from flux_engine.text.encoders import TextCond
from flux_engine.text.flux import FluxTextEncoder
from flux_engine.text.redux import SO400M, Preprocessing, Redux, mix

TOLERANCE = 1e-5
CPU = torch.device("cpu")
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 45,
    "patch_size": 14,
}
TOKENS = 9
"""(45 // 14) squared: the last three pixels are left out, as the last six of 384 are."""
DEMO = hub.find("demo-dev").obtain()
DEMO_WIDTH = 64
"""Of the demo models' text."""


def picture(seed: int, width: int = 60, height: int = 37) -> Image.Image:
    """Blots, so that resizing keeps something of it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def processor(side: int = 45) -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": side, "width": side})


def publish(folder: Path, text_dim: int) -> dict[str, Path]:
    """A small Redux as the published repository holds it."""
    torch.manual_seed(0)
    tower = randomise(SiglipVisionModel(SiglipVisionConfig(**TOWER)), 1)
    tower.save_pretrained(folder / "image_encoder")
    adapter = randomise(ReduxImageEncoder(TOWER["hidden_size"], text_dim), 2)
    save_file(adapter.state_dict(), folder / "redux.safetensors")
    processor().save_pretrained(folder / "feature_extractor")
    return {
        "adapter": folder / "redux.safetensors",
        "image_encoder": folder / "image_encoder",
        "image_encoder/config.json": folder / "image_encoder" / "config.json",
        "feature_extractor/preprocessor_config.json": folder / "feature_extractor" / "preprocessor_config.json",
    }


def theirs(files: dict[str, Path], text_dim: int, **parts: Any) -> FluxPriorReduxPipeline:
    adapter = ReduxImageEncoder(TOWER["hidden_size"], text_dim)
    adapter.load_state_dict(load_file(files["adapter"]), strict=True)
    tower = SiglipVisionModel.from_pretrained(files["image_encoder"]).eval()
    pipeline = FluxPriorReduxPipeline(tower, processor(), adapter.eval(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return publish(tmp_path_factory.mktemp("redux"), DEMO_WIDTH)


def load(files: dict[str, Path], **more: Any) -> Redux:
    return Redux.load(files, dtype=torch.float32, device=CPU, **more)


@pytest.fixture(scope="module")
def redux(files: dict[str, Path]) -> Redux:
    return load(files)


def test_the_adapter_agrees_with_diffusers(files: dict[str, Path], redux: Redux) -> None:
    other = ReduxImageEncoder(TOWER["hidden_size"], DEMO_WIDTH)
    other.load_state_dict(load_file(files["adapter"]), strict=True)
    x = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        assert relative_error(redux.adapter(x), other(x).image_embeds) <= TOLERANCE
        assert relative_error(redux.adapter(x.flip(1)), other(x).image_embeds) > 1e-2


def test_tokens_agree_with_diffusers_without_text(tmp_path: Path) -> None:
    files = publish(tmp_path, 4096)  # their zeros in the place of T5's tokens are as wide as the published ones
    reference = theirs(files, 4096)(picture(1)).prompt_embeds
    assert reference.shape == (1, 512 + TOKENS, 4096) and not reference[:, :512].any()
    ours = load(files)
    assert ours.text_dim == 4096
    assert relative_error(ours.encode([picture(1)]), reference[:, 512:]) <= TOLERANCE
    # Negative control: another picture.
    assert relative_error(ours.encode([picture(2)]), reference[:, 512:]) > 1e-2
    zeros = TextCond(torch.zeros(1, 512, 4096), torch.zeros(1, 768))
    mixed = mix(zeros, ours.encode([picture(1)]))
    assert relative_error(mixed.tokens, reference) <= TOLERANCE


def test_text_and_picture_agree_with_diffusers(files: dict[str, Path], redux: Redux) -> None:
    pipeline = theirs(
        files,
        DEMO_WIDTH,
        text_encoder=CLIPTextModel.from_pretrained(DEMO["text_encoder"], dtype=torch.float32).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(DEMO["tokenizer"]),
        text_encoder_2=T5EncoderModel.from_pretrained(DEMO["text_encoder_2"], dtype=torch.float32).eval(),
        tokenizer_2=T5Tokenizer.from_pretrained(DEMO["tokenizer_2"]),
    )
    prompt = "a red circle on a blue background"
    reference = pipeline(picture(1), prompt=prompt)
    text = FluxTextEncoder.load(DEMO, Place(), max_sequence_length=512).encode([prompt])
    mixed = mix(text, redux.encode([picture(1)]))
    assert mixed.tokens.shape == reference.prompt_embeds.shape
    assert relative_error(mixed.tokens, reference.prompt_embeds) <= TOLERANCE
    assert relative_error(mixed.pooled, reference.pooled_prompt_embeds) <= TOLERANCE
    for other in (mix(text, redux.encode([picture(2)])), mix(text, redux.encode([picture(1)]), 0.5)):
        assert relative_error(other.tokens, reference.prompt_embeds) > 1e-2


def test_mixing() -> None:
    generator = torch.Generator().manual_seed(4)
    text = TextCond(torch.randn(2, 5, 8, generator=generator), torch.randn(2, 3, generator=generator))
    tokens = torch.randn(3, 4, 8, generator=generator)
    mixed = mix(text, tokens, 0.25)
    assert mixed.pooled is text.pooled
    assert mixed.tokens.shape == (2, 5 + 3 * 4, 8)
    assert torch.equal(mixed.tokens[:, :5], text.tokens)
    for row in mixed.tokens[:, 5:]:
        assert torch.equal(row, tokens.reshape(12, 8) * 0.25)
    assert torch.equal(mix(text, tokens[:1]).tokens[1, 5:], tokens[0])
    half = TextCond(text.tokens.bfloat16(), text.pooled)
    assert mix(half, tokens).tokens.dtype == torch.bfloat16
    with pytest.raises(WeightsError, match="9 wide and the prompt's 8"):
        mix(text, torch.zeros(1, 4, 9))


@pytest.mark.parametrize("size", [(60, 37), (384, 384), (385, 383), (1, 1), (3, 900), (1024, 640)])
def test_preprocessing_agrees_with_transformers(size: tuple[int, int]) -> None:
    given = picture(5, *size)
    reference = processor(384).preprocess(given, return_tensors="pt")["pixel_values"]
    ours = Preprocessing(height=384, width=384)(given)
    assert ours.shape == reference.shape == (1, 3, 384, 384)
    assert ours.dtype == torch.float32
    assert (ours - reference).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes(mode: str) -> None:
    given = picture(5).convert(mode)
    reference = processor(64).preprocess(given, return_tensors="pt")["pixel_values"]
    assert (Preprocessing(height=64, width=64)(given) - reference).abs().max() <= 1e-5


def test_preprocessing_as_its_config_says(tmp_path: Path) -> None:
    their = SiglipImageProcessorPil(
        size={"height": 40, "width": 50}, resample=2, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    their.save_pretrained(tmp_path)
    ours = Preprocessing.read(tmp_path / "preprocessor_config.json")
    assert (ours.height, ours.width, ours.resample) == (40, 50, Image.Resampling.BILINEAR)
    reference = their.preprocess(picture(6), return_tensors="pt")["pixel_values"]
    assert (ours(picture(6)) - reference).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("[1]", "holds a list"),
        ("{", "cannot be read: Expecting property name"),
        ({}, "KeyError: 'size'"),
        ({"size": {"shortest_edge": 45}}, "KeyError: 'height'"),
        ({"size": {"height": "tall", "width": 45}}, "ValueError"),
        ({"size": {"height": 45, "width": 45}, "resample": 9}, "ValueError: 9 is not a valid Resampling"),
        ({"size": {"height": 45, "width": 45}, "image_std": [0.5, 0, 0.5]}, "three deviations other than 0"),
        ({"size": {"height": 45, "width": 45}, "image_mean": [0.5]}, "three means"),
        ({"size": {"height": 45, "width": 45}, "do_resize": False}, "do_resize: False"),
        ({"size": {"height": 45, "width": 45}, "do_center_crop": True}, "do_center_crop: True"),
        ({"size": {"height": 90, "width": 45}}, r"makes pictures 45x90, and .*image_encoder reads 45x45"),
    ],
)
def test_preprocessing_that_cannot_be(
    tmp_path: Path, files: dict[str, Path], said: str | dict[str, Any], words: str
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(said if isinstance(said, str) else json.dumps(said))
    with pytest.raises(WeightsError, match=words):
        load(files | {"feature_extractor/preprocessor_config.json": path})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(files: dict[str, Path], dtype: torch.dtype) -> None:
    pictures = [picture(1), picture(2, 30, 80), picture(3, 45, 45)]
    together = Redux.load(files, dtype=dtype, device=CPU).encode(pictures)
    alone = Redux.load(files, dtype=dtype, device=CPU)
    assert together.shape == (3, TOKENS, DEMO_WIDTH) and together.dtype == dtype
    assert torch.equal(together, torch.cat([alone.encode([one]) for one in reversed(pictures)][::-1]))


def test_float16_becomes_float32(files: dict[str, Path]) -> None:
    assert Redux.load(files, dtype=torch.float16, device=CPU).encode([picture(1)]).dtype == torch.float32


def test_the_cache_goes_by_pixels(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    redux = load(files, cache_size=2)
    seen: list[tuple[int, int]] = []
    real = Redux._encode_one

    def counted(self: Redux, one: Image.Image) -> Tensor:
        seen.append(one.size)
        return real(self, one)

    monkeypatch.setattr(Redux, "_encode_one", counted)
    first = redux.encode([picture(1), picture(1).copy(), picture(1)])
    assert len(seen) == 1 and torch.equal(first[0], first[2])
    redux.encode([picture(2)])
    assert torch.equal(redux.encode([picture(1)]), first[:1]) and len(seen) == 2
    redux.encode([picture(3)])  # the second is the one that was used least lately
    redux.encode([picture(1)])
    assert len(seen) == 3
    redux.encode([picture(2)])
    assert len(seen) == 4
    # The same bytes in another shape, and a pixel that is changed in place, are other pictures.
    flat = Image.frombytes("RGB", (37, 60), picture(2).tobytes())
    redux.encode([flat])
    assert len(seen) == 5
    flat.putpixel((0, 0), (1, 2, 3))
    redux.encode([flat])
    assert len(seen) == 6


def test_layouts_of_the_tower(tmp_path: Path, files: dict[str, Path], redux: Redux) -> None:
    """With and without the prefix, a single file, a whole SigLIP, positions that are stored: the same bits."""
    wanted = redux.encode([picture(1)])
    stored = load_file(files["image_encoder"] / "model.safetensors")
    older = {f"vision_model.{name}": tensor for name, tensor in stored.items()}
    older["vision_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    save_file(older, tmp_path / "older.safetensors")
    assert torch.equal(load(files | {"image_encoder": tmp_path / "older.safetensors"}).encode([picture(1)]), wanted)

    headless = {name: tensor for name, tensor in stored.items() if not name.startswith("head.")}
    save_file(headless, tmp_path / "headless.safetensors")
    assert torch.equal(load(files | {"image_encoder": tmp_path / "headless.safetensors"}).encode([picture(1)]), wanted)

    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, **ends}
    config = SiglipConfig(vision_config=TOWER, text_config={**text, "num_attention_heads": 2})
    whole = SiglipModel(config)
    whole.vision_model.load_state_dict(stored, strict=True)
    whole.save_pretrained(tmp_path / "whole")
    folder = {"adapter": files["adapter"], "image_encoder": tmp_path / "whole"}  # of which the config is found
    assert torch.equal(load(folder).encode([picture(1)]), wanted)
    with WeightSource.open(tmp_path / "whole") as source:
        assert what_is(source) == "a SigLIP vision tower in the layout of transformers"


def broken(files: dict[str, Path], tmp_path: Path, part: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
    path = files[part] / "model.safetensors" if part == "image_encoder" else files[part]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, tmp_path / "broken.safetensors")
    return tmp_path / "broken.safetensors"


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("adapter", lambda t: t.pop("redux_down.bias"), ["1 missing: redux_down.bias"]),
        ("adapter", lambda t: t.update(extra=torch.zeros(1)), ["1 not known: extra"]),
        ("adapter", lambda t: t.pop("redux_down.weight"), ["no tensor 'redux_down.weight'"]),
        ("adapter", lambda t: t.update({"redux_down.weight": torch.tensor(1.0)}), ["are no matrices"]),
        ("adapter", lambda t: t.pop("redux_up.weight"), ["is not FLUX.1 Redux's image adapter"]),
        (
            "adapter",
            lambda t: t.update({"redux_up.bias": torch.zeros(5)}),
            ["1 of another shape: redux_up.bias is [5], not [192]"],
        ),
        (
            "image_encoder",
            lambda t: t.update(extra=t.pop("post_layernorm.bias")),
            ["1 missing: post_layernorm.bias", "1 not known: extra"],
        ),
        ("image_encoder", lambda t: t.pop("embeddings.patch_embedding.bias"), ["is not a SigLIP vision tower"]),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, files: dict[str, Path], part: str, change: Callable[[dict[str, Tensor]], object], words: list[str]
) -> None:
    path = broken(files, tmp_path, part, change)
    with pytest.raises(WeightsError) as caught:
        load(files | {part: path})
    assert str(path) in str(caught.value) or words[0].startswith(("no tensor", "are no"))
    for word in words:
        assert word in str(caught.value)


def test_parts_that_do_not_belong_together(tmp_path: Path, files: dict[str, Path]) -> None:
    adapter = tmp_path / "adapter.safetensors"
    save_file(ReduxAdapter(ReduxParams(in_dim=24, text_dim=8)).state_dict(), adapter)
    with pytest.raises(WeightsError, match=r"adapts what is 24 wide, and .* is 32 wide"):
        load(files | {"adapter": adapter})
    with pytest.raises(WeightsError, match=r"is not a SigLIP vision tower: it holds FLUX.1 Redux's image adapter"):
        load(files | {"image_encoder": adapter})
    # Without a config it is taken for the published one, which it is not.
    without = {"adapter": files["adapter"], "image_encoder": files["image_encoder"] / "model.safetensors"}
    with pytest.raises(WeightsError, match="does not fit the network"):
        load(without)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image_size": [45, 45]}, r"image_size is \[45, 45\]"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"num_hidden_layers": 10**9}, "more than"),
        ({"num_attention_heads": 5}, "divisible"),
        ({"hidden_size": "wide"}, "cannot be used"),
        ({"image_size": 300}, "of another shape"),
        ({"vision_config": 3}, "cannot be used"),
        (None, "No such file"),
    ],
)
def test_configs_that_cannot_be(
    tmp_path: Path, files: dict[str, Path], changed: dict[str, Any] | None, words: str
) -> None:
    path = tmp_path / "config.json"
    if changed is not None:
        path.write_text(json.dumps(TOWER | changed))
    with pytest.raises(WeightsError, match=words):
        load(files | {"image_encoder/config.json": path})


def test_inspecting(tmp_path: Path, files: dict[str, Path]) -> None:
    (adapter,) = inspect(files["adapter"])["parts"]
    assert adapter["what"] == "FLUX.1 Redux's image adapter"
    assert adapter["missing"] == adapter["not known"] == adapter["of another shape"] == []
    (tower,) = inspect(files["image_encoder"])["parts"]
    assert tower["what"] == "a SigLIP vision tower"
    assert tower["missing"] == tower["not known"] == tower["of another shape"] == []
    path = broken(files, tmp_path, "image_encoder", lambda t: t.pop("encoder.layers.1.mlp.fc1.bias"))
    assert inspect(path)["parts"][0]["missing"] == ["encoder.layers.1.mlp.fc1.bias"]


def test_the_published_one_at_full_size() -> None:
    with torch.device("meta"):
        adapter = ReduxAdapter(ReduxParams())
        tower = SiglipVisionModel(SiglipVisionConfig(**SO400M, vision_use_head=False))
        seen = tower(torch.empty(1, 3, 384, 384)).last_hidden_state
        tokens = adapter(seen)
    assert seen.shape == (1, 729, 1152)
    assert tokens.shape == (1, 729, 4096)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    assert shapes == {
        "redux_up.weight": (12288, 1152),
        "redux_up.bias": (12288,),
        "redux_down.weight": (4096, 12288),
        "redux_down.bias": (4096,),
    }
    assert ReduxParams.from_shapes(shapes) == ReduxParams()
    assert sum(tensor.numel() for tensor in adapter.state_dict().values()) == 64_503_808
    published = hub.find("flux-redux-dev").files["adapter"].bytes or 0
    assert 0 < published - 2 * 64_503_808 < 100_000  # in 16 bits, with its header
