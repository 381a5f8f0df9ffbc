"""The same models through every FLOP counter that installs from PyPI, against answers derived by hand.

    python benchmarks/counters.py [--python PYTHON | --environment FOLDER] [--tool NAME ...] [--case NAME ...]
                                  [--raw FILE] [--write]

The other counters live in an environment of their own, made here in FOLDER (a few minutes, a package at a time, so
that one that does not install is a row that says so) or given by its PYTHON. `counter_cases.py` has the models and
the hand counts, `counter_tools.py` how each tool is asked. Each tool runs in a process of its own and each case in a
fork of that, one after another, under a time limit. `--raw` keeps the answers, and takes from FILE those it has: an
interrupted
run goes on. `--write` writes counters.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECONDS = 150  # for one tool on one case
ENOUGH = 1.5  # CPU seconds: a count that takes longer is made once, a shorter one three times
OTHER_WORK = 0.10  # how far above the products a tool that counts norms and activations too may be

Answer = dict[str, Any]


# ---- in the environment of the counters


def worker(tool: str, names: list[str]) -> None:
    """Answer each case on a line of JSON: value, what was named, seconds, the process's peak bytes, or the error."""
    sys.path.insert(0, str(HERE.parent / "src"))
    warnings.simplefilter("ignore", FutureWarning)
    import counter_cases
    import counter_tools
    import torch  # before the forks, so that no case pays for it
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    import bursar

    torch.set_num_threads(2)
    chosen = next(t for t in counter_tools.TOOLS if t.name == tool)
    version = bursar.__version__ if chosen.package == "bursar" else importlib.metadata.version(chosen.package)
    print(json.dumps({"tool": tool, "version": version}), flush=True)
    for case in counter_cases.cases():
        if case.name in names:
            print(json.dumps({"tool": tool, "case": case.name, **in_fork(chosen, case)}), flush=True)


