"""Products and attention of the kernels for processors, by all that the processor can multiply by, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import cpu_cases
import pytest
import torch
import torch.nn.functional as F
from cpu_cases import BOUND, HALF, OPS, WIDE, both, close, layers, needs_kernels, some
from flux_kernels import cpu
from torch import Tensor, nn

from flux_engine import kernels, linears, ops
from flux_engine.attention import attention
from flux_engine.quantization.linears import INT8, QuantizedLinear


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
    yield from cpu_cases.without_gradients()


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
def test_what_multiplies_is_told(isa: str) -> None:
    for dtype, wide in ((HALF, f"flux_kernels ({isa})"), (WIDE, "torch (float32)")):
        assert kernels.describe(torch.device("cpu"), dtype) == {
            "attention": wide,
            "linears": wide,
            "int8": f"flux_kernels ({isa})",
            "tokens": "flux_kernels (AVX-512)",
        }
