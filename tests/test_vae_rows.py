"""The autoencoder some rows at a time: what it gives at once, in half the memory."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from benchmarks.dry_run import CUDA, dry_run, placed
from flux_engine.models import vae_rows
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import VAEParams

TINY = VAEParams(channels=16, norm_groups=4, channel_multipliers=(1, 2, 4, 4), latent_channels=4, quant_conv=True)
SIZES = [(8, 8), (5, 9), (16, 4), (1, 3)]


def made(params: VAEParams = TINY, dtype: torch.dtype = torch.float32) -> AutoEncoder:
    torch.manual_seed(3)
    vae = AutoEncoder(params)
    for parameter in vae.parameters():
        nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.5, 0.1)
    return vae.to(dtype).eval().requires_grad_(False)


@pytest.fixture(params=[2**10, 2**14, 2**24], ids=["two rows", "some rows", "all rows"])
def work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(vae_rows, "WORK", request.param)
    return request.param


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_same_numbers(size: tuple[int, int], last: bool, work: int) -> None:
    """To rounding; and no further from the truth, in float64, than at once."""
    vae = made()
    if last:
        vae = vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    h, w = size
    z, x = torch.randn(2, 4, h, w), torch.rand(2, 3, 8 * h, 8 * w) * 2 - 1
    truth = made(dtype=torch.float64)
    for whole, rows, exact in (
        (vae.decode(z), vae.decode(z, by_rows=True), truth.decode(z.double())),
        (vae.encode(x), vae.encode(x, by_rows=True), truth.encode(x.double())),
    ):
        scale = exact.abs().max()
        assert rows.shape == whole.shape and rows.dtype == whole.dtype
        assert (rows - exact).abs().max() <= 2 * (whole - exact).abs().max() + 1e-6 * scale
        assert (rows - whole).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_two_bytes_a_number(dtype: torch.dtype, work: int) -> None:
    z = torch.randn(1, 4, 6, 7)
    truth = made(dtype=torch.float64).decode(z.double())
    whole, rows = (made(dtype=dtype).decode(z.to(dtype), by_rows=by_rows) for by_rows in (False, True))
    assert rows.dtype == whole.dtype
    assert (rows - truth).square().mean() <= 1.5 * (whole - truth).square().mean()


def test_rows_of_a_batch_do_not_mix(work: int) -> None:
    vae, z = made(), torch.randn(3, 4, 6, 6)
    together = vae.decode(z, by_rows=True)
    alone = torch.cat([vae.decode(row, by_rows=True) for row in z.split(1)])
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_a_seam_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip that does not read the row beside it: the difference that the first test would find."""
    vae, z = made(), torch.randn(1, 4, 8, 8)
    whole = vae.decode(z)
    monkeypatch.setattr(vae_rows, "WORK", 2**10)
    plain = vae_rows._product

    def product(conv: nn.Conv2d, rows: torch.Tensor, *, top: bool, bottom: bool) -> torch.Tensor:
        return plain(conv, rows.index_fill(2, torch.tensor(0), 0.0), top=top, bottom=bottom)

    monkeypatch.setattr(vae_rows, "_product", product)
    assert (vae.decode(z, by_rows=True) - whole).abs().max() > 1e-2 * whole.abs().max()


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.full
@pytest.mark.parametrize(("way", "whole", "rows"), [("decode", 1611e6, 857e6), ("encode", 1342e6, 604e6)])
def test_half_the_memory_at_the_true_size(way: str, whole: float, rows: float) -> None:
    """FLUX's autoencoder, 1024 px, bfloat16: bytes beside the weights, counted by a dry run."""
    found: list[int] = []
    for by_rows in (False, True):
        with dry_run() as card:
            with torch.device("meta"):
                vae = AutoEncoder(VAEParams())
            vae = placed(vae, torch.bfloat16, card)
            before = card.bytes
            shape = (1, 16, 128, 128) if way == "decode" else (1, 3, 1024, 1024)
            with card.measured() as peak:
                getattr(vae, way)(torch.empty(shape, device=CUDA, dtype=torch.bfloat16), by_rows=by_rows)
            found.append(peak[0] - before)
    assert found[0] == pytest.approx(whole, rel=0.02) and found[1] == pytest.approx(rows, rel=0.02)
