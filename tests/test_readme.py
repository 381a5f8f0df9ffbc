"""The READMEs run: what a block says a command prints is what it prints.

    ```console      each line `$ bursar …` is run and what it prints, errors included, compared with the lines below it;
                    `; echo $?` at its end prints the exit code. A line `...` stands for lines left out, and
                    the path of the reader's own folder is left out too
    ```python       run; what it prints is compared with the ```text block that follows, if one does
    ```python NAME  a file the commands use; likewise ```json NAME
    ```sh           for the reader's shell, not run: its make targets and extras must exist

Both READMEs have the same blocks, so each is run once. `python tests/test_readme.py` rewrites the outputs of both after
a change that is meant; the lines left out stay left out.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import os
import re
import shlex
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from bursar.architecture import preset
from bursar.cli import main
from bursar.roofline import RESERVE_BYTES
from bursar.units import format_bytes

ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
LANGUAGES = {"console", "python", "json", "text", "sh"}
FIRST_SCREEN = 60  # lines of a tall terminal
OMITTED = "..."
SETTING = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "POLARS_TABLE_WIDTH": "80"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is, its text, and the line it begins on."""

    language: str
    name: str
    text: str
    line: int


@dataclass(frozen=True)
class Example:
    """Something to run and the lines it is said to print."""

    kind: str  # console or python
    code: str
    expected: tuple[str, ...]
    line: int
    output_line: int  # where the expected lines begin


FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[Block]:
    return [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def examples(found: list[Block]) -> Iterator[Example]:
    for block, following in zip(found, [*found, None][1:], strict=True):
        if block.language == "python" and not block.name:
            shown = following if following is not None and following.language == "text" else None
            yield Example("python", block.text, trimmed(shown.text if shown else ""), block.line,
                          (shown or block).line + 1)  # fmt: skip
        elif block.language == "console":
            for command in re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE)[1:]:
                code = re.match(r"(?:.*\\\n)*.*", command)[0]
                line = block.line + 1 + block.text[: block.text.index(command)].count("\n")
                yield Example("console", code.removeprefix("$ ").replace("\\\n", ""),
                              trimmed(command[len(code) :]), line, line + 1 + code.count("\n"))  # fmt: skip


def trimmed(text: str) -> tuple[str, ...]:
    return tuple(line.rstrip() for line in text.strip("\n").split("\n")) if text.strip() else ()


def matches(expected: tuple[str, ...], printed: tuple[str, ...]) -> bool:
    pattern = "".join("(?:.*\n)+?" if line == OMITTED else re.escape(line) + "\n" for line in expected)
    return re.fullmatch(pattern, "".join(line + "\n" for line in printed)) is not None


def check(example: Example, printed: tuple[str, ...]) -> None:
    if not matches(example.expected, printed):
        difference = "\n".join(difflib.ndiff(example.expected, printed))
        raise AssertionError(f"line {example.line}: {example.code}\ndoes not print what it says:\n{difference}")


# ---- running


