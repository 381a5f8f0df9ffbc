"""docs/lecture.md is what the notes' claims give when executed; every other page with examples prints what it says.

``python tests/test_pages.py`` (``make docs``) writes them anew: the first in whole, of the others the outputs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bursar import rules
from bursar.report.lecture import markdown
from claims import executed, one_thread
from test_readme import FENCE, LANGUAGES, blocks, check, examples, rewrite, run

DOCS = Path(__file__).parent.parent / "docs"
LECTURE, COURSE = DOCS / "lecture.md", DOCS / "course.md"
SHOWN = LANGUAGES | {"toml", "yaml"}  # of these none but console and python are run

STEP = "bursar step gpt2:L=2 --batch-size 1"
MATMUL = "bursar op 'matmul 16384x32768x8192' --on h100-sxm"
NOTES_RUN = "bursar run --params 70B --tokens 15T"
SGD, MOMENTUM, ADAGRAD, RMSPROP, ADAM, LAMB = (
    f"bursar step cruncher --optimizer {name}" for name in ("sgd", "momentum", "adagrad", "rmsprop", "adam", "lamb")
)
STATE = r"^ optimizer state .*%$"

# What the notes name, the command that accounts for it, and which line of its output to show: a pattern, or a claim.
NAMED = (
    ("FLOPs", MATMUL, r"^ bf16 .*FLOP .*"),
    ("FLOP/s", "bursar hardware h100-sxm", r"^ peak_flops_per_s bf16 .*"),
    ("matrix product", "bursar op 'matmul 4x5x6'", r"^ bf16 .*"),
    ("element-wise operation", "bursar op relu 1024x1024 --on h100-sxm", r"^ bf16 .* memory .*"),
    ("addition of matrices", "bursar op add 1024x1024", r"^ bf16 .*"),
    ("convolution", "bursar op conv2d 8x3x224x224 64x7x7 stride=2 padding=3", r"^ bf16 .*"),
    ("MFU", "bursar step gpt2:L=2 --batch-size 1 --precision bf16-mixed --on h100-sxm", r"^ MFU .*"),
    ("A100", "bursar hardware a100-80g-sxm", r"^ peak_flops_per_s bf16 .*"),
    ("H100", "bursar op 'matmul 8192x8192x8192' --on h100-sxm", r"^ bf16 .* compute .*"),
    ("BF16 and FP32", "bursar op 'matmul 8192x8192x8192' --dtype fp32,bf16 --on a100-80g-sxm", r"^ fp32 .* compute .*"),
    ("TF32", "bursar op 'matmul 8192x8192x8192' --dtype tf32 --on a100-80g-sxm", r"^ tf32 .* compute .*"),
    ("Tensor Cores", "bursar lecture 7", "7.20"),
    ("memory bandwidth as a limit", f"{STEP} --on 8xh100-sxm", r"^ bound by memory .*"),
    ("scheduling as a limit", f"{STEP} --on 8xh100-sxm", r"^ bound by overhead .*"),
    ("communication as a limit", "bursar lecture 7", "7.21"),
    ("GPT-3's training", "bursar run --flops gpt3 --on h100-sxm --mfu 1", r"^ time .*"),
    ("GPT-4's training, a rumour", "bursar run --flops gpt4-rumour --on h100-sxm --mfu 1", r"^ time .*"),
    ("the threshold of 1e26", "bursar run --flops us-1e26 --on h100-sxm --mfu 1", r"^ time .*"),
    ("6·N·D", f"{NOTES_RUN} --on 1024xh100-sxm --mfu 0.5", r"^ FLOPs .*"),
    ("the time formula: time", f"{NOTES_RUN} --on 1024xh100-sxm --mfu 0.5", r"^.*solved.*"),
    ("… GPUs", f"{NOTES_RUN} --on h100-sxm --mfu 0.5 --days 144", r"^.*solved.*"),
    ("… MFU", f"{NOTES_RUN} --on 1024xh100-sxm --days 180", r"^.*solved.*"),
    ("… tokens", "bursar run --params 70B --on 1024xh100-sxm --mfu 0.5 --days 144", r"^.*solved.*"),
    ("… parameters", "bursar run --tokens 15T --on 1024xh100-sxm --mfu 0.5 --days 144", r"^.*solved.*"),
    ("gradient FLOPs per tensor", "bursar step two-layer --gradients", r"^ w2 .*"),
    ("mixed precision", f"{STEP} --precision bf16-mixed", r"^ +bf16 autocast .*"),
    ("gradient accumulation", f"{STEP} --accumulate 4", r"^gpt2.*4 micro-batches.*"),
    ("NCCL's collectives", f"{STEP} --on 8xh100-sxm", r"^ +all_reduce .*"),
    ("torch.compile", "bursar lecture 8", "8.23"),
    ("gradient sparsification", "bursar lecture 8", "8.23"),
    ("sparse attention", "bursar lecture 7", "7.28"),
    ("nn.Parameter", "bursar lecture 9", "9.2"),
    ("unscaled initialisation", "bursar lecture 9", "9.5"),
    ("1/√in", "bursar lecture 9", "9.7"),
    ("Xavier", "bursar lecture 9", "9.9"),
    ("Kaiming", "bursar lecture 9", "9.19"),
    ("truncated normal", "bursar lecture 9", "9.12"),
    ("the variance check", "bursar lecture 9", "9.20"),
    ("the variance check of a model", "bursar probe mlp:L=2", r"^mlp.* layers: .*"),
    ("SGD", SGD, STATE),
    ("Momentum", MOMENTUM, STATE),
    ("AdaGrad", ADAGRAD, STATE),
    ("RMSProp", RMSPROP, STATE),
    ("Adam", ADAM, STATE),
    ("LAMB", LAMB, STATE),
    ("8-bit Adam", "bursar lecture 10", "10.25"),
    ("Cruncher and its step", "bursar step cruncher", r"^ model = .*"),
    ("memory as a table, parts and total", "bursar step cruncher", r"^ total +496 B .*"),
    ("memory as a pie, shares", "bursar step cruncher", r"^ layer outputs .*"),
    ("zero_grad(set_to_none)", "bursar step cruncher", r"^ gradients .* 0 B$"),
    ("gradient checkpointing", f"{STEP} --recompute full", r"^ recompute .*"),
    ("sequence chunking", "bursar lecture 10", "10.28"),
    ("Transformer totals: parameters", "bursar models gpt3-175b", r"^ all .*"),
    ("Transformer totals: FLOPs", STEP, r"^ model = .*"),
    ("ZeRO 1, 2, 3", "bursar lecture 10", "10.26"),
    ("FSDP", "bursar lecture 10", "10.37"),
    ("memory wall, roofline", "bursar lecture 10", "10.33"),
)

HEADER = """# The lecture notes, executed

