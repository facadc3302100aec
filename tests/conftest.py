"""Small networks with random weights in which every part matters, and the shipped demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flux_kernels import cpu
from safetensors.torch import save_file
from torch import Tensor, nn

import flux_engine
from flux_engine.engine import Engine

pytest_plugins = ("published_models",)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def a_ledger_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's files are pinned to is nothing to another, nor to the next run."""
    monkeypatch.setenv("FLUX_ENGINE_CACHE", str(tmp_path_factory.mktemp("ledger")))


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The demo model in float32, shared by all tests: an engine keeps nothing of a request."""
    return flux_engine.load("demo-schnell", device="cpu", dtype="float32")


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights that keep activations near 1 and every modulation, gate and bias away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 0
            noise = torch.randn(parameter.shape, generator=generator)
            if fan_in:
                parameter.copy_(noise / fan_in**0.5)
            else:
                parameter.copy_(parameter + 0.2 * noise)
    return module.eval().requires_grad_(False)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def latent_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 of two latents."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def in_shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A folder as diffusers writes it, with two shards."""
    names, files = sorted(tensors), [f"x-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = names[::2], names[1::2]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file)
    where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / "x.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def assert_the_same(batch: torch.Tensor, singles: torch.Tensor, dtype: torch.dtype) -> None:
    """To the bit; but torch's products of bfloat16 by AMX have an order of sums that depends on the number of rows."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and cpu.why_not():
        assert latent_error(batch, singles) <= 0.03
    else:
        assert torch.equal(batch, singles)
