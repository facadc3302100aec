"""Mutated weight files and LoRAs, in processes of their own with little memory to spare (fuzz_weights.py,
fuzz_loras.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("structured", 300),
        pytest.param("structured", 5_000, marks=pytest.mark.full),
        pytest.param("covering", 50_000, marks=pytest.mark.full),
    ],
)
def test_mutated_weight_files(how: str, count: int) -> None:
    if how == "covering":
        pytest.importorskip("atheris", reason="has no wheel for this system: pip install atheris")
    command = [sys.executable, str(Path(__file__).with_name("fuzz_weights.py")), how, str(count)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert told.returncode == 0, (told.stdout + told.stderr)[-3000:]
    assert "done" in told.stdout or f"Done {count} runs" in told.stderr


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.full)])
def test_mutated_loras(count: int) -> None:
    command = [sys.executable, str(Path(__file__).with_name("fuzz_loras.py")), str(count)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert told.returncode == 0, (told.stdout + told.stderr)[-3000:]
    assert f"done: {count} files" in told.stdout
