"""Linears of 8 bits: against float32, at the edges of what they can hold, and in the whole models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from conftest import latent_error
from torch import Tensor, nn

import flux_engine
from benchmarks import adherence, quality
from flux_engine import Engine, UnsupportedError, hardware
from flux_engine.models.flux import Flux
from flux_engine.models.flux_controlnet import FluxControlNet
from flux_engine.models.unet import UNet
from flux_engine.models.unet_controlnet import UNetControlNet
from flux_engine.params import FluxControlNetParams, FluxParams, UNetControlNetParams, UNetParams
from flux_engine.quantization import linears
from flux_engine.quantization.linears import (
    FP8,
    INT8,
    INT8_STORAGE,
    SCHEMES,
    QuantizedLinear,
    Scheme,
    int8_product,
    on_grid,
    quantize_rows,
    quantize_weight,
)
from flux_engine.quantization.policy import POLICIES, place, rule_for, treatment

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
CAPTION = "a small red star on a striped green and white background"


def some_linear(width: int = 64, out: int = 48, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


def some_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_scheme
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64), (0, 64)], ids=str)
def test_a_linear_is_like_the_one_it_was_made_of(scheme: Scheme, shape: tuple[int, ...]) -> None:
    linear, x = some_linear(), some_tokens(*shape)
    out, exact = QuantizedLinear.of(linear, scheme)(x), linear(x)
    assert out.shape == exact.shape and out.dtype == exact.dtype
    assert (out - exact).norm() <= (0.02 if scheme.dtype == torch.int8 else 0.06) * exact.norm()


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_it_gives_has_the_dtype_of_what_it_reads(scheme: Scheme, dtype: torch.dtype) -> None:
    quantized = QuantizedLinear.of(some_linear().to(dtype), scheme)
    out = quantized(some_tokens(3, 64).to(dtype))
    assert out.dtype == dtype
    exact = some_tokens(3, 64).to(dtype).float() @ quantized.dequantized().T + some_linear().bias.to(dtype).float()
    assert (out.float() - exact).norm() <= 0.06 * exact.norm()


@every_scheme
def test_the_scale_of_every_row_is_its_own(scheme: Scheme) -> None:
    linear = some_linear(bias=False)
    linear.weight[7] *= 1e-6
    x = some_tokens(20, 64)
    x[3] *= 1e-6
    out, exact = QuantizedLinear.of(linear, scheme)(x), linear(x)
    for part in ((3, slice(None)), (slice(None), 7)):
        assert (out[part] - exact[part]).norm() <= 0.1 * exact[part].norm()


@every_scheme
def test_rows_of_zeros_give_zeros(scheme: Scheme) -> None:
    linear = some_linear(bias=False)
    linear.weight[7] = 0
    x = some_tokens(20, 64)
    x[3] = 0
    out = QuantizedLinear.of(linear, scheme)(x)
    assert out.isfinite().all() and not out[:, 7].any() and not out[3].any() and out[4].any()


@every_scheme
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_harms_no_other_row(scheme: Scheme, bad: float) -> None:
    quantized, x = QuantizedLinear.of(some_linear(), scheme), some_tokens(20, 64)
    whole = quantized(x)
    x[3, 5] = bad
    out = quantized(x)
    assert not out[3].isfinite().any() or (not scheme.multiplies and not out[3].isfinite().all())
    assert torch.equal(out[:3], whole[:3]) and torch.equal(out[4:], whole[4:])


@every_scheme
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_row(scheme: Scheme, bad: float) -> None:
    linear = some_linear()
    linear.weight[7, 5] = bad
    with pytest.raises(ValueError, match="row 7 is not finite"):
        QuantizedLinear.of(linear, scheme)


@every_scheme
def test_a_token_has_the_same_bits_in_any_batch(scheme: Scheme) -> None:
    quantized, x = QuantizedLinear.of(some_linear(192, 96), scheme), some_tokens(64, 192)
    batch = quantized(x)
    if scheme is INT8:  # in floating point a product's rounding depends on its size
        assert all(torch.equal(batch[i : i + 1], quantized(x[i : i + 1])) for i in range(0, 64, 7))
    assert torch.equal(batch, quantized(x)) and torch.equal(batch, quantized(x.clone()))


@every_scheme
def test_tokens_need_not_be_contiguous(scheme: Scheme) -> None:
    quantized, x = QuantizedLinear.of(some_linear(), scheme), some_tokens(64, 20).T
    assert not x.is_contiguous()
    assert torch.equal(quantized(x), quantized(x.contiguous()))


def test_the_int8_product_is_exact_at_its_limits() -> None:
    """Processors without VNNI add pairs of products in 16 bits, which saturate if nothing is done about it."""
    a = torch.full((3, 256), 127, dtype=torch.int8)
    b = torch.full((5, 256), -127, dtype=torch.int8)
    b[1::2] = 127
    assert torch.equal(int8_product(a, b), a.int() @ b.int().T)
    assert torch.equal(int8_product(-a, b), -a.int() @ b.int().T)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize(("width", "out"), [(64, 48), (60, 48), (64, 47), (3, 5)])
@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_a_product_is_padded_to_the_grid_of_cuda(scheme: Scheme, rows: int, width: int, out: int) -> None:
    a = torch.randint(-9, 9, (rows, width), dtype=torch.int8)
    b = torch.randint(-9, 9, (out, width), dtype=torch.int8)
    padded_a, padded_b = on_grid(a, b, scheme.grid)
    least, multiple = scheme.grid
    assert len(padded_a) >= least and a.shape[1] <= padded_a.shape[1] == padded_b.shape[1]
    assert padded_a.shape[1] % multiple == 0 and len(padded_b) % multiple == 0
    product = padded_a.int() @ padded_b.int().T
    assert torch.equal(product[:rows, :out], a.int() @ b.int().T)
    if rows >= least and width % multiple == 0 and out % multiple == 0:
        assert padded_a is a and padded_b is b


def test_rows_of_a_weight_have_the_best_of_several_scales() -> None:
    weight = some_linear(128, 64).weight
    values, scale = quantize_weight(weight, FP8)
    plain, largest = quantize_rows(weight, FP8)
    error, other = ((v.float() * s[:, None] - weight).square().sum(1) for v, s in ((values, scale), (plain, largest)))
    assert (error <= other).all() and error.sum() < 0.97 * other.sum()
    assert ((scale >= largest) & (scale < 2 * largest)).all()


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_many_tokens_are_multiplied_in_turn(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, x = QuantizedLinear.of(some_linear(64, 48), scheme), some_tokens(2, 50, 64)
    whole = quantized(x)
    monkeypatch.setattr(linears, "WORK", 4 * 64 * 30)
    assert (quantized(x) - whole).abs().max() <= (0 if scheme is INT8 else 1e-6)


def test_a_large_weight_comes_back_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, x = QuantizedLinear.of(some_linear(64, 47), INT8_STORAGE), some_tokens(20, 64)
    whole = quantized(x)
    monkeypatch.setattr(linears, "WORK", 4 * 64 * 10)
    assert torch.allclose(quantized(x), whole, atol=1e-6)


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_outliers_among_the_activations(scheme: Scheme) -> None:
    found = quality.synthetic(scheme)
    if scheme is INT8:
        assert found["row_wise"] >= 0.997 > found["per_tensor"]
    else:
        assert found["row_wise"] >= 0.999


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("model", ["demo-schnell", "demo-sdxl"])
def test_every_linear_of_the_demo_models(model: str, scheme: str) -> None:
    engine = flux_engine.load(model, dtype="float32")
    captions = [caption for _, caption in islice(adherence.scenes(0), 4)]
    found = quality.linears(engine, scheme, captions, seed=0, steps=4 if model == "demo-schnell" else 5)
    each = {f"{part} {name}": one for part, linears in found.items() for name, one in linears.items()}
    assert len(each) == {"demo-schnell": 53, "demo-sdxl": 77}[model]
    assert min(one.row_wise.cosine for one in each.values()) >= 0.999
    if scheme == "int8":
        multiplied = {name: one for name, one in each.items() if one.scheme is INT8}
        assert not [name for name, one in multiplied.items() if one.row_wise.cosine <= one.per_tensor.cosine]


def networks() -> Iterator[tuple[str, nn.Module]]:
    """One of every kind, on the meta device."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        yield "flux", Flux(FluxParams(depth=1, depth_single_blocks=1, guidance_embed=True))
        yield (
            "flux_controlnet",
            FluxControlNet(FluxControlNetParams(depth=1, depth_single_blocks=1, hint_width=16, num_modes=3)),
        )
        yield "unet", UNet(UNetParams())
        yield "unet_controlnet", UNetControlNet(UNetControlNetParams())
        for feed_forward in ("gated-gelu", "relu"):
            yield "t5", T5EncoderModel(T5Config(num_layers=1, feed_forward_proj=feed_forward))