Every claim of the notes' chapters 7 to 10: what they say, what bursar computes, the verdict, and what is right. Every
figure after “bursar” was computed by bursar's own code when this page was written (`make docs`); `tests/test_pages.py`
computes them again and holds the page to them. A verdict follows from the conditions a claim was tested under, which
`bursar lecture --explain` prints: *right* where all hold, *wrong* where none does, *depends* where some do,
*misleading* where the statement holds and what the notes draw from it does not.

Attention counts the pairs its mask lets through; “full-square” names the literature's S². Chapter 9 draws seeded random
numbers; ± is four standard errors of the sample.

## What the notes name

Each with a command that accounts for it, and what that prints.

"""


def shown(command: str, pattern: str) -> str:
    """The line of the command's output that ``pattern`` names, or what was computed for the claim it names."""
    if re.fullmatch(r"\d+\.\d+", pattern):
        (line,) = (x for x in executed() if x.id == pattern)
        assert command == f"bursar lecture {pattern.split('.')[0]}"
        assert line.computed
        return f"{pattern}: {line.computed}"
    found = [line for line in run("console", command) if re.search(pattern, line)]
    assert found, f"{command} prints no line like {pattern}"
    return " ".join(found[0].replace("″", "").split())  # ″: the source is the line's above


def row(name: str, command: str, pattern: str) -> str:
    printed = shown(command, pattern).replace("|", "\\|")
    return f"| {name} | `{command}` | `{printed}` |\n"


