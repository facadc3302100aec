"""The kernels' rules, checks and definitions, without running one: what is refused, and what comes of a dry run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flux_kernels import ArgumentError, KernelUnavailable, arch, table
from flux_kernels.arch import SHARED, Capability
from flux_kernels.ops import OPS
from kernel_cases import Draw
from kernel_launches import SIZES, Empty, Size, dtypes, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.dry_run import register_guard
from flux_engine import ops
from flux_engine.quantization.linears import FP8, INT8
from flux_engine.quantization.linears import quantize_rows as quantized

CARDS = tuple(SHARED)
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="a dry run needs a C++ compiler"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_imports_are_light() -> None:
    assert run("import flux_kernels, sys; print('torch' in sys.modules)") == "False"
    assert run("from flux_kernels import ops, table; import sys; print('triton' in sys.modules)") == "False"


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5)


def test_references_are_the_ops_of_the_library() -> None:
    draw = Draw(torch.Generator().manual_seed(0))
    x, update = draw(2, 5, 24), draw(2, 5, 24)
    shift, scale, gate = draw(2, 3, 1, 24).unbind(1)
    stream = ops.gated_residual(x, gate, update)
    q, k = draw(2, 3, 5, 8), draw(2, 3, 5, 8)
    tables = ops.rotary_tables(torch.arange(15).view(5, 3), (4, 2, 2), 1e4)
    picture, weight, bias = draw(2, 8, 5, 7), draw(8), draw(8)
    pairs: dict[str, tuple[Any, ...]] = {
        "layer_norm_modulate": (ops.layer_norm_modulate(x, shift, scale), x, shift, scale),
        "gated_residual": (stream, x, gate, update),
        "gated_residual_modulate": (
            (stream, ops.layer_norm_modulate(stream, shift, scale)), x, gate, update, shift, scale,
        ),
        "qk_norm_rotary": (
            ops.qk_norm_rotary(q, k, weight, bias, *tables), q, k, weight, bias, *tables,
        ),
        "group_norm_silu": (
            ops.group_norm_silu(picture, 4, weight, bias, 1e-5), picture, 4, weight, bias, 1e-5,
        ),
    }  # fmt: skip
    for op, (wanted, *arguments) in pairs.items():
        found = OPS[op].reference(*arguments)
        for a, b in zip(*((v,) if isinstance(v, Tensor) else v for v in (found, wanted)), strict=True):
            assert close(a, b), op


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=lambda scheme: scheme.name)
def test_rows_are_quantized_as_the_library_does(scheme: Any) -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    x[1], x[2] = 0, x[2] * 1e-38
    values, scales = OPS["quantize_rows"].reference(x, scheme.dtype)
    wanted, wanted_scales = quantized(x.clone(), scheme)
    assert torch.equal(values.float(), wanted.float()) and torch.equal(scales, wanted_scales)
    x[0, 3], x[4, 5] = float("nan"), float("inf")
    assert OPS["quantize_rows"].reference(x, scheme.dtype)[1].isfinite().tolist() == [
        False,
        True,
        True,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_rule_and_a_place(op: str) -> None:
    assert (op in arch.NORMS) + (op in arch.QUANTIZING) + (op in arch.PRODUCTS) == 1
    assert "7.5" in (arch.why_not(op, (torch.float16,), (7, 0)) or "")
    for newer in ((8, 7), (9, 0), (10, 3), (12, 1), (13, 0)):
        assert arch.why_not(op, (torch.int8,), newer) is None or op == "fp8_linear"


def test_a_refusal_says_what_why_and_what_instead() -> None:
    assert arch.why_not("int8_linear", (torch.float16,), (7, 5)) == (
        "int8_linear needs compute capability 8.0, and this is 7.5: Triton has no tensor cores on 7.5; "
        "use torch._int_mm"
    )
    assert arch.why_not("quantize_rows", (torch.float16, torch.float8_e4m3fn), (8, 6)) == (
        "quantize_rows to float8_e4m3fn needs compute capability 8.9, and this is 8.6: Triton has no e4m3 below 8.9; "
        "use int8"
    )


def test_the_table_of_the_readme_is_what_the_rules_say() -> None:
    text = table.README.read_text()
    assert table.written(text) == text, "run python -m flux_kernels.table"


@needs_compiler
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_dry_run_gives_what_the_reference_gives_or_what_a_card_would_say(size: Size) -> None:
    register_guard()
    op = getattr(torch.ops.flux_kernels, size.op)
    with FakeTensorMode():
        arguments = tensors(size, Empty())
        wanted = OPS[size.op].reference(*arguments)
        for card in CARDS:
            with arch.assumed(card):
                if arch.why_not(size.op, dtypes(size), card):
                    with pytest.raises(KernelUnavailable, match=f"this is {card[0]}.{card[1]}"):
                        op(*arguments)
                    continue
                found = op(*arguments)
            for a, b in zip(*((v,) if isinstance(v, Tensor) else v for v in (found, wanted)), strict=True):
                assert a.device.type == "cuda"
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_tensors_of_the_cpu_are_not_launched() -> None:
    for size in SIZES:
        with pytest.raises(ArgumentError, match="is for CUDA, and a tensor is on cpu"):
            getattr(OPS[size.op], size.op)(*tensors(size, Empty("cpu"), tokens=2))


Change = Callable[[list[Any]], object]


def change(index: int, function: Callable[[Tensor], Any]) -> Change:
    def changed(arguments: list[Any]) -> None:
        arguments[index] = function(arguments[index])

    return changed


WRONG: dict[str, tuple[str, Change, str]] = {
    "axes": ("layer_norm_modulate", change(0, lambda x: x[0]), "x has 2 axes, not 3"),
    "double": ("layer_norm_modulate", change(0, lambda x: x.double()), "x is float64, not one of float32"),
    "transposed": ("layer_norm_modulate", change(0, lambda x: x.mT), "the last axis of x has stride 3072, not 1"),
    "too wide": ("quantize_rows", change(0, lambda x: x.new_empty(2, 16385)), "rows of 16385, where 1 to 16384"),
    "no width": ("quantize_rows", change(0, lambda x: x[:, :0]), "rows of 0"),
    "another width": ("layer_norm_modulate", change(1, lambda x: x[..., :8]), r"shift has shape \[1, 1, 8\], not"),
    "two for three": (
        "gated_residual", change(1, lambda x: x.new_empty(2, 1, 3072)), r"gate has shape \[2, 1, 3072\], not",
    ),
    "another dtype": ("gated_residual", change(2, lambda x: x.float()), "update is float32, not float16"),
    "another device": (
        "gated_residual", change(2, lambda x: torch.empty_like(x, device="cpu")), "update is on cpu, and the rest",
    ),
    "int16": ("quantize_rows", change(1, lambda _: torch.int16), "int16 is not one of int8, float8_e4m3fn"),
    "odd head": ("qk_norm_rotary", change(0, lambda x: x[..., :127]), "heads of 127, where even widths"),
    "tables": ("qk_norm_rotary", change(4, lambda x: x[:-1]), r"cos has shape \[4607, 64\], not \[4608, 64\]"),
    "half tables": ("qk_norm_rotary", change(5, lambda x: x.half()), "sin is float16, not float32"),
    "weights": ("qk_norm_rotary", change(3, lambda x: x.bfloat16()), "k_weight is bfloat16, not float16 or float32"),
    "groups": ("group_norm_silu", change(1, lambda _: 33), "320 channels in 33 groups"),
    "layout": ("group_norm_silu", change(0, lambda x: x[:, :, :, ::2]), "neither contiguous nor channels last"),
    "rows": ("gated_residual_modulate", change(0, lambda x: x[:, 1:]), r"update has shape .* not \[1, 4607, 3072\]"),
    "inner": ("int8_linear", change(0, lambda x: x[:, 1:]), r"weight has shape \[3072, 12288\], not \[3072, 12287\]"),
    "unscaled": ("int8_linear", change(1, lambda x: x[1:]), r"scales has shape \[4607\], not \[4608\]"),
    "half scales": ("int8_linear", change(3, lambda x: x.half()), "weight_scale is float16, not float32"),
    "e4m3": ("int8_linear", change(2, lambda x: x.view(torch.float8_e4m3fn)), "weight is float8_e4m3fn, not int8"),
    "columns": ("int8_linear", change(5, lambda _: 3073), "gelu_from 3073 is not a column of 3072"),
    "residual": ("int8_linear", change(6, lambda x: x[:, 1:]), r"residual has shape \[4607, 3072\], not"),
    "gate alone": ("int8_linear", change(6, lambda _: None), "a gate of 1 pictures wants a residual"),
    "five pictures": ("int8_linear", change(7, lambda x: x.new_empty(5, 1, 3072)), "a gate of 5 pictures .* 4608"),
    "to int8": ("int8_linear", change(8, lambda _: torch.int8), "int8 is not one of float32"),
    "bytes": ("fp8_linear", change(0, lambda x: x.view(torch.uint8)), "values is uint8, not float8_e4m3fn"),
    "float32": ("fp8_storage_linear", change(0, lambda x: x.float()), "float32, not float16 or bfloat16"),
    "column-major": (
        "fp8_storage_linear", change(1, lambda x: x.t()), "the last axis of weight has stride 3072, not 1",
    ),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_by_name_before_a_launch(wrong: str) -> None:
    register_guard()
    op, spoil, message = WRONG[wrong]
    size = next(size for size in SIZES if size.op == op and size.dtype == torch.float16)
    card: Capability = max(CARDS)
    with FakeTensorMode(), arch.assumed(card):
        arguments = list(tensors(size, Empty()))
        spoil(arguments)
        for call in (getattr(OPS[op], op), getattr(torch.ops.flux_kernels, op)):
            with pytest.raises(ArgumentError, match=message):
                call(*arguments)
