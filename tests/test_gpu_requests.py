"""Whole requests on the card that is there: compiled, captured, by the kernels for cards and without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor

import flux_engine
from flux_engine import hardware, kernels
from flux_engine.engine import Engine

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch"),
]
PROMPT = "a large red circle on a blue background"
MODELS = pytest.mark.parametrize("model", ["demo-dev", "demo-sdxl"])
REQUESTS: list[dict[str, Any]] = [
    {"seed": 0, "width": 64, "height": 96}, {"seed": 1, "width": 96, "height": 64, "num_outputs": 2},
    {"seed": 0, "width": 64, "height": 96, "negative_prompt": "a blue star"},
    {"seed": 2, "width": 128, "height": 32}, {"seed": 0, "width": 64, "height": 96},
]  # fmt: skip
BOUND = 0.03
"""Of max |a - b| / max |b| of latents in the card's own 16 bits."""


def latents(engine: Engine, **fields: Any) -> Tensor:
    return torch.stack([one.cpu() for one in engine(PROMPT, num_inference_steps=3, output_type="latent", **fields)])


@pytest.fixture(params=["demo-dev", "demo-sdxl"])
def plain(request: pytest.FixtureRequest) -> Engine:
    return flux_engine.load(request.param, device="cuda")


def test_captured_calls_are_the_calls(plain: Engine) -> None:
    engine = flux_engine.load(plain.spec.name, device="cuda", cuda_graphs=True)
    for fields in REQUESTS:
        assert torch.equal(latents(engine, **fields), latents(plain, **fields)), fields
    assert 0 < engine.describe()["cuda_graphs"] <= 5


def test_compiled_and_captured_calls_are_near(plain: Engine, tmp_path: Path) -> None:
    options = {"device": "cuda", "compile": "default", "compile_cache": tmp_path}
    compiled = flux_engine.load(plain.spec.name, **options)
    compiled.warm_up()
    made = compiled.describe()["compile"]["graphs"]
    both = flux_engine.load(plain.spec.name, cuda_graphs=True, **options)
    for fields in REQUESTS:
        wanted = latents(plain, **fields)
        for engine in (compiled, both):
            assert relative_error(latents(engine, **fields), wanted) <= BOUND, fields
    assert compiled.describe()["compile"]["graphs"] == made


@pytest.mark.parametrize("scheme", ["none", "int8", "fp8", "fp8-storage"])
@MODELS
def test_with_kernels_and_without(model: str, scheme: str) -> None:
    if not hardware.card_of(CUDA).runs(scheme):
        pytest.skip(f"this card does not multiply {scheme}")
    found: list[list[Tensor]] = []
    for setting in ("auto", "off"):
        engine = flux_engine.load(model, device="cuda", quantization=scheme)
        kernels.choose(setting, CUDA)
        found.append([latents(engine, **fields) for fields in REQUESTS])
    kernels.choose("auto", CUDA)
    for ours, torchs in zip(*found, strict=True):
        assert relative_error(ours, torchs) <= (BOUND if scheme in ("none", "fp8-storage") else 2 * BOUND)