def page() -> str:
    table = "".join(row(*named) for named in NAMED)
    return f"{HEADER}| what | command | it prints |\n|---|---|---|\n{table}\n{markdown(executed())}"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def pages() -> list[Path]:
    """Every page of docs/ but the one that is made in whole."""
    return [path for path in sorted(DOCS.rglob("*.md")) if path != LECTURE]


def page_examples() -> list[object]:
    return [
        pytest.param(x, id=f"{path.relative_to(DOCS)}:{x.line}")
        for path in pages()
        for x in examples(blocks(path.read_text(encoding="utf-8")))
    ]


# ---- docs/lecture.md


def test_the_committed_page_is_the_one_the_claims_give_now():
    assert LECTURE.read_text(encoding="utf-8") == page()


def test_the_page_holds_every_claim_with_its_verdict():
    text = LECTURE.read_text(encoding="utf-8")
    assert len(executed()) == 111
    for x in executed():
        assert re.search(
            rf"^\*\*{re.escape(x.id)}\*\* .*\n\n- notes: .*\n- bursar: .*\n- \*\*{x.verdict}\*\*: ", text, re.M
        )


@pytest.mark.parametrize(
    "said",
    "FLOP/s|MFU|A100|H100|BF16|FP32|TF32|Tensor Cores|memory bandwidth|scheduling|communication|GPT-3|GPT-4|1e26|6·N·D|"
    "mixed precision|accumulation|NCCL|torch.compile|sparsification|sparse attention|nn.Parameter|1/√in|Xavier|Kaiming|"
    "truncated|variance check|SGD|Momentum|AdaGrad|RMSProp|Adam|LAMB|8-bit Adam|Cruncher|table|pie|zero_grad|"
    "checkpointing|chunking|Transformer totals|ZeRO 1, 2, 3|FSDP|memory wall".split("|"),
)
def test_what_the_notes_name_has_a_command(said: str):
    assert any(said in name and command.startswith("bursar ") for name, command, _ in NAMED)


def test_markup_in_a_claim_is_escaped():
    (bounds,) = (x for x in executed() if x.id == "9.12")
    assert "a=-3\\*std, b=3\\*std" in markdown([bounds])


# ---- the other pages


@pytest.mark.parametrize("example", page_examples())
def test_an_example_prints_what_it_says(example, monkeypatch):
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))  # a rule that an example registers is the example's
    check(example, run(example.kind, example.code))


@pytest.mark.parametrize("path", pages(), ids=lambda p: p.relative_to(DOCS).as_posix())
def test_every_block_of_a_page_is_of_a_language_that_is_checked(path: Path):
    text = path.read_text(encoding="utf-8")
    unnamed = text.count("\n```\n") - len(blocks(text))  # drawings: a fence without a language is closed by another
    assert {b.language for b in blocks(text)} <= SHOWN
    assert unnamed == 2 * len(re.findall(r"^```\n.*?^```$", FENCE.sub("", text), re.MULTILINE | re.DOTALL))


def test_every_example_says_what_it_prints():
    assert all(x.values[0].expected for x in page_examples())


CHAPTERS = "index flops gradients initialisation optimizers time clusters".split()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_shows_bursars_own_output_and_names_its_sources(chapter: str):
    text = (DOCS / f"{chapter}.md").read_text(encoding="utf-8")
    assert sum(x.kind == "console" for x in examples(blocks(text))) >= 1
    assert chapter == "index" or "## Sources" in text


