"""The page's playground for HiPPO, and its line of models."""

from __future__ import annotations

import re
from typing import Any

import torch

from browser_tab import Tab
from longscan.models import MODELS
from longscan.models.common.hippo_measures import MEASURES
from longscan.models.hippo_memory import Memory
from longscan.serve.service import Service

# HiPPO


SAMPLES = [
    0.6 * torch.sin(torch.arange(n) * 0.11) + 0.4 * ((torch.arange(n) * 7919) % 13 / 13 - 0.5)
    for n in (1, 50, 300)
]


def test_the_playground_agrees_with_the_library(tab: Tab) -> None:
    """Coefficients and reconstructions of every measure, for several N and windows."""
    names = tab.page.evaluate("import('/page/hippo.js').then(m => Object.keys(m.MEASURES))")
    assert set(names) == set(MEASURES)
    script = """cases => import('/page/hippo.js').then(m => cases.map(([f, n, measure, window]) => {
      const memory = m.compress(f, n, measure, window);
      return [Array.from(memory.c), m.reconstruct(memory), memory.oldest];
    }))"""
    cases = [
        (f, n, measure, window)
        for f in SAMPLES
        for measure in MEASURES
        for n in (2, 16, 64)
        for window in ((len(f),) if measure == "legs" else (max(2.0, len(f)), max(2.0, 0.3 * len(f))))
    ]
    found = tab.page.evaluate(script, [(f.tolist(), n, measure, window) for f, n, measure, window in cases])
    for (f, n, measure, window), (coefficients, fit, oldest) in zip(cases, found, strict=True):
        memory = Memory(n, measure, window=None if measure == "legs" else window)
        memory.write(f.double())
        expected = memory.reconstruct(torch.arange(memory.oldest, memory.length))[0]
        assert oldest == memory.oldest
        close = {"rtol": 1e-5, "atol": 1e-5, "msg": lambda text, case=(measure, n, window): f"{case}: {text}"}
        torch.testing.assert_close(torch.tensor(coefficients).double(), memory.coefficients[0], **close)
        torch.testing.assert_close(torch.tensor(fit).double(), expected, **close)


def test_a_signal_is_drawn_with_mouse_and_keyboard(tab: Tab) -> None:
    page = tab.page
    tab.view("hippo")

    def paths() -> list[str]:
        return [page.get_attribute(f".board .{name}", "d") for name in ("signal", "fit")]

    first = paths()
    box = page.locator(".board").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 60, steps=4)
    page.mouse.up()
    second = paths()
    assert second[0] != first[0]
    assert second[1] != first[1]
    page.focus(".board")
    for key in ("ArrowRight", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    assert paths()[0] != second[0]
    page.select_option("#measure", "legt")
    assert page.is_visible("#hippo-window")
    page.focus("#hippo-n")
    page.keyboard.press("Home")
    assert page.locator(".bars rect").count() == 2
    reading = page.inner_text("output.reading")
    assert re.match(r"2 coefficients for \d+ samples; root mean square error 0\.\d", reading)
    page.click("button:text-is('Blank')")
    assert "error 0" in page.inner_text("output.reading")


def test_nothing_moves_for_those_who_prefer_that(browser: Any, served: tuple[Service, int]) -> None:
    tab = Tab(browser, served[1], reduced_motion="reduce")
    tab.view("hippo")
    tab.page.click("button:text-is('Play')")
    assert tab.page.is_visible("button:text-is('Play')")  # one step, no animation
    assert tab.page.input_value("#hippo-seen") == "40"
    tab.close()


# the line


def test_the_line_shows_every_model_and_its_parents(tab: Tab) -> None:
    page = tab.page
    tab.view("line")
    page.wait_for_selector(".arcs path")
    assert page.locator(".model").count() == len(MODELS)
    assert page.locator(".arcs path").count() == sum(len(entry.parents) for entry in MODELS.values())
    hrefs = page.eval_on_selector_all(".paper a", "links => links.map(x => [x.href, x.rel])")
    papers = [entry.arxiv for entry in MODELS.values() if entry.arxiv]
    assert hrefs == [[f"https://arxiv.org/abs/{number}", "noopener noreferrer"] for number in papers]
    page.hover("#model-mamba2 h2")
    lit = set(page.eval_on_selector_all(".model.lit", "rows => rows.map(row => row.id)"))
    assert {f"model-{name}" for name in ("mamba", "s4", "hippo", "mamba2", "mamba3", "zamba2")} <= lit
    assert not {"model-vim", "model-resnet"} & lit
    page.click("#model-mamba2 .kin a:text-is('mamba')")
    assert page.evaluate("document.activeElement.textContent") == "mamba"
