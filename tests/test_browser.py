"""The report in real Chromium: opened from disk, at a desk and on a phone, by day and by night, with keys and without
its script. ``BURSAR_SCREENSHOTS=docs/images`` has the pictures in the docs made anew.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest

from browser import chromium, opened, violations
from bursar.report.html import page as pages
from bursar.report.record import step_record
from test_html import WORSE, ledger, nasty  # noqa: F401  (a fixture)

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


def report_of(step, folder, name, **more):
    at = folder / f"{name}.html"
    if not at.exists():
        at.write_text(pages.render(step, step.on("h100-sxm"), **more), encoding="utf-8")
    return at.as_uri()


@pytest.fixture(scope="module")
def url(folder):
    return report_of(ledger("gpt2"), folder, "gpt2", command="bursar step gpt2 --precision bf16-mixed --on h100-sxm")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["gpt2", "llama3-70b"])
def test_the_report_opens_from_disk_asks_nobody_and_says_the_json_s_peak(browser, folder, name, width, scheme):
    step = ledger(name)
    url = report_of(step, folder, name, command="bursar step gpt2 --precision bf16-mixed --on h100-sxm")
    with opened(browser, url, width=WIDTHS[width], scheme=scheme) as seen:
        shown = seen.page.locator("[data-peak-bytes]")
        assert shown.count() == 1
        assert int(shown.get_attribute("data-peak-bytes")) == step_record(step).memory["peak_bytes"]
        assert shown.is_visible()
        seen.page.mouse.move(WIDTHS[width] / 2, 600)
        assert seen.requests == [url]
        assert seen.problems == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") == WIDTHS[width]  # nothing hangs over
        paper = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") is (scheme == "light")


def test_a_page_that_asks_would_be_noticed(browser, tmp_path):
    (tmp_path / "asks.html").write_text("<img src='other.png'><script>console.error('no')</script>", encoding="utf-8")
    with opened(browser, (tmp_path / "asks.html").as_uri()) as seen:
        assert len(seen.requests) == 2
        assert any("no" in problem for problem in seen.problems)


@pytest.mark.parametrize(("width", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_axe_finds_nothing_serious(browser, url, width, scheme):
    with opened(browser, url, width=WIDTHS[width], scheme=scheme, judged=True) as seen:
        assert violations(seen.page) == []
        assert violations(seen.page, ("moderate", "minor")) == []


def test_axe_would_find_a_nameless_button(browser, tmp_path):
    page = "<!DOCTYPE html><html lang=en><title>x</title><main><h1>x</h1><button></button></main></html>"
    (tmp_path / "bad.html").write_text(page, encoding="utf-8")
    with opened(browser, (tmp_path / "bad.html").as_uri(), judged=True) as seen:
        assert [v.split()[0] for v in violations(seen.page)] == ["button-name"]


def test_keys_walk_through_the_step_and_it_tells_module_and_op(browser, url):
    peak = ledger("gpt2").memory
    with opened(browser, url) as seen:
        walk, told = seen.page.locator("#timeline-walk"), seen.page.locator("#timeline output")
        assert "9.44 GB live" in told.inner_text()  # it begins at the peak
        assert ledger("gpt2").rows[peak.peak_row].op in told.inner_text()
        walk.focus()
        seen.page.keyboard.press("Home")
        assert told.inner_text().startswith("before the step: ")
        for _ in range(40):
            seen.page.keyboard.press("ArrowRight")
        assert re.search(r"forward, aten\.\w+ in h\.\d+\.", told.inner_text())
        assert walk.get_attribute("aria-valuetext") == told.inner_text()
        assert seen.problems == []


def test_the_pointer_tells_of_what_is_below_it(browser, url):
    with opened(browser, url) as seen:
        for figure, mark in (("map", "g.mark"), ("roofline", "circle.mark")):
            shown = seen.page.locator(f"#{figure} svg:visible {mark}")
            shown.nth(1).scroll_into_view_if_needed()
            box = shown.nth(1).bounding_box()
            seen.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            said = seen.page.locator(f"#{figure} output").inner_text()
            assert said == seen.page.locator(f"#{figure} svg:visible .mark.on title").text_content()
            assert seen.page.locator(f"#{figure} .on").count() == 1
        drawn = seen.page.locator("#timeline svg:visible")
        drawn.scroll_into_view_if_needed()
        box = drawn.bounding_box()
        seen.page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 100)
        assert "optimizer" in seen.page.locator("#timeline output").inner_text()


def test_tables_sort_and_search(browser, url):
    with opened(browser, url) as seen:
        table = seen.page.locator("#module-table")
        head = table.locator("thead th").nth(2)
        head.get_by_role("button").click()
        values = [float(v) for v in table.locator("tbody td:nth-child(3)").evaluate_all("c => c.map(x => x.dataset.v)")]
        assert values == sorted(values, reverse=True)
        assert head.get_attribute("aria-sort") == "descending"
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        table.locator("thead th").nth(0).get_by_role("button").click()
        assert (head.get_attribute("aria-sort"), table.locator("[aria-sort]").count()) == (None, 1)
        seen.page.get_by_label("Search modules").fill("MLP.c_fc")
        assert table.locator("tbody tr:visible").count() == 1
        assert seen.page.locator("[for=module-table-search]").last.inner_text().startswith("1 of ")


def test_areas_switch_without_the_script(browser, url):
    for javascript in (True, False):
        with opened(browser, url, javascript=javascript) as seen:
            assert seen.page.locator("#map svg:visible").get_attribute("id") == "map-roofline_seconds-wide"
            seen.page.get_by_role("radio", name="bytes at the peak").check()
            assert seen.page.locator("#map svg:visible").get_attribute("id") == "map-bytes_at_peak-wide"


def test_without_its_script_the_page_says_all_of_it_and_offers_no_control_that_does_nothing(browser, url):
    with opened(browser, url, javascript=False) as seen:
        assert seen.page.locator("[data-peak-bytes]").is_visible()
        assert seen.page.locator("svg.plot:visible").count() == 4
        assert seen.page.locator("#module-table tbody tr:visible").count() > 10
        assert seen.page.locator("input[type=search]:visible, input[type=range]:visible, thead button").count() == 0
        assert seen.problems == []


def test_nothing_in_a_name_runs(browser, folder, nasty):  # noqa: F811
    url = report_of(nasty, folder, "nasty", command=" ".join(WORSE))
    with opened(browser, url) as seen:
        seen.page.on("dialog", lambda dialog: seen.problems.append(dialog.message))
        for figure in ("timeline", "map", "roofline"):
            seen.page.locator(f"#{figure}-walk").focus()
            for _ in range(6):
                seen.page.keyboard.press("ArrowRight")
        assert (seen.requests, seen.problems) == ([url], [])
        assert seen.page.locator("img, iframe, object, form").count() == 0


def test_a_notebook_s_view_reads_by_day_and_by_night(browser, tmp_path):
    step = ledger("gpt2")
    views = step._repr_html_() + step.on("h100-sxm")._repr_html_()
    style = "<style>body { background: Canvas; color: CanvasText; color-scheme: light dark }</style>"
    source = f"<!DOCTYPE html><html lang=en><title>x</title>{style}<main><h1>x</h1>{views}</main></html>"
    (tmp_path / "cell.html").write_text(source, encoding="utf-8")
    for scheme in SCHEMES:
        with opened(browser, (tmp_path / "cell.html").as_uri(), scheme=scheme, judged=True) as seen:
            assert violations(seen.page) == []
            assert (len(seen.requests), seen.problems) == (1, [])


# ---- the pictures in the docs


@pytest.mark.skipif(
    "BURSAR_SCREENSHOTS" not in os.environ, reason="pictures are made when BURSAR_SCREENSHOTS says where"
)
def test_the_pictures_are_made(browser, url):
    from PIL import Image

    into = Path(os.environ["BURSAR_SCREENSHOTS"])
    into.mkdir(parents=True, exist_ok=True)
    for name, width, height, scheme, at in (
        ("report-desktop-light", 1280, 960, "light", None), ("report-desktop-dark", 1280, 960, "dark", None),
        ("report-phone-light", 390, 844, "light", None), ("report-phone-dark", 390, 844, "dark", None),
        ("report-where", 1280, 560, "light", "where"), ("report-roofline", 1280, 760, "light", "roofline"),
        ("report-modules", 1280, 620, "light", "modules"),
    ):  # fmt: skip
        with opened(browser, url, width=width, height=height, scheme=scheme) as seen:
            if at is not None:
                seen.page.evaluate("id => document.getElementById(id).scrollIntoView()", at)
            shot = Image.open(io.BytesIO(seen.page.screenshot())).convert("RGB")
        file = into / f"{name}.png"
        shot.save(file, optimize=True)
        assert file.stat().st_size < 150_000


def test_the_pictures_in_the_docs_are_small():
    for file in (Path(__file__).parent.parent / "docs" / "images").glob("*.png"):
        assert file.stat().st_size < 150_000, file.name
