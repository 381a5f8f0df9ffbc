"""The docs site: its order, its reference, and that a link which leads nowhere ends the build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bursar
import docs_site
from docs_site import NAV, PUBLIC, ROOT, build, command_names, definitions, dialect, entries, place, stage
from test_readme import READMES, blocks

pytest.importorskip("zensical", reason="the docs site is built with the extra docs")

DOCS = sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make site` builds it."""
    folder = tmp_path_factory.mktemp("site")
    stage(folder)
    result = build(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def html(site: Path, page: str) -> str:
    return (site / "site" / place(page)).with_suffix(".html").read_text(encoding="utf-8")


# ---- what is in it


def test_the_chapters_stand_in_the_lectures_order():
    titles = [title for _, title, _ in entries()]
    asked = (
        "Start in five minutes, Counting FLOPs, Gradients, Initialisation, Optimizers and memory, Time and MFU, "
        "Clusters, The lecture, executed, The course's questions, Count a custom op, Add a device, Add an optimizer, "
        "Gate a pull request, Meter a loop, Commands, Python: bursar, Comparison with other tools, Architecture, Log, "
        "Changelog"
    )
    assert asked == ", ".join(title for title in titles if title in asked)


def test_every_page_of_docs_stands_in_the_navigation():
    assert {p.relative_to(ROOT).as_posix() for p in (*DOCS, *NOTEBOOKS)} <= {page for _, _, page in entries()}


def test_every_entry_is_a_page_with_its_title(site: Path):
    for _, _, page in entries():
        assert re.search(r"<h1[^>]*>\S", html(site, page)), page


def test_an_entry_without_its_page_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docs_site, "NAV", (*NAV, ("More", (("Abacus", "docs/abacus.md"),))))
    with pytest.raises(FileNotFoundError, match=r"docs/abacus\.md"):
        entries()


def test_a_page_that_comes_later_has_no_entry_until_it_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docs_site, "NAV", (*NAV, ("More", (("Abacus", "docs/abacus.md"),))))
    monkeypatch.setattr(docs_site, "LATER", {"docs/abacus.md", *docs_site.LATER})
    assert "Abacus" not in [title for _, title, _ in entries()]


# ---- links


def fetched(markup: str) -> list[str]:
    """What a page loads from another host: scripts, pictures, styles, fonts; not what it links to."""
    return re.findall(
        r"<(?:script|img|iframe|link(?=[^>]*rel=\"?(?:stylesheet|preconnect|preload)))\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)",
        markup,
    )


def test_nothing_is_fetched_from_elsewhere(site: Path):
    for page in (site / "site").rglob("*.html"):
        assert fetched(page.read_text(encoding="utf-8")) == [], page.name


def test_a_script_or_a_font_from_elsewhere_would_be_noticed():
    assert fetched('<script async src="https://a.b/c.js">') == ["https://a.b/c.js"]
    assert fetched('<link rel="stylesheet" href="https://a.b/font.css">') == ["https://a.b/font.css"]
    assert fetched('<a href="https://a.b/">') == []


@pytest.mark.parametrize("link", ["[gone](gone.md)", "[gone](words.md#no-such-heading)"], ids=["page", "anchor"])
def test_a_link_that_leads_nowhere_ends_the_build(site: Path, tmp_path: Path, link: str):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "index.md").write_text(f"# Home\n\n{link} [words](words.md)\n", encoding="utf-8")
    (tmp_path / "source" / "words.md").write_text("# Words\n", encoding="utf-8")
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "t"\ndocs_dir = "source"\n', encoding="utf-8")
    result = build(tmp_path)
    assert result.returncode != 0
    assert "does not exist" in result.stdout + result.stderr


def test_a_page_is_changed_only_where_the_dialects_differ():
    text = (
        "A list:\n- one\n- two\n\n| `a \\| b` | [map](architecture.md#floors) |\n\n```python net.py\n- x \\| y\n```\n"
    )
    changed, linked = dialect(text, "docs/howto/op.md".replace("howto/", ""))
    assert changed == (
        "A list:\n\n- one\n- two\n\n| `a | b` | [map](architecture.md#floors) |\n\n"
        '```python title="net.py"\n- x \\| y\n```\n'
    )
    assert linked == {"docs/architecture.md"}


def test_a_link_out_of_docs_leads_to_where_the_page_stands_in_the_site():
    changed, linked = dialect("[c](../benchmarks/counters.md) [l](../CHANGELOG.md)", "docs/comparison.md")
    assert changed == "[c](benchmarks/counters.md) [l](changelog.md)"
    assert linked == {"benchmarks/counters.md", "CHANGELOG.md"}


# ---- the reference is the code


def test_the_reference_has_every_public_name_with_its_docstring(site: Path):
    text = html(site, "reference:bursar")
    for name in set(bursar.__all__) - {"__version__"}:
        assert f">bursar.{name}<" in text


@pytest.mark.parametrize("module", [m for modules in PUBLIC.values() for m in modules if m != "bursar"])
def test_the_reference_has_every_public_class_and_function_of_a_public_module(site: Path, module: str):
    (page,) = (page for page, modules in PUBLIC.items() if module in modules)
    text = html(site, f"reference:{page}")
    assert f">{module}<" in text
    found = definitions(module)
    assert found
    assert [name for name in found if f'<h3 id="{name.lower()}' not in text] == []


def test_what_an_example_imports_of_bursar_is_in_the_reference():
    shown = [b.text for page in (READMES[0], *DOCS) for b in blocks(page.read_text(encoding="utf-8"))
             if b.language == "python"]  # fmt: skip
    used = {m for text in shown for m in re.findall(r"^from (bursar[\w.]*) import", text, re.MULTILINE)}
    assert len(used) >= 5
    internal = {"bursar.workload.modules.gpt"}  # a preset's module, taken apart by one of the course's questions
    assert used - internal <= {m for modules in PUBLIC.values() for m in modules}


def test_every_command_stands_on_its_page(site: Path):
    names = command_names()
    assert {"step", "run", "op", "lecture", "probe", "train"} <= set(names)
    assert all(f">bursar {name}<" in html(site, "reference:commands") for name in names)
