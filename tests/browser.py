"""A real browser for tests: Debian's Chromium driven by Playwright, and axe-core to judge what it shows.

Chromium comes with ``apt-get install chromium`` (``make browser``), axe-core from the npm registry on first use, into a
cache that git ignores; where one is missing the tests that need it are skipped and say so.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

AXE = "4.14.1"
CACHE = Path(__file__).parent.parent / ".axe"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# no sandbox, for root has none; the rest keep Chromium from asking its maker for anything
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-default-apps --disable-extensions --font-render-hinting=none"
).split()


@dataclass
class Seen:
    """A page that is open, what it asked for and what it complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A running browser. Skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: make browser, or apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'bursar[test]'")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(
    browser: Any, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light", javascript: bool = True,
    judged: bool = False
) -> Iterator[Seen]:  # fmt: skip
    """``url`` in a fresh profile, listened to from the start. ``judged`` lets axe-core in past the content policy."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme,
                                  java_script_enabled=javascript, bypass_csp=judged,
                                  reduced_motion="reduce")  # fmt: skip
    try:
        page = context.new_page()
        seen = Seen(page)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("console", lambda message: seen.problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: seen.problems.append(f"error: {error}"))
        page.goto(url)
        yield seen
    finally:
        context.close()


def axe_source() -> str:
    """axe-core's script, fetched once. Skips the test where it cannot be had."""
    at = CACHE / f"axe-{AXE}.min.js"
    if not at.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"no npm here to fetch axe-core {AXE} with")
        with tempfile.TemporaryDirectory() as folder:
            command = [npm, "pack", f"axe-core@{AXE}", "--silent"]
            got = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
            packed = list(Path(folder).glob("*.tgz"))
            if not packed:
                pytest.skip(f"npm cannot fetch axe-core {AXE}: {got.stderr.strip()[-200:] or got.returncode}")
            with tarfile.open(packed[0]) as tar:
                inside = tar.extractfile("package/axe.min.js")
                assert inside is not None
                script = inside.read()
        CACHE.mkdir(exist_ok=True)
        at.write_bytes(script)
    return at.read_text(encoding="utf-8")


def violations(page: Any, least: tuple[str, ...] = ("serious", "critical")) -> list[str]:
    """What axe-core finds wrong by WCAG 2.2 A and AA and its best practices: rule, how bad, where."""
    page.evaluate(axe_source())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{v['id']} ({v['impact']}): {v['help']}: {v['nodes'][0]['html'][:160]}"
        for v in found["violations"]
        if v["impact"] in least
    ]
