"""Build the kernels for processors, once: `python -m flux_kernels.build`.

They need a processor with AVX-512 (VNNI and BF16) and GCC, 11 or later; AMX is used where there is any. Without them
everything works by torch's own operations, only slower, and `Engine.describe()` says so.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
BUILT = SOURCES / "built"
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fvisibility=default"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mfma", "-mbmi2"),
    *("-mamx-tile", "-mamx-int8", "-mamx-bf16"),
)
COMMAND = "python -m flux_kernels.build"


class BuildError(RuntimeError):
    """The kernels cannot be built here; says what is missing."""


def library() -> Path:
    """Where the library of these sources is or will be: changed sources have another name."""
    told = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            told.update(path.name.encode() + b"\0" + path.read_bytes())
    return BUILT / f"cpu-{told.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile and link, unless that was done; returns the library. Raises BuildError."""
    path = library()
    if path.exists():
        return path
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"the kernels are for x86-64, and this is {platform.machine()}")
    # Clang's OpenMP needs a runtime of its own, and two in one process would wait for each other.
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("GCC's g++ is not on the path: install it (Debian: apt install g++), then run " + COMMAND)
    try:
        BUILT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            objects = {source: Path(folder) / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda s: _run(compiler, *FLAGS, "-c", str(s), "-o", str(objects[s])), objects))
            made = Path(folder) / path.name
            # Not linked with an OpenMP runtime: torch has brought one, whose threads they share.
            _run(compiler, "-shared", "-o", str(made), *map(str, objects.values()))
            made.replace(path)
    except OSError as error:
        raise BuildError(f"the kernels cannot be written to {BUILT}: {error.strerror}") from None
    for old in BUILT.glob("cpu-*.so"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{build()}\n")
    except BuildError as error:
        sys.exit(f"flux_kernels: {error}")
