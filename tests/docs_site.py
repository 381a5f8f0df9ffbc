"""The docs site: docs/, the benchmarks and the changelog, with a reference read off the code, built strictly.

``python tests/docs_site.py [FOLDER]`` (``make site``) writes it to build/site: a broken link or anchor ends it with 1.
The pages are written for any reader of Markdown; what zensical's dialect wants otherwise is changed in a copy of them.
Nothing of the reference is kept in the repository, so it cannot differ from the code.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import bursar
from bursar.cli import main

ROOT = Path(__file__).parent.parent
SOURCE = Path(bursar.__file__).parent

# Section, then titles with the page in the repository, or with what makes the page.
NAV: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("", (("Start in five minutes", "docs/index.md"), ("The same as a notebook", "docs/tutorial.ipynb"))),
    (
        "Chapters",
        (
            ("Counting FLOPs", "docs/flops.md"),
            ("Gradients", "docs/gradients.md"),
            ("Initialisation", "docs/initialisation.md"),
            ("Optimizers and memory", "docs/optimizers.md"),
            ("Time and MFU", "docs/time.md"),
            ("Clusters", "docs/clusters.md"),
            ("The lecture, executed", "docs/lecture.md"),
            ("The course's questions", "docs/course.md"),
        ),
    ),
    (
        "How to",
        (
            ("Count a custom op", "docs/howto/op.md"),
            ("Add a device", "docs/howto/device.md"),
            ("Add an optimizer", "docs/howto/optimizer.md"),
            ("Gate a pull request", "docs/ci.md"),
            ("Meter a loop", "docs/howto/meter.md"),
            ("Ask on a page", "docs/howto/page.md"),
            ("Calibrate this machine", "docs/howto/bench.md"),
        ),
    ),
    (
        "Reference",
        (
            ("The law of counting", "docs/counting.md"),
            ("Words", "docs/words.md"),
            ("Commands", "reference:commands"),
            ("Python: bursar", "reference:bursar"),
            ("Python: catalogues", "reference:catalogues"),
            ("Python: the ledger", "reference:ledger"),
            ("Python: prices", "reference:prices"),
            ("Python: planning", "reference:planning"),
            ("Python: measuring", "reference:measuring"),
        ),
    ),
    (
        "Proof",
        (
            ("Scoreboard", "docs/scoreboard.md"),
            ("Comparison with other tools", "docs/comparison.md"),
            ("Counters", "benchmarks/counters.md"),
            ("Architectures", "benchmarks/architectures.md"),
            ("torch's op database", "benchmarks/op_database.md"),
            ("The page under load", "benchmarks/ui.md"),
        ),
    ),
    (
        "The project",
        (
            ("Architecture", "docs/architecture.md"),
            ("Log", "docs/log.md"),
            ("Changelog", "CHANGELOG.md"),
        ),
    ),
)
LATER = {"docs/scoreboard.md"}  # written by `bursar validate`; its entry stands from then on

# The public modules, by page; `bursar` itself stands for its `__all__`.
PUBLIC: dict[str, tuple[str, ...]] = {
    "bursar": ("bursar", "bursar.errors"),
    "catalogues": ("bursar.hardware", "bursar.architecture", "bursar.optimizers"),
    "ledger": ("bursar.ledger", "bursar.memory", "bursar.rules", "bursar.report.record"),
    "prices": ("bursar.roofline", "bursar.network", "bursar.operation", "bursar.run", "bursar.units"),
    "planning": ("bursar.jobs", "bursar.frameworks", "bursar.step_time", "bursar.rank_memory", "bursar.schedule"),
    "measuring": ("bursar.meter.live", "bursar.meter.adapters", "bursar.reconcile", "bursar.probe"),
}

FENCE_LINE = re.compile(r"^(```+)(\w*)(?: (\S+))?$")
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


# ---- pages of the repository


def entries() -> list[tuple[str, str, str]]:
    """Section, title and page of every entry that stands; raises FileNotFoundError for a page that is missing."""
    found = []
    for section, pages in NAV:
        for title, page in pages:
            if page.startswith("reference:") or (ROOT / page).exists():
                found.append((section, title, page))
            elif page not in LATER:
                raise FileNotFoundError(f"{page}, named in the site's navigation")
    return found


def place(page: str) -> str:
    """Where a page or a file of the repository stands in the site's source."""
    if page.startswith("reference:"):
        return f"reference/{page.removeprefix('reference:')}.md"
    page = page.replace(".ipynb", ".md")
    return page.removeprefix("docs/") if page.startswith("docs/") else page.replace("CHANGELOG.md", "changelog.md")


