"""The report and the notebook's view: what they show is what the ledger says, and nothing in a name is obeyed."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bursar
from bursar.hardware import cluster
from bursar.ledger import Ledger
from bursar.memory import CLASSES
from bursar.modules import shares
from bursar.plan import model, search
from bursar.reconcile import Expected, Measured, reconcile
from bursar.report import figures, plot
from bursar.report.html import markup, notebook, page, plots
from bursar.report.html.markup import Markup, asset, document, tag, text
from command import ask
from test_names import MODEL, NASTY

VOID = {"meta", "input", "br", "hr", "link", "wbr"}
WORSE = [*NASTY, "=cmd|' /C calc'!A0", "</script><script>alert(1)</script>", "\" onload='alert(1)", "</title><b>"]
ASKED = {"gpt2": {"precision": "bf16-mixed", "on": "h100-sxm"}, "cruncher": {}, "resnet50": {"on": "h100-sxm"},
         "llama3-70b": {"batch_size": 1, "seq_len": 8192, "precision": "bf16", "on": "h100-sxm"}}  # fmt: skip


@functools.cache
def ledger(name: str) -> Ledger:
    return bursar.step(name, **ASKED[name])


@functools.cache
def report(name: str) -> str:
    step, on = ledger(name), ASKED[name].get("on")
    return page.render(step, step.on(on) if on else None, command=f"bursar step {name}")


class Elements(HTMLParser):
    """The elements of a page, their text and attributes; raises where one closes that is not open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        assert len(dict(attributes)) == len(attributes)
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    def shapes(self) -> set[tuple[str, frozenset[str]]]:
        return {(name, frozenset(attributes)) for name, attributes in self.found}

    def attribute(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.found if name in attributes]


# ---- what it says


@pytest.mark.parametrize("name", ASKED)
def test_the_peak_on_the_page_is_the_ledger_s_to_the_byte(name):
    assert Elements(report(name)).attribute("data-peak-bytes") == [str(ledger(name).memory.peak_bytes)]
    assert f"{ledger(name).memory.peak_bytes:,} bytes" in report(name)


def test_the_command_s_page_and_its_json_say_the_same(tmp_path, capsys):
    html = tmp_path / "report.html"
    code, out, _ = ask(capsys, "step", "cruncher", "--on", "h100-sxm", "--json", "--html", str(html))
    assert code == 0
    said, found = json.loads(out), Elements(html.read_text(encoding="utf-8"))
    assert found.attribute("data-peak-bytes") == [str(said["memory"]["peak_bytes"])]
    assert found.attribute("data-model-flops") == [str(said["flops"]["model"])] == ["368"]
    assert float(found.attribute("data-seconds")[0]) == said["time"]["seconds"]
    assert float(found.attribute("data-mfu")[0]) == said["time"]["mfu"]
    assert "bursar step cruncher --on h100-sxm" in found.text["code"]


def test_llama_3_70b_takes_less_than_a_megabyte():
    assert len(ledger("llama3-70b").recorded) > 5000
    assert len(report("llama3-70b").encode()) < 10**6


def test_a_model_of_thousands_of_unlike_modules_does_too():
    made = ledger("cruncher")
    row = made.recorded[0]
    rows = [row._replace(module=f"m{i}.n{'x' * (i % 50)}.{i}.{i % 7}") for i in range(6000)]
    work = [row.work.__class__(row.work.flops + i, row.work.read_bytes, 8) for i in range(6000)]
    many = Ledger([r._replace(work=w) for r, w in zip(rows, work, strict=True)], made.storages, [], model=made.model)
    source = page.render(many, many.on("h100-sxm"))
    assert len(source.encode()) < 10**6
    assert "more</th>" in source  # what was left out is said


def test_every_section_is_there_once():
    ids = Elements(report("gpt2")).attribute("id")
    assert {"memory", "where", "time", "modules", "kinds", "assumptions"} <= set(ids)
    assert len(ids) == len(set(ids))
    assert "uncounted" not in ids


