"""examples/losses.ipynb runs, and the outputs committed in it are those of a whole run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "losses.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell put out, such as {"stdout", "image/png"}."""
    return {kind for o in cell.outputs for kind in o.get("data", [o.get("name")])}


def test_committed_notebook_is_whole(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {o.output_type for o in outputs} == {"stream", "display_data"}  # no errors
    assert not any(o.get("name") == "stderr" for o in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_notebook_runs_as_committed(notebook, tmp_path, monkeypatch):
    """In a fresh kernel with one CPU device, as a reader runs it; a cell that fails raises."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("XLA_FLAGS")
    committed = [kinds(cell) for cell in code_cells(notebook)]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    for cell, expected in zip(code_cells(notebook), committed, strict=True):
        # More where the data are prepared: TFDS reports its progress.
        assert expected <= kinds(cell), cell.source