def test_a_rule_speaks_of_every_linear_and_every_rule_of_some() -> None:
    used: set[tuple[str, str]] = set()
    for kind, network in networks():
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):
                rule = rule_for(kind, name)
                used.add((kind, rule.names))
                assert rule.how == "asked" or rule.why, f"{kind}: {rule.names} does not say why"
    assert used == {(kind, rule.names) for kind, rules in POLICIES.items() for rule in rules}
    with pytest.raises(LookupError, match="no rule of flux"):
        rule_for("flux", "a_new_layer")


@pytest.mark.parametrize("quantization", ["int8", "fp8", "fp8-storage"])
def test_most_of_every_network_is_of_8_bits(quantization: str) -> None:
    for kind, network in networks():
        linear = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
        treat = treatment(kind, quantization)
        assert treat is not None
        place(network, treat)
        small = sum(m.weight.numel() for m in network.modules() if isinstance(m, QuantizedLinear))
        assert small > 0.75 * linear, (kind, small / linear)


def test_t5_is_not_rounded_to_e4m3() -> None:
    """transformers casts what `wo` reads to the dtype of its weight, unless that is int8."""
    for quantization in ("int8", "fp8", "fp8-storage"):
        treat = treatment("t5", quantization)
        assert treat is not None
        assert treat("encoder.block.0.layer.1.DenseReluDense.wo") is INT8_STORAGE
        keys = treat("encoder.block.0.layer.0.SelfAttention.k")
        assert keys is (INT8 if quantization == "int8" else INT8_STORAGE)