def dialect(text: str, page: str) -> tuple[str, set[str]]:
    """A page as zensical reads Markdown, and the files of the repository that it links to.

    A list needs an empty line before it, a bar in a table's code no backslash, a fence's file name a key.
    """
    lines: list[str] = []
    linked: set[str] = set()
    fence = ""
    folder = Path(page).parent

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target:
            return match[0]
        named = os.path.normpath(folder / target)
        linked.add(named)
        return match[1] + os.path.relpath(place(named), Path(place(page)).parent) + match[3]

    for line in text.split("\n"):
        opened = FENCE_LINE.match(line)
        if fence:
            fence = "" if line == fence else fence
        elif opened:
            fence = opened[1]
            line = f'{opened[1]}{opened[2]} title="{opened[3]}"' if opened[3] else line
        else:
            if line.startswith("- ") and lines and lines[-1] and not lines[-1].startswith(("- ", "  ")):
                lines.append("")
            if line.startswith("|"):
                line = re.sub(r"`[^`]*`", lambda m: m[0].replace("\\|", "|"), line)
            line = LINK.sub(moved, line.replace("\\<", "&lt;"))
        lines.append(line)
    return "\n".join(lines), linked


def notebook(text: str) -> str:
    """An executed notebook as Markdown: cells, and under each what it printed or the page it made of itself."""
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/html" in data:
                markup = " ".join("".join(data["text/html"]).split())  # an empty line would end the block
                parts.append(f"<div>{markup}</div>")
            else:
                shown = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
                parts.append(f"```text\n{shown}\n```")
    return "\n\n".join(parts) + "\n"


# ---- the reference


def docstring(node: ast.AST) -> str:
    """A docstring as Markdown: code marked once, sessions and drawings fenced."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")  # type: ignore[arg-type]
    parts: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        if block.startswith(">>>"):
            parts.append(f"```pycon\n{block}\n```")
        elif block.startswith("    "):
            parts.append(f"```text\n{inspect.cleandoc(chr(10) + block)}\n```")
        else:
            prose, *drawing = re.split(r"\n(?=    )", block, maxsplit=1)
            parts.append(re.sub(r"``(.+?)``", r"`\1`", prose, flags=re.DOTALL).replace("<", "&lt;"))
            if drawing:
                parts.append(f"```text\n{inspect.cleandoc(chr(10) + drawing[0])}\n```")
    return "\n\n".join(parts)


def signature(node: ast.FunctionDef, name: str) -> str:
    """``name(arguments) -> result`` on one line, or an argument a line where it is long."""
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({arguments}){result}"
    if len(line) <= 88:
        return line
    return f"{name}(\n    " + ",\n    ".join(split_arguments(arguments)) + f",\n){result}"


def split_arguments(arguments: str) -> list[str]:
    """Arguments apart: at commas outside brackets and quotes."""
    found, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(arguments):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and not depth:
            found.append(arguments[start:i].strip())
            start = i + 1
    return [*found, arguments[start:].strip()]


def fields(node: ast.ClassDef, source: list[str]) -> str:
    """The annotated attributes of a class as they are written, comments with their units included."""
    found = [source[n.lineno - 1 : n.end_lineno] for n in node.body if isinstance(n, ast.AnnAssign)]
    return "\n".join(line.removeprefix("    ") for lines in found for line in lines)


def decorated(node: ast.FunctionDef, name: str) -> bool:
    return any(name in ast.unparse(d) for d in node.decorator_list)


def entry(node: ast.FunctionDef | ast.ClassDef, source: list[str], name: str) -> str:
    """One class or function: its signature or fields, its docstring, its methods."""
    if isinstance(node, ast.FunctionDef):
        return f"### {name}\n\n```python\n{signature(node, name)}\n```\n\n{docstring(node)}\n"
    shown = fields(node, source)
    parts = [f"### {name}", docstring(node), f"```python\n{shown}\n```" if shown else ""]
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and not decorated(part, "setter"):
            head = part.name if decorated(part, "property") else signature(part, part.name)
            shown = f"{name}.{head}"
            parts.append(f"```python\n{shown}\n```" if "\n" in shown else f"`{shown}`")
            parts.append(docstring(part))
    return "\n\n".join(part for part in parts if part) + "\n"


def path_of(module: str) -> Path:
    """The file of a module of bursar's."""
    place = SOURCE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


Definition = tuple[ast.FunctionDef | ast.ClassDef, list[str]]  # and the lines of the file it stands in