def test_an_uncounted_op_is_named_and_totals_say_at_least():
    step = ledger("cruncher")
    rows = [r._replace(kind="uncounted", op="my.<op>") if r.op == "aten.mm" else r for r in step.rows]
    source = page.render(dataclasses.replace(step, rows=rows))
    assert 'id="uncounted"' in source
    assert '<th scope="row">my.&lt;op&gt;</th>' in source
    assert "at least " in source
    assert "at least " not in report("cruncher")


def test_a_page_without_a_device_has_no_time():
    assert "data-seconds" not in report("cruncher")
    assert 'id="time"' not in report("cruncher")


def test_a_measured_step_has_both_books(tmp_path, capsys):
    html = tmp_path / "report.html"
    code, out, _ = ask(capsys, "step", "cruncher", "--measure", "--json", "--html", str(html))
    source, said = html.read_text(encoding="utf-8"), json.loads(out)
    assert (code, said["balances"]) == (0, True)
    assert 'id="measured"' in source
    assert source.count("✓ balances") == len(said["lines"]) == 3


def test_books_that_could_not_be_judged_say_so_and_forecast_seconds_stand_beside_the_measured():
    step = ledger("cruncher")
    spans = (2e-5,) * len(step)
    measured = Measured(
        "cpu", "a <machine>", 368, 368, step.memory.peak_bytes, (1e-3, 2e-3, 3e-3), 1e-3, spans, spans=spans
    )
    found = reconcile(step, measured, Expected(1e-3, (1e-5,) * len(step)))
    lines = tuple(dataclasses.replace(x, judged=False) if x.unit == "s" else x for x in found.lines)
    source = page.render(step, measured=measured, found=dataclasses.replace(found, lines=lines))
    assert 'id="beside-kind"' in source
    assert "not judged" in source
    assert source.count("✓ balances") == 3
    assert "a &lt;machine&gt;" in source
    assert "✗" in page.render(step, measured=measured, found=found)  # 1 ms was forecast, 2 ms were measured


# ---- what pictures are made of


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("columns", [7, 360])
@pytest.mark.parametrize("timed", [False, True])
def test_a_thinned_timeline_keeps_the_peak_and_shows_real_moments(name, columns, timed):
    step, memory = ledger(name), ledger(name).memory
    seconds = figures.row_seconds(step, step.on("h100-sxm")) if timed else None
    course = figures.course(step, seconds, columns)
    live = np.stack([memory.timeline[c] for c in CLASSES], axis=1)
    real = {tuple(m) for m in live.tolist()} | {tuple(memory.base[c] for c in CLASSES)}
    assert len(course.moments) == columns + 1
    assert all(m.live in real for m in course.moments)
    assert course.peak_bytes == memory.peak_bytes
    assert dict(zip(CLASSES, course.moments[course.peak].live, strict=True)) == memory.at_peak


