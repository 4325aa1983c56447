"""The choice of an adapter on the page of `longscan serve`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import longscan
from adapters import write_adapter
from browser_tab import READY, Tab
from live_server import NAME, serving_all
from longscan.checkpoints.adapter import beside
from longscan.serve.limits import Limits
from longscan.serve.served import serve_adapters
from longscan.tokenizers.chat import find_template

ALL = [NAME, "one", "two"]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server of a base with two adapters."""
    model, tokenizer = longscan.load(NAME)
    assert tokenizer is not None
    template = find_template(tokenizer, None)
    adapters = {}
    for seed, name in enumerate(ALL[1:], 1):
        directory = write_adapter(model, tmp_path_factory.mktemp("adapters") / name, seed, std=0.02)
        adapters[name] = (beside(model, tokenizer, directory)[0], tokenizer, template)
    with serving_all(serve_adapters((model, tokenizer, template), NAME, adapters, Limits())) as (_, port):
        yield port


@pytest.fixture
def several(browser: Any, port: int) -> Iterator[Tab]:
    """A tab with the page of that server."""
    tab = Tab(browser, port)
    tab.page.wait_for_selector("#model")
    yield tab
    tab.close()


def sent(tab: Tab) -> list[tuple[str, Any]]:
    """Return a list that gets the path and the model of each POST from now on."""
    found: list[tuple[str, Any]] = []

    def note(request: Any) -> None:
        if request.method == "POST":
            path = request.url.removeprefix(tab.origin)
            found.append((path, json.loads(request.post_data).get("model")))

    tab.page.on("request", note)
    return found


def choose_with_keys(tab: Tab, times: int) -> None:
    """Move down in the list of models."""
    tab.page.focus("#model")
    for _ in range(times):
        tab.page.keyboard.press("ArrowDown")
    assert tab.page.evaluate("document.activeElement.id") == "model"  # the view changed, not the focus


def test_a_model_is_chosen_with_the_keyboard(several: Tab) -> None:
    page = several.page
    select = page.get_by_role("combobox", name="Model", exact=True)
    assert select.locator("option").all_inner_texts() == ALL
    assert select.input_value() == "one"  # what answers who names none
    posts = sent(several)
    several.limit(6)
    several.ask("Who is it?")
    assert posts == [("v1/chat/completions", None)]
    choose_with_keys(several, 1)
    page.wait_for_selector(".note:has-text('two has no chat template')")
    assert page.locator(".turn").count() == 2  # the conversation stays
    several.ask("And now?")
    assert posts[1:] == [("v1/chat/completions", "two")]
    page.reload()
    page.wait_for_selector(".note:has-text('two has no chat template')")
    assert page.input_value("#model") == "two"
    page.click("#language")
    page.wait_for_selector("#model")
    assert page.get_by_role("combobox", name="模型", exact=True).input_value() == "two"


def test_looking_inside_asks_the_chosen_model(several: Tab) -> None:
    page = several.page
    several.view("inside")
    page.wait_for_selector(READY["inside"])
    norms = page.inner_text(".note >> nth=0")
    assert norms.startswith("one")
    posts = sent(several)
    page.select_option("#model", "two")
    page.wait_for_selector(".note:has-text('two')")
    page.wait_for_selector(READY["inside"])
    page.wait_for_selector(".likely button")
    page.click(".likely button >> nth=0")
    page.wait_for_selector(".continuation")
    paths = {path for path, _ in posts}
    assert paths == {"tokenize", "v1/inspect", "v1/inspect/attention", "v1/inspect/continue"}
    assert {model for _, model in posts} == {"two"}
    page.select_option("#model", NAME)  # nothing of another model is shown
    page.wait_for_selector(f".note:has-text('{NAME}')")
    assert page.locator(".continuation").count() == 0
    page.wait_for_selector(READY["inside"])
    assert posts[-1][1] == NAME


def test_a_model_that_is_gone_is_forgotten(several: Tab) -> None:
    several.page.evaluate("sessionStorage.setItem('longscan.model', 'three')")
    several.page.reload()
    several.page.wait_for_selector("#model")
    assert several.page.input_value("#model") == "one"


def test_one_model_needs_no_choice(tab: Tab) -> None:
    tab.page.wait_for_selector(READY["chat"])
    assert tab.page.locator("#model").is_hidden()
    assert tab.page.get_by_text("Model", exact=True).is_hidden()
    posts = sent(tab)
    tab.limit(4)
    tab.ask("Hello")
    assert posts == [("v1/chat/completions", None)]