@pytest.fixture(scope="module", params=["int8", "fp8", "fp8-storage"])
def quantized(request: pytest.FixtureRequest) -> Engine:
    return flux_engine.load("demo-schnell", dtype="float32", quantization=request.param)


def test_the_picture_is_nearly_the_same(quantized: Engine, engine: Engine) -> None:
    fields = {"seed": 0, "output_type": "latent"}
    (ours,), (exact,) = (one(CAPTION, **fields).images for one in (quantized, engine))
    error = float((ours - exact).norm() / exact.norm())
    assert 0 < error < {"int8": 0.05, "fp8": 0.2, "fp8-storage": 0.2}[quantized.describe()["quantization"]]


def test_the_same_request_has_the_same_bits_and_a_batch_is_its_singles(quantized: Engine) -> None:
    fields = {"seed": 5, "output_type": "latent", "num_inference_steps": 2}
    first, again = (quantized(CAPTION, **fields).images[0] for _ in range(2))
    assert torch.equal(first, again)
    batch = quantized(CAPTION, num_outputs=3, **fields).images
    assert latent_error(batch[0], first) <= 1e-5
    third = quantized(CAPTION, **(fields | {"seed": 7})).images[0]
    assert latent_error(batch[2], third) <= 1e-5


def test_what_is_in_force_is_told(quantized: Engine, engine: Engine) -> None:
    said = quantized.describe()
    scheme = said["quantization"]
    linears = said["parts"]["transformer"]["linears"]
    assert linears["double_blocks.{i}.img_attn.qkv"] == scheme
    assert linears["single_blocks.{i}.modulation.lin"] == ("fp8-storage" if scheme == "fp8-storage" else "int8-storage")
    assert linears["img_in"] == linears["final_layer.linear"] == "float32"
    assert "linears" not in said["parts"]["vae"] and "linears" not in engine.describe()["parts"]["transformer"]
    assert said["parts"]["transformer"]["bytes"] < 0.4 * engine.describe()["parts"]["transformer"]["bytes"]


@pytest.mark.parametrize(
    ("capability", "auto"), [((7, 0), "none"), ((7, 5), "int8"), ((8, 6), "int8"), ((8, 9), "fp8"), ((9, 0), "fp8")]
)
def test_auto_is_what_the_card_multiplies(
    capability: tuple[int, int], auto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some card")
    device = torch.device("cuda")
    assert hardware.pick_quantization("auto", device) == auto
    for name, least in (("int8", (7, 5)), ("fp8", (8, 9))):
        if capability >= least:
            assert hardware.pick_quantization(name, device) == name
        else:
            other = "int8" if name == "fp8" and capability >= (7, 5) else "fp8-storage"
            expected = f"{name!r} asked for, but Some card has compute capability {capability[0]}.{capability[1]}"
            with pytest.raises(UnsupportedError, match=f"{re.escape(expected)}.*use {other!r}"):
                hardware.pick_quantization(name, device)


@pytest.mark.parametrize(("features", "auto"), [({"avx512_vnni": True}, "int8"), ({"avx2": True}, "none")])
def test_auto_on_a_processor(features: dict[str, bool], auto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    cpu = torch.device("cpu")
    assert hardware.pick_quantization("auto", cpu) == auto
    assert [hardware.pick_quantization(name, cpu) for name in ("none", "int8", "fp8")] == ["none", "int8", "fp8"]