def test_every_nth_moment_would_miss_the_peak():
    memory = ledger("gpt2").memory
    total = sum(memory.timeline[c] for c in CLASSES)
    assert total[:: len(total) // 360].max() < memory.peak_bytes


def test_phases_follow_each_other_from_one_end_to_the_other():
    phases = figures.course(ledger("gpt2"), None, 360).phases
    assert [p for p, _, _ in phases] == ["forward", "backward", "optimizer"]
    assert (phases[0][1], phases[-1][2]) == (0.0, 1.0)
    assert all(a[2] == b[1] for a, b in itertools.pairwise(phases))


@pytest.mark.parametrize("name", ASKED)
def test_groups_add_up_to_the_step(name):
    step = ledger(name)
    priced = step.on("h100-sxm")
    ops, kinds = figures.merged(step, priced), figures.kinds(figures.merged(step, priced))
    assert sum(o.calls for o in ops) == sum(k.calls for k in kinds) == len(step)
    assert sum(o.flops for o in ops) == step.flops.total
    assert sum(k.moved_bytes for k in kinds) == sum(step.bytes_moved.values())
    assert math.isclose(sum(o.roofline_seconds for o in ops), priced.roofline_seconds, rel_tol=1e-9)
    assert sum(h.n_bytes for h in figures.held(step)) == step.memory.peak_bytes
    found = shares(step, priced.cluster.accelerator)
    assert sum(c.value for c in figures.cells(found, "flops")) == step.flops.total
    assert sum(c.value for c in figures.cells(found, "bytes_at_peak")) == step.memory.peak_bytes
    assert math.isclose(math.fsum(figures.row_seconds(step, priced)), priced.seconds, rel_tol=1e-9)


def test_what_stands_at_the_peak_is_the_classes_at_the_peak():
    by_class = dict.fromkeys(CLASSES, 0)
    for h in figures.held(ledger("gpt2")):
        by_class[h.memory_class] += h.n_bytes
    assert by_class == ledger("gpt2").memory.at_peak


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.floats(10, 1000), st.floats(10, 1000))
def test_a_treemap_s_areas_are_its_values(values, width, height):
    values.sort(reverse=True)
    boxes = plots.squarify(values, plots.Box(0, 0, width, height))
    whole = math.fsum(values)
    for value, box in zip(values, boxes, strict=True):
        assert box.width * box.height == pytest.approx(width * height * value / whole, rel=1e-6, abs=1e-6)
        assert -1e-6 <= box.x <= box.x + box.width <= width * (1 + 1e-9) + 1e-6
        assert -1e-6 <= box.y <= box.y + box.height <= height * (1 + 1e-9) + 1e-6


def test_few_cells_hold_what_many_held():
    cells = [figures.Cell(f"g{i % 30}", f"n{i}", 1, float(i + 1)) for i in range(500)]
    groups = {}
    for c in cells:
        groups.setdefault(c.group, []).append(c)
    few = plots._fewer(sorted(groups.items()), 60)
    assert sum(len(inside) for _, inside in few) <= 60 + len(groups) + 1
    assert sum(c.value for _, inside in few for c in inside) == sum(c.value for c in cells) == 500 * 501 / 2
    assert sum(c.copies for _, inside in few for c in inside) == 500


def test_a_point_on_the_roofline_stands_where_its_bounds_put_it():
    o = figures.Ops("aten.mm", "matmul", "forward", "bf16", "m", 1, 2_000_000, 1000, 4.0, 1.0)
    assert (o.intensity, o.bound, o.roofline_seconds) == (2000.0, "compute", 4.0)
    drawn = ET.fromstring(plots.roofline([o], "r", {"bf16": 5e5}, 1e3, width=700, height=300))
    circle = drawn.find("{*}circle")
    roof = re.findall(r"[\d.]+", drawn.find("{*}path").get("d"))
    assert circle.get("cy") == roof[3]  # 2e6 FLOP in 4 s is the peak, 5e5 FLOP/s: it lies on the flat roof
    assert float(circle.get("cx")) > float(roof[2])  # right of the ridge, 500 FLOP/B


def test_ops_forecast_by_themselves_stand_below_the_roof_and_keep_their_seconds():
    step = ledger("cruncher")
    plain = step.on("h100-sxm")
    rows = tuple(2.0 * s for s in figures.row_seconds(step, plain))
    calibrated = dataclasses.replace(plain, row_seconds=rows, seconds=math.fsum(rows), basis="calibrated")
    assert figures.row_seconds(step, calibrated) == list(rows)
    ops = figures.merged(step, calibrated)
    assert math.fsum(o.forecast_seconds for o in ops) == pytest.approx(math.fsum(rows))
    assert all(o.seconds == o.forecast_seconds > o.roofline_seconds for o in ops)
    assert "forecast time" in page.render(step, calibrated)
    assert "forecast time" not in page.render(step, plain).replace("by forecast time", "")


# ---- how it looks to those who see other colours

