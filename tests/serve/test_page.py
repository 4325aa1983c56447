"""The page at /: its files and who may have them, its words, colours and sizes, and its keys."""

from __future__ import annotations

import re
from typing import Any

import pytest

from browser_tab import READY, VIEWS, Tab
from live_server import ask, serving
from longscan.models import MODELS
from longscan.serve.guard import Access
from longscan.serve.page_routes import PAGE, POLICY, TYPES
from longscan.serve.service import Service

NAME = "longscan-tiny-en"
# the right edge of everything that does not scroll by itself
WIDTH = """Math.max(...[...document.querySelectorAll('body *')]
  .filter(x => !x.closest('.scroll, .unseen, .skip, nav, pre, svg'))
  .map(x => x.getBoundingClientRect().right))"""
NAMELESS = """[...document.querySelectorAll(
    'button, a, input, select, textarea, summary, [role=img], [role=listbox], section, nav')]
  .filter(x => !x.closest('[hidden]') && x.type !== 'file')
  .filter(x => !x.ariaLabel && !x.textContent.trim() && !x.labels?.length)
  .map(x => x.outerHTML.slice(0, 120))"""


# files, without a browser


def test_the_files_are_small_and_guarded(served: tuple[Service, int]) -> None:
    paths = ["/", *(f"/page/{path.name}" for path in PAGE.iterdir())]
    total = 0
    for path in paths:
        status, content, headers = ask(served[1], path)
        assert status == 200, path
        total += len(content.encode())
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-cache"
        known = ask(served[1], path, None, {"If-None-Match": f'"other", W/{headers["etag"]}'})
        assert (known[0], known[1]) == (304, "")
        assert ask(served[1], path, None, {"If-None-Match": '"other"'})[0] == 200
        assert ask(served[1], path, method="HEAD")[:2] == (200, "")
    assert total < 200_000
    assert {path.suffix for path in PAGE.iterdir()} == set(TYPES)


@pytest.mark.parametrize("name", ["none.js", "..%2fguard.py", "%2e%2e/guard.py", "page.css%00"])
def test_nothing_else_is_served(served: tuple[Service, int], name: str) -> None:
    assert ask(served[1], f"/page/{name}")[0] == 404


def test_the_page_is_complete_and_asks_nobody_else() -> None:
    for path in PAGE.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r'from "\./(.*?)"', text):
            assert (PAGE / name).is_file(), f"{path.name} imports {name}"
        hosts = set(re.findall(r"https?://([\w.-]+)", text))
        assert hosts <= {"www.w3.org", "arxiv.org"}, path.name  # a namespace, and links to papers
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)


def test_the_page_needs_no_key_but_the_model_does(served: tuple[Service, int]) -> None:
    service = served[0]
    with serving(service.model, service.tokenizer, NAME, access=Access(keys=("secret",))) as (_, port):
        for path in ("/", "/page/main.js", "/line"):
            assert ask(port, path)[0] == 200
        for path in ("/v1/inspect", "/v1/models", "/page", "/pages/x", "/metrics"):
            assert ask(port, path)[0] == 401, path
        assert ask(port, "/", None, {"Host": "evil.example"})[0] == 403


def test_the_line_is_the_registry(served: tuple[Service, int]) -> None:
    found = ask(served[1], "/line")[1]
    assert [entry["name"] for entry in found] == list(MODELS)
    assert [entry["idea"] for entry in found] == [entry.idea for entry in MODELS.values()]


# words


