"""Every kernel against its torch reference, in Triton's interpreter on the CPU: shapes off the grid, all dtypes,
strided inputs, rows that are not finite. One process runs all cases; each is a test here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_interpreter
import pytest
from flux_kernels.ops import OPS
from kernel_cases import CASES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(kernel_interpreter.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_what_its_reference_does(case: str, found: dict[str, str | None]) -> None:
    assert found[case] is None, found[case]


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_registered_as_it_behaves(op: str, found: dict[str, str | None]) -> None:
    assert found[f"opcheck-{op}"] is None, found[f"opcheck-{op}"]