SEEN = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(colour):
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def oklab(rgb):
    """Ottosson 2020: distances in it are about those that people see."""
    lms = [math.cbrt(sum(a * b for a, b in zip(row, rgb, strict=True))) for row in (
        (0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566),
        (0.0883024619, 0.2817188376, 0.6299787005))]  # fmt: skip
    return [sum(a * b for a, b in zip(row, lms, strict=True)) for row in (
        (0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099),
        (0.0259040371, 0.7827717662, -0.8086757660))]  # fmt: skip


def apart(a, b, sight):
    seen = ([min(1, max(0, sum(m * c for m, c in zip(row, linear(x), strict=True)))) for row in SEEN[sight]]
            for x in (a, b))  # fmt: skip
    return math.dist(*map(oklab, seen))


def contrast(a, b):
    """WCAG 2.2's ratio."""
    low, high = sorted(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(x), strict=True)) for x in (a, b))
    return (high + 0.05) / (low + 0.05)


def palette(scheme):
    light, _, rest = asset("style.css").partition("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    return found if scheme == "light" else {**found, **dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", rest))}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("sight", SEEN)
def test_the_classes_colours_stay_apart_in_every_sight(scheme, sight):
    colours = palette(scheme)
    for a, b in itertools.combinations(CLASSES, 2):
        assert apart(colours[a], colours[b], sight) > 0.08, (a, b)


def test_red_and_green_of_one_lightness_would_be_found():
    assert apart("#c83232", "#3f8f3f", "all") > 0.2 > 0.08 > apart("#b05a3c", "#7f7f3c", "no green")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(scheme):
    colours = palette(scheme)
    pairs = [("ink", "page"), ("soft", "page"), ("accent", "page"), ("good", "page"), ("bad", "page"), ("ink", "panel")]
    pairs += [(ink, cell) for ink in ("cell-ink", "cell-soft") for cell in ("cell", "cell-optimizer", "cell-outside")]
    for a, b in pairs:
        assert contrast(colours[a], colours[b]) >= 4.5, (a, b)


# ---- what it may not do


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    return _named(tmp_path_factory.mktemp("nasty"), WORSE)


def _named(folder, names):
    (folder / "named.py").write_text(MODEL.format(nasty=names, makes=""))
    step = bursar.step(f"{folder}/named.py:make", on="h100-sxm")
    assert {r.module.removesuffix(".layer") for r in step.recorded} >= set(names)
    return dataclasses.replace(step, model=dataclasses.replace(step.model, name=" ".join(names)))


def pages(step):
    priced = step.on("h100-sxm")
    return {
        "report": page.render(step, priced, command="bursar step '<b>'", gradients=True),
        "notebook": step._repr_html_(),
        "forecast": priced._repr_html_(),
        "table": notebook.show("</caption><b>", [r.module for r in step.recorded], [[r.module] for r in step.recorded]),
        "svg": plot.svg(step, priced),
    }


def test_names_make_no_element_and_no_attribute(nasty, tmp_path):
    plain = pages(_named(tmp_path, [f"plain{i}" for i in range(len(WORSE))]))
    for which, source in pages(nasty).items():
        found = Elements(source)
        assert found.shapes() <= Elements(plain[which]).shapes() | {
            ("title", frozenset()),
            ("text", frozenset("xy")),
        }, which
        assert not [name for _, attributes in found.found for name in attributes if name.startswith("on")]
        assert not any(c in source for c in "\x1b\u202e\x00")
    assert "&lt;img src=x onerror=alert(1)&gt;" in pages(nasty)["report"]


def test_markup_that_is_not_escaped_would_be_found(nasty, monkeypatch):
    monkeypatch.setattr(markup.html, "escape", lambda value, quote: value)
    with pytest.raises(AssertionError):
        assert not [n for n, _ in Elements(page.render(nasty, None)).found if n in ("img", "bold", "b")]


def test_data_for_the_script_ends_no_element(nasty):
    source = page.render(nasty, nasty.on("h100-sxm"))
    said = re.search(r'<script type="application/json" id="timeline-said">(.*?)</script>', source, re.DOTALL)[1]
    assert not set("<>&") & set(said)
    assert any("</script><script>alert(1)</script>" in moment for moment in json.loads(said))
    with pytest.raises(ValueError, match="not JSON compliant"):
        markup.data(math.nan, "x")


