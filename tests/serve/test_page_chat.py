"""The chat of the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import longscan
from browser_tab import READY, VIEWS, Tab
from live_server import serving
from longscan.inference.chat_file import load_chat
from longscan.serve.guard import Access
from longscan.serve.service import Service

NAME = "longscan-tiny-en"


def test_a_conversation_streams_and_remembers(tab: Tab) -> None:
    tab.limit(40)
    page = tab.page
    page.wait_for_selector(".note:has-text('no chat template')")
    tab.ask("Where is the king?")
    first = page.inner_text(".turn.assistant .stats")
    assert re.match(r"\d+ new tokens read, 0 remembered · [\d.,]+ tokens/s · first token after", first)
    tab.ask("And the queen?")
    fresh, remembered = map(int, re.findall(r"\d+", page.inner_text(".turn:last-child .stats"))[:2])
    assert 0 < fresh < 20
    assert remembered > 40
    shown = page.inner_text(".turns")
    page.reload()
    page.wait_for_selector(".turn")
    assert page.inner_text(".turns") == shown


def test_stop_ends_an_answer_and_the_server_too(tab: Tab, served: tuple[Service, int]) -> None:
    tab.limit(20_000)
    tab.page.fill("#message", "Tell me everything.")
    tab.page.press("#message", "Enter")
    tab.until("document.querySelector('.turn.assistant .body').textContent.length > 20")
    assert not tab.page.is_visible(".primary:text-is('Send')")
    tab.page.click(".stop")
    tab.page.wait_for_selector(".turn.running", state="detached")
    assert tab.page.inner_text(".turn.assistant .stats") == "Stopped."
    assert tab.page.is_visible(".primary:text-is('Send')")
    for _ in range(200):
        if not served[0].worker.jobs:
            break
        tab.page.wait_for_timeout(20)
    assert not served[0].worker.jobs


def test_turns_are_retried_edited_and_forked(tab: Tab) -> None:
    tab.limit(8)
    page = tab.page
    tab.ask("One")
    answers = [page.inner_text(".turn.assistant .body")]
    page.click(".turn.assistant button:text-is('Retry')")
    page.wait_for_selector(".branches:has-text('2/2')")
    page.wait_for_selector(".turn.running", state="detached")
    answers.append(page.inner_text(".turn.assistant .body"))
    page.click("button[aria-label='Previous branch']")
    assert page.inner_text(".turn.assistant .branches span") == "1/2"
    assert page.inner_text(".turn.assistant .body") == answers[0]
    tab.ask("Two")
    page.click(".turn:nth-child(2) button:text-is('Fork here')")
    assert page.locator(".turn").count() == 2
    tab.ask("Three")
    assert page.locator(".turn").count() == 4
    page.click(".turn:nth-child(3) button[aria-label='Previous branch']")
    assert page.inner_text(".turn:nth-child(3) .body") == "Two"
    page.click(".turn:nth-child(1) button:text-is('Edit')")
    page.fill(".turn:nth-child(1) textarea", "Zero")
    page.press(".turn:nth-child(1) textarea", "Enter")
    page.wait_for_selector(".turn:nth-child(1) .branches:has-text('2/2')")
    page.wait_for_selector(".turn.running", state="detached")
    assert page.locator(".turn").count() == 2


def test_a_conversation_is_exported_and_imported(tab: Tab, tmp_path: Path) -> None:
    tab.limit(8)
    page = tab.page
    page.click("summary:text-is('System prompt and sampling')")
    page.fill("#system", "Be brief.")
    tab.ask("Hello")
    with page.expect_download() as download:
        page.click("button:text-is('Export')")
    saved = tmp_path / "conversation.json"
    download.value.save_as(saved)
    content = json.loads(saved.read_text(encoding="utf-8"))
    assert [message["role"] for message in content["messages"]] == ["system", "user", "assistant"]
    loaded, _ = load_chat(saved, longscan.load(NAME)[0])
    assert loaded == content["messages"]  # as `longscan chat --file` does
    shown = page.inner_text(".turn.assistant .body")
    page.click("button:text-is('New')")
    assert page.locator(".turn").count() == 0
    page.fill("#system", "")
    page.set_input_files("input[type=file]", saved)
    page.wait_for_selector(".turn.assistant")
    assert page.inner_text(".turn.assistant .body") == shown
    assert page.input_value("#system") == "Be brief."
    for wrong in (
        "{",
        "[]]",
        '{"messages": 5}',
        '[{"role": "user"}]',
        '[{"role": "x", "content": ""}]',
        "null",
    ):
        (tmp_path / "wrong.json").write_text(wrong)
        page.set_input_files("input[type=file]", tmp_path / "wrong.json")
        page.wait_for_selector(".alert:has-text('wrong.json')")
    assert page.inner_text(".turn.assistant .body") == shown


def test_composing_a_character_sends_nothing(tab: Tab) -> None:
    page = tab.page
    page.fill("#message", "你好")
    for event in ("{isComposing: true}", "{keyCode: 229}"):
        page.evaluate(
            f"""document.querySelector('#message').dispatchEvent(new KeyboardEvent(
            'keydown', {{key: 'Enter', bubbles: true, cancelable: true, ...{event}}}))"""
        )
    page.press("#message", "Shift+Enter")
    assert page.input_value("#message") == "你好\n"
    assert page.locator(".turn").count() == 0
    tab.limit(4)
    page.press("#message", "Enter")
    page.wait_for_selector(".turn.assistant")
    assert page.inner_text(".turn.user .body").strip() == "你好"
    assert page.get_attribute(".turn.user .body", "lang") == "zh-CN"


def test_an_error_is_shown_and_the_conversation_goes_on(tab: Tab) -> None:
    page = tab.page
    tab.limit(6)

    def answer_once(**answer: Any) -> None:
        def handle(route: Any) -> None:
            route.fulfill(**answer) if answer else route.abort()

        page.route("**/v1/chat/completions", handle, times=1)

    answer_once(body='data: {"error": {"message": "so it is"}}\n\n')
    tab.ask("Hello")
    assert page.inner_text(".turn.assistant .stats") == "so it is"
    answers: list[tuple[str, dict[str, Any]]] = [
        ("connection ended", {"body": "data: {"}),
        ("503", {"status": 503}),
        ("does not answer", {}),
    ]
    for message, answer in answers:
        answer_once(**answer)
        page.click("button:text-is('Retry')")
        page.wait_for_selector(f".turn.assistant .stats:has-text('{message}')")
    page.click("button:text-is('Retry')")
    page.wait_for_selector(".turn.assistant .branches:has-text('5/5')")
    page.wait_for_selector(".turn.running", state="detached")
    assert "new tokens read" in page.inner_text(".turn.assistant .stats")
    tab.faults[:] = [fault for fault in tab.faults if "Failed to load" not in fault]  # the browser logs them


def test_reasoning_is_set_apart(tab: Tab) -> None:
    script = "c => import('/page/turn.js').then(m => m.thought(c))"
    for content, expected in {
        "plain": ("", "plain"),
        "<think>a\nb": ("a\nb", ""),
        "<think>a</think>\n\nb": ("a", "b"),
        "a</think>b": ("a", "b"),  # the template has written the first tag
    }.items():
        found = tab.page.evaluate(script, {"content": content, "reasoning": ""})
        assert (found["reasoning"], found["text"]) == expected
    assert tab.page.evaluate(script, {"content": "b", "reasoning": "a"}) == {"reasoning": "a", "text": "b"}


def test_a_screen_reader_hears_sentences(tab: Tab) -> None:
    said = tab.page.evaluate(
        """async () => {
          const { Speech } = await import('/page/speech.js');
          const speech = new Speech('x');
          const heard = [];
          const pieces = ['It was a', ' bright, **cold** morn', 'ing. The Cap', 'tain said',
            ': 今天天气很好，我们去甲板上走走吧。然后', '回来'];
          for (const piece of pieces) {
            speech.append(piece);
            heard.push(speech.element.childElementCount);
          }
          speech.flush();
          const texts = [...speech.element.children].map(x => x.textContent);
          return [heard, texts, ...['role', 'aria-live'].map(name => speech.element.getAttribute(name))];
        }"""
    )
    assert said[0] == [0, 0, 1, 1, 2, 2]
    assert said[1][0] == "It was a bright, cold morning."
    assert said[1][-1] == "然后回来"
    assert said[2:] == ["log", "polite"]


def test_a_key_is_asked_for_once_and_stays_in_the_tab(browser: Any, served: tuple[Service, int]) -> None:
    service = served[0]
    with serving(service.model, service.tokenizer, NAME, access=Access(keys=("secret",))) as (_, port):
        tab = Tab(browser, port)
        page = tab.page
        page.fill("#key", "wrong")
        page.click("dialog .primary")
        page.wait_for_selector("dialog:has-text('does not accept')")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector(".note:has-text('no chat template')")
        tab.limit(4)
        tab.ask("Hello")
        for view in VIEWS:
            tab.view(view)
        page.reload()
        page.wait_for_selector(READY[VIEWS[-1]])
        assert page.locator("dialog").count() == 0
        assert "secret" not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
        tab.context.close()
        assert [fault for fault in tab.faults if "401" not in fault] == []  # the browser logs refusals
