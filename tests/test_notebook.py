"""The tutorial notebook runs and shows what it says. ``python tests/test_notebook.py`` writes its outputs anew.

Cells are run here as a kernel would, one after the other in one namespace, and what their last expression is becomes
text and HTML: twenty lines, in the place of thirty packages and open ports.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import json
import pprint
import re
import tempfile
import warnings
from pathlib import Path

import polars
import pytest

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


def read():
    return json.loads(TUTORIAL.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def run(code, names, number):
    """The outputs of one cell, in the notebook format's words."""
    tree, out = ast.parse(code), io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(out):
        exec(compile(tree, f"cell {number}", "exec"), names)
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names) if last is not None else None
    found = []
    if out.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": out.getvalue().splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": pprint.pformat(value, width=79, sort_dicts=False).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        found.append({"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}})
    return found


def executed(notebook):
    """A copy of ``notebook`` with the outputs that its cells give now, run in a folder of its own."""
    made, names, number = copy.deepcopy(notebook), {"__name__": "__main__"}, 0
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        warnings.catch_warnings(),
        polars.Config(tbl_width_chars=100),
    ):
        warnings.simplefilter("error")
        for cell in made["cells"]:
            if cell["cell_type"] == "code":
                number += 1
                cell["outputs"], cell["execution_count"] = run(source(cell), names, number), number
    return made


@pytest.fixture(scope="module")
def now():
    return executed(read())


def stale(notebook, now):
    """The sources of the cells whose outputs are not those they give now."""
    pairs = zip(notebook["cells"], now["cells"], strict=True)
    return [source(before) for before, after in pairs if before.get("outputs") != after.get("outputs")]


def test_the_tutorial_shows_what_its_cells_give(now):
    assert stale(read(), now) == []
    assert read() == now


def test_an_output_that_is_not_what_the_cell_gives_would_be_found(now):
    other = copy.deepcopy(now)
    (cell,) = (c for c in other["cells"] if source(c).startswith("flops = cruncher.flops"))
    assert cell["outputs"][0]["data"] == {"text/plain": ["(432, 144, 224, 368)"]}
    cell["outputs"][0]["data"] = {"text/plain": ["(432, 144, 288, 432)"]}
    assert stale(other, now) == [source(cell)]


def test_a_cell_is_run_as_a_kernel_would():
    names = {}
    assert run("x = 2\nprint('a')\nx + 1", names, 4) == [
        {"output_type": "stream", "name": "stdout", "text": ["a\n"]},
        {"output_type": "execute_result", "execution_count": 4, "data": {"text/plain": ["3"]}, "metadata": {}},
    ]
    assert run("x = x + 1\nNone", names, 5) == []
    assert names["x"] == 3
    with pytest.raises(ZeroDivisionError):
        run("1 / 0", names, 6)


def test_the_notebook_is_of_the_format_that_readers_know():
    notebook = read()
    assert (notebook["nbformat"], notebook["nbformat_minor"] >= 5) == (4, True)
    ids = [c["id"] for c in notebook["cells"]]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", id_) for id_ in ids)
    assert {c["cell_type"] for c in notebook["cells"]} == {"code", "markdown"}


def test_the_notebook_names_nobody_s_machine_and_is_small():
    text = TUTORIAL.read_text(encoding="utf-8")
    assert not re.search(r"/(?:work|root|home|tmp)/", text)
    assert len(text.encode()) < 150_000


def test_it_covers_what_a_newcomer_wants():
    words = " ".join(map(source, read()["cells"]))
    for wanted in ("cruncher", "gpt2", "h100-sxm", "batch_size", "recompute", "nn.Module", "export", "--html"):
        assert wanted in words


if __name__ == "__main__":
    TUTORIAL.write_text(json.dumps(executed(read()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