def test_the_policy_allows_this_style_and_this_script_and_nothing_else():
    source = report("cruncher")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', source)[1].replace("&#x27;", "'")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for name, opened in (("style-src", "<style>"), ("script-src", "<script>")):
        inside = source.split(opened)[1].split(opened.replace("<", "</"))[0]
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    assert (rules["default-src"], rules["base-uri"], rules["form-action"]) == ("'none'",) * 3
    assert "unsafe" not in policy
    assert not Elements(source).attribute("style")


@pytest.mark.parametrize("name", ASKED)
def test_nothing_is_fetched(name):
    found = Elements(report(name))
    assert {target[0] for target in found.attribute("href")} == {"#"}
    assert not found.attribute("src")
    assert set(re.findall(r"\w+://[\w.]+", report(name))) == {"http://www.w3.org"}  # the namespace of SVG


def test_what_is_markup_stays_and_what_is_not_is_escaped():
    assert text(Markup("<b>")) == "<b>"
    assert tag("p", "a < b", None, title='"') == '<p title="&quot;">a &lt; b</p>'
    assert "<title>&lt;i&gt;</title>" in document("<i>", [])


# ---- for a notebook


@pytest.mark.parametrize("name", ASKED)
def test_a_notebook_s_view_is_small_and_says_the_peak(name):
    source = ledger(name)._repr_html_()
    assert len(source.encode()) < 60_000
    assert Elements(source).attribute("data-peak-bytes") == [str(ledger(name).memory.peak_bytes)]


def test_a_notebook_s_styles_reach_nothing_outside():
    style = re.search(r"<style>(.*?)</style>", ledger("cruncher")._repr_html_(), re.DOTALL)[1]
    style = re.sub(r"@media[^{]*\{((?:[^{}]*\{[^{}]*\})*)[^{}]*\}", r"\1", style)
    for selectors in re.findall(r"([^{}]+)\{", style):
        assert all(".bursar" in one for one in re.sub(r"\([^)]*\)", "", selectors).split(","))


def test_a_forecast_s_view_adds_up():
    priced = ledger("gpt2").on("h100-sxm")
    assert "NVIDIA H100" in priced._repr_html_()
    assert "fits" in priced._repr_html_()


def test_an_empty_ledger_has_a_view_and_a_page():
    assert "0 B" in Ledger([], [], [])._repr_html_()
    assert 'data-peak-bytes="0"' in page.render(Ledger([], [], []))
    assert repr(Ledger([], [], [])) == "<Ledger of a step: 0 ops, 0 FLOP, peak 0 B>"


def test_a_ledger_s_repr_is_a_line():
    assert repr(ledger("gpt2")) == "<Ledger gpt2: 644 ops, 6.54 TFLOP, peak 9.44 GB>"


def test_a_plan_has_a_view_whether_or_not_there_is_one():
    question = search.Question(model.read("gpt2")[0], seq_len=1024, batch=512)
    plan = search.search(question, [cluster("8xh100-sxm")], top=3)
    found = Elements(plan._repr_html_())
    assert len([n for n, _ in found.found if n == "tr"]) == 1 + 3
    none = dataclasses.replace(plan, layouts=(), nearest="<b>", rejected={"</td>memory": 3})
    assert {n for n, _ in Elements(none._repr_html_()).found} <= {n for n, _ in found.found}


def test_names_as_long_as_anyone_likes_do_not_make_a_page_long():
    step = ledger("cruncher")
    rows = [r._replace(module="x" * 20_000 + ".layer") for r in step.rows]
    assert len(page.render(dataclasses.replace(step, rows=rows), None).encode()) < 300_000


def test_a_view_loads_no_polars():
    import subprocess
    import sys

    script = ("from bursar.ledger import Ledger\nimport sys\nLedger([], [], [])._repr_html_()\n"
              "assert not {'polars', 'torch', 'jinja2', 'matplotlib'} & set(sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
