"""The notebooks run from top to bottom on the shipped models, and are kept without what they showed."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_is_one_for_every_subject() -> None:
    subjects = ["benchmarking", "conditions", "loras", "quantization", "text_to_image"]
    assert [path.stem for path in NOTEBOOKS] == subjects


@each
def test_kept_clean(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            ast.parse(cell.source)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each
def test_runs(path: Path, tmp_path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    client = NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type != "error" for output in shown)
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert pictures or path.stem == "benchmarking"
