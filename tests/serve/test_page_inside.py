"""Looking inside the model with the page, and its memory."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from browser_tab import Tab
from live_server import serving
from longscan.models import MODELS, LanguageModel
from longscan.serve.service import Service
from longscan.tokenizers.base import ByteTokenizer

# look inside


def drawn(page: Any, selector: str) -> dict[str, Any]:
    """The size of a canvas, its colours, and the pixels that are not drawn."""
    found: dict[str, Any] = page.eval_on_selector(
        selector,
        """canvas => {
          const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          const pixels = new Set();
          let empty = 0;
          for (let i = 0; i < data.length; i += 4) {
            if (data[i + 3] === 0) empty += 1;
            else pixels.add(data.slice(i, i + 3).join());
          }
          return { width: canvas.width, height: canvas.height, colours: pixels.size, empty };
        }""",
    )
    return found


def test_heat_maps_have_a_row_for_each_layer_and_a_column_for_each_token(
    tab: Tab, served: tuple[Service, int]
) -> None:
    page, text = tab.page, "The king is dead, and the queen is gone."
    n = len(served[0].tokenizer.encode(text))
    tab.view("inside")
    page.wait_for_selector(".square canvas")
    page.fill("#text", text)
    page.click("button:text-is('Inspect')")
    tab.until(f"document.querySelectorAll('.token').length === {n}")
    page.wait_for_selector(".square canvas")
    for map_ in (":nth-match(.wide canvas[role=img], 1)", ":nth-match(.wide canvas[role=img], 2)"):
        found = drawn(page, map_)
        assert (found["width"], found["height"], found["empty"]) == (n, 8, 0)
        assert found["colours"] > 20
        assert re.search(rf"8 × {n} values; the largest: layer \d", page.get_attribute(map_, "aria-label"))
    found = drawn(page, ".square canvas[role=img]")
    assert (found["width"], found["height"]) == (n, n)
    assert found["empty"] == n * (n - 1) // 2  # no token attends to later ones
    page.focus(".wide canvas[role=img]")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    assert "layer 1, token 3" in page.inner_text(".wide .reading >> nth=0")
    assert page.get_attribute(".token[aria-selected=true]", "data-index") == "2"
    page.click(".wide summary >> nth=0")
    page.wait_for_selector(".wide table")
    assert page.locator(".wide table >> nth=0").locator("tbody tr").count() == 8
    assert page.locator(".chart circle").count() == 8  # half-lives


def test_a_token_is_exchanged_and_the_text_goes_on_from_there(tab: Tab, served: tuple[Service, int]) -> None:
    page = tab.page
    tab.view("inside")
    page.wait_for_selector(".square canvas")
    page.focus(".token[aria-selected=true]")
    page.keyboard.press("Home")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.get_attribute(".token[aria-selected=true]", "data-index") == "4"
    before = page.locator(".token").all_inner_texts()
    shares = [float(text.split()[0]) for text in page.locator(".likely .percent").all_inner_texts()]
    assert shares[:10] == sorted(shares[:10], reverse=True)
    assert page.locator(".likely .own").count() == 1  # the text's own next token is among them
    chosen = page.locator(".likely button:not(.own) .name >> nth=0").inner_text().replace("␣", " ")
    page.click(".likely button:not(.own) >> nth=0")
    page.wait_for_selector(".continuation")
    assert page.locator(".continuation").count() == 2
    page.click(".continuation button >> nth=0")
    page.wait_for_selector(".branched button >> nth=1")
    after = page.locator(".token").all_inner_texts()
    assert after[:5] == before[:5]
    assert after[5].strip() == chosen.strip()
    assert len(after) == 5 + 1 + 32
    page.click(".branched button >> nth=0")
    assert page.locator(".token").all_inner_texts() == before
    page.select_option(".pair select >> nth=0", "surprise")
    assert page.locator(".token[title='']").count() == 1  # the first token has none


def test_a_conversation_can_be_looked_into(tab: Tab) -> None:
    tab.limit(10)
    tab.ask("Where is the king?")
    tab.view("inside")
    tab.page.click("button:text-is('Inspect the conversation')")
    tab.until(
        "[...document.querySelectorAll('.token')].map(x => x.textContent).join('').startsWith('User: Where')"
    )


def test_an_empty_text_is_refused_and_a_long_one_cut(tab: Tab) -> None:
    tab.view("inside")
    tab.page.wait_for_selector(".square canvas")
    tab.page.fill("#text", "")
    tab.page.click("button:text-is('Inspect')")
    tab.page.wait_for_selector(".alert:has-text('expected some tokens')")
    tab.page.fill("#text", "word " * 2000)
    tab.page.click("button:text-is('Inspect')")
    tab.page.wait_for_selector(".note:has-text('The first 1,024 of')")
    tab.page.wait_for_selector(".note:has-text('drawn for up to 512')")
    assert tab.page.locator(".token").count() == 1024
    tab.faults[:] = [fault for fault in tab.faults if "400" not in fault]  # the browser logs refusals


@pytest.mark.parametrize("name", ["llama", "hybrid", "lstm"])
def test_other_models_say_what_they_lack(browser: Any, name: str) -> None:
    fields = {"pattern": "m*M", "n_layers": 3} if name == "hybrid" else {}
    entry = MODELS[name]
    sizes = {**entry.presets["tiny"], **fields}
    model = entry.cls(entry.config.from_dict(sizes), torch.Generator().manual_seed(0)).eval()
    assert isinstance(model, LanguageModel)
    with serving(model, ByteTokenizer(), name) as (_, port):
        tab = Tab(browser, port)
        tab.view("inside")
        tab.page.wait_for_selector(".likely li")
        text = tab.page.inner_text("main")
        assert ("has no selective state" in text) == (name in ("llama", "lstm"))
        assert ("Layers 1 have attention" in text) == (name == "hybrid")
        assert tab.page.locator(".wide canvas[role=img]").count() == (2 if name == "hybrid" else 0)
        if name != "lstm":
            tab.page.wait_for_selector(".square canvas")
        tab.view("memory")
        tab.page.wait_for_selector(".facts dd")
        assert ("a token" in tab.page.inner_text(".facts dd >> nth=0")) == (name != "lstm")
        tab.close()


# memory


def test_memory_is_compared_with_a_transformer_of_equal_size(tab: Tab, served: tuple[Service, int]) -> None:
    page, model = tab.page, served[0].model
    tab.limit(12)
    tab.ask("Hello")
    tab.view("memory")
    page.wait_for_selector(".facts dd")
    body, d = model.num_parameters() - model.backbone.embedding.weight.numel(), model.config.d_model
    script = "([size, w, s]) => import('/page/memory.js').then(m => m.cachePerToken(size, w, s))"
    per = page.evaluate(script, [{"body_parameters": body, "d_model": d}, 2, 1])
    assert per == pytest.approx(2 * (body / (12 * d * d)) * d * 2)
    facts = page.locator(".facts dd").all_inner_texts()
    assert facts[0].replace("\u202f", " ") == f"{model.init_state(1).nbytes / 1000:.0f} kB"
    assert int(facts[2]) == -(-model.init_state(1).nbytes // per)
    assert page.locator(".chart g.dots circle").count() == 1  # the turn
    page.select_option("select >> nth=1", "8")
    assert int(page.inner_text(".facts dd >> nth=2")) >= 8 * int(facts[2]) - 8
    page.select_option("select >> nth=2", "800")
    page.click("button:text-is('Measure')")
    page.wait_for_selector(".note:has-text('tokens per second at first')")
