"""The page of ``bursar ui`` in real Chromium: at a desk and on a phone, by day and by night, with and without scripts.

``BURSAR_SCREENSHOTS=docs/images`` has its pictures in the docs made anew.
"""

import io
import os
import re
from pathlib import Path

import pytest

from browser import chromium, opened, violations
from page_server import served

WIDTHS = {"desktop": 1280, "phone": 390}
SMALL = "/?model=gpt2&gpus=8&seq=1024&batch=524288&tokens=10B"
PAGES = {
    "one": SMALL,
    "two": SMALL + "&compare=1&b.gpu=a100-80g-sxm",
    "refused": "/?gpus=0",
    "nothing fits": "/?gpus=8",
    "levers": SMALL.replace("/?", "/levers?"),
}


@pytest.fixture(scope="module")
def page():
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_opens_asks_nobody_else_and_complains_of_nothing(browser, page, width, scheme):
    with opened(browser, page.url + SMALL, width=WIDTHS[width], scheme=scheme) as seen:
        assert seen.page.locator("h1").inner_text() == "gpt2 on 8 × NVIDIA H100 SXM5 80GB"
        seen.page.wait_for_load_state("networkidle")
        assert all(url.startswith(page.url + "/") for url in seen.requests)
        assert len(seen.requests) <= 6
        assert seen.problems == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") == WIDTHS[width]  # nothing hangs over
        paper = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") is (scheme == "light")


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("one", "desktop", "light"),
        ("one", "phone", "dark"),
        ("two", "desktop", "dark"),
        ("two", "phone", "light"),
        ("refused", "phone", "light"),
        ("nothing fits", "desktop", "dark"),
        ("levers", "phone", "dark"),
    ],
)
def test_axe_finds_nothing_serious(browser, page, name, width, scheme):
    with opened(browser, page.url + PAGES[name], width=WIDTHS[width], scheme=scheme, judged=True) as seen:
        for closed in seen.page.locator("details:not([hx-get])").all():
            closed.evaluate("element => { element.open = true }")
        assert violations(seen.page, ("serious", "critical", "moderate")) == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") == WIDTHS[width]
        heads = seen.page.locator("tbody th:visible").evaluate_all("cells => cells.map(cell => cell.clientWidth)")
        assert min(heads, default=99) >= 60  # no column is squeezed to a letter


def test_a_moved_slider_is_answered_in_place_and_the_address_follows(browser, page):
    with opened(browser, page.url + SMALL) as seen:
        seen.page.evaluate("window.stayed = true")
        before = seen.page.locator(".fig .value").first.inner_text()
        slider = seen.page.get_by_label("How many, slider")
        assert slider.get_attribute("aria-valuetext") == "8"
        slider.focus()
        seen.page.keyboard.press("ArrowRight")
        seen.page.get_by_role("heading", name="gpt2 on 16 ×").wait_for()
        assert seen.page.get_by_label("How many", exact=True).input_value() == "16"
        assert "gpus=16" in seen.page.url
        assert seen.page.title() == "gpt2 on 16 × NVIDIA H100 SXM5 80GB · bursar"
        assert seen.page.locator(".fig .value").first.inner_text() != before
        assert seen.page.evaluate("window.stayed")
        assert seen.problems == []
        shared = seen.page.url
    with opened(browser, shared, javascript=False) as seen:
        assert seen.page.locator("h1").inner_text() == "gpt2 on 16 × NVIDIA H100 SXM5 80GB"


def test_what_is_typed_wrong_is_said_marks_its_field_and_is_put_right(browser, page):
    with opened(browser, page.url + SMALL) as seen:
        field = seen.page.get_by_label("How many", exact=True)
        field.fill("none")
        said = seen.page.get_by_role("alert")
        said.wait_for()
        assert "cannot read 'none'" in said.inner_text()
        assert field.get_attribute("aria-invalid") == "true"
        field.fill("4")
        seen.page.get_by_role("heading", name="gpt2 on 4 ×").wait_for()
        assert field.get_attribute("aria-invalid") is None


