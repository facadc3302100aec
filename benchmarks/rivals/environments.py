"""A virtual environment for each rival, made by the command that needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.harness import Failed
from benchmarks.machine import ROOT

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
ENVIRONMENTS = ROOT / "out" / "rivals"
INSTALLING = 1800
"""Seconds after which an installation has failed."""


def requirements_of(name: str) -> str:
    """All that an environment is made of. Raises Failed for a name that has none."""
    path = REQUIREMENTS / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in REQUIREMENTS.glob("*.txt")))
        raise Failed(f"no environment {name!r}: {known}")
    lines = path.read_text().splitlines()
    more = [line.removeprefix("-r ").removesuffix(".txt").strip() for line in lines if line.startswith("-r ")]
    return "\n".join([*lines, *(requirements_of(each) for each in more)])


def python_of(name: str | None) -> str:
    """The interpreter of an environment, which is made or brought up to date first; None for the one that runs.

    Raises Failed if it cannot be, with what pip said.
    """
    if name is None:
        return sys.executable
    wanted, folder = requirements_of(name), ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return str(python)
    sys.stderr.write(f"making the environment of {name} in {folder.relative_to(ROOT)}, which takes minutes\n")
    stamp.unlink(missing_ok=True)
    commands = [] if python.exists() else [[sys.executable, "-m", "venv", str(folder)]]
    commands.append([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                     "-r", str(REQUIREMENTS / f"{name}.txt")])  # fmt: skip
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALLING)
        except subprocess.TimeoutExpired:
            raise Failed(f"the environment of {name} was not installed in {INSTALLING} s") from None
        if done.returncode:
            raise Failed(f"the environment of {name} cannot be installed:\n{done.stderr[-1500:]}")
    stamp.write_text(wanted)
    return str(python)