def definitions(module: str) -> dict[str, Definition]:
    """A module's public classes and functions, those it hands on from another module by ``__all__`` included."""
    text = path_of(module).read_text(encoding="utf-8")
    found: dict[str, Definition] = {}
    handed_on: dict[str, str] = {}
    public: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found[node.name] = node, text.split("\n")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bursar.") and node.module != module:
            handed_on |= {name.name: node.module or "" for name in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = set(ast.literal_eval(node.value))
    for name in sorted(public & handed_on.keys() - found.keys()):
        found |= {n: d for n, d in definitions(handed_on[name]).items() if n == name}
    return found


def module_reference(module: str) -> str:
    """One module: what it says of itself, and each public name."""
    if module == "bursar":
        parts = ["## bursar", docstring(ast.parse(path_of(module).read_text(encoding="utf-8")))]
        for name in bursar.__all__:
            if name == "__version__":
                continue
            where, attribute = bursar._WHERE[name]
            parts.append(entry(*definitions(where)[attribute], f"bursar.{name}"))
        return "\n\n".join(parts)
    parts = [f"## {module}", docstring(ast.parse(path_of(module).read_text(encoding="utf-8")))]
    return "\n\n".join([*parts, *(entry(*found, name) for name, found in definitions(module).items())])


def reference(name: str) -> str:
    """A page of the Python reference."""
    (title,) = (title for _, pages in NAV for title, page in pages if page == f"reference:{name}")
    return f"# {title}\n\nRead off the docstrings.\n\n" + "\n\n".join(module_reference(m) for m in PUBLIC[name])


def printed(*arguments: str) -> str:
    """What ``bursar ARGUMENTS`` prints at 80 columns."""
    out = io.StringIO()
    setting = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    with mock.patch.dict(os.environ, setting), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(list(arguments))
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").split("\n"))


def command_names() -> list[str]:
    """The commands, as ``bursar --help`` lists them."""
    return re.findall(r"^│ ([a-z]+) {2,}", printed("--help"), re.MULTILINE)


def commands() -> str:
    """The page of commands: what each one's --help prints."""
    parts = ["# Commands", "What `--help` prints.", f"```text\n{printed('--help')}\n```"]
    for name in command_names():
        parts += [f"## bursar {name}", f"```text\n{printed(name, '--help')}\n```"]
    return "\n\n".join(parts) + "\n"


# ---- building


def stage(folder: Path) -> None:
    """The site's source: pages, what they link to, the reference, and zensical's configuration."""
    source = folder / "source"
    found = entries()
    pages = {page for _, _, page in found}
    waiting = sorted(pages)
    while waiting:
        page = waiting.pop()
        target = source / place(page)
        target.parent.mkdir(parents=True, exist_ok=True)
        if page.startswith("reference:"):
            name = page.removeprefix("reference:")
            target.write_text(commands() if name == "commands" else reference(name), encoding="utf-8")
        elif not page.endswith((".md", ".ipynb")):
            shutil.copyfile(ROOT / page, target)
        else:
            text = (ROOT / page).read_text(encoding="utf-8")
            text, linked = dialect(notebook(text) if page.endswith(".ipynb") else text, page)
            target.write_text(text, encoding="utf-8")
            more = {f for f in linked if (ROOT / f).is_file()} - pages  # what is missing is zensical's to report
            pages |= more
            waiting += sorted(more)
    sections: dict[str, list[dict[str, str]]] = {}
    for section, title, page in found:
        sections.setdefault(section, []).append({title: place(page)})
    nav = [*sections.pop(""), *({section: pages} for section, pages in sections.items())]
    (source / "site.css").write_text(STYLE, encoding="utf-8")
    (source / "site.js").write_text(SCRIPT, encoding="utf-8")
    (folder / "zensical.toml").write_text(CONFIGURATION.replace("NAV", inline(nav)), encoding="utf-8")


def inline(value: object) -> str:
    """A list, a table or a string as TOML on one line."""
    if isinstance(value, list):
        return "[" + ", ".join(inline(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


# What axe-core finds in the theme: the entry one stands on has a contrast of 3.8, wide tables scroll by mouse alone.
STYLE = """.md-nav__link--active .md-ellipsis { color: #2b3fc0 }
[data-md-color-scheme="slate"] .md-nav__link--active .md-ellipsis { color: #a9b5ff }
"""
SCRIPT = """document$.subscribe(() => requestAnimationFrame(() => {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) table.tabIndex = 0
}))
"""

CONFIGURATION = """[project]
site_name = "bursar"
site_description = "What a deep-learning training step and a whole run cost"
docs_dir = "source"
site_dir = "site"
use_directory_urls = false  # opens from disk; the search wants a server
extra_css = ["site.css"]
extra_javascript = ["site.js"]
nav = NAV

[project.markdown_extensions.tables]
[project.markdown_extensions.toc]
permalink = true
[project.markdown_extensions.pymdownx.highlight]
[project.markdown_extensions.pymdownx.superfences]

[project.theme]
font = false  # nothing is fetched from elsewhere
features = ["navigation.sections", "navigation.footer", "navigation.top", "content.code.copy", "toc.follow"]

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"
toggle.icon = "lucide/sun"
toggle.name = "Switch to dark"

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"
toggle.icon = "lucide/moon"
toggle.name = "Switch to light"
"""


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build what is staged in ``folder`` into ``folder``/site; the return code is 1 where a link leads nowhere."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    setting = os.environ | {"NO_COLOR": "1"}
    return subprocess.run(command, cwd=folder, env=setting, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "site"
    with tempfile.TemporaryDirectory() as made:
        stage(Path(made))
        result = build(Path(made))
        if result.returncode:
            sys.exit(result.stdout + result.stderr)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(Path(made) / "site", target)
    where = os.path.relpath(target)
    print(f"{len(list(target.rglob('*.html')))} pages in {where}; with search: python -m http.server -d {where}")