# What the chapters work out by hand, as it stands there, and the arithmetic again.
BY_HAND = (
    ("index", "271 056 896", 2 * 32 * (1024 * 4096 + 4096 * 10)),
    ("index", "273 678 336", 2 * 32 * (1024 * 4096 + 4096 * 10) + 2 * 32 * 4096 * 10),
    ("index", "4 239 370", 1024 * 4096 + 4096 + 4096 * 10 + 10),
    ("flops", "48 FLOPs", 2 * 2 * 3 * 4),
    ("flops", "320 FLOPs", 4 * (4 * 5 // 2) * 8),
    ("gradients", "34 209 792", 2 * 64 * (512 * 512 + 512 * 10)),
    ("gradients", "34 865 152", 2 * 64 * (512 * 512 + 2 * 512 * 10)),
    ("gradients", "68 419 584", 4 * 64 * (512 * 512 + 512 * 10)),
    ("initialisation", "0.408", round((1 / 6) ** 0.5, 3)),
    ("initialisation", "3e-25", float(f"{6**-31.5:.0e}")),
    ("optimizers", "2.87 GB", round(2048 * 12288 * (34 + 5 * 96 * 2048 / 12288) / 1e9, 2)),
    ("optimizers", "0.86 GB", round(2048 * 12288 * 34 / 1e9, 2)),
    ("optimizers", "1.65 GB", round(8 * 1024 * 50257 * 4 / 1e9, 2)),
    ("optimizers", "24.9 GB", round(1_557_611_200 * 16 / 1e9, 1)),
    ("time", "8.89 ms", round(2**43 / 989.4e12 * 1e3, 2)),
    ("time", "1.28 ms", round(53_561_088 * 80 / 3.35e12 * 1e3, 2)),
    ("time", "1.244e7 s", float(f"{6 * 70e9 * 15e12 / (1024 * 989.4e12 * 0.5):.3e}")),
    ("time", "143.9 days", round(6 * 70e9 * 15e12 / (1024 * 989.4e12 * 0.5) / 86400, 1)),
    ("clusters", "31 ms", round(7 / 8 * 16e9 / 450e9 * 1e3)),
    ("clusters", "375 MB", round(2 * 7 / 8 * 4 * 53_561_088 / 1e6)),
    ("clusters", "203 ranks", 1 + int(4e6 * 50e9 / 989.4e12)),
    ("clusters", "0.94 GB", round(4 * 2 * 7 / 8 * 2 * 8192 * 8192 / 1e9, 2)),
    ("clusters", "22 % longer", round(100 * 7 / 32)),
    ("clusters", "18 % of the step", round(100 * 7 / 39)),
)


@pytest.mark.parametrize(("chapter", "stands", "value"), BY_HAND, ids=lambda x: str(x))
def test_what_a_chapter_works_out_by_hand_is_right(chapter: str, stands: str, value: float):
    prose = " ".join(FENCE.sub("", (DOCS / f"{chapter}.md").read_text(encoding="utf-8")).split())
    assert stands in prose
    assert float(re.match(r"\d[\d .]*(?:e-?\d+)?", stands)[0].replace(" ", "")) == value


def claims_named(text: str) -> list[tuple[str, str]]:
    """The claims of a chapter's table, with the verdict that stands beside each."""
    return re.findall(r"^\| (\d+\.\d+) \|.*?\| ([a-z ]+) \|", text, re.MULTILINE)


def wrongly_judged(text: str) -> list[str]:
    verdicts = dict(re.findall(r"^\*\*(\d+\.\d+)\*\*.*?^- \*\*([a-z ]+)\*\*:", LECTURE.read_text(encoding="utf-8"),
                               re.MULTILINE | re.DOTALL))  # fmt: skip
    return [claim for claim, verdict in claims_named(text) if verdicts.get(claim) != verdict]


@pytest.mark.parametrize("chapter", CHAPTERS[1:])
def test_a_chapter_judges_the_notes_as_the_lecture_does(chapter: str):
    text = (DOCS / f"{chapter}.md").read_text(encoding="utf-8")
    assert len(claims_named(text)) >= 3
    assert wrongly_judged(text) == []


def test_another_verdict_in_a_chapter_would_be_noticed():
    assert wrongly_judged("| 7.6 | costs 8.8e15 | right | |\n| 7.27 | 144 days | right | |\n") == ["7.6"]


# ---- docs/course.md


@pytest.mark.parametrize(
    "answer",
    "2127057600 1640452800 1635537600 4513336524800 3516769894400 4352432537600 33.1 24.9 6583.6 3406809600 54.51 "
    "40.88 27.25 2415919104 40B 341.3 295.3".split(),
)
def test_the_course_s_known_answers_are_printed(answer: str):
    printed = "".join(b.text for b in blocks(COURSE.read_text(encoding="utf-8")) if b.language in ("text", "console"))
    assert re.search(rf"(?<![\d.]){re.escape(answer)}(?![\d])", printed)


if __name__ == "__main__":
    LECTURE.write_text(page(), encoding="utf-8")
    for shown_page in pages():
        shown_page.write_text(rewrite(shown_page.read_text(encoding="utf-8")), encoding="utf-8")