def test_without_its_script_the_form_is_sent_and_the_page_says_the_same(browser, page):
    with opened(browser, page.url + SMALL, javascript=False) as seen:
        seen.page.get_by_label("How many", exact=True).fill("16")
        seen.page.get_by_role("button", name="Show").click()
        assert seen.page.locator("h1").inner_text() == "gpt2 on 16 × NVIDIA H100 SXM5 80GB"
        assert seen.page.locator("input[type=range]").count() == 0
        figures = seen.page.locator(".fig .value").all_inner_texts()
        seen.page.get_by_role("link", name="Link to this page").click()
        assert seen.page.locator(".fig .value").all_inner_texts() == figures
        seen.page.get_by_text("What each lever alone would do").click()
        seen.page.get_by_role("link", name="Work it out").click()
        assert seen.page.get_by_role("row", name=re.compile("^8bit-states")).is_visible()
        assert seen.problems == []


def test_why_is_told_by_keys_alone(browser, page):
    with opened(browser, page.url + SMALL) as seen:
        why = seen.page.locator("#a-mfu > summary")
        why.focus()
        seen.page.keyboard.press("Enter")
        told = seen.page.locator("#a-mfu")
        assert "model FLOPs of a step / (accelerators × dense peak × seconds of a step)" in told.inner_text()
        assert "989.4 TFLOP/s" in told.inner_text()
        assert told.get_by_text("published runs").or_(told.get_by_text("interval")).first.is_visible()


def test_levers_come_when_they_are_asked_for(browser, page):
    with opened(browser, page.url + SMALL) as seen:
        seen.page.wait_for_load_state("networkidle")
        assert not [url for url in seen.requests if "/levers" in url]
        seen.page.get_by_text("What each lever alone would do").click()
        seen.page.get_by_role("row", name=re.compile("^8bit-states")).wait_for()
        assert seen.problems == []


def test_a_second_set_up_is_as_the_first_until_it_is_changed(browser, page):
    with opened(browser, page.url + SMALL) as seen:
        seen.page.get_by_role("link", name="Compare with another").click()
        ratios = seen.page.locator(".versus tbody td:last-child")
        assert set(ratios.all_inner_texts()) == {"1 ×"}
        seen.page.get_by_label("How many, set-up B", exact=True).fill("16")
        seen.page.get_by_role("heading", name="gpt2 on 16 ×").first.wait_for()
        assert set(ratios.all_inner_texts()) != {"1 ×"}
        assert "b.gpus=16" in seen.page.url
        seen.page.get_by_role("link", name="Swap A and B").click()
        assert seen.page.get_by_label("How many", exact=True).input_value() == "16"
        seen.page.get_by_role("link", name="Leave out B").click()
        assert seen.page.locator("h1").inner_text() == "gpt2 on 16 × NVIDIA H100 SXM5 80GB"
        assert seen.problems == []


# ---- the pictures in the docs


@pytest.mark.skipif(
    "BURSAR_SCREENSHOTS" not in os.environ, reason="pictures are made when BURSAR_SCREENSHOTS says where"
)
def test_the_pictures_are_made(browser, page):
    from PIL import Image

    into = Path(os.environ["BURSAR_SCREENSHOTS"])
    into.mkdir(parents=True, exist_ok=True)
    for name, address, width, height, scheme in (
        ("ui-desktop-light", "/", 1280, 900, "light"), ("ui-desktop-dark", "/", 1280, 900, "dark"),
        ("ui-phone-light", "/", 390, 844, "light"), ("ui-phone-dark", "/", 390, 844, "dark"),
        ("ui-compare", "/?compare=1&b.gpu=b200&b.gpus=512", 1280, 900, "light"),
    ):  # fmt: skip
        with opened(browser, page.url + address, width=width, height=height, scheme=scheme) as seen:
            seen.page.wait_for_load_state("networkidle")
            shot = Image.open(io.BytesIO(seen.page.screenshot())).convert("RGB")
        shot.quantize(128).save(into / f"{name}.png", optimize=True)
        assert (into / f"{name}.png").stat().st_size < 150_000