def in_fork(tool: Any, case: Any) -> Answer:
    """One case in a fork, killed after SECONDS; what it printed counts as said."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as answered:
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            try:
                answered.write(json.dumps(answers(tool, case)).encode())
                answered.flush()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        answered.seek(0)
        printed.seek(0)
        text = answered.read()
        said = printed.read().decode(errors="replace")
    found = json.loads(text) if text else {"forward": {"error": f"no answer in {SECONDS} s, wait status {status}"}}
    for one in found.values():
        heard = (one.pop("said", "") + said).lower()
        one["named"] = [word for word in case.culprits if word.lower() in heard]
    return found


def answers(tool: Any, case: Any) -> Answer:
    """Forward, and forward with backward, where the case asks and the tool offers."""
    import torch

    found: Answer = {}
    offered = case.products or tool.other
    if case.forward and offered:
        with torch.no_grad():
            found["forward"] = ask(tool, tool.forward, case, times=3)
    if case.step and tool.step and offered and (case.products or tool.optimizer):
        found["step"] = ask(tool, tool.step, case, times=1)
    return found


def ask(tool: Any, question: Any, case: Any, times: int) -> Answer:
    """The answer in FLOPs of the whole batch; CPU seconds of all threads, building the model and counting it."""
    taken: list[float] = []
    value, said = None, ""
    try:
        while not taken or (len(taken) < times and taken[0] < ENOUGH):
            started = time.process_time()
            value, said = question(case)
            taken.append(time.process_time() - started)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]}
    if value is None:
        return {"error": "gives no figure", "said": said}
    scale = (2 if tool.unit == "MACs" else 1) * (case.samples if tool.per_sample else 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "value": round(value * scale),
        "said": said,
        "cpu_seconds": statistics.median(taken),
        "first_cpu_seconds": taken[0],
        "bytes": peak,
    }


# ---- here: the environment, the verdicts, the page


def environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """Make it unless it is there: its Python, and the first line of what each package that failed said."""
    python = folder / "bin" / "python"
    failed: dict[str, str] = {}
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = [line for line in (HERE / "counters_requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    own = ["torch==2.13.0", "setuptools", "wheel", "transformers", "cyclopts", "msgspec", "platformdirs", "polars",
           "pytorch-optimizer"]  # fmt: skip
    for packages in (own, *([w] for w in wanted)):
        pip = [str(python), "-m", "pip", "install", "-q", "-c", str(HERE.parent / "constraints.txt")]
        done = subprocess.run([*pip, "--no-build-isolation", *packages], capture_output=True, text=True,
                              env={**os.environ, "DS_BUILD_OPS": "0"}, check=False)  # fmt: skip
        if done.returncode and packages is own:
            raise SystemExit(f"the environment of the counters cannot be made:\n{done.stderr}")
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            failed[packages[0].split("==")[0]] = (errors or ["pip failed"])[0].strip()
    return python, failed


def verdict(case: Any, tool: Any, which: str, found: Answer | None) -> str:
    """A word: right, named as missing, off by a factor and silent, crashed, or not offered."""
    right = getattr(case, which)
    if not right:
        return ""
    if found is None:
        return "–"
    if "error" in found:
        return "crash"
    value, factor = found["value"], f"×{found['value'] / right['']:.2f}"
    if tool.estimates and which == "step":
        return f"est. {factor}"
    below = {name: count for name, count in right.items() if count <= value * (1 + 1e-9)}
    if below:
        name, count = max(below.items(), key=lambda pair: pair[1])
        if value <= count * (1 + (OTHER_WORK if which == "forward" else 1e-9)):
            return f"right{', ' + name if name else ''}"
    factor = "0" if not value else factor if factor != "×1.00" else f"×{value / right['']:.4f}"
    return f"named, {factor}" if found["named"] else f"**{factor}**"


def page(rows: dict[tuple[str, str], Answer], versions: dict[str, str], failed: dict[str, str]) -> str:
    """The tables as committed."""
    import counter_cases
    import counter_tools

    cases = counter_cases.cases()
    tools = [t for t in counter_tools.TOOLS if t.name in versions or t.package in failed]
    verdicts = {
        (t.name, c.name, w): verdict(c, t, w, rows.get((t.name, c.name), {}).get(w))
        for t in tools for c in cases for w in ("forward", "step")
    }  # fmt: skip
    lines = [
        "# FLOP counters",
        "",
        f"{datetime.date.today()}, `benchmarks/counters.py`, Python {platform.python_version()}, torch 2.13.0 (CPU "
        f"build), {platform.machine()}, {os.cpu_count()} cores shared with other work: trust ratios, not seconds.",
        "What the words and columns mean, and what each tool is good at: [docs/comparison.md](../docs/comparison.md).",
        "",
        "## Summary",
        "",
        "Seconds are CPU seconds, all threads, of building a model and counting its forward, over the cases: the "
        "median of the first counts in a process, that of the medians of three (of one where it takes over 1.5 s), "
        "the slowest. Peak: of the process, torch included.",
        "",
        *table("counter", "version", "unit", "right", "of these full square", "named as missing", "wrong, nothing said",
               "crash", "estimate", "first CPU s", "median CPU s", "slowest CPU s", "peak MB", "asked by"),
    ]  # fmt: skip
    for t in tools:
        if t.name not in versions:
            lines.append(row(t.name, f"no row: {tidy(failed[t.package])}", *[""] * 12))
            continue
        of = [v for (name, _, _), v in verdicts.items() if name == t.name and v not in ("", "–")]
        signs = ("full square", "named", "**", "crash", "est.")
        n_full_square, *others = (sum(sign in v for v in of) for sign in signs)
        answered = [r["forward"] for (name, _), r in rows.items() if name == t.name and "value" in r.get("forward", {})]
        first, again = ([a[which] for a in answered] for which in ("first_cpu_seconds", "cpu_seconds"))
        seconds = (statistics.median(first), statistics.median(again), max(again)) if answered else (0.0, 0.0, 0.0)
        lines.append(
            row(t.name, versions[t.name], t.unit, f"{sum('right' in v for v in of)} of {len(of) - others[-1]}",
                n_full_square, *others, *(f"{s:.2f}" for s in seconds),
                f"{max([a['bytes'] for a in answered], default=0) / 1e6:.0f}", t.how)
        )  # fmt: skip
    for which, title in (("forward", "Forward"), ("step", "Forward and backward, or the optimizer's update")):
        asked = [t for t in tools if any(verdicts[t.name, c.name, which] not in ("", "–") for c in cases)]
        lines += ["", f"## {title}", "", *table("case", *(t.name for t in asked))]
        lines += [row(c.name, *(verdicts[t.name, c.name, which] for t in asked)) for c in cases if getattr(c, which)]
    lines += ["", "## CPU seconds of a forward count, the model's building included", ""]
    lines += table("case", *(t.name for t in tools))
    for c in cases:
        found = [rows.get((t.name, c.name), {}).get("forward", {}).get("cpu_seconds") for t in tools]
        lines.append(row(c.name, *("" if s is None else f"{s:.2f}" for s in found)))
    lines += ["", "## The hand counts", "", *table("case", "forward", "with backward", "how")]
    lines += [row(c.name, written(c.forward), written(c.step), c.why) for c in cases]
    lines += ["", "## Crashes", ""]
    for (name, case), answer in rows.items():
        lines += [f"- {name}, {case}, {w}: `{tidy(a['error'])}`" for w, a in answer.items() if "error" in a]
    return "\n".join(lines) + "\n"


def row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(*heads: str) -> tuple[str, str]:
    return row(*heads), "|---" * len(heads) + "|"


def written(counts: dict[str, int]) -> str:
    """A hand count by convention, bursar's first."""
    return "; ".join(f"{n:,}".replace(",", " ") + (f" ({name})" if name else "") for name, n in counts.items())


