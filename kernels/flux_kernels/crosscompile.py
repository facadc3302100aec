"""Compile a kernel for a card that is not there, exactly as a wrapper would launch it, and say what came of it.

with arch.assumed((8, 6)), jit.recorded() as launches:
    wrapper(*tensors without numbers)
compiled(launches[0], (8, 6))
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flux_kernels.arch import Capability
from flux_kernels.jit import Launch

PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")
USED = re.compile(r"Used (\d+) registers")
SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Compiled:
    """What Triton and ptxas made of a launch."""

    products: tuple[str, ...]
    """The tensor-core instructions of its PTX."""
    shared: int
    """Bytes of shared memory of a block."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes that found no register."""


class _Pointer:
    """As much of a tensor as Triton looks at to specialise."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._offset = tensor.dtype, int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset  # torch's allocator begins at multiples of 512 bytes


def specialised(launch: Launch, capability: Capability) -> tuple[dict[str, str], dict[Any, Any], Any, Any]:
    """Types of the arguments, those fixed at compile time, hints such as that they are multiples of 16, and options:
    Triton's own answer. Launches with equal answers share a binary."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability[0] * 10 + capability[1], 32))
    function = launch.kernel.jitted
    binder = create_function_from_signature(function.signature, function.params, backend)
    arguments = [_Pointer(x) if isinstance(x, Tensor) else x for x in launch.arguments]
    bound, specialisation, _ = binder(*arguments, **launch.options, debug=False)
    options, signature, fixed, hints = function._pack_args(backend, launch.options, bound, specialisation, None)
    return signature, fixed, hints, options


def compiled(launch: Launch, capability: Capability) -> Compiled:
    """Compile it whole. Raises RuntimeError, or what Triton raises, where Triton or ptxas cannot."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    from triton.compiler import ASTSource, make_backend

    name_of: Any = sm_arch_from_capability
    number = capability[0] * 10 + capability[1]
    target = GPUTarget("cuda", number, 32)
    backend: Any = make_backend(target)
    signature, fixed, hints, options = specialised(launch, capability)
    source = ASTSource(launch.kernel.jitted, signature, fixed, hints)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module: Any = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata: dict[str, Any] = {"target": target, **vars(options)}
    for name in ("ttir", "ttgir", "llir", "ptx"):
        module = stages[name](module, metadata)
    ptxas = get_ptxas(number)
    log = _assembled(module, ptxas.path, name_of(number))
    spills = [int(stores) + int(loads) for stores, loads in SPILLED.findall(log)]
    return Compiled(
        tuple(sorted(set(PRODUCT.findall(module)))), metadata["shared"], max(map(int, USED.findall(log))), sum(spills)
    )


def _assembled(ptx: str, ptxas: str, card: str) -> str:
    """What ptxas says of registers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={card}", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr[-2000:]}")
    return done.stderr
