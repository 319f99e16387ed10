"""The notebooks run from top to bottom, and are kept with what they showed.

Running them takes a minute or two: FLARE_FAST=1 python -m pytest tests/test_notebooks.py
"""

import ast
import json
import os
import pathlib
import re

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
ALLOWED = {"flare_jax", "jax", "numpy", "matplotlib", "IPython", "importlib", "os", "time"}
ALLOWED |= {"dataclasses", "json", "pathlib", "tempfile"}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@every_notebook
def test_outputs_are_kept_and_none_is_an_error(path):
    outputs = [output for cell in code(path) for output in cell["outputs"]]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert "image/png" in kinds
    assert all(output["output_type"] != "error" for output in outputs)
    assert [cell["execution_count"] for cell in code(path)] == list(range(1, len(code(path)) + 1))
    text = path.read_text()
    assert not re.search(r"/(home|root|work|tmp)/", text), "a path of this machine"


@every_notebook
def test_imports_only_the_package_and_what_it_needs(path):
    source = "\n".join("".join(cell["source"]) for cell in code(path))
    tree = ast.parse(re.sub(r"^( *)%.*$", r"\1pass", source, flags=re.M))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names <= ALLOWED


@pytest.mark.skipif(os.environ.get("FLARE_FAST") != "1", reason="set FLARE_FAST=1 to run them")
@every_notebook
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    monkeypatch.setenv("FLARE_JAX_CACHE", str(tmp_path))
    notebook = nbformat.read(path, 4)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
