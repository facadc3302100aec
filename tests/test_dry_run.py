"""The request path on a card that is not there, and what a dry run has to catch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame

import flux_engine
from benchmarks.dry_run import CUDA, Card, DryRunError, dry_run, placed, request
from flux_engine.models.flux import Flux
from flux_engine.quantization.linears import INT8, QuantizedLinear
from flux_engine.request import Request

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="a dry run needs a C++ compiler"
)


def run(model: str, dtype: torch.dtype = torch.bfloat16, quantization: str = "none", **fields: Any) -> Card:
    engine = flux_engine.load(model, dtype="float32", quantization=quantization)
    steps = {"num_inference_steps": 2, "output_type": "pt", "seed": 0}
    job = Request(prompt="a red star", **(steps | fields)).resolve(engine.spec)
    return request(engine._pipeline.family, job, dtype)


@pytest.mark.parametrize("quantization", ["none", "int8", "fp8", "fp8-storage"])
def test_a_request_of_flux(quantization: str) -> None:
    card = run("demo-schnell", quantization=quantization, num_outputs=2)
    assert card.operations > 1000 and card.peak > 5e6


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_request_of_sdxl(quantization: str) -> None:
    card = run("demo-sdxl", quantization=quantization, negative_prompt="a blue circle", num_outputs=2)
    assert card.operations > 1000 and card.peak > 5e6


@pytest.mark.parametrize("listening", [None, False])
def test_what_a_caller_holds_is_counted(listening: bool | None) -> None:
    """Whether torch listens to frames, as after a compilation that failed, or not yet: bytes are those of the first."""

    def lets_go(x: Tensor) -> Tensor:
        x = x.sum()
        return torch.empty(1000, device=x.device)

    before = eval_frame.set_eval_frame(listening)
    try:
        with dry_run() as card:
            lets_go(torch.empty(1000, device=CUDA))
        assert eval_frame.get_eval_frame_callback() is listening
    finally:
        eval_frame.set_eval_frame(before)
    assert card.peak >= 2 * 4000


PLANTED: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda x: x.sum().item(), r"\.item\(\) waits for the device"),
    "bool": (lambda x: bool((x > 0).all()), r"\.item\(\) waits for the device"),
    "cpu": (lambda x: x.cpu(), "is copied from the device"),
    "to cpu": (lambda x: x.to("cpu", torch.float32), "is copied from the device"),
    "copy": (lambda x: torch.empty(x.shape, device="cpu").copy_(x), "is copied from the device"),
    "nonzero": (lambda x: x.nonzero(), "nonzero waits for the device"),
    "a table": (
        lambda x: torch.ones(10, device="cpu")[torch.zeros(2, dtype=torch.long, device=x.device)],
        "a table on cpu is indexed by a tensor on another device",
    ),
    "four rows": (
        lambda x: torch._int_mm(x.new_empty((4, 64), dtype=torch.int8), x.new_empty((64, 64), dtype=torch.int8)),
        "int8: 4 x 64 times 64 x 64; the kernel wants 17 rows",
    ),
    "off the grid": (
        lambda x: torch._scaled_mm(
            x.new_empty((32, 24), dtype=torch.float8_e4m3fn), x.new_empty((16, 24), dtype=torch.float8_e4m3fn).t(),
            scale_a=x.new_empty((32, 1), dtype=torch.float32), scale_b=x.new_empty((1, 16), dtype=torch.float32),
            out_dtype=torch.bfloat16,
        ),
        "fp8: 32 x 24 times 24 x 16",
    ),
    "another dtype": (lambda x: x.bfloat16() @ torch.ones(x.shape[-1], 3, device=x.device), "same dtype"),
    "another device": (lambda x: x + torch.ones(x.shape, device="cpu"), "same device"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_in_the_network_is_caught(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, message = PLANTED[planted]
    forward = Flux.forward

    def planting(self: Flux, x: Tensor, *args: Any) -> Tensor:
        plant(x)
        return forward(self, x, *args)

    monkeypatch.setattr(Flux, "forward", planting)
    with pytest.raises((DryRunError, RuntimeError), match=message):
        run("demo-schnell")


def test_outside_of_the_loop_results_are_fetched() -> None:
    with dry_run() as card:
        x = torch.ones(4, 4, device=CUDA)
        assert x.cpu().device.type == "cpu"
        with card.loop(), pytest.raises(DryRunError):
            x.cpu()


def test_linears_of_8_bits_keep_to_the_kernels_grid() -> None:
    with dry_run() as card, card.loop():
        for tokens in (1, 16, 17, 300):
            for width, out in ((64, 48), (60, 47)):
                with torch.device("meta"):
                    linear = QuantizedLinear.like(nn.Linear(width, out), INT8)
                assert placed(linear, torch.bfloat16, card)(
                    torch.empty(tokens, width, device=CUDA, dtype=torch.bfloat16)
                ).shape == (tokens, out)


def test_bytes_are_counted_as_they_come_and_go() -> None:
    with dry_run() as card:
        a = torch.empty(1000, device=CUDA)
        b = a[10:]
        assert card.bytes == 4000, "a view is no memory"
        with card.measured() as found:
            c = a + 1
            del c
            d = a.to(torch.bfloat16)
        assert card.bytes == 6000 and found == [8000]
        del a, b, d
        torch.empty(5, device="cpu")
        assert card.bytes == 0 and card.peak == 8000