@functools.cache
def folder() -> str:
    """A folder with the files that the READMEs and the pages of docs/ show."""
    made = os.path.realpath(tempfile.mkdtemp(prefix="bursar-readme-"))
    for name, text in files_shown().items():
        path = Path(made, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return made


def files_shown() -> dict[str, str]:
    """Each file that a page shows, by its name; raises ValueError where two pages show different files of one name."""
    found: dict[str, str] = {}
    for page in (READMES[0], *sorted((ROOT / "docs").rglob("*.md"))):
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.name and found.setdefault(block.name, block.text) != block.text:
                raise ValueError(f"{page.name}: another {block.name} stands on an earlier page")
    return found


@functools.cache
def run(kind: str, code: str) -> tuple[str, ...]:
    out = io.StringIO()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BURSAR_")} | SETTING
    known = set(sys.modules)
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        contextlib.chdir(folder()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        if kind == "python":
            run_python(code)
        else:
            run_command(code, out)
    for name in set(sys.modules) - known:  # a model file of the reader's is not ours to keep
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder()):
            del sys.modules[name]
    return trimmed(out.getvalue().replace(f"{folder()}/", ""))


def run_command(code: str, out: io.StringIO) -> None:
    command, asks, _ = code.partition("; echo $?")
    program, *arguments = shlex.split(command)
    assert program == "bursar", f"only bursar is run here, not {program}"
    status: object = 0
    try:
        main(arguments)
    except SystemExit as end:
        status = end.code or 0
    if asks:
        out.write(f"{status}\n")


def run_python(code: str) -> None:
    try:
        exec(compile(code, "README.md", "exec"), {"__name__": "__readme__"})
    except Exception as error:  # a traceback's last line is what a reader would see first
        print(traceback.format_exception_only(error)[-1], end="")


# ---- tests


def all_examples() -> list[object]:
    return [
        pytest.param(path, example, id=f"{path.name}:{example.line}")
        for path in READMES
        for example in examples(blocks(path.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize(("path", "example"), all_examples())
def test_an_example_prints_what_it_says(path: Path, example: Example):
    if "config.json" in example.code:
        pytest.importorskip("transformers")
    check(example, run(example.kind, example.code))


def test_both_readmes_have_the_same_blocks_in_the_same_order():
    english, chinese = (
        [(b.language, b.name, b.text) for b in blocks(path.read_text(encoding="utf-8"))] for path in READMES
    )
    assert english == chinese


def test_both_readmes_have_the_same_sections():
    levels = [re.findall(r"^(#+) ", FENCE.sub("", p.read_text(encoding="utf-8")), re.MULTILINE) for p in READMES]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.name)
def test_a_block_is_of_a_language_that_is_checked(path: Path):
    text = path.read_text(encoding="utf-8")
    assert {b.language for b in blocks(text)} <= LANGUAGES
    assert text.count("```") == 2 * len(blocks(text))  # a fence without a language would escape the tests


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.name)
def test_the_first_screen_shows_the_commands_and_the_notes_own_numbers(path: Path):
    screen = "\n".join(path.read_text(encoding="utf-8").split("\n")[:FIRST_SCREEN])
    for shown in ("make demo", "make test", "36", "496 B", "368 FLOP", "432 FLOP", "143.9 days", "8.8e15"):
        assert shown in screen


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.name)
def test_what_stands_in_bold_in_the_table_is_what_the_command_beside_it_prints(path: Path):
    rows = re.findall(r"^\|.*?\| `bursar (.*?)` \|.*?\|(.*)\|$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 7
    for command, right in rows:
        printed = " ".join(run("console", f"bursar {command}")) if "**" in right else ""
        assert [shown for shown in re.findall(r"\*\*(.*?)\*\*", right) if shown not in printed] == []


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.name)
def test_a_figure_in_the_prose_is_printed_by_a_block_or_worked_out_here(path: Path):
    text = path.read_text(encoding="utf-8")
    printed = "".join(b.text for b in blocks(text)).replace(" ", "")
    worked_out = {
        format_bytes(8 * preset("llama3-70b").parameters()): "bf16 parameters, gradients and two states: 4 · 2 bytes",
        "1 GB": f"{RESERVE_BYTES} bytes",
    }
    figures = re.findall(r"\d[\d.]* (?:TB|GB|%)", FENCE.sub("", text))
    assert len(figures) >= 4
    assert [f for f in figures if f not in worked_out and f.replace(" ", "") not in printed] == []


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.name)
def test_every_make_target_and_every_extra_named_exists(path: Path):
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)", "\n".join(b.text for b in blocks(text) if b.language == "sh")))
    targets |= set(re.findall(r"`make ([a-z]+)`", text))
    assert targets
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {name for extras in re.findall(r"(?:bursar|-e '?\.)\[([\w,]+)\]", text) for name in extras.split(",")}
    assert named <= set(project["optional-dependencies"])


def test_a_wrong_digit_in_any_line_shown_is_noticed():
    for example in examples(blocks(READMES[0].read_text(encoding="utf-8"))):
        shown, printed = example.expected, run(example.kind, example.code)
        assert matches(shown, printed)
        for i, line in enumerate(shown):
            if digit := re.search(r"\d", line):
                other = line[: digit.start()] + str((int(digit[0]) + 1) % 10) + line[digit.end() :]
                assert not matches((*shown[:i], other, *shown[i + 1 :]), printed)


def test_the_notes_512_bytes_in_place_of_496_fail():
    code = "bursar step cruncher"
    printed = run("console", code)
    assert any("496 B" in line for line in printed)
    wrong = tuple(line.replace("496 B", "512 B") for line in printed)
    with pytest.raises(AssertionError, match="512 B"):
        check(Example("console", code, wrong, 1, 2), printed)


def test_an_omission_hides_lines_but_no_difference_beside_it():
    assert matches(("a", OMITTED, "d"), ("a", "b", "c", "d"))
    assert not matches(("a", OMITTED, "d"), ("a", "b", "c", "e"))
    assert not matches(("a", OMITTED, "d"), ("a", "d"))


# ---- rewriting


def renewed(expected: tuple[str, ...], printed: tuple[str, ...]) -> tuple[str, ...]:
    """``expected`` with the printed lines that are most like it; what it leaves out stays left out."""
    parts: list[list[str]] = [[]]
    for line in expected:
        if line == OMITTED:
            parts.append([])
        else:
            parts[-1].append(line)
    if len(parts) == 1:
        return printed
    new: list[str] = []
    at = 0
    for n, part in enumerate(parts):
        starts = [0] if n == 0 else range(at + 1, len(printed) - len(part) + 1)
        if n == len(parts) - 1:
            starts = [len(printed) - len(part)]
        likeness = {
            s: difflib.SequenceMatcher(None, "\n".join(part), "\n".join(printed[s : s + len(part)])).ratio()
            for s in starts
        }
        at = max(likeness, key=lambda s: likeness[s])
        new += [*([OMITTED] if n else []), *printed[at : at + len(part)]]
        at += len(part)
    return tuple(new)


def rewrite(text: str) -> str:
    for example in examples(blocks(text)):
        new = renewed(example.expected, run(example.kind, example.code))
        if new != example.expected:
            lines, start = text.split("\n"), example.output_line - 1
            return rewrite("\n".join([*lines[:start], *new, *lines[start + len(example.expected) :]]))
    return text


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(rewrite(readme.read_text(encoding="utf-8")), encoding="utf-8")
