"""The request path on a card that is not there: tensors without numbers, on the device "cuda", on a CPU build of torch.

What would go wrong on a card is caught (tensors on two devices, a wait for the device inside the loop, products that
the card's kernels refuse), and live bytes are counted: the peak of memory for the published widths on any card.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flux_engine.families.base import Condition, Family, Stage, Walk, generators_of
from flux_engine.families.sdxl import SDXLFamily
from flux_engine.params import FlowSchedule
from flux_engine.pipeline import Pipeline
from flux_engine.quantization.linears import FP8, INT8
from flux_engine.request import Job
from flux_engine.schedulers import flow_match_euler

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
NO_OP_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>); }
"""
"""Without it indexing fails on a CPU build of torch ("not linked with support for cuda devices")."""
WAITS = {
    aten._local_scalar_dense.default: ".item()",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "a mask as an index",
    aten.equal.default: "torch.equal",
}
"""What makes the processor wait for the device."""


WHOLE = (aten.to, aten.item, aten.is_nonzero)
"""What in inference mode comes whole, and is to be looked into."""
PRODUCTS = (
    aten.linear, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.matmul, aten.conv2d, aten.convolution,
    aten.scaled_dot_product_attention, aten.layer_norm, aten.group_norm,
)  # fmt: skip
"""What a card refuses for tensors of several dtypes, and tensors without numbers do not."""


class DryRunError(AssertionError):
    """Something that a card would refuse, or wait for."""


