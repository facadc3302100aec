"""Loading takes the memory of the result, and little more: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import memory
from flux_engine.params import FluxParams

LAYERS, WIDTH = 128, 2896
"""2.1 GB in two bytes a number."""

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource

layers, width = {layers}, {width}

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
with WeightSource.open(Path(sys.argv[1])) as source:
    make = lambda: nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    net = load_module(make, source, dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"))
total = sum(float(p[::7, ::512].float().sum()) + float(p.view(torch.int16)[:, ::64].max()) for p in net.parameters())
size = sum(p.nbytes for p in net.parameters())
print(json.dumps([(peak() - before) / size, size, total == total]))
"""


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loading_two_gigabytes(tmp_path_factory: pytest.TempPathFactory, dtype: str) -> None:
    """As it is stored, where every page is touched, and converted while it is read."""
    path = tmp_path_factory.getbasetemp() / "two-gigabytes.safetensors"
    if not path.exists():
        save_file({f"{i}.weight": torch.full((WIDTH, WIDTH), i, dtype=torch.float16) for i in range(LAYERS)}, path)
    program = PROGRAM.format(layers=LAYERS, width=WIDTH)
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), dtype], capture_output=True, text=True, check=True, timeout=600
    )
    ratio, size, whole = json.loads(done.stdout)
    assert size > 2e9 and whole
    assert 0.9 < ratio <= 1.1, ratio


def test_the_program_measures_the_peak(tmp_path: Path) -> None:
    """Of a small file too, where the ratio says little: the program itself works."""
    path = tmp_path / "x.safetensors"
    save_file({"0.weight": torch.zeros(64, 64, dtype=torch.float16)}, path)
    program = PROGRAM.format(layers=1, width=64)
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), "bfloat16"], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout)[1] == 64 * 64 * 2


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_quantizing_while_loading(tmp_path: Path, scheme: str) -> None:
    """Six of FLUX.1's blocks, 2.6 GB: nothing in bfloat16 is held but some rows."""
    found = memory.loading(tmp_path, scheme, FluxParams(depth=2, depth_single_blocks=4))
    assert found["source"] > 2.5e9 and 0.5 < found["bytes"] / found["source"] < 0.55
    assert found["bytes"] * 0.95 < found["peak"] <= found["allowed"], found


def test_quantizing_while_loading_is_measured(tmp_path: Path) -> None:
    params = FluxParams(hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=64, vec_in_dim=64)
    found = memory.loading(tmp_path, "int8", params)
    assert 0.5 < found["bytes"] / found["source"] < 0.65 and not list(tmp_path.iterdir())
