"""Pictures are never black: what runs over in float16 is drawn in another dtype, or refused by name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sdxl_models
import torch
from conftest import relative_error
from safetensors.torch import save_file

from flux_engine.engine import Engine
from flux_engine.errors import NumericalError
from flux_engine.families.base import load_vae
from flux_engine.families.load import load_family
from flux_engine.hardware import has_bf16
from flux_engine.memory import Place
from flux_engine.models.vae import AutoEncoder
from flux_engine.pipeline import Step
from flux_engine.result import Result
from flux_engine.specs import SDXLSpec

CPU = torch.device("cpu")
UPCAST = sdxl_models.BASE
PLAIN = replace(UPCAST, vae=replace(UPCAST.vae, force_upcast=False))


@pytest.fixture(scope="module")
def wild() -> AutoEncoder:
    """Activations of some 100,000, which the next normalisation makes ordinary again; float16 ends at 65,504."""
    vae = copy.deepcopy(sdxl_models.family().vae)
    for middle in (vae.encoder.mid, vae.decoder.mid):
        middle.block_2.conv2.weight.mul_(1e5)
    return vae


@pytest.fixture(scope="module")
def file(wild: AutoEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wild") / "vae.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in wild.state_dict().items()}, path)
    return path


def engine(spec: SDXLSpec, vae: AutoEncoder) -> Engine:
    return Engine(replace(sdxl_models.family(), spec=spec, vae=vae))


def draw(engine: Engine, **asked: Any) -> Result:
    return engine("a red circle", **({"width": 32, "height": 32, "num_inference_steps": 1, "seed": 3} | asked))


@pytest.fixture(scope="module")
def reference(wild: AutoEncoder) -> torch.Tensor:
    return draw(engine(PLAIN, wild), output_type="pt").image


def test_it_does_run_over(file: Path) -> None:
    """Or what follows would pass for nothing."""
    vae = load_vae(PLAIN, file, Place(torch.float16))
    assert vae.dtype == torch.float16
    assert not vae.decode(torch.randn(1, 4, 4, 4)).isfinite().any()


def test_what_is_known_to_run_over_is_loaded_in_another_dtype(
    file: Path, reference: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flux_engine"):
        vae = load_vae(UPCAST, file, Place(torch.float16))
    wanted = "bfloat16" if has_bf16(CPU) else "float32"
    assert caplog.messages == [f"the autoencoder runs in {wanted}: it would run over in float16"]
    loaded = engine(UPCAST, vae)
    assert loaded.describe()["parts"]["vae"]["dtype"] == wanted
    result = draw(loaded, output_type="pt")
    assert result.notes == ()
    assert (result.image - reference).abs().mean() <= 0.02
    for dtype in (torch.float32, torch.bfloat16):
        caplog.clear()
        assert load_vae(UPCAST, file, Place(dtype)).dtype == dtype
        assert not caplog.messages


def test_a_model_in_float16_says_where_its_autoencoder_is_not(file: Path, tmp_path: Path) -> None:
    folder = Engine(sdxl_models.family()).export(tmp_path / "model")
    parts = ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    files = {part: folder / part for part in parts} | {
        f"{part}/config.json": folder / part / "config.json" for part in ("text_encoder", "text_encoder_2")
    }
    found = {}
    for spec in (UPCAST, PLAIN):
        family = load_family(spec, files | {"vae": file}, Place(torch.float16), embedding_cache=0)
        described = Engine(family).describe()["parts"]
        assert draw(Engine(family), output_type="pt").image.isfinite().all()
        found[spec.vae.force_upcast] = described["vae"]["dtype"]
        assert described["unet"]["dtype"] == "float16"
    assert found == {True: "bfloat16" if has_bf16(CPU) else "float32", False: "float16"}


def test_what_runs_over_is_decoded_in_float32_and_reported(file: Path, reference: torch.Tensor) -> None:
    vae = load_vae(PLAIN, file, Place(torch.float16))
    half = engine(PLAIN, vae)
    assert half.describe()["parts"]["vae"]["dtype"] == "float16"
    result = draw(half, output_type="pt", num_outputs=2)
    assert result.notes == ("decoded in float32: the autoencoder ran over in float16",)
    assert all(picture.isfinite().all() for picture in result)
    assert relative_error(result[0], reference) <= 5e-3
    assert reference.std() > 0.05  # not of one colour
    assert half._pipeline.family.vae.dtype == torch.float16  # as it was


def test_previews_are_fitted_in_float32_where_the_encoder_runs_over(file: Path, wild: AutoEncoder) -> None:
    previews = []
    for vae in (wild, load_vae(PLAIN, file, Place(torch.float16))):
        steps: list[Step] = []
        draw(engine(PLAIN, vae), on_step=steps.append)
        previews.append(np.asarray(steps[0].preview()[0], float))
    assert previews[0].std() > 5
    assert np.abs(previews[0] - previews[1]).max() <= 3


@contextmanager
def over(engine: Engine) -> Iterator[None]:
    """The network's own numbers run over."""
    weight = engine._pipeline.family.net.conv_out.weight
    before = weight.clone()
    weight.fill_(torch.finfo(weight.dtype).max)
    yield
    weight.copy_(before)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (torch.float16, "Load the model with dtype='bfloat16' or 'float32'"),
        (torch.bfloat16, "Load the model with dtype='float32'"),
        (torch.float32, "Its weights may be damaged"),
    ],
)
@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_a_latent_that_is_not_finite_is_an_error(dtype: torch.dtype, remedy: str, output_type: str) -> None:
    family = sdxl_models.family()
    one = Engine(replace(family, net=family.net.to(dtype)))
    before = draw(one, output_type="latent").image
    assert before.isfinite().all()
    with over(one), pytest.raises(NumericalError) as caught:
        draw(one, output_type=output_type)
    assert f"ran over in {str(dtype).removeprefix('torch.')}: the latent is not finite. {remedy}" in str(caught.value)
    assert torch.equal(draw(one, output_type="latent").image, before)


def test_an_autoencoder_that_has_nothing_finite_is_an_error() -> None:
    family = sdxl_models.family()
    one = Engine(family)
    family.vae.decoder.conv_out.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="no finite picture of the latent, even in float32"):
        draw(one)
    assert draw(one, output_type="latent").image.isfinite().all()
