"""The documents name what exists: modules, paths, tests, links, words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import bursar
from bursar import memory, rules

ROOT = Path(__file__).parent.parent
SOURCE = Path(bursar.__file__).parent
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
COUNTING = (ROOT / "docs" / "counting.md").read_text(encoding="utf-8")
WORDS = (ROOT / "docs" / "words.md").read_text(encoding="utf-8")
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))


def modules() -> set[str]:
    """Every module as the map writes it: ``rules/matmul.py``, and ``rules/`` for the package itself."""
    paths = [p.relative_to(SOURCE).as_posix() for p in SOURCE.rglob("*.py")]
    return {p.removesuffix("__init__.py") or p for p in paths}


def paths(text: str) -> set[str]:
    """What is written in backticks as a file or a folder."""
    return set(re.findall(r"`([\w./]+(?:\.py|\.toml|\.md|/))`", text))


def unnamed(text: str) -> set[str]:
    return modules() - paths(text)


def missing(text: str) -> list[str]:
    return sorted(p for p in paths(text) if not any((place / p).exists() for place in (SOURCE, ROOT, ROOT / "docs")))


def named_tests(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"\b(tests/test_\w+\.py)::(\w+)", text))


def functions_of(path: Path) -> set[str]:
    """The functions of a test module, those it makes in a loop aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def absent(text: str) -> list[str]:
    return [f"{path}::{name}" for path, name in sorted(named_tests(text))
            if not (ROOT / path).exists() or name not in functions_of(ROOT / path)]  # fmt: skip


def links(text: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]


def test_every_module_stands_in_the_map():
    assert unnamed(ARCHITECTURE) == set()


def test_a_module_that_left_the_map_is_missed():
    assert unnamed(ARCHITECTURE.replace("`roofline.py`", "")) == {"roofline.py"}


@pytest.mark.parametrize("text", [ARCHITECTURE, COUNTING], ids=["architecture", "counting"])
def test_every_path_named_exists(text: str):
    assert missing(text) == []


def test_a_path_that_is_not_there_is_noticed():
    assert missing(ARCHITECTURE + "`rules/abacus.py`") == ["rules/abacus.py"]


def test_every_rule_of_counting_names_a_test_that_exists():
    assert len(named_tests(COUNTING)) > 30
    assert absent(COUNTING) == []


def test_a_test_that_is_not_there_is_noticed():
    assert absent("`tests/test_rules.py::test_no_such_thing`") == ["tests/test_rules.py::test_no_such_thing"]


@pytest.mark.parametrize("word", [*rules.KINDS, *rules.PHASES, *memory.CLASSES])
def test_every_kind_phase_and_memory_class_is_in_the_glossary(word: str):
    assert re.search(rf"\b{word}\b", WORDS)


def test_no_word_has_two_meanings():
    words = [w.strip() for row in re.findall(r"^\| ([^|]+) \|", WORDS, re.MULTILINE) for w in row.split(",")]
    words = [w for w in words if w not in ("word", "---")]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path):
    assert [target for target in links(page.read_text(encoding="utf-8")) if not (page.parent / target).exists()] == []


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.*?)\]", text, re.MULTILINE)[1] == bursar.__version__
