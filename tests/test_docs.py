"""The code on the documentation's pages runs, page by page, from top to bottom."""

import pathlib
import re

import pytest

PAGES = sorted((pathlib.Path(__file__).parent.parent / "docs").glob("*.md"))
CODE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize(
    "path", [p for p in PAGES if CODE.search(p.read_text())], ids=lambda p: p.stem
)
def test_code_runs(path):
    names = {}
    for block in CODE.findall(path.read_text()):
        exec(compile(block, path.name, "exec"), names)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_commands_exist(path):
    from flare_jax import cli

    root = path.parent.parent
    for name in re.findall(r"python -m (experiments\.\w+)", path.read_text()):
        assert list(root.glob(name.replace(".", "/") + "*")), name
    for name in re.findall(r"flare-jax ([a-z]+)", path.read_text()):
        assert callable(getattr(cli, name)), name