def tidy(text: str) -> str:
    """Without this machine's paths."""
    return re.sub(r"(/[\w.\-]+)+/", "", text).replace("|", "/").replace("`", "'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="of an environment with the counters in it")
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "bursar-counters")
    parser.add_argument("--tool", action="append", help="only this one; may be given again")
    parser.add_argument("--case", action="append", help="only this one; may be given again")
    parser.add_argument("--raw", type=Path, help="answers as JSON lines, kept and gone on with")
    parser.add_argument("--write", action="store_true", help="write benchmarks/counters.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.case or [])
        return
    sys.path.insert(0, str(HERE.parent / "src"))
    import counter_cases
    import counter_tools

    python, failed = (args.python, {}) if args.python else environment(args.environment)
    lines = args.raw.read_text().splitlines() if args.raw and args.raw.exists() else []
    names = [c.name for c in counter_cases.cases() if not args.case or c.name in args.case]
    for tool in counter_tools.TOOLS:
        done = {a["case"] for a in map(json.loads, lines) if a["tool"] == tool.name and "case" in a}
        left = [n for n in names if n not in done]
        if not left or tool.package in failed or (args.tool and tool.name not in args.tool):
            continue
        command = [str(python), __file__, "--worker", tool.name, *(w for n in left for w in ("--case", n))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for line in process.stdout or ():
                lines.append(line.strip())
                print(line.strip()[:160], file=sys.stderr)
                if args.raw:
                    args.raw.write_text("\n".join(lines) + "\n")
        if process.returncode:
            failed[tool.package] = f"the process ended with {process.returncode}"
    found = [json.loads(line) for line in lines]
    versions = {a["tool"]: a["version"] for a in found if "version" in a}
    rows = {(a.pop("tool"), a.pop("case")): a for a in found if "case" in a}
    text = page(rows, versions, failed)
    print(text)
    if args.write:
        (HERE / "counters.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
