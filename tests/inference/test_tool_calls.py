"""Calls in what a model writes: their grammar, and reading them out of any pieces of text."""

from __future__ import annotations

from typing import Any

import pytest

from longscan.errors import UsageError
from longscan.inference.grammar import GrammarError, Grammars
from longscan.inference.tool_calls import FORMATS, CallFormat, CallReader, Tool, call_grammar, find_format
from longscan.tokenizers.base import ByteTokenizer

TOOLS = [
    Tool("add", {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}),
    Tool("now", {"additionalProperties": False}),
]
HERMES, GRANITE = FORMATS["hermes"], FORMATS["granite"]
ADD = '{"name": "add", "arguments": {"a": 12}}'
NOW = '{"name": "now", "arguments": {}}'


def written(form: CallFormat, *calls: str) -> str:
    """Return calls as a model is made to write them."""
    if form.listed:
        return f"{form.opening}[{', '.join(calls)}]{form.closing}"
    return "\n".join(f"{form.opening}\n{call}\n{form.closing}" for call in calls)


def read(form: CallFormat, text: str, size: int) -> tuple[str, list[list[str]]]:
    """Return the text and the calls in a text that comes in pieces."""
    reader, content, calls = CallReader(form, ["add", "now"]), "", list[list[str]]()
    parts = [part for i in range(0, len(text), size) for part in reader.push(text[i : i + size])]
    for part in [*parts, *reader.close()]:
        if part.call is None:
            content += part.text
        elif part.name is not None:
            assert part.call == len(calls)
            calls.append([part.name, part.text])
        else:
            calls[part.call][1] += part.text
    return content, calls


SIZES = (1, 2, 7, 10_000)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_calls_are_read(form: CallFormat, size: int) -> None:
    text = "Let me see. \n" + written(form, ADD, NOW, ADD)
    assert read(form, text, size) == (
        "Let me see.",
        [["add", '{"a": 12}'], ["now", "{}"], ["add", '{"a": 12}']],
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        (" A < b, <tool and\n<tool_cal ", " A < b, <tool and\n<tool_cal ", []),
        ("x<tool_call>", "x<tool_call>", []),
        ("x <tool_call>\n{oops}</tool_call> y", "x<tool_call>\n{oops}</tool_call> y", []),
        ("<tool_call>{}" + "z" * 2000, "<tool_call>{}" + "z" * 2000, []),
        ('<tool_call>{"name": "god", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "add", "arguments": 7}</tool_call>', None, []),
        (
            '<tool_call>{"name":"add","arguments":{"a": {"b}": "\\"}]{"}}}</tool_call>',
            "",
            [["add", '{"a": {"b}": "\\"}]{"}}']],
        ),
        ('<tool_call>{"name":"add","parameters":{}} </tool_call> z', " z", [["add", "{}"]]),
        ('<tool_call>{"name": "add", "arguments": {"a": [1', "", [["add", '{"a": [1']]),
        (written(HERMES, NOW) + "\n<tool_c", "", [["now", "{}"]]),
        (written(HERMES, NOW) + "\n<tool_call>\n{", "", [["now", "{}"]]),
    ],
    ids=range(12),
)
def test_what_only_looks_like_a_call_is_text(size: int, text: str, content: str | None, calls: Any) -> None:
    assert read(HERMES, text, size) == (text if content is None else content, calls)


def follows(source: str, text: str) -> tuple[int, bool]:
    """Return how many bytes of a text follow a grammar, and whether it may end after them."""
    tokenizer = ByteTokenizer()
    constraint = Grammars(tokenizer).lark(source)()
    for n, token in enumerate(text.encode()):
        if not constraint.allowed()[token]:
            return n, bool(constraint.allowed()[tokenizer.eos_id])
        constraint.accept(token)
    return len(text.encode()), bool(constraint.allowed()[tokenizer.eos_id])


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_grammar_of_calls(form: CallFormat) -> None:
    required = call_grammar(form, TOOLS, "required")
    auto = call_grammar(form, TOOLS, "auto")
    one, two = written(form, ADD), written(form, NOW, ADD)
    for source in (required, auto):
        assert follows(source, one) == (len(one), True)
        assert follows(source, two) == (len(two), True)
        wrong = one.replace('"a"', '"b"')
        assert follows(source, wrong) == (wrong.index('"b"') + 1, False)
        for n in range(len(form.opening), len(one)):
            assert follows(source, one[:n])[1] is False
    assert follows(required, "Yes") == (0, False)
    assert follows(auto, "Yes. <tool\n") == (11, True)
    assert follows(auto, "Yes. " + two) == (5 + len(two), True)
    single = call_grammar(form, TOOLS, "required", parallel=False)
    assert follows(single, two) != (len(two), True)
    assert follows(single, one) == (len(one), True)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_grammar_of_text(form: CallFormat) -> None:
    none = call_grammar(form, TOOLS, "none")
    assert follows(none, "a" + form.opening) == (len(form.opening), True)
    assert follows(none, "a\n{]<") == (5, True)
    answer = '%json {"type": "boolean"}'
    assert follows(call_grammar(form, TOOLS, "none", answer=answer), "true") == (4, True)
    both = call_grammar(form, TOOLS, "auto", answer=answer)
    assert follows(both, "true") == (4, True)
    assert follows(both, "x") == (0, False)
    assert follows(both, written(form, NOW)) == (len(written(form, NOW)), True)


def test_formats_are_found_by_their_markers() -> None:
    for form in FORMATS.values():
        assert find_format("{% for tool in tools %}" + form.opening) == form
    for template, words in (
        ("{{ messages }}", "knows no tools"),
        ("<tool_call>", "knows no tools"),
        ("{{ tools }}<tool_call><function=", "writes calls with <function="),
    ):
        with pytest.raises(UsageError, match=words):
            find_format(template)


def test_bad_tools() -> None:
    for tools, words in (
        ([], "expected at least one"),
        ([Tool("f", {"type": "array"})], "the parameters of f: expected a JSON schema of an object"),
        ([Tool("f", {"not": {}})], "the parameters of f: .*'not' is not supported"),
        ([Tool(f"f{i}", {"description": "x" * 60_000}) for i in range(3)], "at most 131,072 bytes together"),
    ):
        with pytest.raises(GrammarError, match=words):
            call_grammar(GRANITE, tools, "auto")
