"""The kernels for processors against torch's own operations in float64, and what they promise besides."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu_cases
import pytest
import torch
import torch.nn.functional as F
from cpu_cases import BOUND, HALF, OPS, both, close, layers, needs_kernels, some
from flux_kernels import build, cpu
from torch import Tensor, nn

import flux_engine
from flux_engine import kernels, linears, ops
from flux_engine.attention import attention
from flux_engine.config import EngineConfig
from flux_engine.errors import UnsupportedError
from flux_engine.lora import side
from flux_engine.quantization.linears import INT8, QuantizedLinear, quantize_rows


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    yield from cpu_cases.without_gradients()


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
def test_what_is_of_another_dtype_is_converted_and_lives_until_it_is_read() -> None:
    """As under autocast, where weights stay in float32. What is converted has no other name than its address."""
    x = some(2, 320, 16, 17, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, bias = some(2, 320, dtype=torch.float32)
    close(ops.group_norm(x, 4, weight, bias, 1e-5), F.group_norm(x.double(), 4, weight.double(), bias.double()), 0.02)
    q, k = some(2, 2, 3, 9, 64, dtype=torch.bfloat16)
    weights, angle = some(2, 64, dtype=torch.float32), torch.randn(32, 9).T  # of strides that no kernel reads
    for one, of, scale in zip(
        ops.qk_norm_rotary(q, k, *weights, angle.cos(), angle.sin()), (q, k), weights, strict=True
    ):
        close(one, ops.apply_rotary(ops.rms_norm(of.float(), scale), angle.cos(), angle.sin()), 0.02)
    tokens, update = some(2, 9, 64, dtype=torch.bfloat16), some(2, 9, 64, dtype=torch.float32)
    gate = some(2, 1, 64, dtype=torch.float32)
    close(ops.gated_residual(tokens, gate, update), tokens.double() + gate.double() * update.double(), 0.02)
    product, shift = some(64, 128, dtype=torch.bfloat16), some(64, dtype=torch.float32)
    wide, apart = some(2, 9, 128, dtype=torch.bfloat16), some(2, 64, 9, dtype=torch.float32).transpose(1, 2)
    found = torch.ops.flux_cpu.bf16_linear(wide, product, shift, None, apart, gate).view(2, 9, 64)
    linear = wide.double() @ product.double().T + shift.double()
    close(found, apart.double() + gate.double() * linear, 0.02)


@needs_kernels
def test_silu_after_a_norm_has_the_digits_of_float32() -> None:
    """By itself: what it is given is the same norm without it. So the kernels' power of two is as exact as it says."""
    x = some(1, 64, 33, 9, dtype=torch.float32, mean=0.0).contiguous(memory_format=torch.channels_last)
    weight, bias = 4 * torch.ones(64), torch.zeros(64)
    given = ops.group_norm(x, 4, weight, bias, 1e-5).double()
    found = ops.group_norm_silu(x, 4, weight, bias, 1e-5)
    assert (found / F.silu(given) - 1).abs().max() <= 2e-6


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
