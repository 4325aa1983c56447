"""Structured output and tools, live: OpenAI's own client, streams, and what may go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
import torch

from live_server import NAME, ask, running
from longscan.models import LanguageModel, Mamba, MambaConfig
from longscan.serve.service import Service
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.bpe import train_bpe
from longscan.tokenizers.chat import ChatTemplate

TEMPLATE = """{% if tools %}
Tools, called with <tool_call>:{% for tool in tools %} {{ tool | tojson }}{% endfor %}

{% endif %}
{% for message in messages %}
{{ message.role }}>{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}

{% endfor %}
{% if add_generation_prompt %}
assistant>{% endif %}"""
HELLO: list[Any] = [{"role": "user", "content": "Where is the king?"}]
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "maximum": 9, "minimum": 1},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY, "strict": True}}


class Person(pydantic.BaseModel):
    """What the client asks for."""

    title: Literal["king", "queen"]
    age: int = pydantic.Field(ge=0, le=120)
    alive: bool
    swords: list[Literal["long", "short"]] = pydantic.Field(max_length=3)


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[Service, int]]:
    with running(template=ChatTemplate(TEMPLATE, "test", own=True)) as server:
        yield server


def client_of(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(live: tuple[Service, int]) -> openai.OpenAI:
    return client_of(live[1])


# response_format


def test_parse(client: openai.OpenAI) -> None:
    got = client.chat.completions.parse(model=NAME, messages=HELLO, response_format=Person, seed=1, n=3)
    people = [choice.message.parsed for choice in got.choices]
    assert all(isinstance(person, Person) for person in people)
    assert [choice.finish_reason for choice in got.choices] == ["stop"] * 3
    assert len({str(person) for person in people}) > 1


def test_the_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": NAME,
        "messages": HELLO,
        "response_format": SCHEMA,
        "seed": 5,
        "n": 2,
    }
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=1)
    chunks = list(client.chat.completions.create(**settings, stream=True))
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.finish_reason for part in mine if part.finish_reason] == ["stop"]
        jsonschema.validate(json.loads(choice.message.content or ""), CITY)
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert "".join(entry.token for entry in entries[:-1]) == choice.message.content
        assert all(entry.logprob <= 0 for entry in entries)


def test_json_objects_and_expressions(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model=NAME, messages=HELLO, response_format={"type": "json_object"}, max_tokens=5, seed=1
    )
    assert (got.choices[0].message.content or "").startswith("{")
    assert got.choices[0].finish_reason == "length"
    form: Any = {"type": "regex", "regex": "(yes|no), [0-9]{2}/[a-z]"}
    for path in ("chat", "text"):
        if path == "chat":
            answer = client.chat.completions.create(model=NAME, messages=HELLO, response_format=form)
            text = answer.choices[0].message.content or ""
        else:
            plain = client.completions.create(
                model=NAME, prompt="So?", max_tokens=40, extra_body={"response_format": form}
            )
            text = plain.choices[0].text
        assert text[:2] in ("ye", "no")
        assert text[-2] == "/"
    plain = client.completions.create(
        model=NAME, prompt=["A", "B"], n=2, max_tokens=90, seed=3, extra_body={"response_format": SCHEMA}
    )
    for choice in plain.choices:
        jsonschema.validate(json.loads(choice.text), CITY)


def test_greedy_and_an_end_of_text_that_always_is_likeliest(
    live: tuple[Service, int], client: openai.OpenAI
) -> None:
    end = str(live[0].tokenizer.eos_id)
    got = client.chat.completions.create(
        model=NAME, messages=HELLO, response_format=SCHEMA, temperature=0, logit_bias={end: 100}
    )
    jsonschema.validate(json.loads(got.choices[0].message.content or ""), CITY)


def test_the_next_turn_finds_the_state(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": NAME, "response_format": SCHEMA, "temperature": 0}
    first = client.chat.completions.create(messages=HELLO, **settings)
    said = [*HELLO, {"role": "assistant", "content": first.choices[0].message.content}]
    second = client.chat.completions.create(messages=[*said, *HELLO], **settings)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1  # its end
    jsonschema.validate(json.loads(second.choices[0].message.content or ""), CITY)


def test_a_grammar_that_ends_in_nothing_ends_only_its_own_text(live: tuple[Service, int]) -> None:
    """Its automaton has too many states, which is noticed while it writes."""
    schema = {"type": "string", "pattern": "(.*a.{20})|(.*b.{30})"}
    form = {"type": "json_schema", "json_schema": {"name": "evil", "schema": schema}}
    evil = {"messages": HELLO, "response_format": form, "max_tokens": 400, "temperature": 50, "seed": 1}
    evil["n"] = 8
    good = {"messages": HELLO, "response_format": SCHEMA, "seed": 2}
    alone = ask(live[1], "/v1/chat/completions", good)[1]["choices"]
    with ThreadPoolExecutor(4) as pool:
        bad = pool.submit(ask, live[1], "/v1/chat/completions", evil)
        others = list(pool.map(lambda _: ask(live[1], "/v1/chat/completions", good), range(6)))
        status, found, _ = bad.result()
    assert [other[1]["choices"] for other in others] == [alone] * 6
    assert (status, found["error"]["type"]) == (400, "invalid_request_error"), found
    assert "states" in found["error"]["message"]


# tools


def arguments_of(call: Any, parameters: Any = CITY) -> Any:
    value = json.loads(call.function.arguments)
    jsonschema.validate(value, parameters)
    return value


def test_a_required_call(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": NAME,
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 4,
        "n": 3,
    }
    got = client.chat.completions.create(**settings)
    for choice in got.choices:
        [call] = choice.message.tool_calls or []
        assert choice.message.content is None
        assert choice.finish_reason == "tool_calls"
        assert call.id.startswith("call_")
        assert len(call.id) == 29
        if call.function.name == "weather":
            arguments_of(call)
        else:
            assert (call.function.name, call.function.arguments) == ("now", "{}")
    assert {choice.message.tool_calls[0].function.name for choice in got.choices} == {"weather", "now"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_call_and_its_result(client: openai.OpenAI, stream: bool) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    settings: dict[str, Any] = {"model": NAME, "tools": TOOLS, "seed": 1, "parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(messages=HELLO, tool_choice=named, **settings) as events:
            kinds = [event.type for event in events]
            got: Any = events.get_final_completion()
        assert kinds.count("tool_calls.function.arguments.done") == 1
        assert kinds.count("tool_calls.function.arguments.delta") > 2
    else:
        got = client.chat.completions.create(messages=HELLO, tool_choice=named, **settings)
    message = got.choices[0].message
    [call] = message.tool_calls
    assert (call.function.name, got.choices[0].finish_reason) == ("weather", "tool_calls")
    assert set(arguments_of(call)) == {"city", "days"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    said = [*HELLO, message.model_dump(exclude_none=True), result]
    after = client.chat.completions.create(messages=said, max_tokens=8, **settings)
    assert after.choices[0].message.content is not None


def test_streamed_calls_have_openais_shape(live: tuple[Service, int]) -> None:
    body = {
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": "required",
        "stream": True,
        "seed": 8,
        "max_tokens": 150,
    }
    status, text, _ = ask(live[1], "/v1/chat/completions", body)
    assert status == 200
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    seen: dict[int, str] = {}
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls", ()):
            if call["index"] in seen:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
            else:
                assert call["index"] == len(seen)
                assert call["type"] == "function"
                assert call["function"]["arguments"] == ""
                seen[call["index"]] = call["function"]["name"]
    assert len(seen) > 1  # in parallel
    assert set(seen.values()) <= {"weather", "now"}
    assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)


def test_none_and_auto_write_text(client: openai.OpenAI) -> None:
    for choice in ("none", "auto"):
        got: Any = client.chat.completions.create(
            model=NAME, messages=HELLO, tools=TOOLS, tool_choice=choice, max_tokens=12, seed=1
        )
        assert got.choices[0].message.content
        assert got.choices[0].message.tool_calls is None
    both: Any = client.chat.completions.create(
        model=NAME, messages=HELLO, tools=TOOLS, tool_choice="none", response_format=SCHEMA
    )
    jsonschema.validate(json.loads(both.choices[0].message.content), CITY)


MARKS = ["<tool_call>", "</tool_call>"]


def marked(special: bool) -> tuple[LanguageModel, Tokenizer]:
    """Return a random model whose tokenizer has a token for each marker."""
    base = train_bpe(
        ["the king and the queen"] * 9, 280, special=[*(MARKS if special else []), "<|endoftext|>"]
    )
    if not special:
        base._tokenizer.add_tokens(MARKS)
        base = type(base)(base._tokenizer, base.eos_id)
    config = MambaConfig(d_model=16, n_layers=2, vocab_size=base.vocab_size)
    return Mamba(config, torch.Generator().manual_seed(0)).eval(), base


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_begins_a_call_by_itself_must_finish_it(special: bool, stream: bool) -> None:
    model, tokenizer = marked(special)
    begin, end = tokenizer_id(tokenizer, MARKS[0]), tokenizer.eos_id
    with running(loaded=(model, tokenizer), template=ChatTemplate(TEMPLATE, "test", own=True)) as (_, port):
        client = client_of(port)
        settings: dict[str, Any] = {
            "model": NAME,
            "messages": HELLO,
            "tools": TOOLS,
            "seed": 2,
            "max_tokens": 600,
        }
        bias = {str(begin): 100, str(end): 60}
        if stream:
            with client.chat.completions.stream(logit_bias=bias, **settings) as events:
                got: Any = events.until_done().get_final_completion()
        else:
            got = client.chat.completions.create(logit_bias=bias, **settings)
        [call] = got.choices[0].message.tool_calls
        assert not got.choices[0].message.content
        assert got.choices[0].finish_reason == "tool_calls"
        assert call.function.arguments == "{}" if call.function.name == "now" else arguments_of(call)
        none = client.chat.completions.create(tool_choice="none", logit_bias={str(begin): 100}, **settings)
        assert MARKS[0] not in (none.choices[0].message.content or "")
        assert none.choices[0].message.tool_calls is None
        cut = client.chat.completions.create(logit_bias=bias, **{**settings, "max_tokens": 4})
        assert cut.choices[0].finish_reason == "length"


def tokenizer_id(tokenizer: Tokenizer, name: str) -> int:
    special = tokenizer.special_tokens
    return special[name] if name in special else tokenizer.vocab_size - 2 + MARKS.index(name)


def test_templates_see_tools_and_arguments(live: tuple[Service, int]) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    cut = {"id": "b", "type": "function", "function": {"name": "weather", "arguments": '{"city'}}
    said = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call, cut]}]
    said.append({"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "rain"}]})
    found = ask(live[1], "/tokenize", {"messages": said, "tools": TOOLS})[1]
    text = live[0].tokenizer.decode(found["tokens"])
    assert '"name": "weather", "description": "The weather."' in text
    assert '{"name": "weather", "arguments": {"city": "Rome"}}' in text
    assert '"arguments": "{\\"city"' in text  # no JSON: as it is
    assert text.endswith("tool>rain\nassistant>")
    assert "weather" not in live[0].tokenizer.decode(
        ask(live[1], "/tokenize", {"messages": HELLO})[1]["tokens"]
    )


def test_a_template_for_tools_is_used_with_tools() -> None:
    model, tokenizer = marked(special=False)
    tokenizer.chat_templates = {"default": "{{ messages[0].content }}", "tool_use": TEMPLATE}
    with running(loaded=(model, tokenizer)) as (_, port):
        plain, tools = (
            tokenizer.decode(ask(port, "/tokenize", body)[1]["tokens"])
            for body in ({"messages": HELLO}, {"messages": HELLO, "tools": TOOLS})
        )
        assert plain == HELLO[0]["content"]
        assert tools.startswith("Tools, called with")
        body = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
        assert ask(port, "/v1/chat/completions", body)[1]["choices"][0]["message"]["tool_calls"]


# what may go wrong

F = {"name": "f", "parameters": {"type": "object"}}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("xml", {"response_format": {"type": "xml"}}),
    ("no-schema", {"response_format": {"type": "json_schema"}}),
    ("no-name", {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
    ("bad-name", {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}),
    ("list", {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}}),
    ("no-regex", {"response_format": {"type": "regex"}}),
    ("regex", {"response_format": {"type": "regex", "regex": "("}}),
    ("huge-regex", {"response_format": {"type": "regex", "regex": "(a{1000}){1000}"}}),
    ("ignore-eos", {"response_format": {"type": "json_object"}, "ignore_eos": True}),
    *(
        (name, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}})
        for name, schema in {
            "not": {"not": {}},
            "oneOf": {"oneOf": [{"type": "null"}]},
            "unique": {"type": "array", "uniqueItems": True},
            "format": {"type": "string", "format": "king"},
            "guidance": {"x-guidance": {"lenient": True}},
            "url": {"$ref": "http://127.0.0.1:1/x"},
            "file": {"$ref": "file:///etc/passwd"},
            "endless": {"$ref": "#"},
            "false": {"type": "string", "enum": [1]},
            "multiple": {"type": "integer", "multipleOf": 123456789},
            "properties": {"properties": {f"p{i}": {} for i in range(513)}},
            "enum": {"enum": list(range(1001))},
            "size": {"const": "x" * 70_000},
            "deep": json.loads('{"items":' * 40 + "{}" + "}" * 40),
        }.items()
    ),
    ("tool-type", {"tools": [{"type": "web", "function": F}]}),
    ("tool-name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
    ("tool-twice", {"tools": [{"type": "function", "function": F}] * 2}),
    ("tools-many", {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(65)]}),
    (
        "tool-schema",
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
    ),
    ("tool-not", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}),
    ("choice", {"tools": TOOLS, "tool_choice": "always"}),
    ("choice-name", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}),
    ("choice-alone", {"tool_choice": "required"}),
    ("kwargs", {"tools": TOOLS, "chat_template_kwargs": {"tools": []}}),
    ("result", {"messages": [*HELLO, {"role": "tool", "tool_call_id": "x", "content": "y"}]}),
    ("result-id", {"messages": [*HELLO, {"role": "tool", "tool_call_id": {}, "content": "y"}]}),
    ("calls", {"messages": [*HELLO, {"role": "assistant", "content": "", "tool_calls": 7}]}),
    (
        "call",
        {
            "messages": [
                *HELLO,
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": 1}}]},
            ]
        },
    ),
]


@pytest.mark.parametrize("body", [body for _, body in BAD], ids=[name for name, _ in BAD])
def test_bad_formats_and_tools(live: tuple[Service, int], body: dict[str, Any]) -> None:
    status, found, _ = ask(live[1], "/v1/chat/completions", {"messages": HELLO, "max_tokens": 3, **body})
    assert status == 400, found
    assert found["error"]["type"] == "invalid_request_error"
    assert found["error"]["param"] in body
    assert len(found["error"]["message"]) < 900
    assert ask(live[1], "/health")[0] == 200


def test_the_keyword_at_fault_is_named(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"items": {"not": {}}}}}
    with pytest.raises(openai.BadRequestError, match="items: the keyword 'not' is not supported") as error:
        client.chat.completions.create(model=NAME, messages=HELLO, response_format=form)
    assert error.value.param == "response_format"
