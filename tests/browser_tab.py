"""A tab of a browser with the page of `longscan serve`."""

from __future__ import annotations

import shutil
import time
from typing import Any

__all__ = ["CHROMIUM", "FLAGS", "READY", "VIEWS", "Tab"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
# the views, and what shows that each is complete
READY = {
    "chat": ".note:not(:empty)",
    "inside": ".square canvas",
    "memory": ".facts dd",
    "hippo": ".bars rect",
    "line": ".arcs path",
}
VIEWS = tuple(READY)
WAIT = 20.0  # seconds


class Tab:
    """A tab with the page, which notes what must not happen.

    Args:
        browser: of Playwright.
        port: of the server.
        settings: of the browser's context.

    Attributes:
        page: Playwright's.
        faults: errors and warnings in the console, dialogs, and requests to others.
    """

    def __init__(self, browser: Any, port: int, **settings: Any) -> None:
        self.origin = f"http://127.0.0.1:{port}/"
        self.faults: list[str] = []
        options = {"viewport": {"width": 1100, "height": 800}, "locale": "en-US", **settings}
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(1000 * WAIT)
        self.page = self.context.new_page()
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.faults.append("dialog"), dialog.dismiss()))
        self.context.route("**/*", self._local)
        self.page.goto(self.origin)

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"{message.type}: {message.text}")

    def _local(self, route: Any) -> None:
        if route.request.url.startswith((self.origin, "blob:" + self.origin)):
            route.continue_()
        else:
            self.faults.append(f"request: {route.request.url}")
            route.abort()

    def view(self, name: str) -> None:
        """Show a view."""
        self.page.click(f"nav a[href='#{name}']")
        self.page.wait_for_selector(f"main.{name}")

    def ask(self, text: str) -> None:
        """Send a message, and wait for the whole answer."""
        n = self.page.locator(".turn").count()
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")
        self.page.wait_for_selector(f".turn:nth-child({n + 2})")
        self.page.wait_for_selector(".turn.running", state="detached")

    def until(self, script: str) -> None:
        """Wait until an expression is true; Playwright's own way needs what the page's policy forbids."""
        deadline = time.monotonic() + WAIT
        while not self.page.evaluate(script):
            assert time.monotonic() < deadline, script
            self.page.wait_for_timeout(20)

    def limit(self, n: int) -> None:
        """Bound the tokens of the answers to come."""
        script = "n => import('/page/settings.js').then(m => { m.settings.max_tokens = n; })"
        self.page.evaluate(script, n)

    def close(self) -> None:
        """Close the tab, in which nothing must have gone wrong."""
        self.context.close()
        assert not self.faults