def register_guard() -> None:
    """Let tensors be indexed on a device that is not there. Needs a C++ compiler; does nothing the second time."""
    if torch.version.cuda is not None or getattr(register_guard, "done", False):
        return
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("a dry run needs a C++ compiler: install g++")
    root = Path(torch.__file__).parent
    key = hashlib.sha256(f"{NO_OP_GUARD}{torch.__version__}{root}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"flux-engine-guard-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
            source.write_text(NO_OP_GUARD)
            flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
            subprocess.run([compiler, str(source), "-o", str(made), *flags], check=True, capture_output=True)
            shutil.move(made, library)
    ctypes.CDLL(str(library))
    register_guard.done = True  # pyright: ignore[reportFunctionMemberAccess]


class Card(TorchDispatchMode):
    """Watches every operation: what it would do on a card, and how many bytes live there."""

    def __init__(self) -> None:
        super().__init__()
        self.in_loop = False
        self._live: dict[int, Any] = {}
        self.bytes = 0
        """That live on the device now."""
        self.peak = 0
        self.operations = 0

    @contextmanager
    def measured(self) -> Iterator[list[int]]:
        """The list has the peak inside, at the end."""
        before, self.peak = self.peak, self.bytes
        found: list[int] = []
        try:
            yield found
        finally:
            found.append(self.peak)
            self.peak = max(before, self.peak)

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Nothing inside may wait for the device."""
        self.in_loop = True
        try:
            yield
        finally:
            self.in_loop = False

    def hold(self, module: nn.Module) -> None:
        """Count a network's parameters and buffers."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in WHOLE:
            with self:
                return func.decompose(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        if self.in_loop:
            self._refuse_waits(func, args, kwargs, inputs)
        elif func is aten._local_scalar_dense.default:
            return True  # outside of the loop: whether all is finite
        elif func is aten.equal.default:
            return False  # whether a prompt is remembered
        self._refuse_products(func, args)
        if func.overloadpacket in PRODUCTS:
            dtypes = {tensor.dtype for tensor in inputs if tensor.device.type == "cuda"}
            if len(dtypes) > 1:
                raise DryRunError(f"{func.overloadpacket}: not all of the same dtype, but {dtypes}")
        out = func(*args, **kwargs)
        self.operations += 1
        for tensor in _tensors(out):
            self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type == "cuda":
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key not in self._live:
                self._live[key] = weakref.ref(storage, lambda _: self._gone(key, size))
                self.bytes += size
                self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int, size: int) -> None:
        del self._live[key]
        self.bytes -= size

    def _refuse_waits(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> None:
        on_card = any(tensor.device.type == "cuda" for tensor in inputs)
        if func in WAITS and on_card:
            raise DryRunError(f"{WAITS[func]} waits for the device")
        if func is aten._to_copy.default and on_card and torch.device(kwargs.get("device") or CUDA).type == "cpu":
            raise DryRunError(f"a tensor of shape {list(inputs[0].shape)} is copied from the device")
        if func is aten.copy_.default and args[0].device.type == "cpu" and args[1].device.type == "cuda":
            raise DryRunError(f"a tensor of shape {list(args[1].shape)} is copied from the device")
        if func is aten.index.Tensor:
            devices = {tensor.device.type for tensor in inputs}
            if len(devices) > 1:
                raise DryRunError(f"a table on {args[0].device} is indexed by a tensor on another device")

    def _refuse_products(self, func: Any, args: Any) -> None:
        for operation, scheme in ((aten._int_mm.default, INT8), (aten._scaled_mm.default, FP8)):
            if func is operation and args[0].device.type == "cuda":
                least, multiple = scheme.grid
                (rows, inner), columns = args[0].shape, args[1].shape[1]
                if rows < least or inner % multiple or columns % multiple:
                    raise DryRunError(
                        f"{scheme.name}: {rows} x {inner} times {inner} x {columns}; the kernel wants {least} rows and "
                        f"multiples of {multiple}"
                    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in _tensors(one)]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return []


@contextmanager
def dry_run() -> Iterator[Card]:
    """Inside, tensors have no numbers, and those on "cuda" are watched."""
    register_guard()
    card = Card()
    with FakeTensorMode(allow_non_fake_inputs=True), card, torch.inference_mode(), _arguments_held():
        yield card


@contextmanager
def _arguments_held() -> Iterator[None]:
    """While torch listens to frames, which it does for ever after a compilation that failed, CPython keeps what a
    function is given until it returns, even if that lets go of it before. So live a few tensors more: counted are these
    processes, as what is foretold has to hold in them as well."""
    before = eval_frame.set_eval_frame(False)  # listens, and compiles nothing
    try:
        yield
    finally:
        eval_frame.set_eval_frame(before)


def placed(module: nn.Module, dtype: torch.dtype, card: Card, without: Collection[str] = ()) -> Any:
    """A network from the meta device on the card, its numbers in floating point in `dtype`, but for some."""
    left, made = set(without), dict[int, nn.Parameter]()
    for path, parent in module.named_modules():
        for name, parameter in list(parent._parameters.items()):
            if parameter is not None and f"{path}.{name}".removeprefix(".") not in left:
                kind = dtype if parameter.dtype == torch.float32 and not name.endswith("_scale") else parameter.dtype
                if id(parameter) not in made:  # tables that are tied are one
                    empty = torch.empty(parameter.shape, dtype=kind, device=CUDA)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                parent._parameters[name] = made[id(parameter)]
        for name, buffer in list(parent._buffers.items()):
            if buffer is not None:
                parent._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    card.hold(module)
    return module.eval()


class PlainSDXL(SDXLFamily):
    """With a schedule of plain numbers: diffusers' schedulers read tables, and what has no numbers cannot be read."""

    def stages(self, job: Job, condition: Condition) -> list[Stage]:
        schedule = flow_match_euler(FlowSchedule(shifted=False), job.num_inference_steps, 1, 1.0)

        def begin(_: Walk | None) -> Walk:
            noise = self.noise(generators_of(job), *job.latent_size)
            return Walk(noise, noise)

        return [Stage(self, schedule, begin, condition)]


def request(family: Family[Any], job: Job, dtype: torch.dtype) -> Card:
    """A job from its prompt to its pictures, the networks placed on the card; the loop has to run without waiting.

    Raises DryRunError, or what torch raises for tensors that do not go together. The family is of no use afterwards.
    """
    if isinstance(family, SDXLFamily):
        family = PlainSDXL(**vars(family))
    with dry_run() as card:
        for network in family.networks().values():
            placed(network, dtype, card)
        pipeline = Pipeline(family)
        denoise = pipeline._denoise

        def watched(*args: Any) -> Walk:
            with card.loop():
                return denoise(*args)

        pipeline._denoise = watched  # pyright: ignore[reportAttributeAccessIssue]
        pipeline.run(job)
    return card
