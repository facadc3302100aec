"""The kernels for processors against torch's own operations in float64, and what they promise besides."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flux_kernels import build, cpu
from torch import Tensor, nn

import flux_engine
from flux_engine import kernels, linears, ops
from flux_engine.attention import attention
from flux_engine.config import EngineConfig
from flux_engine.errors import UnsupportedError
from flux_engine.lora import side
from flux_engine.quantization.linears import INT8, QuantizedLinear, quantize_rows

OPS = torch.ops.flux_cpu
WIDE, HALF = torch.float32, torch.bfloat16
BOUND = {WIDE: 1e-6, HALF: 5e-3}
"""Of max |a - b| / max |b|: a rounding to bfloat16 is 0.004 of a number."""
needs_kernels = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
both = pytest.mark.parametrize("dtype", [WIDE, HALF], ids=["float32", "bfloat16"])


@pytest.fixture(params=["AMX", "AVX-512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to multiply, where the processor has both."""
    if cpu.why_not() is not None:
        pytest.skip(str(cpu.why_not()))
    usual = cpu.isa()
    if cpu.isa(request.param) != request.param:
        pytest.skip(f"the processor has no {request.param}")
    yield request.param
    cpu.isa(usual)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    kernels.choose("auto")


def close(found: Tensor, exact: Tensor, bound: float) -> None:
    assert found.shape == exact.shape
    error = (found.double() - exact.double()).abs().max() / exact.double().abs().max()
    assert error <= bound, f"{error:.2e}"


def some(*shape: int, dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    return (torch.randn(*shape) * 2 + mean).to(dtype)


def exact_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = x.double()
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.double()) + shift.double()


SIZES = [(1, 1, 16), (2, 5, 8), (1, 7, 72), (3, 4, 200), (2, 33, 3072)]


