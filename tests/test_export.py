"""A step as files: traces, snapshots and tables that others' readers take, with the ledger's own figures in them."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import pickle
import pickletools
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch.cuda._memory_viz as torch_viz

from bursar import allocator
from bursar.errors import BadInput, UnknownName
from bursar.report import export, perfetto, plot, snapshot
from bursar.report.markdown import step as markdown
from command import ask
from test_html import ASKED, WORSE, ledger, nasty  # noqa: F401  (a fixture)


def priced(name, on="h100-sxm"):
    return ledger(name).on(on)


# ---- a trace for Perfetto


def tracks(trace):
    """The slices of each track in order."""
    found = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[event["tid"]].append((round(event["ts"] * 1000), round(event["dur"] * 1000), event))
    return found


def overlaps(trace):
    """Slices that begin before the one before them on their track has ended, in nanoseconds."""
    return [b[2] for track in tracks(trace).values() for a, b in itertools.pairwise(track) if b[0] < a[0] + a[1]]


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("on", [None, "h100-sxm", "8xh100-sxm"])
def test_a_trace_has_every_op_end_to_end_and_the_peak_as_its_counter_s_most(name, on):
    step = ledger(name)
    forecast = None if on is None else step.on(on)
    trace = json.loads(json.dumps(perfetto.trace(step, forecast), allow_nan=False))
    events = [e for e in trace["traceEvents"] if e["ph"] != "M"]
    assert all(a["ts"] <= b["ts"] for a, b in itertools.pairwise(events))
    assert not overlaps(trace)
    ops = tracks(trace)[perfetto.COMPUTE]
    assert [e["name"] for _, _, e in ops] == [r.op for r in step.recorded]
    whole = ops[-1][0] + ops[-1][1]
    assert whole == (1000 * len(step) if forecast is None else pytest.approx(forecast.seconds * 1e9, abs=2))
    phases = tracks(trace)[perfetto.PHASES]
    assert sum(dur for _, dur, _ in phases) == sum(dur for _, dur, _ in ops)
    counters = [e for e in events if e["ph"] == "C"]
    assert max(sum(e["args"].values()) for e in counters) == step.memory.peak_bytes
    assert counters[-1]["args"] == step.memory.between_steps


def test_an_overlap_would_be_found():
    trace = perfetto.trace(ledger("cruncher"), priced("cruncher", "h100-sxm"))
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == perfetto.COMPUTE]
    slices[1]["dur"] += slices[2]["dur"] + 1
    assert overlaps(trace)


def test_ranks_that_wait_for_the_network_have_a_track_of_it():
    alone = priced("gpt2", "8xh100-sxm")
    assert alone.collectives
    forecast = dataclasses.replace(alone, seconds=alone.seconds + 0.01, bound_by={**alone.bound_by, "network": 0.01})
    trace = perfetto.trace(ledger("gpt2"), forecast)
    ((begin, wait, event),) = tracks(trace)[perfetto.NETWORK]
    assert wait == 10_000_000
    optimizer = next(s for s in tracks(trace)[perfetto.COMPUTE] if s[2]["args"]["phase"] == "optimizer")
    assert begin + wait == optimizer[0]
    assert event["args"] == {"all_reduce bytes per rank": forecast.collectives[0].bytes}


def test_flops_in_a_trace_are_the_step_s():
    ops = [e["args"]["flops"] for _, _, e in tracks(perfetto.trace(ledger("gpt2"), None))[perfetto.COMPUTE]]
    assert sum(ops) == ledger("gpt2").flops.total


# ---- a memory snapshot

VIEWER_READS = set(  # the opcodes in torch/utils/viz/MemoryViz.js, unpickle(), at torch 2.13
    "APPEND APPENDS BINGET BININT BININT1 BININT2 EMPTY_DICT EMPTY_LIST FRAME LONG1 LONG_BINGET MARK MEMOIZE PROTO "
    "SETITEMS SHORT_BINUNICODE STOP TUPLE2 NEWFALSE BINPUT BINUNICODE EMPTY_TUPLE NEWTRUE NONE BINFLOAT TUPLE TUPLE1 "
    "TUPLE3 LONG_BINPUT LIST DICT SETITEM".split()
)


def replayed(trace):
    """The most bytes alive, and those alive at the end, as the viewer adds them up."""
    live, most = {}, 0
    for e in trace:
        if e["action"] == "alloc":
            assert e["addr"] not in live
            live[e["addr"]] = e["size"]
        elif e["action"] == "free_completed":
            assert live.pop(e["addr"]) == e["size"]
        most = max(most, sum(live.values()) if e["action"] == "alloc" else 0)
    return most, live


@pytest.mark.parametrize("name", ["gpt2", "cruncher", "resnet50"])
def test_a_snapshot_replays_to_the_peak_and_holds_what_the_allocator_holds(name):
    step, memory = ledger(name), ledger(name).memory
    found = pickle.loads(snapshot.dumps(step, priced(name)))
    (trace,) = found["device_traces"]
    most, live = replayed(trace)
    assert most == memory.peak_bytes
    assert sum(live.values()) == sum(memory.between_steps.values())
    assert sum(s["total_size"] for s in found["segments"]) == memory.reserved_bytes
    assert {e["category"] for e in trace if "category" in e} - {"unknown"} <= set(memory.at_peak)
    assert trace[-1]["category"] == "unknown"  # without one the viewer stops
    times = [e["time_us"] for e in trace]
    assert times == sorted(times)


@pytest.mark.parametrize("name", ["gpt2", "llama3-70b"])
def test_blocks_fill_their_segments_and_lie_inside_them(name):
    found = snapshot.snapshot(ledger(name))
    segments = sorted((s["address"], s["total_size"]) for s in found["segments"])
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(segments))
    for s in found["segments"]:
        at = s["address"]
        for block in s["blocks"]:
            assert block["address"] == at
            at += block["size"]
        assert at == s["address"] + s["total_size"]
    active = {b["address"]: b["requested_size"] for s in found["segments"] for b in s["blocks"]
              if b["state"] == "active_allocated"}  # fmt: skip
    assert active == replayed(found["device_traces"][0])[1]


@pytest.mark.parametrize("name", ["gpt2", "llama3-70b"])
def test_a_snapshot_is_in_the_opcodes_that_the_viewer_reads(name):
    used = {opcode.name for opcode, _, _ in pickletools.genops(snapshot.dumps(ledger(name)))}
    assert used <= VIEWER_READS
    assert {"GLOBAL", "STACK_GLOBAL", "REDUCE"} & used == set()  # plain data: nothing in it can run


def test_a_float_array_would_not_be():
    used = {opcode.name for opcode, _, _ in pickletools.genops(pickle.dumps({"x": {1, 2}}, protocol=4))}
    assert not used <= VIEWER_READS


def test_torch_s_own_readers_take_it():
    found = snapshot.snapshot(ledger("gpt2"), priced("gpt2"))
    assert "total_reserved: " in torch_viz.segsum(found)
    assert f"{len(found['device_traces'][0])} entries" in torch_viz.trace(found)
    assert "MemoryViz.js" in torch_viz.trace_plot(found)


def test_addresses_are_those_of_the_best_fit():
    mib = 2**20
    events = [(0, 4 * mib), (1, 6 * mib), (2, 5 * mib), (1, -6 * mib), (3, 5 * mib), (3, -5 * mib), (9, -1)]
    placed = allocator.placements(*np.array(events).T)
    begins = placed[0].address
    assert [(p.address - begins) // mib for p in placed] == [0, 4, 10, 4, 15, 15]  # 5 MiB left in the segment fit best
    assert [p.segment for p in placed if p.segment] == [(begins, 20 * mib)]


# ---- CSV, Markdown, plots


@pytest.mark.parametrize("name", ["gpt2", "cruncher"])
def test_a_csv_s_columns_add_up_to_the_step(name):
    step = ledger(name)
    rows = list(csv.DictReader(io.StringIO(export.table(step))))
    assert len(rows) == len(step)
    assert sum(int(r["flops"]) + int(r["recompute_flops"]) for r in rows) == step.flops.total
    assert sum(int(r["read_bytes"]) + int(r["written_bytes"]) for r in rows) == sum(step.bytes_moved.values())


def test_an_op_without_a_rule_has_no_flops_in_a_csv():
    step = ledger("cruncher")
    odd = step.__class__([r._replace(kind="uncounted") for r in step.rows], step.storages, step.events)
    assert {r["flops"] for r in csv.DictReader(io.StringIO(export.table(odd)))} == {""}


def test_no_cell_is_a_formula_and_no_name_is_obeyed(nasty):  # noqa: F811
    source = export.table(nasty)
    assert not set(source) & set("\x1b\u202e")
    cells = [c for row in csv.reader(io.StringIO(source)) for c in row]
    assert not [c for c in cells if c[:1] in ("=", "+", "-", "@", "\t", "\r")]
    assert "'=cmd|' /C calc'!A0.layer" in cells
    assert len({len(row) for row in csv.reader(io.StringIO(source))}) == 1


def columns(line):
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_markdown_s_tables_hold_their_columns_whatever_the_names(nasty):  # noqa: F811
    source = markdown(nasty, nasty.on("h100-sxm"))
    assert not re.search(r"<(?!br)", source)
    assert not set(source) & set("\x1b\u202e")
    for block in re.findall(r"(?:^\|.*\n)+", source, re.MULTILINE):
        assert len({columns(line) for line in block.splitlines()}) == 1
    assert f"{nasty.memory.peak_bytes:,} bytes" in source


def test_other_outputs_carry_such_names_as_data(nasty):  # noqa: F811
    trace = json.dumps(perfetto.trace(nasty, nasty.on("h100-sxm")), ensure_ascii=False)
    blob = repr(pickle.loads(snapshot.dumps(nasty)))
    for source in (trace, blob):
        assert not set(source) & set("\x1b\u202e")
        assert "two\\\\x0alines" in source
        assert "<img src=x onerror=alert(1)>" in source
    assert len(WORSE) == 9


def test_an_svg_is_well_formed_and_shows_the_peak():
    drawn = ET.fromstring(plot.svg(ledger("gpt2"), priced("gpt2")))
    words = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "peak 9.44 GB" in words
    assert {"parameters", "activations", "optimizer state"} <= set(words)


def test_every_form_is_written_by_its_suffix(tmp_path):
    for form, (suffixes, _) in export.FORMS.items():
        for suffix in suffixes:
            ledger("cruncher").export(tmp_path / f"step{suffix}", on="h100-sxm")
            assert (tmp_path / f"step{suffix}").stat().st_size > 200, form
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_is_refused_with_what_can(tmp_path, capsys):
    with pytest.raises(BadInput, match=r"known: \.html \(html\), \.json \(perfetto\)"):
        ledger("cruncher").export(tmp_path / "step.docx")
    with pytest.raises(UnknownName, match="did you mean html"):
        ledger("cruncher").export(tmp_path / "x", form="htm")
    with pytest.raises(BadInput, match="there is no folder"):
        ledger("cruncher").export(tmp_path / "no" / "step.html")
    with pytest.raises(BadInput, match="is a folder"):
        ledger("cruncher").export(tmp_path, form="html")
    code, out, err = ask(capsys, "step", "no-such-model", "--plot", "x.gif")
    assert (code, out) == (2, "")
    assert ".svg or .png" in err  # said before anything is traced, so the model's name is not even looked at


def test_the_command_writes_all_that_it_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"html": "r.html", "perfetto": "t.json", "parquet": "o.parquet", "csv": "o.csv", "markdown": "r.md",
             "snapshot": "m.pickle", "plot": "m.svg"}  # fmt: skip
    flags = [word for form, name in files.items() for word in (f"--{form}", name)]
    code, out, _ = ask(capsys, "step", "cruncher", "--on", "h100-sxm", "--json", *flags)
    assert code == 0
    peak = json.loads(out)["memory"]["peak_bytes"]
    assert set(files) == set(export.FORMS)
    assert {p.name for p in tmp_path.iterdir()} == set(files.values())
    events = json.loads(Path("t.json").read_text(encoding="utf-8"))["traceEvents"]
    assert max(sum(e["args"].values()) for e in events if e["ph"] == "C") == peak
    assert f'data-peak-bytes="{peak}"' in Path("r.html").read_text(encoding="utf-8")