def test_both_languages_say_everything(tab: Tab) -> None:
    words = tab.page.evaluate(
        """async () => {
          const files = ['en', 'zh', 'ideas'].map(name => import(`/page/${name}.js`));
          const [{ en }, { zh }, { IDEAS }] = await Promise.all(files);
          const kinds = (x) => Object.fromEntries(Object.entries(x).map(([k, v]) => [k, typeof v]));
          return { en: kinds(en), zh: kinds(zh), ideas: Object.keys(IDEAS) };
        }"""
    )
    assert words["en"] == words["zh"]
    assert set(words["ideas"]) == set(MODELS)
    code = "".join(path.read_text(encoding="utf-8") for path in PAGE.glob("*.js"))
    used = set(re.findall(r'\bt\("([\w.]+)"', code))
    assert len(used) > 30
    assert used <= set(words["en"])
    begun = set(re.findall(r"\bt\(`([\w.]*)\$\{", code))  # names that end with a variable, or a letter
    unused = {
        name
        for name in set(words["en"]) - used
        if f'"{name}"' not in code.replace(f'  "{name}":', "")
        and not any(name.startswith(start) for start in begun - {""})
        and name not in ("channel", "channels", "head", "heads")
    }
    assert not unused


# languages, colours, sizes, keys


def test_the_page_speaks_chinese(browser: Any, served: tuple[Service, int]) -> None:
    tab = Tab(browser, served[1], locale="zh-CN")
    page = tab.page
    assert page.get_attribute("html", "lang") == "zh-CN"
    tab.limit(5)
    tab.ask("Hello")
    assert re.search("新读入 .* 个词元，记得 0 个", page.inner_text(".stats >> nth=1"))
    for view in VIEWS:
        tab.view(view)
        page.wait_for_selector("h1, .turn")
        text = page.inner_text("main")
        assert len(re.findall("[\u4e00-\u9fff]", text)) > 30, view
    page.wait_for_selector("text=记忆是会选择的状态")
    page.click("#language")
    assert page.get_attribute("html", "lang") == "en"
    page.wait_for_selector("text=memory is a state that chooses")
    page.reload()
    assert page.get_attribute("html", "lang") == "en"  # it is remembered
    tab.close()


def test_dark_and_light(browser: Any, served: tuple[Service, int]) -> None:
    def lightness() -> float:
        red, green, blue = page.evaluate(
            "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)"
        )
        return float(red + green + blue) / 3

    tab = Tab(browser, served[1], color_scheme="dark")
    page = tab.page
    assert lightness() < 50
    page.click("#theme")
    assert lightness() > 200
    page.reload()
    assert lightness() > 200
    page.click("#theme")
    assert lightness() < 50
    tab.close()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_nothing_is_wider_than_a_small_telephone(
    browser: Any, served: tuple[Service, int], locale: str
) -> None:
    tab = Tab(browser, served[1], viewport={"width": 360, "height": 640}, locale=locale)
    tab.limit(12)
    tab.ask("x" * 200 + "\n\n| a | b |\n|---|---|\n| " + "y" * 100 + " | z |")
    for view in VIEWS:
        tab.view(view)
        tab.page.wait_for_selector(READY[view])
        tab.page.evaluate("for (const x of document.querySelectorAll('details')) x.open = true")
        width = tab.page.evaluate(WIDTH)
        assert width <= 360, view
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360, view
    tab.close()


def test_everything_has_a_name_and_a_place_in_the_order_of_keys(tab: Tab) -> None:
    tab.limit(5)
    tab.ask("Hello")
    for view in VIEWS:
        tab.view(view)
        tab.page.wait_for_selector(READY[view])
        assert tab.page.evaluate(NAMELESS) == [], view
        assert tab.page.evaluate("[...document.querySelectorAll('[tabindex]')].every(x => x.tabIndex <= 0)")
        ids = tab.page.evaluate("[...document.querySelectorAll('[id]')].map(x => x.id)")
        assert len(ids) == len(set(ids)), view
        levels = tab.page.evaluate("[...document.querySelectorAll('h1, h2')].map(x => x.tagName)")
        assert levels.count("H1") == 1


def test_a_conversation_with_the_keyboard_alone(tab: Tab) -> None:
    tab.limit(30)
    page = tab.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "message":
            break
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.assistant:not(.running) .stats:not(:empty)")
    focused = []
    for _ in range(14):
        page.keyboard.press("Shift+Tab")
        focused.append(page.evaluate("document.activeElement.textContent"))
    assert {"Retry", "Edit", "Fork here", "Copy"} <= set(focused)
