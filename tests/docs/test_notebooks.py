"""The notebooks of the documentation run from their first cell to their last one."""

import os
import re
from pathlib import Path
from typing import Any

import jax
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_is_a_notebook():
    assert ROOT / "docs/tutorials/quickstart.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None and not cell.outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_links_of_notebooks_lead_somewhere(path):
    for cell in read(path).cells:
        for link in re.findall(r"\]\(([^):]+)\)", cell.source):
            assert (path.parent / link).exists(), link


@pytest.mark.slow
def test_the_quickstart_runs_and_shows_what_it_promises(tmp_path, monkeypatch):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    compiled = str(jax.config.values["jax_compilation_cache_dir"])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compiled)
    notebook = read(ROOT / "docs/tutorials/quickstart.ipynb")
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    shown = [set(output.get("data", {})) for output in outputs]
    assert any("text/html" in kinds for kinds in shown)  # the data frame
    assert any("image/png" in kinds for kinds in shown)  # the figure
    measured = eval(outputs[-1].data["text/plain"])
    assert measured["other"] == pytest.approx(measured["other, permuted"], abs=0.01)
    plain, matched = (
        measured[f"average {how}"] for how in ("as they are", "after matching")
    )
    assert plain < min(measured["one"], measured["other"])
    assert matched > plain + 0.1
