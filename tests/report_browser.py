"""A real headless Chromium for the tests of the report. Tests that use it are skipped where it, or Playwright, is not installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = os.environ.get("CCPO_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def needs_chromium() -> None:
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'ccpo[test]'")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium, or name it in CCPO_CHROMIUM")


@dataclass(slots=True)
class Heard:
    """What a page said and asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def open_page(browser: Any, url: str, **context: Any) -> tuple[Any, Heard]:
    """A new page at ``url``, drawn, and what is heard from it. ``context``: of Playwright, e.g. ``color_scheme``."""
    heard = Heard()
    page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | context))
    page.on("pageerror", lambda error: heard.errors.append(str(error)))
    page.on("console", lambda m: heard.errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("request", lambda request: heard.requests.append(request.url))
    page.on("dialog", lambda dialog: (heard.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(url)
    page.wait_for_selector("#overview h2")
    return page, heard


def violations(page: Any) -> list[str]:
    """What axe-core calls serious or critical, as rule and the first element."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v["impact"] in ("serious", "critical")]


def wait_for_count(locator: Any, count: int) -> None:
    """Wait until so many are there: what hangs on sizes and on opened details is drawn a moment later."""
    from playwright.sync_api import expect

    expect(locator).to_have_count(count)