@needs_kernels
@both
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norms(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    batch, _, width = size
    x, shift, scale = some(*size, dtype=dtype), *some(2, batch, 1, width, dtype=dtype)
    exact = exact_norm(x, scale, shift)
    close(ops.layer_norm_modulate(x, shift, scale), exact, BOUND[dtype])
    values, scales = OPS.layer_norm_quantize(x, scale, shift, 1e-6, 1.0)
    assert values.dtype is torch.int8
    assert values.abs().amax(dim=1).eq(127).all()
    close((values * scales[:, None]).view(size), exact, 0.51 / 127)
    weight, bias = some(2, width, dtype=dtype)
    own = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
    close(ops.layer_norm(x, weight, bias, 1e-5), own, BOUND[dtype])


@needs_kernels
@both
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_of_8_bits(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    x = some(*size, dtype=dtype)
    values, scales = OPS.quantize_rows(x)
    theirs, their_scales = quantize_rows(x.flatten(0, 1), INT8)
    assert torch.equal(scales, their_scales)
    apart = (values.int() - theirs.int()).abs()
    assert apart.max() <= 1  # where a number is as near to one as to the other
    assert apart.sum() <= max(2, apart.numel() // 1000)
    exact = ops.geglu(x.double())
    close(ops.geglu(x), exact, BOUND[dtype])
    values, scales = OPS.geglu_quantize(x)
    close((values * scales[:, None]).view(exact.shape), exact, 0.51 / 127)
    gate = some(size[0], 1, size[2], dtype=dtype)
    close(ops.gated_residual(x, gate, x * 2), x.double() + gate.double() * (x * 2).double(), BOUND[dtype])


@needs_kernels
def test_rows_that_are_zero_or_not_finite(isa: str) -> None:
    x = some(5, 48, dtype=WIDE)
    x[1], x[2, 3], x[3, 47], x[4, 0] = 0, float("nan"), float("inf"), -float("inf")
    values, scales = OPS.quantize_rows(x)
    assert torch.equal(scales.isfinite(), torch.tensor([True, True, False, False, False]))
    assert not values[1].any()
    assert scales[1] > 0
    linear = QuantizedLinear.of(nn.Linear(48, 20), INT8)
    assert torch.equal(linear(x).isfinite().all(dim=1), scales.isfinite())
    for op in (ops.geglu, lambda x: ops.layer_norm(x, x[0], x[0], 1e-6)):
        assert torch.equal(op(x[None]).isfinite().all(dim=2)[0], scales.isfinite())
    q = some(1, 1, 5, 8, dtype=HALF)
    bad = q.clone()
    bad[0, 0, 2, 1] = float("nan")
    assert torch.equal(attention(bad, q, q).isfinite().all(dim=3)[0, 0], torch.arange(5) != 2)
    assert not attention(q, bad, q).isfinite().any()


@needs_kernels
@both
@pytest.mark.parametrize("width", [8, 64, 100, 128])
def test_queries_and_keys(dtype: torch.dtype, width: int) -> None:
    """Also those that lie in a wider product."""
    batch, heads, length = 2, 3, 9
    fused = some(batch, length, 3 * heads * width + 64, dtype=dtype)[..., : 3 * heads * width]
    q, k, _ = fused.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
    weights, angle = some(2, width, dtype=dtype), torch.randn(length, width // 2)
    found = ops.qk_norm_rotary(q, k, *weights, angle.cos(), angle.sin())
    kernels.choose("off")
    for one, x, weight in zip(found, (q, k), weights, strict=True):
        close(one, ops.apply_rotary(ops.rms_norm(x.float(), weight.float()), angle.cos(), angle.sin()), BOUND[dtype])
        assert one.transpose(1, 2).is_contiguous()


@needs_kernels
@both
@pytest.mark.parametrize("size", [(1, 32, 1, 1), (2, 12, 5, 3), (1, 320, 16, 17), (2, 128, 33, 9)], ids=str)
def test_group_norms(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    channels = size[1]
    far = 50 * torch.rand(channels)[:, None, None]  # a mean that is large beside what is around it
    x = (torch.randn(size) + far).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = some(2, channels, dtype=dtype)
    exact = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    for found, of in (
        (ops.group_norm(x, 4, weight, bias, 1e-5), exact),
        (ops.group_norm_silu(x, 4, weight, bias, 1e-5), F.silu(exact)),
    ):
        close(found, of, 4 * BOUND[dtype])
        assert found.is_contiguous(memory_format=torch.channels_last)


@needs_kernels
def test_silu_after_a_norm_has_the_digits_of_float32() -> None:
    """By itself: what it is given is the same norm without it. So the kernels' power of two is as exact as it says."""
    x = some(1, 64, 33, 9, dtype=torch.float32, mean=0.0).contiguous(memory_format=torch.channels_last)
    weight, bias = 4 * torch.ones(64), torch.zeros(64)
    given = ops.group_norm(x, 4, weight, bias, 1e-5).double()
    found = ops.group_norm_silu(x, 4, weight, bias, 1e-5)
    assert (found / F.silu(given) - 1).abs().max() <= 2e-6


@needs_kernels
@pytest.mark.parametrize("size", [(1, 2, 5, 7, 64), (2, 3, 130, 77, 64), (1, 1, 97, 700, 512), (2, 2, 100, 300, 16),
                                  (1, 2, 96, 257, 40), (1, 1, 1, 1, 2), (1, 2, 300, 256, 128)], ids=str)  # fmt: skip
def test_attention(isa: str, size: tuple[int, ...]) -> None:
    batch, heads, queries, keys, width = size
    q = some(batch, queries, heads, width, dtype=HALF, mean=0).transpose(1, 2)
    k, v = some(2, batch, heads, keys, width, dtype=HALF, mean=0.0)
    found, exact = attention(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    close(found, exact, BOUND[HALF])
    theirs = F.scaled_dot_product_attention(q, k, v)
    assert (found - exact).norm() <= 1.1 * (theirs - exact).norm()
    assert found.transpose(1, 2).is_contiguous()


@needs_kernels
def test_attention_to_what_is_far_below(isa: str) -> None:
    """Scores that are all far below zero are no reason for nothing to be left."""
    q = torch.full((1, 1, 3, 64), 30.0, dtype=HALF)
    v = some(1, 1, 70, 64, dtype=HALF)
    close(
        attention(q, -q[:, :, :1].expand(1, 1, 70, 64), v),
        v.double().mean(dim=2, keepdim=True).expand(1, 1, 3, 64),
        0.01,
    )


PRODUCTS = [(1, 16, 20), (7, 64, 70), (13, 12300, 130), (200, 96, 64), (5, 16388, 3)]


def exact_int8(tokens: int, inner: int, outer: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """values, scales, weight and its scales, and what they make."""
    values, weight = (torch.randint(-128, 128, (n, inner), dtype=torch.int8) for n in (tokens, outer))
    scales, weight_scale = torch.rand(tokens), torch.rand(outer)
    exact = (values.double() @ weight.double().t()) * scales[:, None] * weight_scale
    return (values, scales, weight, weight_scale), exact


@needs_kernels
@both
@pytest.mark.parametrize("size", PRODUCTS, ids=str)
def test_products_of_8_bits(isa: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Sums are exact, whatever is done to them after."""
    tokens, _, outer = size
    (a, scales, b, weight_scale), plain = exact_int8(*size)
    bias = torch.randn(outer)
    close(OPS.int8_linear(a, scales, b, weight_scale, None, None, None, None, dtype), plain, BOUND[dtype])
    residual, gate = some(1, tokens, outer, dtype=dtype), some(1, 1, outer, dtype=dtype)
    exact = residual.double() + gate.double() * F.gelu(plain + bias, approximate="tanh")
    found = OPS.int8_linear(a, scales, b, weight_scale, bias, 0, residual, gate, dtype)
    close(found, exact[0], BOUND[dtype])


@needs_kernels
@pytest.mark.parametrize("inner", [4, 60, 64, 76, 200])
def test_products_of_any_number_of_tokens(isa: str, inner: int) -> None:
    """Around where tiles of 16 and blocks of 6 and 32 end; rows of x and of the weight that lie far apart."""
    for tokens in range(1, 71, 3):
        outer = 2 * tokens - 1
        (values, scales, weight, weight_scale), exact = exact_int8(tokens, inner, outer)
        far = torch.full((tokens, inner + 64), 77, dtype=torch.int8)
        far[:, :inner] = values
        found = OPS.int8_linear(far[:, :inner], scales, weight, weight_scale, None, None, None, None, WIDE)
        close(found, exact, BOUND[WIDE])
        x, w = some(tokens, inner, dtype=HALF), some(outer, inner, dtype=HALF)
        spoiled = [torch.full((len(each), inner + 2), float("nan"), dtype=HALF) for each in (x, w)]
        for whole, each in zip(spoiled, (x, w), strict=True):
            whole[:, :inner] = each
        found = OPS.bf16_linear(spoiled[0][:, :inner], spoiled[1][:, :inner], None, None, None, None)
        close(found, x.double() @ w.double().t(), BOUND[HALF])


@needs_kernels
@pytest.mark.parametrize("size", [(300, 13000, 70), (1601, 3100, 140), (2000, 64, 900)], ids=str)
def test_large_products_are_the_same_in_parts_and_by_any_number_of_threads(isa: str, size: tuple[int, ...]) -> None:
    tokens, inner, outer = size
    (values, scales, weight, weight_scale), exact = exact_int8(tokens, inner, outer)
    x, w = some(tokens, inner, dtype=HALF), some(outer, inner, dtype=HALF)

    def results(rows: slice) -> tuple[Tensor, Tensor]:
        after = (None, None, None, None)
        return (
            OPS.int8_linear(values[rows], scales[rows], weight, weight_scale, *after, WIDE),
            OPS.bf16_linear(x[rows], w, *after),
        )

    threads = torch.get_num_threads()
    together = results(slice(None))
    close(together[0], exact, BOUND[WIDE])
    close(together[1], x.double() @ w.double().t(), BOUND[HALF])
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (slice(None), slice(0, 17), slice(5, 205), slice(tokens - 1, tokens)):
                for one, whole in zip(results(rows), together, strict=True):
                    assert torch.equal(one, whole[rows])
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_what_is_not_a_number_stays_in_its_row(isa: str) -> None:
    (values, scales, weight, weight_scale), _ = exact_int8(40, 76, 50)
    scales[3], scales[33] = float("nan"), float("inf")
    found = OPS.int8_linear(values, scales, weight, weight_scale, None, None, None, None, HALF)
    assert torch.equal(found.isfinite().all(dim=1), scales.isfinite())
    x, w = some(40, 76, dtype=HALF), some(50, 76, dtype=HALF)
    x[3, 75], x[20, 0], x[39, 40] = float("nan"), float("inf"), -float("inf")
    found = OPS.bf16_linear(x, w, None, None, None, None)
    assert torch.equal(found.isfinite().all(dim=1), x.isfinite().all(dim=1))


@needs_kernels
def test_what_multiplies_is_told(isa: str) -> None:
    for dtype, wide in ((HALF, f"flux_kernels ({isa})"), (WIDE, "torch (float32)")):
        assert kernels.describe(torch.device("cpu"), dtype) == {
            "attention": wide,
            "linears": wide,
            "int8": f"flux_kernels ({isa})",
            "tokens": "flux_kernels (AVX-512)",
        }


@needs_kernels
@pytest.mark.parametrize("size", PRODUCTS, ids=str)
def test_products_of_bfloat16(isa: str, size: tuple[int, int, int]) -> None:
    tokens, inner, outer = size
    x, linear = some(1, tokens, inner, dtype=HALF), nn.Linear(inner, outer).to(HALF)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    close(linears.linear(linear, x), exact, BOUND[HALF])
    residual, gate = some(1, tokens, outer, dtype=HALF), some(1, 1, outer, dtype=HALF)
    close(linears.linear(linear, x, residual=residual), residual.double() + exact, BOUND[HALF])
    last = residual.double() + gate.double() * F.gelu(exact, approximate="tanh")
    close(linears.linear(linear, x, gelu=True, residual=residual, gate=gate), last, BOUND[HALF])
    if outer > 64:
        head, tail = linears.linear_and_gelu(linear, x, 64)
        close(head, exact[..., :64], BOUND[HALF])
        close(tail, F.gelu(exact[..., 64:], approximate="tanh"), BOUND[HALF])


def layers() -> list[nn.Module]:
    linear = nn.Linear(96, 80).to(HALF)
    return [linear, QuantizedLinear.of(linear, INT8)]


@needs_kernels
@pytest.mark.parametrize("kind", [0, 1], ids=["bfloat16", "int8"])
def test_what_comes_before_and_after_a_linear_is_the_same_without_kernels(kind: int) -> None:
    layer = layers()[kind]
    x, residual = some(2, 11, 96, dtype=HALF), some(2, 11, 80, dtype=HALF)
    shift, scale, gate = some(2, 1, 96, dtype=HALF), some(2, 1, 96, dtype=HALF), some(2, 1, 80, dtype=HALF)
    norm = nn.LayerNorm(96).to(HALF)

    def results() -> list[Tensor]:
        return [
            linears.linear(layer, linears.modulated(layer, x, shift, scale), residual=residual, gate=gate),
            linears.linear(layer, linears.normed(layer, norm, x), gelu=True),
            linears.linear(layer, linears.geglu(layer, torch.cat((x, x), dim=-1)), residual=residual),
            torch.cat(linears.linear_and_gelu(layer, x, 16), dim=-1),
            layer(x),
        ]

    with_them = results()
    kernels.choose("off")
    for found, plain in zip(with_them, results(), strict=True):
        close(found, plain, 0.02)


@needs_kernels
@pytest.mark.parametrize("kind", [0, 1], ids=["bfloat16", "int8"])
def test_a_token_has_the_same_bits_in_any_batch_and_by_any_number_of_threads(isa: str, kind: int) -> None:
    layer, threads = layers()[kind], torch.get_num_threads()
    x, shift, scale = some(3, 50, 96, dtype=HALF), some(3, 1, 96, dtype=HALF), some(3, 1, 96, dtype=HALF)
    residual, gate = some(3, 50, 80, dtype=HALF), some(3, 1, 80, dtype=HALF)
    picture = some(3, 64, 20, 20, dtype=HALF).contiguous(memory_format=torch.channels_last)
    weight = some(64, dtype=HALF)

    def results(rows: slice) -> list[Tensor]:
        read = linears.modulated(layer, x[rows], shift[rows], scale[rows])
        out = linears.linear(layer, read, gelu=True, residual=residual[rows], gate=gate[rows])
        heads = out.unflatten(-1, (5, 16)).transpose(1, 2)
        return [out, attention(heads, heads, heads), ops.group_norm_silu(picture[rows], 8, weight, weight, 1e-6)]

    together = results(slice(0, 3))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for i in range(3):
                for one, all_of in zip(results(slice(i, i + 1)), together, strict=True):
                    assert torch.equal(one[0], all_of[i])
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_what_kernels_are_not_for_is_done_by_torch() -> None:
    q = some(1, 1, 4, 5, dtype=HALF)
    close(attention(q, q, q), F.scaled_dot_product_attention(q.double(), q.double(), q.double()), BOUND[HALF])
    for inner in (5, 6):  # int8 wants a multiple of 4, bfloat16 of 2
        linear = nn.Linear(inner, 8).to(HALF)
        x = some(1, 3, inner, dtype=HALF)
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        close(linears.linear(linear, x), exact, BOUND[HALF])
        close(linears.linear(QuantizedLinear.of(linear, INT8), x), exact, 0.03)
    for dtype in (torch.float16, torch.float64):
        assert not kernels.usable(torch.zeros(1, dtype=dtype))
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(1, 2, 16, requires_grad=True)
        ops.geglu(x).sum().backward()
        assert x.grad is not None


@needs_kernels
def test_who_listens_to_a_linear_hears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in layers():
        heard: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, inputs, __, heard=heard: heard.append(inputs[0]))
        x = some(1, 3, 96, dtype=HALF)
        listened = linears.linear(layer, linears.modulated(layer, x, x[:, :1], x[:, :1]))
        handle.remove()
        assert [each.shape for each in heard] == [x.shape]
        close(listened, linears.linear(layer, linears.modulated(layer, x, x[:, :1], x[:, :1])), 0.02)


@needs_kernels
def test_a_linear_with_a_lora_beside_it_is_not_passed_over() -> None:
    for layer in layers():
        x = some(1, 3, 96, dtype=HALF)
        before = linears.linear(layer, x)
        side.reserve(layer, 16, HALF, torch.device("cpu"))
        layer.get_buffer("side_down").fill_(0.1)
        layer.get_buffer("side_up").fill_(0.1)
        added = x.double() @ torch.full((96, 80), 0.16, dtype=torch.float64)
        close(linears.linear(layer, x), before.double() + added, 0.02)


@needs_kernels
@pytest.mark.parametrize("name", [function.__name__ for function in cpu.OPERATIONS])
def test_torch_knows_their_sizes_and_what_they_change(name: str) -> None:
    x, row = some(2, 3, 8, dtype=HALF), some(8, dtype=HALF)
    heads, angle = some(1, 2, 3, 8, dtype=HALF), torch.rand(3, 4)
    values, scales = torch.ones((6, 8), dtype=torch.int8), torch.ones(6)
    after = (row, 0, some(2, 3, 8, dtype=HALF), some(2, 1, 8, dtype=HALF))
    arguments: dict[str, tuple[Any, ...]] = {
        "layer_norm": (x, row, row, 1e-6, 1.0),
        "layer_norm_quantize": (x, row, None, 1e-6, 1.0),
        "quantize_rows": (x,),
        "geglu_quantize": (x,),
        "geglu": (x,),
        "qk_norm_rotary": (heads, heads, row, row, angle, angle, 1e-6),
        "gated_residual": (x, some(2, 1, 8, dtype=HALF), x),
        "group_norm": (heads, 2, row[:2], row[:2], 1e-6, True),
        "attention": (heads, heads, heads),
        "int8_linear": (values, scales, torch.ones((8, 8), dtype=torch.int8), torch.ones(8), *after, HALF),
        "bf16_linear": (x, some(8, 8, dtype=HALF), *after),
    }
    tests = ("test_schema", "test_faketensor")
    with torch.inference_mode(False):
        plain = [a.clone() if isinstance(a, Tensor) else a for a in arguments[name]]
        torch.library.opcheck(getattr(OPS, name).default, tuple(plain), test_utils=tests)


@needs_kernels
def test_an_engine_says_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = flux_engine.load("demo-schnell", device="cpu", dtype="bfloat16")
    said = engine.describe()["kernels"]
    assert set(said) == {"attention", "linears", "int8", "tokens"}
    assert said["tokens"].startswith("flux_kernels")
    with_them = engine("a red circle", seed=1, output_type="latent").images[0]
    monkeypatch.setenv("FLUX_ENGINE_KERNELS", "off")
    engine = flux_engine.load("demo-schnell", device="cpu", dtype="bfloat16")
    assert set(engine.describe()["kernels"].values()) == {"torch (kernels are off)"}
    without = engine("a red circle", seed=1, output_type="latent").images[0]
    assert not torch.equal(with_them, without)
    assert (with_them - without).norm() <= 0.05 * without.norm()


def test_kernels_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_not", lambda: "they are not built")
    with pytest.raises(UnsupportedError, match="kernels 'on' asked for, but they are not built; use 'auto'"):
        kernels.choose("on")
    with pytest.raises(UnsupportedError, match="kernels 'fast' is not one of auto, on, off"):
        EngineConfig(kernels="fast")
    kernels.choose("auto")
    assert kernels.describe(torch.device("cpu"), HALF)["attention"] == "torch (they are not built)"
    assert kernels.describe(torch.device("meta"), HALF)["attention"] == "torch"
    x = some(1, 2, 8, dtype=HALF)
    assert not kernels.usable(x)
    assert torch.equal(ops.geglu(x), x[..., :4] * F.gelu(x[..., 4:]))


def test_what_is_missing_to_build_them_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(build.SOURCES, tmp_path / "csrc", ignore=shutil.ignore_patterns("built"))
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    monkeypatch.delenv("CXX", raising=False)

    def refused(why: str) -> None:
        with pytest.raises(build.BuildError, match=why):
            build.build()
        assert not list(tmp_path.glob("built/*"))

    with monkeypatch.context() as patch:
        patch.setattr(build.platform, "machine", lambda: "arm64")
        refused("the kernels are for x86-64, and this is arm64")
    with monkeypatch.context() as patch:
        patch.setattr(build.shutil, "which", lambda _: None)
        refused("not on the path: install it")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(tmp_path / "nothing"))
        refused("cannot be run: No such file")
        patch.setenv("CXX", "false")
        refused("failed")
    before = build.library()
    (tmp_path / "csrc" / "simd.h").write_text("other")
    assert build.library() != before  # what was built of other sources is not taken


@pytest.mark.parametrize(
    ("module", "heavy"), [("flux_kernels.build", "torch"), ("flux_engine.linears", "torch._dynamo")]
)
def test_importing_them_is_light(module: str, heavy: str) -> None:
    """torch.compile's machinery takes seconds to import."""
    code = f"import sys, {module}; print({heavy!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@both
@pytest.mark.parametrize("size", [(1, 3, 1, 1), (2, 32, 9, 11)], ids=str)
def test_an_enlarged_picture_is_convolved_in_four_parts(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    x, weight = some(*size, dtype=dtype), some(6, size[1], 3, 3, dtype=dtype)
    for bias in (None, some(6, dtype=dtype)):
        wide = None if bias is None else bias.double()
        exact = F.conv2d(F.interpolate(x.double(), scale_factor=2.0), weight.double(), wide, padding=1)
        close(ops.upsampled_conv(x, weight, bias), exact, 2 * BOUND[dtype])
