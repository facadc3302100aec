"""Where the networks call the kernels for cards, without a card: on a processor by the kernels' torch references, and
on a card that is not there, where what each kernel refuses is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import relative_error
from flux_kernels import arch
from flux_kernels.ops import OPS
from torch import Tensor

import flux_engine
from benchmarks.dry_run import Card, request
from flux_engine import kernels
from flux_engine.request import Request

PROMPT = "a large red circle on a blue background"
BOUND = {"none": 1e-5, "int8": 0.03, "fp8": 0.05, "fp8-storage": 1e-5}
"""Of max |a - b| / max |b| of latents in float32: a token that is rounded from other last bits is one step away."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The processor is taken for an H100 whose kernels are their references; how often each is called."""
    found: Counter[str] = Counter()
    library = torch.library.Library("flux_kernels", "IMPL")

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            found[name] += 1
            return function(*args)

        return count

    for name, module in OPS.items():
        library.impl(name, counting(name, module.reference), "CPU")
    there = kernels.for_card((9, 0))
    monkeypatch.setattr(kernels, "on_processor", lambda x: False)
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    monkeypatch.setattr(
        kernels, "on_card", lambda op, x, to=None: (op, x.dtype, to) in there and not torch.is_grad_enabled()
    )
    yield found
    library._destroy()


def latents(model: str, scheme: str) -> Tensor:
    engine = flux_engine.load(model, device="cpu", dtype="float32", quantization=scheme)
    fields = {"width": 64, "height": 96, "num_outputs": 2, "num_inference_steps": 2, "negative_prompt": "a blue star"}
    return torch.stack(list(engine(PROMPT, seed=0, output_type="latent", **fields)))


FLUX = {"layer_norm_modulate", "qk_norm_rotary", "gated_residual"}
WANTED = {
    ("demo-schnell", "none"): FLUX,
    ("demo-schnell", "int8"): {"layer_norm_modulate_quantize", "qk_norm_rotary", "quantize_rows", "int8_linear"},
    ("demo-schnell", "fp8"): {"layer_norm_modulate_quantize", "qk_norm_rotary", "quantize_rows", "fp8_linear"},
    ("demo-schnell", "fp8-storage"): FLUX,
    ("demo-sdxl", "none"): {"group_norm_silu"},
    ("demo-sdxl", "int8"): {"group_norm_silu", "quantize_rows", "int8_linear"},
}


@pytest.mark.parametrize(("model", "scheme"), WANTED)
def test_networks_call_them_and_draw_the_same(model: str, scheme: str, called: Counter[str]) -> None:
    mine = latents(model, scheme)
    assert WANTED[model, scheme] <= set(called), called
    assert min(called[op] for op in WANTED[model, scheme]) >= 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "on_card", lambda op, x, to=None: False)
        before = called.total()
        plain = latents(model, scheme)
        assert called.total() == before
    assert relative_error(mine, plain) <= BOUND[scheme]


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="a dry run needs a C++ compiler"
)
@pytest.mark.parametrize("card", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("model", "scheme"), [*WANTED, ("demo-sdxl", "fp8")], ids=lambda value: value if isinstance(value, str) else None
)
def test_a_request_on_a_card_that_is_not_there(
    model: str, scheme: str, card: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No op is called for a card that does not run it, and each takes what the networks give it."""
    if scheme == "fp8" and card < (8, 9):
        pytest.skip("hardware.pick_quantization refuses it")
    engine = flux_engine.load(model, device="cpu", dtype="float32", quantization=scheme)
    found: Counter[str] = Counter()
    dispatch = Card.__torch_dispatch__

    def watching(self: Card, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found[func.name()] += 1
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(Card, "__torch_dispatch__", watching)
    monkeypatch.setattr(kernels, "_on_card", kernels.for_card(card))
    job = Request(prompt=PROMPT, seed=0, num_inference_steps=2, output_type="pt", num_outputs=2).resolve(engine.spec)
    with arch.assumed(card):
        request(engine._pipeline.family, job, torch.float16 if card == (7, 5) else torch.bfloat16)
    ours = {name.partition("::")[2] for name in found if name.startswith("flux_kernels::")}
    assert ours, "no kernel was called"
    assert ("int8_linear" in ours) == (scheme == "int8" and card >= (8, 0))
    assert ("fp8_linear" in ours) == (scheme == "fp8")
    assert ("fp8_storage_linear" in ours) == (scheme == "fp8-storage" and card >= (8, 0))


def test_what_is_for_a_card() -> None:
    t4, a100, h100 = (kernels.for_card(card) for card in ((7, 5), (8, 0), (9, 0)))
    assert ("int8_linear", torch.float16, None) not in t4 and ("int8_linear", torch.float16, None) in a100
    assert ("quantize_rows", torch.bfloat16, torch.float8_e4m3fn) in h100 - a100
    assert ("fp8_storage_linear", torch.float32, None) not in h100
    assert t4 < a100 < h100


def test_describe_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_on_card", kernels.for_card((8, 0)))
    told = kernels.describe(torch.device("cuda"), torch.bfloat16)
    assert told["int8"] == told["tokens"] == "flux_kernels (Triton)" and told["fp8"] == told["attention"] == "torch"
