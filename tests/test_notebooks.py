"""How the notebooks are written. That they run, and that their claims hold, is `pytest --nbmake notebooks`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_figures_described(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]  # what a progress bar leaves there: a megabyte
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert len(cell["source"]) <= 15, f"{cell['id']}: drawing belongs into viz.py"
        assert all(output.get("name") != "stderr" for output in cell["outputs"]), cell["id"]
        has_figure = any("image/png" in output.get("data", {}) for output in cell["outputs"])
        # JupyterLab reads no alt text; `jupyter nbconvert --template classic` reads the cell's
        assert has_figure == bool(cell["metadata"].get("alt")), f"{cell['id']}: its metadata needs `alt`, a sentence"


def test_cells_are_python_3_10():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version", "py310", "--select", "E9"]
    run = subprocess.run([*command, *map(str, NOTEBOOKS)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
