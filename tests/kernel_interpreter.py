"""Run the cases in Triton's interpreter and say what is wrong: a process of its own, because TRITON_INTERPRET has to be
set before Triton is imported. Prints {case: error or null} as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import numpy as np
import torch
from flux_kernels import registry
from flux_kernels.ops import OPS
from kernel_cases import CASES


def correct_the_interpreter() -> None:
    """Let it round as cards do. Triton 3.7 to 3.9's interpreter cuts bits off where it goes to bfloat16, rounds e4m3
    without a carry, and multiplies bfloat16 by its bits; here torch converts, to the nearest number."""
    import triton.language as tl
    from triton.runtime import interpreter

    kinds = {
        tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }  # fmt: skip
    of_bits = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.int16), 32: (np.uint32, torch.int32)}

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        numpy_bits, torch_bits = of_bits[source.primitive_bitwidth]
        bits = np.ascontiguousarray(data).view(numpy_bits)
        numbers = torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(torch_bits).view(kinds[source]).float()
        if kinds[target] == torch.float8_e4m3fn:
            numbers = numbers.clamp(-448, 448)  # as cvt.rn.satfinite
        numpy_bits, torch_bits = of_bits[target.primitive_bitwidth]
        return numbers.to(kinds[target]).view(torch_bits).numpy().view(numpy_bits).reshape(np.shape(data))

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        def wide(x: Any) -> Any:
            if x.dtype.scalar == tl.int8:
                return x.data.astype(np.int32)
            if x.dtype.scalar == tl.float16:
                return x.data.astype(np.float32)
            return convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32)

        return interpreter.TensorHandle(np.matmul(wide(a), wide(b)) + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def opcheck(op: str) -> str | None:
    """torch.library.opcheck of the op as it is registered, with the kernel in the interpreter behind it."""
    case = next(case for case in CASES.values() if case.op == op)
    arguments = case.arguments("cpu")
    utilities = ["test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn for x in arguments):
        utilities.append("test_schema")  # which multiplies its arguments, and torch has no product of e4m3
    checked = torch.library.opcheck(getattr(torch.ops.flux_kernels, op).default, arguments, test_utils=utilities)
    return None if set(checked.values()) == {"SUCCESS"} else str(checked)


def outcome(run: Any, *arguments: Any) -> str | None:
    try:
        return run(*arguments)
    except Exception as error:  # noqa: BLE001 it is what the test tells
        return f"{type(error).__name__}: {error}"


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # numpy's, where numbers are not finite
    correct_the_interpreter()
    for op, module in OPS.items():
        registry.implement(op, "CPU", getattr(module, op))
    found = {case.id: outcome(case.error) for case in CASES.values()}
    found |= {f"opcheck-{op}": outcome(opcheck, op) for op in OPS}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
