"""The floors: a module imports from its own floor or below, and torch stays on the top ones."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import bursar

SOURCE = Path(bursar.__file__).parent
FLOORS = {
    0: "errors units polynomial files revisions",
    1: "machine hardware architecture optimizers jobs frameworks catalog",
    # a ledger's .memory replays its own events, and asks the allocator what it would hold: they stand together
    2: "rules kernels ledger memory allocator folding",
    3: "roofline reconcile unfinished network schedule efficiency step_time rank_memory workspaces calibration context "
    "store pricing run operation forms modules goodput scaling diff gate",
    4: "plan report lecture",
    5: "trace workload measure meter ranks probe train bench lecture.chapter* lecture.traces",
    6: "cli web __main__",
}
TORCH_FLOOR = 5
TORCH = {"torch", "transformers", "torchao", "pytorch_optimizer"}


class Import(NamedTuple):
    name: str  # the whole dotted name
    line: int
    top: bool  # runs when the module is imported
    typing: bool  # under `if TYPE_CHECKING`


def imports(tree, package):
    """Every import of a module of ``package``, with where it stands."""

    def walk(node, top, typing):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, top, typing)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            base = (base + (node.module or "")).rstrip(".")
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, top, typing)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            here = typing or (guarded and child in node.body)
            yield from walk(child, top and not inside and not here, here)

    yield from walk(tree, True, False)


def floor_of(dotted):
    """The floor of ``bursar.<name>...``, by the longest name that fits; None where none does."""
    parts = dotted.split(".")
    if parts[0] == "bursar":
        for name in (".".join(parts[1:3]), ".".join(parts[1:2])):
            for floor, patterns in FLOORS.items():
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split()):
                    return floor
    return None


def complaints(source, module):
    """What is wrong with the imports of ``module`` (``bursar.rules.matmul``), in words."""
    floor = floor_of(module)
    if floor is None:
        yield f"{module} stands on no floor: give it one in FLOORS"
        return
    package = module if (SOURCE.parent / Path(*module.split("."))).is_dir() else module.rpartition(".")[0]
    for found in imports(ast.parse(source), package):
        theirs = floor_of(found.name)
        if theirs is not None and found.top and theirs > floor:
            yield f"{module}:{found.line} (floor {floor}) imports {found.name} (floor {theirs})"
        is_torch = found.name.split(".")[0] in TORCH
        if is_torch and not found.typing and (floor < TORCH_FLOOR or (floor > TORCH_FLOOR and found.top)):
            yield f"{module}:{found.line} (floor {floor}) imports {found.name}"
        if floor > TORCH_FLOOR and theirs == TORCH_FLOOR and found.top:
            yield f"{module}:{found.line} imports {found.name} before it is needed"


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("bursar", *path.relative_to(SOURCE).with_suffix("").parts)
        yield ".".join(p for p in parts if p != "__init__"), path


@pytest.mark.parametrize(("module", "path"), [m for m in modules() if m[0] != "bursar"], ids=lambda v: str(v)[:40])
def test_a_module_imports_from_its_floor_or_below_and_torch_only_on_the_fifth(module, path):
    assert list(complaints(path.read_text(), module)) == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("bursar.novelty", "", "bursar.novelty stands on no floor"),
        ("bursar.units", "from bursar import ledger", "bursar.units:1 (floor 0) imports bursar.ledger (floor 2)"),
        ("bursar.rules.conv", "from .. import trace", "bursar.rules.conv:1 (floor 2) imports bursar.trace (floor 5)"),
        ("bursar.ledger", "def f():\n    import torch", "bursar.ledger:2 (floor 2) imports torch"),
        ("bursar.run", "if True:\n    from torch import nn", "bursar.run:2 (floor 3) imports torch.nn"),
        (
            "bursar.cli.step",
            "from bursar.trace import tracing",
            "bursar.cli.step:1 imports bursar.trace.tracing before",
        ),
        ("bursar.cli.step", "import torch", "bursar.cli.step:1 (floor 6) imports torch"),
    ],
)
def test_a_planted_violation_is_found(module, source, says):
    assert any(c.startswith(says) for c in complaints(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bursar.ledger", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("bursar.ledger", "def on():\n    from bursar.roofline import forecast"),
        ("bursar.cli.step", "def step():\n    import torch\n    from bursar.trace import tracing"),
        ("bursar.trace.session", "import torch\nfrom bursar.ledger import Ledger"),
    ],
)
def test_what_the_floors_allow_is_no_violation(module, source):
    assert list(complaints(source, module)) == []


def test_the_floors_below_the_fifth_import_neither_torch_nor_polars():
    floors = {name: floor_of(name) for name, _ in modules()}
    low = ["bursar", *(name for name, floor in floors.items() if floor is not None and floor < TORCH_FLOOR)]
    script = (
        "import importlib, sys\n"
        f"for name in {low!r}:\n"
        "    importlib.import_module(name)\n"
        "    late = {'torch', 'polars'} & set(sys.modules)\n"
        "    assert not late, (name, late)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_that_check_would_see_torch():
    script = "import sys, bursar.trace\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "AssertionError" in done.stderr
