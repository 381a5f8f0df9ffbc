"""What changed between two steps: by hand, against the steps themselves, at two git revisions, and gated."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

import bursar
from bursar.cli import main
from bursar.diff import FIGURES, OF_A_MODULE, FileChange, Side, Source, changed_lines, compare, span
from bursar.errors import BadInput, BursarError
from bursar.gate import limits, rose
from bursar.hardware import accelerator
from bursar.modules import folded, label, shares, unfolded
from bursar.report.diff import markdown
from bursar.report.record import step_record
from command import ask

ROOT = Path(__file__).parent.parent
D, B, LAYERS = 64, 8, 6


# ---- models to compare


class MLP(nn.Module):
    def __init__(self, times: int, name: str) -> None:
        super().__init__()
        self.up = nn.Linear(D, times * D)
        self.add_module(name, nn.Linear(times * D, D))
        self.last = name

    def forward(self, x):
        return self.get_submodule(self.last)(self.up(x).relu())


class Block(nn.Module):
    def __init__(self, times: int, mlp: str, name: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.add_module(mlp, MLP(times, name))
        self.mlp_name = mlp

    def forward(self, x):
        return x + self.get_submodule(self.mlp_name)(self.norm(x))


class Net(nn.Module):
    def __init__(self, times: int = 3, layers: int = LAYERS, mlp: str = "mlp", name: str = "down") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(times, mlp, name) for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def side(name: str = "net", sources=None, on: str | None = "h100-sxm", **sizes) -> Side:
    ledger = bursar.step(Net(**sizes), torch.randn(B, D))  # AdamW: the peak stands where all blocks hold alike
    record = msgspec.to_builtins(step_record(ledger, ledger.on(on) if on else None, on=on))
    return Side(name, record, sources=sources)


@pytest.fixture(scope="module")
def three() -> Side:
    return side()


@pytest.fixture(scope="module")
def four() -> Side:
    return side(times=4)


def by_name(diff):
    return {c.figure: c for c in diff.figures}


# ---- modules


@pytest.mark.parametrize(
    "how",
    [
        {"precision": "bf16-mixed", "recompute": "full"},
        {"accumulate": 2, "optimizer": "sgd"},
        {"on": "8xh100-sxm"},
        {"on": "cpu"},
    ],
    ids=str,
)
def test_the_shares_of_the_modules_add_up_to_the_step(how):
    ledger = bursar.step("gpt2:L=5,d=64,h=4,V=100,T=32", batch_size=2, seq_len=32, **how)
    device = accelerator("h100-sxm")
    found = shares(ledger, device)
    assert len(found) < len(list(unfolded(found)))  # blocks alike stand as one
    assert sum(s.copies * s.flops for s in found) == ledger.flops.total
    assert sum(s.copies * s.bytes_moved for s in found) == sum(ledger.bytes_moved.values())
    assert sum(s.copies * s.bytes_at_peak for s in found) == ledger.memory.peak_bytes
    if how.get("on") != "cpu":
        forecast = ledger.on(how.get("on", "h100-sxm"))
        bound = forecast.roofline_seconds - forecast.bound_by["network"]
        assert sum(s.copies * s.roofline_seconds for s in found) == pytest.approx(bound, rel=1e-12)


def test_modules_alike_are_folded_and_come_back_whole():
    found = shares(bursar.step(Net(), torch.randn(B, D)))
    assert "blocks.0–5.mlp.up" in {label(s.module, s.copies) for s in found}
    whole = list(unfolded(found))
    assert {s.module for s in whole} >= {f"blocks.{i}.mlp.{part}" for i in range(LAYERS) for part in ("up", "down")}
    assert sorted(unfolded(folded(whole))) == sorted(whole)


def test_blocks_that_differ_or_are_not_neighbours_are_not_folded():
    ledger = bursar.step(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8), optimizer="sgd")
    assert [s.copies for s in shares(ledger) if s.module in ("0", "2")] == [1, 1]


# ---- figures, by hand


def test_an_mlp_a_third_wider_costs_a_third_more_by_hand(three, four):
    diff = compare(three, four)
    found = by_name(diff)
    # two products of 2·B·D·D more per block forward; in backward each has dX and dW, for a norm's weight stands before
    more = LAYERS * 2 * (2 * B * D * D)
    assert found["flops.forward"].change == more
    assert found["flops.backward"].change == 2 * more
    assert found["flops.forward"].relative == pytest.approx(1 / 3)
    assert found["model.parameters"].change == LAYERS * (2 * D * D + D)  # two matrices and up's bias
    assert not diff.same


def test_every_figure_is_what_each_step_says_of_itself(three, four):
    found = by_name(compare(three, four))
    assert set(found) == set(FIGURES)
    for record, which in ((three.record, "before"), (four.record, "after")):
        assert getattr(found["memory.peak_bytes"], which) == record["memory"]["peak_bytes"]
        assert getattr(found["bytes_moved.total"], which) == record["bytes_moved"]["total"]
        assert getattr(found["time.roofline_seconds"], which) == record["time"]["roofline_seconds"]
        assert getattr(found["flops.by_kind.matmul"], which) == record["flops"]["by_kind"]["matmul"]


@pytest.mark.parametrize("other", [{"times": 4}, {"layers": 9}, {"layers": 3, "times": 5}, {"mlp": "ffn", "times": 4}])
def test_what_the_modules_changed_by_adds_up_to_what_the_step_changed_by(three, other):
    diff = compare(three, side(**other))
    whole = {"flops": "flops.total", "bytes_moved": "bytes_moved.total", "bytes_at_peak": "memory.peak_bytes",
             "roofline_seconds": "time.roofline_seconds"}  # fmt: skip
    for figure in OF_A_MODULE:
        parts = sum(m.copies * c.change for m in diff.modules for c in m.changes if c.figure == figure)
        assert parts == pytest.approx(by_name(diff)[whole[figure]].change, rel=1e-12, abs=0)


def test_identical_steps_have_no_difference(three):
    diff = compare(three, copy.deepcopy(three))
    assert diff.same
    assert diff.modules == ()
    assert rose(diff, limits("0%")) == []


# ---- modules that came, went or changed their name


def test_modules_alike_that_changed_alike_are_one_line(three, four):
    changed = {label(m.module, m.copies): m for m in compare(three, four).modules}
    assert {"blocks.0–5.mlp.up", "blocks.0–5.mlp.down", "optimizer step"} <= set(changed)
    flops = next(c for c in changed["blocks.0–5.mlp.down"].changes if c.figure == "flops")
    assert flops.after - flops.before == 3 * 2 * B * D * D  # of each: forward, dX, dW, and no arithmetic else
    assert not any("norm" in name for name in changed)


def test_blocks_more_are_added_and_blocks_fewer_removed(three):
    for pair, status in (((three, side(layers=9)), "added"), ((side(layers=9), three), "removed")):
        (found,) = [m for m in compare(*pair).modules if m.status == status]
        assert (found.module, found.copies) == ("blocks.6", 3)


def test_a_module_with_another_name_and_the_same_figures_is_renamed(three):
    diff = compare(three, side(mlp="ffn"))
    (found,) = diff.modules
    assert (found.status, found.was, found.module, found.copies) == ("renamed", "blocks.0.mlp", "blocks.0.ffn", LAYERS)
    assert not diff.same
    assert found.changes == ()


def test_a_module_with_another_name_and_other_figures_is_gone_and_another_is_new(three):
    found = {(m.status, label(m.module, m.copies)) for m in compare(three, side(mlp="ffn", times=4)).modules}
    assert {("removed", "blocks.0–5.mlp"), ("added", "blocks.0–5.ffn")} <= found


# ---- lines


def test_changed_lines_are_those_of_both_files():
    assert changed_lines("a\nb\n", "a\nb\n") == ()
    assert [span("f.py", x) for x in changed_lines("a\nb\nc\n", "a\nb2\nb3\nc\n")] == ["f.py:2-3"]
    assert [span("f.py", x) for x in changed_lines("a\nb\nc\n", "a\nc\n")] == ["f.py:2 (1 line less)"]


def test_a_module_is_given_the_lines_of_its_class_or_of_the_nearest_around_it():
    sources = {"": [Source("net.py", 30, 40)], "blocks.0.mlp": [Source("net.py", 1, 9)], "blocks.0": []}
    a, b = side(layers=1, sources=sources), side(layers=1, times=4, sources=sources)

    def lines(first: int) -> set[tuple[str, ...]]:
        before = [f"line {i}" for i in range(1, 51)]
        after = [*before[: first - 1], "another", *before[first:]]
        files = [FileChange("net.py", changed_lines("\n".join(before), "\n".join(after)))]
        return {m.lines for m in compare(a, b, files).modules if m.module.startswith("blocks.0.mlp")}

    assert lines(5) == {("net.py:5",)}  # of MLP, which holds up and down
    assert lines(33) == {("net.py:33",)}  # of the whole model
    assert lines(20) == {()}  # between the classes: nobody's


# ---- the gate


def test_a_limit_is_read_exactly():
    assert limits("2%") == dict.fromkeys(("flops", "bytes", "peak", "time"), Fraction(1, 50))
    assert limits("2%,peak=0%") == {**limits("2%"), "peak": 0}
    assert limits("flops=0.1 %") == {"flops": Fraction(1, 1000)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "two%",
        "nan%",
        "inf%",
        "-1%",
        "%",
        "1/0%",
        "flops=",
        "flops=1%,flops=2%",
        "1%,2%",
        "speed=2%",
        "²%",
        "1e9%",
    ],
)
def test_a_limit_that_cannot_be_read_is_refused(text):
    with pytest.raises(BursarError):
        limits(text)


@pytest.mark.parametrize("gate", ["flops", "bytes", "peak", "time"])
def test_a_rise_over_the_limit_is_named_and_a_rise_to_the_limit_is_not(three, gate):
    places = {"flops": ("flops", "total"), "bytes": ("bytes_moved", "total"), "peak": ("memory", "peak_bytes"),
              "time": ("time", "roofline_seconds")}  # fmt: skip
    part, name = places[gate]

    def with_figure(value) -> Side:
        record = copy.deepcopy(three.record)
        record[part][name] = value
        return Side("net", record)

    base, cap = with_figure(1000), limits("2%")
    assert rose(compare(base, with_figure(1020)), cap) == []
    (said,) = rose(compare(base, with_figure(1021)), cap)
    assert "2.10 %" in said
    assert rose(compare(with_figure(0), with_figure(1)), cap) != []
    assert rose(compare(with_figure(1000), with_figure(10)), limits("0%")) == []


def test_an_op_newly_uncounted_is_no_pass_on_flops(three):
    record = copy.deepcopy(three.record)
    record["flops"]["uncounted"] = [{"op": "mylib.fused", "calls": 2, "bytes": 8}]
    diff = compare(three, Side("net", record))
    assert not diff.same
    (said,) = rose(diff, limits("50%"))
    assert "mylib.fused" in said
    assert rose(compare(Side("net", record), three), limits("0%")) == []


def test_time_on_two_devices_is_not_compared_and_not_gated_in_silence(three):
    diff = compare(three, side(on="l4"))
    assert by_name(diff)["time.roofline_seconds"].change is None
    assert any("not compared" in text for text in diff.notes)
    assert rose(diff, limits("0%")) == []
    with pytest.raises(BadInput, match="no time to compare"):
        rose(diff, limits("time=2%"))
    nowhere = side(on=None)
    assert any("neither side" in text for text in compare(nowhere, nowhere).notes)


# ---- pages


def test_names_that_are_markup_stay_text_in_markdown(three):
    record = copy.deepcopy(three.record)
    record["modules"].append({"module": "<img src=x>|`a`\x1b[31m", "copies": 1, "flops": 10**9, "bytes_moved": 1,
                              "bytes_at_peak": 1, "roofline_seconds": 1.0})  # fmt: skip
    page = markdown(compare(three, Side("net", record)), [])
    assert "<img" not in page
    assert "\x1b" not in page
    (row,) = [text for text in page.splitlines() if "img" in text and "FLOPs" in text]
    assert row.replace("\\|", "").count("|") == 7  # six cells


# ---- the command, on presets and saved records


def test_a_preset_against_itself_is_no_difference(capsys):
    code, out, _ = ask(capsys, "diff", "cruncher", "cruncher", "--max-increase", "0%")
    assert code == 0
    assert "no difference" in out


def test_the_command_gates_and_says_what_rose(capsys):
    argv = ("diff", "cruncher", "cruncher", "--json")
    _, first, _ = ask(capsys, *argv)
    assert ask(capsys, *argv)[1] == first  # to the last byte
    record = json.loads(first)
    assert (record["schema_version"], record["same"], record["modules"]) == (1, True, [])
    code, out, err = ask(capsys, "diff", "cruncher", "mlp", "--max-increase", "flops=2%", "--json")
    assert code == 1
    assert "all FLOPs rose by" in err
    assert json.loads(out)["over"]


def test_a_saved_step_is_a_side(capsys, tmp_path):
    _, text, _ = ask(capsys, "step", "cruncher", "--on", "l4", "--json")
    saved = tmp_path / "base.json"
    saved.write_text(text)
    code, out, _ = ask(capsys, "diff", str(saved), "cruncher", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["same"]
    assert found["b"]["hardware"]["name"] == "l4"  # priced where the saved one was
    code, _, err = ask(capsys, "diff", str(saved), str(saved), "--batch-size", "4")
    assert (code, "saved records" in err) == (2, True)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"schema_version": 1}',
        '{"schema_version": 99, "flops": {}}',
        '{"schema_version": 1, "flops": {"model": "many"}, "model": {}, "modules": []}',
    ],
)
def test_a_file_that_is_no_record_is_refused(capsys, tmp_path, text):
    saved = tmp_path / "base.json"
    saved.write_text(text)
    code, out, err = ask(capsys, "diff", str(saved), "cruncher")
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_a_record_whose_modules_cannot_be_is_refused(three):
    for module in ({"copies": 10**12}, {"flops": "1"}, {"module": 3}):
        record = copy.deepcopy(three.record)
        record["modules"][0] |= module
        with pytest.raises(BadInput, match="no record of bursar step"):
            compare(Side("saved.json", record), three)


def test_saved_records_are_compared_without_torch(capsys, tmp_path):
    _, text, _ = ask(capsys, "step", "cruncher", "--json")
    (tmp_path / "base.json").write_text(text)
    script = (
        "import sys\nfrom bursar.cli import main\n"
        f"main(['diff', {str(tmp_path / 'base.json')!r}, {str(tmp_path / 'base.json')!r}, '--max-increase', '0%'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no difference" in done.stdout


# ---- git


LAYERS_PY = """\
from torch import nn


class MLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.up = nn.Linear(d, 3 * d)
        self.down = nn.Linear(3 * d, d)

    def forward(self, x):
        return self.down(self.up(x).relu())
"""
MODEL_PY = """\
import torch
from torch import nn

from mylayers import MLP


class Net(nn.Module):
    def __init__(self, d=64):
        super().__init__()
        self.mlp = MLP(d)
        self.head = nn.Linear(d, 10)

    def forward(self, x):
        return self.head(self.mlp(x))


def make(batch_size: int = 8):
    return Net(), torch.randn(batch_size, 64)
"""


def git(repo: Path, *words: str) -> str:
    who = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(repo), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def repo(tmp_path: Path, monkeypatch) -> Path:
    """A repository with a model in src/, one commit on main; the temporary folders are seen in ``tmp``."""
    made = tmp_path / "repo"
    (made / "src").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(made)
    (made / "src" / "mymodel.py").write_text(MODEL_PY)
    (made / "src" / "mylayers.py").write_text(LAYERS_PY)
    git(made, "init", "-q", "-b", "main")
    git(made, "add", ".")
    git(made, "commit", "-qm", "one")
    return made


def left_behind(repo: Path) -> list[str]:
    pycache = map(str, repo.rglob("__pycache__"))
    return [*os.listdir(repo.parent / "tmp"), *pycache, *git(repo, "worktree", "list").splitlines()[1:]]


def widen(repo: Path) -> None:
    (repo / "src" / "mylayers.py").write_text(LAYERS_PY.replace("3 * d", "4 * d"))


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@needs_git
def test_the_working_tree_against_a_revision_by_file_and_by_package_to_the_same_byte(repo, capsys, monkeypatch):
    widen(repo)
    status = git(repo, "status", "--porcelain")
    code, out, err = ask(capsys, "diff", "src/mymodel.py:make", "--base", "main", "--max-increase", "2%", "--json")
    assert code == 1, err
    found = json.loads(out)
    # 3·D to 4·D: up has no dX, for x wants no gradient
    assert found["figures"]["flops.forward"]["change"] == 2 * (2 * 8 * 64 * 64)
    assert found["figures"]["flops.backward"]["change"] == 3 * (2 * 8 * 64 * 64)
    changed = {m["module"]: m for m in found["modules"]}
    assert changed["mlp.up"]["lines"] == ["src/mylayers.py:7-8"]
    assert "head" not in changed
    assert found["files"] == [{"file": "src/mylayers.py", "added": 2, "removed": 2, "lines": ["src/mylayers.py:7-8"]}]
    assert found["a"]["revision"].startswith("main (")
    assert found["b"]["revision"] == "working tree"
    assert left_behind(repo) == []
    assert git(repo, "status", "--porcelain") == status
    monkeypatch.syspath_prepend(str(repo / "src"))  # as an editable install does: it must be mapped to the revision
    again = ask(capsys, "diff", "mymodel:make", "--base", "main", "--max-increase", "2%", "--json")
    assert again == (code, out.replace("src/mymodel.py:make", "mymodel:make"), err)


@needs_git
def test_two_revisions_between_which_only_a_comment_is_new_are_no_difference(repo, capsys):
    path = repo / "src" / "mymodel.py"
    path.write_text(MODEL_PY + "# said\n")
    git(repo, "commit", "-qam", "two")
    path.unlink()  # the working tree has no say
    code, out, err = ask(capsys, "diff", "src/mymodel.py:make", "--base", "HEAD~1", "--head", "HEAD")
    assert code == 0, err
    assert "no difference: the code changed" in out
    assert left_behind(repo) == []


@needs_git
def test_code_loaded_from_the_working_tree_in_place_of_the_revision_is_an_error(repo, capsys):
    widen(repo)
    path = repo / "src" / "mymodel.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(repo / 'src')!r})\n" + MODEL_PY)
    git(repo, "commit", "-qam", "two")
    code, out, err = ask(capsys, "diff", "src/mymodel.py:make", "--base", "HEAD", "--json")
    assert (code, out) == (2, "")
    assert "mylayers was loaded from the working tree" in err
    assert left_behind(repo) == []


@needs_git
def test_a_side_that_cannot_be_traced_is_named_with_its_error_and_line(repo, capsys):
    path = repo / "src" / "mymodel.py"
    path.write_text(MODEL_PY.replace("nn.Linear(d, 10)", "nn.Linear(d + 1, 10)"))
    code, out, err = ask(capsys, "diff", "src/mymodel.py:make", "--base", "main")
    assert (code, out) == (2, "")
    assert err.startswith("bursar: B (src/mymodel.py:make at working tree) cannot be traced: RuntimeError")
    assert "src/mymodel.py:14" in err
    assert str(repo) not in err
    assert left_behind(repo) == []


@needs_git
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("src/mymodel.py:make",), "one workload is no difference"),
        (("src/mymodel.py:make", "--head", "main"), "--base"),
        (("src/mymodel.py:make", "--base", "nowhere"), "no revision 'nowhere'"),
        (("src/mymodel.py:make", "--base=--output=x"), "no revision"),
        (("src/mymodel.py:make", "--base", "main", "--head", "nowhere"), "no revision 'nowhere'"),
        (("src/new.py:make", "--base", "main"), "there is no src/new.py at main"),
        (("gpt2", "--base", "main"), "stands in no file"),
        (("src/mymodel.py:make", "--base", "main", "--on", "h100"), "no accelerator 'h100'"),
        (("src/mymodel.py:make", "--base", "main", "--max-increase", "much"), "no percentage"),
        (("src/mymodel.py:make", "--base", "main", "--json", "--markdown"), "give one"),
        (("../outside.py:make", "--base", "main"), "in no git repository"),
    ],
)
def test_a_request_that_cannot_be_meant_says_why_and_leaves_nothing(repo, capsys, argv, says):
    (repo / "src" / "new.py").write_text(MODEL_PY)
    (repo.parent / "outside.py").write_text(MODEL_PY)
    code, out, err = ask(capsys, "diff", *argv)
    assert (code, out) == (2, "")
    assert says in err
    assert left_behind(repo) == []


def test_two_files_of_one_name_with_siblings_of_one_name_do_not_mix(tmp_path, capsys):
    for name, layers in (("old", LAYERS_PY), ("new", LAYERS_PY.replace("3 * d", "4 * d"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mymodel.py").write_text(MODEL_PY)
        (tmp_path / name / "mylayers.py").write_text(layers)
    old, new = (f"{tmp_path / name}/mymodel.py:make" for name in ("old", "new"))
    code, out, err = ask(capsys, "diff", old, new, "--json")
    assert code == 0, err
    assert json.loads(out)["figures"]["flops.forward"]["change"] == 2 * (2 * 8 * 64 * 64)


@needs_git
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_diff_that_is_stopped_leaves_no_folder_and_no_process(repo, number, code):
    started = repo.parent / "started"
    slow = f"import os, time\nopen({str(started)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(600)\n"
    (repo / "src" / "mymodel.py").write_text(slow)
    git(repo, "commit", "-qam", "slow")
    words = [sys.executable, "-m", "bursar", "diff", "src/mymodel.py:make", "--base", "HEAD"]
    asked = subprocess.Popen(words, cwd=repo, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while len(started.read_text().split() if started.exists() else ()) < 2:
            assert time.monotonic() < until
            assert asked.poll() is None
            time.sleep(0.05)
        assert left_behind(repo) != []
        asked.send_signal(number)
        assert asked.wait(timeout=60) == code
    finally:
        asked.kill()
    for pid in map(int, started.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert left_behind(repo) == []


# ---- the action


@pytest.fixture(scope="module")
def action() -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def test_the_action_is_one_that_github_reads(action):
    assert {"name", "description", "inputs", "runs"} <= set(action)
    assert action["runs"]["using"] == "composite"
    checkout, _, *scripts = action["runs"]["steps"]
    assert checkout["with"]["fetch-depth"] == 0
    used = " ".join(str(step) for step in action["runs"]["steps"])
    assert all(f"inputs.{name} }}" in used for name in action["inputs"])
    for step in scripts:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]  # an input in a script's text would be run
        assert subprocess.run(["bash", "-n", "-c", step["run"]], check=False).returncode == 0


@needs_git
def test_the_actions_script_gates_a_pull_request_and_writes_its_summary(repo, action):
    git(repo, "update-ref", "refs/remotes/origin/main", "HEAD")
    widen(repo)
    git(repo, "commit", "-qam", "wider")
    summary = repo.parent / "summary.md"
    step = action["runs"]["steps"][-1]
    env = {
        **os.environ, "MODEL": "src/mymodel.py:make", "BASE": "", "MAX_INCREASE": "flops=2%,peak=50%", "DEVICE": "l4",
        "OPTIONS": "--batch-size 4 --optimizer sgd", "GITHUB_BASE_REF": "main", "GITHUB_STEP_SUMMARY": str(summary),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    assert set(step["env"]) <= set(env)
    done = subprocess.run(["bash", "-c", step["run"]], cwd=repo, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    page = summary.read_text()
    assert page == done.stdout
    assert "| forward | " in page
    assert "**Over the limit:** all FLOPs rose by" in page
    assert "peak rose" not in page
    assert "src/mylayers.py:7-8" in page.replace("\\", "")


def test_the_guide_names_every_input_of_the_action(action):
    guide = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    assert [name for name in action["inputs"] if name not in guide and name not in ("base", "python-version")] == []


def test_an_unknown_gate_is_told_which_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["diff", "cruncher", "cruncher", "--max-increase", "mfu=2%"])
    assert stop.value.code == 2
    assert "known: flops, bytes, peak, time" in capsys.readouterr().err
