"""The notebook: it is kept without outputs, and runs from its first cell to its last on a CPU in minutes."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("training", ["--steps 1", pytest.param("--epochs 16", marks=pytest.mark.night)])
def test_it_runs_and_shows_its_picture(training, notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the checkout is under test, whatever is installed
    (cell,) = [cell for cell in notebook.cells if "sam-split finetune" in cell.source and cell.cell_type == "code"]
    assert "--epochs 16" in cell.source
    cell.source = cell.source.replace("--epochs 16", training)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown), "no picture"
    printed = "".join(output.get("text", "") for output in shown)
    assert "AR@100" in printed
    assert not [line for line in printed.splitlines() if line.startswith(("Traceback", "sam-split: error"))], printed
    for made in ("split/config.json", "adapter/adapter/adapter_config.json", "adapter/overlays/index.html"):
        assert (tmp_path / made).is_file(), printed
