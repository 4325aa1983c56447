"""A server with the model that ships, and a browser, for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import longscan
from browser_tab import CHROMIUM, FLAGS, Tab
from live_server import serving
from longscan.serve.service import Service


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[Service, int]]:
    """A service and its port."""
    model, tokenizer = longscan.load("longscan-tiny-en")
    assert tokenizer is not None
    with serving(model, tokenizer, "longscan-tiny-en") as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium; where it is missing, its tests are skipped, except in .ci/run, which installs it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
    if CHROMIUM is None:
        pytest.skip("no Chromium (Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, served: tuple[Service, int]) -> Iterator[Tab]:
    """A tab in which nothing may go wrong."""
    tab = Tab(browser, served[1])
    yield tab
    tab.close()
