"""Rules about the code itself: who imports whom, what is public, what an import costs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flux_engine

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flux_engine"

LEVELS = {
    "errors": 0,
    "params": 0.05,
    "sizes": 0.07,
    "specs": 0.1,
    "config": 0.1,
    "work": 0.15,
    "checks": 0.06,
    "guarded": 1,
    "pictures": 1.1,
    "preprocess": 3.4,
    "inputs": 3.5,
    "request": 3.6,
    "examples": 3.65,
    "files": 1,
    "images": 1.1,
    "hardware": 1,
    "kernels": 0.9,
    "ops": 1,
    "attention": 1,
    "quantization": 1.2,
    "linears": 1.3,
    "models": 2,
    "verdicts": 0.06,
    "watermark": 1,
    "provenance": 1.2,
    "result": 3.7,
    "safety": 4,
    "checkpoints": 3,
    "fetch": 2,
    "ledger": 2,
    "hub": 3,
    "recognition": 3.15,
    "assemble": 3.2,
    "saving": 3.3,
    "addons": 3.25,
    "schedulers": 3,
    "footprint": 2.5,
    "plan": 2.6,
    "staging": 1,
    "memory": 3.05,
    "downloads": 3.12,
    "references": 3.13,
    "lora": 3.52,
    "placing": 4.1,
    "text": 3.1,
    "families": 4,
    "conditions": 4.1,
    "capture": 4.05,
    "compiling": 4.15,
    "network": 4.1,
    "stepcache": 4.2,
    "pipeline": 5,
    "engine": 6,
    "loading": 6.1,
    "bench": 6.5,
    "replicate": 7,
    "predictor": 7.1,
    "cli": 8,
}
"""Module or package -> level. A module imports lower levels, or its own package. Tenths order a level inside."""


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py")


def unit(name: str) -> str:
    """flux_engine.models.flux -> models."""
    return name.split(".")[1]


def imported(tree: ast.AST) -> set[str]:
    """Full names of the flux_engine modules a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide where a name comes from"
            if node.module == "flux_engine":
                names |= {f"flux_engine.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path: Path) -> None:
    source = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    here = unit(source)
    assert here in LEVELS, f"{here} has no level: add it to LEVELS"
    for name in imported(ast.parse(path.read_text())):
        top = name.split(".")[0]
        assert top not in {"benchmarks", "tests", "scripts"}, f"{source} imports {name}"
        if not name.startswith("flux_engine.") or name == "flux_engine.__version__":
            continue
        there = unit(name)
        assert there == here or LEVELS[there] < LEVELS[here], f"{source} imports {name}, which is not below it"


def test_kernels_import_nothing_of_the_library() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert "flux_engine" not in names, path
    assert not (ROOT / "kernels" / "__init__.py").exists(), "`kernels` is the name of a Hugging Face package"


def test_public_names_are_listed_and_there() -> None:
    for name in flux_engine.__all__:
        assert getattr(flux_engine, name) is not None
    assert sorted(flux_engine.__all__) == dir(flux_engine)
    errors = importlib.import_module("flux_engine.errors")
    assert set(errors.__all__) <= set(flux_engine.__all__)
    with pytest.raises(AttributeError):
        _ = flux_engine.nonsense


def run(code: str, sent: str = "") -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=sent, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "diffusers", "triton", "numpy", "PIL")
    code = f"import flux_engine, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert run(code) == "[]"


def test_what_inputs_mean_is_told_without_torch() -> None:
    code = (
        "import sys; from flux_engine.cli import main;"
        "assert main(['validate', 'flux-dev', '--model', 'demo-dev']) == 0;"
        "print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    )
    assert run(code, sent='{"prompt": "x"}').endswith("[]")


def test_import_changes_nothing() -> None:
    code = (
        "import os, threading; before = dict(os.environ), os.getcwd(), threading.active_count();"
        "import flux_engine; print(before == (dict(os.environ), os.getcwd(), threading.active_count()))"
    )
    assert run(code) == "True"


@pytest.mark.full
def test_the_collector_is_paused_only_while_importing() -> None:
    for before in ("enable", "disable"):
        code = f"import gc, flux_engine; gc.{before}(); flux_engine.load; print(gc.isenabled())"
        assert run(code) == str(before == "enable")


def test_a_flux_request_never_imports_diffusers() -> None:
    code = (
        "import flux_engine, sys;"
        "flux_engine.load('demo-schnell', device='cpu')('a red circle', seed=0, num_inference_steps=1);"
        "print('diffusers' in sys.modules)"
    )
    assert run(code) == "False"


def test_only_config_reads_the_environment() -> None:
    for path in modules():
        if path.name != "config.py":
            assert not re.search(r"\b(environ|getenv)\b", path.read_text()), path


def test_source_files_stay_readable() -> None:
    for path in modules():
        assert len(path.read_text().splitlines()) <= 420, f"{path} is long: split it"


def test_there_is_one_loop_over_timesteps() -> None:
    """Of all loops of the package, in statements or comprehensions, one takes the steps of a schedule."""
    loops = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    stepping = {
        f"{path.name}:{function.name}"
        for path in modules()
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for loop in ast.walk(function)
        if isinstance(loop, loops)
        for call in ast.walk(loop)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "step"
    }
    assert stepping == {"pipeline.py:_denoise"}
