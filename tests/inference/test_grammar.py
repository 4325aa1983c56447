"""Texts that follow a grammar: schemas, regular expressions, limits, and what strangers might send."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import longscan
from longscan.errors import LongscanError
from longscan.inference.drafters import PromptLookup
from longscan.inference.engine import Engine
from longscan.inference.grammar import CACHED, GrammarError, Grammars
from longscan.inference.request import Request
from longscan.inference.sampling import Event, SamplingConfig
from longscan.models import LanguageModel
from longscan.tokenizers.base import ByteTokenizer, Tokenizer
from longscan.tokenizers.bpe import train_bpe
from longscan.tokenizers.sentences import SentenceTokenizer
from small_models import build

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["good", "bad"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def shipped() -> tuple[LanguageModel, Tokenizer]:
    model, tokenizer = longscan.load("longscan-tiny-en")
    assert tokenizer is not None
    return model, tokenizer


@pytest.fixture(scope="module")
def grammars(shipped: tuple[LanguageModel, Tokenizer]) -> Grammars:
    return Grammars(shipped[1])


def write(
    shipped: tuple[LanguageModel, Tokenizer],
    constraint: Any,
    prompt: str = "The king",
    drafts: bool = False,
    **settings: Any,
) -> list[Event]:
    """Return the events of a text that follows a constraint."""
    model, tokenizer = shipped
    config = SamplingConfig.from_dict({"temperature": 1.0, "top_p": 1.0, "seed": 3, **settings})
    engine = Engine(model, tokenizer, slots=1, drafter=PromptLookup() if drafts else None)
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    engine.submit(Request(ids=ids, config=config, eos_id=tokenizer.eos_ids, constraint=constraint))
    return list(engine.run())


def text_of(events: list[Event]) -> str:
    assert events[-1].error is None, events[-1].error
    return "".join(event.text for event in events)


# what follows a schema is JSON that fits it


def any_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a random schema whose values are short."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kind = draw.choice(kinds if depth > 2 else [*kinds, "object", "object", "array", "anyOf", "allOf", "ref"])
    low, high = sorted(draw.sample(range(-50, 200), 2))
    if kind == "string":
        return draw.choice(
            [
                {"type": "string", "minLength": draw.randrange(3), "maxLength": draw.randrange(3, 9)},
                {"type": "string", "pattern": draw.choice(["^[a-z]{2,5}$", "^(yes|no)$", "^[0-9]+-[A-F]$"])},
                {"type": "string", "format": draw.choice(["date", "time", "ipv4", "uuid"])},
                {"type": "string", "title": 'a \u00e9 \u4e2d "title"', "maxLength": 4},
            ]
        )
    if kind == "integer":
        return draw.choice(
            [
                {"type": "integer", "minimum": low, "maximum": high},
                {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2},
                {"type": "integer", "multipleOf": draw.choice([2, 5, 7]), "minimum": 0, "maximum": 700},
            ]
        )
    if kind == "number":
        return {"type": "number", "minimum": low, "maximum": high + 1}
    if kind == "enum":
        return {"enum": draw.sample(["a", "b\n", 'c"', 7, 1.5, None, True, "\u00e9\u4e2d", [1], {"k": 2}], 3)}
    if kind == "const":
        return {"const": draw.choice(["x", 3, None, False, {"a": [1, "b"]}])}
    if kind == "object":
        names = draw.sample(["name", "age", "a b", "\u00e9", "x", 'q"', "deep"], draw.randrange(1, 4))
        schema = {
            "type": "object",
            "properties": {name: any_schema(draw, depth + 1) for name in names},
            "required": [name for name in names if draw.random() < 0.7],
            "additionalProperties": False,
        }
        if draw.random() < 0.2:
            schema["patternProperties"] = {"^[A-C]{1,2}$": {"type": "boolean"}}
        elif draw.random() < 0.2:
            schema |= {"additionalProperties": {"type": "null"}, "required": names, "maxProperties": 4}
        return schema
    if kind == "array":
        least = draw.randrange(2)
        return {
            "type": "array",
            "items": any_schema(draw, depth + 1),
            "minItems": least,
            "maxItems": least + draw.randrange(3),
        }
    if kind == "allOf":
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": high, "multipleOf": 1}]}
    if kind == "anyOf":
        return {"anyOf": [any_schema(draw, depth + 1) for _ in range(2)]}
    if kind == "ref":
        inner = any_schema(draw, 3)
        return (
            inner
            if depth
            else {
                "$defs": {"one": inner},
                "type": "array",
                "prefixItems": [{"$ref": "#/$defs/one"}],
                "items": False,
                "minItems": 1,
            }
        )
    return {"type": kind}


def check_schemas(
    shipped: tuple[LanguageModel, Tokenizer], grammars: Grammars, seeds: range
) -> tuple[int, int]:
    """Check what the model writes for random schemas and prompts; return how many texts ended, and all."""
    ended = 0
    for seed in seeds:
        draw = random.Random(seed)
        schema = any_schema(draw)
        prompt = "".join(
            draw.choice(["The king", " and", "\n", '{"a": ', "\u4e2d", " 12", "?"]) for _ in range(3)
        )
        temperature = draw.choice([0.0, 0.7, 1.0, 2.0])
        events = write(
            shipped,
            grammars.json_schema(schema),
            prompt,
            seed=seed,
            temperature=temperature,
            max_new_tokens=200,
        )
        text = text_of(events)
        if events[-1].finish == "eos":
            ended += 1
            value = json.loads(text)
            jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
        else:
            assert events[-1].finish == "length"
    return ended, len(seeds)


def test_random_schemas(shipped: tuple[LanguageModel, Tokenizer], grammars: Grammars) -> None:
    ended, n = check_schemas(shipped, grammars, range(40))
    assert ended >= 0.85 * n


# the same text however it is made


def test_drafts_change_no_token(shipped: tuple[LanguageModel, Tokenizer], grammars: Grammars) -> None:
    schema = {"type": "array", "items": {"enum": ["the king and the queen"]}, "minItems": 6, "maxItems": 6}
    for temperature in (0.0, 1.0):
        plain, drafted = (
            write(shipped, grammars.json_schema(schema), drafts=drafts, temperature=temperature)
            for drafts in (False, True)
        )
        assert plain == drafted
        assert json.loads(text_of(plain)) == ["the king and the queen"] * 6


def test_texts_of_a_batch_are_those_alone(
    shipped: tuple[LanguageModel, Tokenizer], grammars: Grammars
) -> None:
    model, tokenizer = shipped
    constraint = grammars.json_schema(PERSON)
    engine = Engine(model, tokenizer, slots=3)
    config = SamplingConfig(temperature=1.0, top_p=1.0, seed=3, logprobs=1)
    ids = tokenizer.encode("The king")
    numbers = engine.submit_copies(
        Request(ids=ids, config=config, eos_id=tokenizer.eos_ids, constraint=constraint), 3
    )
    free = engine.submit(Request(ids=ids, config=config, eos_id=tokenizer.eos_ids))
    rows: dict[int, list[Event]] = {}
    for event in engine.run():
        rows.setdefault(event.row, []).append(event)
    for i, number in enumerate(numbers):
        alone = write(shipped, constraint, seed=3 + i, logprobs=1)
        assert [event._replace(row=0) for event in rows[number]] == alone
        jsonschema.validate(json.loads(text_of(alone)), PERSON)
        assert all(event.logprob is not None and event.top[0][1] >= event.logprob for event in alone)
    assert len(rows[free]) == 200 or rows[free][-1].finish == "eos"
    assert [e.token for e in rows[free]] == [e.token for e in write(shipped, None, logprobs=1)]


def test_an_end_of_text_that_is_always_likeliest_comes_only_at_the_end(
    shipped: tuple[LanguageModel, Tokenizer], grammars: Grammars
) -> None:
    model, tokenizer = shipped
    request = Request(
        ids=[5],
        config=SamplingConfig(temperature=0),
        eos_id=tokenizer.eos_ids,
        logit_bias={tokenizer.eos_id: 100},
        constraint=grammars.json_schema(PERSON),
    )
    engine = Engine(model, tokenizer)
    engine.submit(request)
    events = list(engine.run())
    jsonschema.validate(json.loads(text_of(events)), PERSON)
    assert events[-1].finish == "eos"


# tokenizers


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_any_tokenizer_with_a_file(name: str) -> None:
    special = ["<|pad|>", "<|user|>", "<|endoftext|>"]
    tokenizer = (
        ByteTokenizer() if name == "bytes" else train_bpe(["\u00e9t\u00e9 \u4e2d\u6587"] * 9, 270, special)
    )
    model = build(vocab_size=288)  # larger than the tokenizer's
    constraint = Grammars(tokenizer).regex("[\u00e9\u4e2d]{3}")
    engine = Engine(model, tokenizer)
    for seed in range(5):
        config = SamplingConfig(temperature=2.0, top_p=1.0, seed=seed)
        engine.submit(Request(ids=[66], config=config, eos_id=tokenizer.eos_ids, constraint=constraint))
    texts = [""] * 5
    for event in engine.run():
        assert event.error is None
        texts[event.row] += event.text
        assert (event.finish == "eos") == (event.token == tokenizer.eos_id)
        assert event.token not in set(tokenizer.special_tokens.values()) - {tokenizer.eos_id}
    assert all(len(text) == 3 and set(text) <= {"\u00e9", "\u4e2d"} for text in texts)
    assert len(set(texts)) > 1


def test_special_tokens_stand_where_a_grammar_names_them() -> None:
    tokenizer = train_bpe(["a b"] * 9, 270, ["<|user|>", "<|end|>", "<|endoftext|>"])
    grammars = Grammars(tokenizer, ends=[1, 2])
    [user, end, eos] = tokenizer.special_tokens.values()
    assert grammars.marker("<|user|>") == user
    assert grammars.marker("a b") is None
    free = grammars.regex("(?s:.*)")().allowed()
    assert free[[user, end, eos]].tolist() == [False, True, True]  # an empty text is complete
    named = grammars.lark(f'start: "a" <[{user}]> "b"', [user])()
    assert named.allowed().sum() == 1
    named.accept(tokenizer.encode("a")[0])
    assert named.allowed().nonzero()[0].tolist() == [user]
    named.accept(user)
    named.accept(tokenizer.encode("b")[0])
    assert named.allowed().nonzero()[0].tolist() == [end, eos]
    with pytest.raises(GrammarError):
        named.accept(user)


def test_a_tokenizer_without_a_file_is_refused() -> None:
    tokenizer = SentenceTokenizer.__new__(SentenceTokenizer)
    tokenizer.eos_id = 1
    with pytest.raises(LongscanError, match=r"a SentenceTokenizer is not what a tokenizer\.json describes"):
        Grammars(tokenizer)


# what strangers send


def nested(n: int) -> Any:
    value: list[Any] = []
    for _ in range(n):
        value = [value]
    return value


BAD_SCHEMAS: dict[str, tuple[Any, str]] = {
    "list": ([], "expected an object, got list"),
    "not": ({"items": {"not": {}}}, "items: the keyword 'not' is not supported"),
    "one-of": ({"anyOf": [{"oneOf": []}]}, "anyOf.0: the keyword 'oneOf'"),
    "unique": ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    "unknown": ({"king": 1}, "'king'"),
    "number": ({1: 2}, "'1'"),
    "guidance": ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
    "format": ({"type": "string", "format": "king"}, "Unknown format: king"),
    "type": ({"type": "king"}, "Invalid type: king"),
    "reference": ({"$ref": "https://example.com/x"}, "expected a reference inside the schema"),
    "file": ({"$ref": "file:///etc/passwd"}, "expected a reference inside the schema"),
    "missing": ({"$ref": "#/$defs/x"}, "'/\\$defs/x' does not exist"),
    "endless": ({"$ref": "#"}, "no text follows it"),
    "impossible": ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum .2. is greater"),
    "nan": ({"const": float("nan")}, "expected JSON values"),
    "object": ({"const": object()}, "expected JSON values"),
    "nested": ({"const": nested(100_000)}, "expected JSON values"),
    "enum": ({"enum": 7}, "enum: expected a list"),
    "values": ({"enum": list(range(1001))}, "enum: expected at most 1,000"),
    "properties": ({"properties": {f"p{i}": {} for i in range(257)}}, "properties: expected at most 256"),
    "listed": ({"properties": []}, "properties: expected schemas, got list"),
    "size": ({"const": "x" * 70_000}, "expected at most 65,536 bytes"),
    "deep": (json.loads('{"items":' * 40 + "{}" + "}" * 40), "expected at most 32 levels"),
    "multiple": ({"type": "integer", "multipleOf": 123456789}, "multipleOf: expected a common multiple"),
    "multiples": ({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}, "multipleOf: expected a common"),
    "tiny": ({"type": "number", "multipleOf": 1e-9}, "multipleOf: expected a common multiple"),
    "zero": ({"multipleOf": 0}, "multipleOf: expected a number above 0"),
    "infinite": ({"multipleOf": float("inf")}, "multipleOf: expected a number above 0"),
    "pattern": ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
    "bomb": ({"type": "string", "pattern": "(a{1000}){1000}"}, "repetitions written out"),
    "name": ({"patternProperties": {"(a{1000}){1000}": {}}}, "repetitions written out"),
    "length": ({"type": "string", "minLength": -1}, "minLength"),
}


@pytest.mark.parametrize(("schema", "words"), BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_bad_schemas(grammars: Grammars, schema: Any, words: str) -> None:
    begin = time.monotonic()
    with pytest.raises(GrammarError, match=words) as error:
        grammars.json_schema(schema)
    assert time.monotonic() - begin < 2
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "expected 1 to"),
        ("x" * 5000, "expected 1 to 4,096 characters"),
        (7, "expected text, got int"),
        ("(", "unclosed group"),
        (r"(a)\1", "backreferences are not supported"),
        ("[^\\x00-\\U0010FFFF]", "no text follows it"),
        *(
            (bomb, "repetitions written out")
            for bomb in ("(a{1000}){1000}", "((a{99}){99}){99}", "(a{300})+{300}")
        ),
    ],
)
def test_bad_expressions(grammars: Grammars, pattern: Any, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        grammars.regex(pattern)


@pytest.mark.parametrize(
    "pattern", [r"a\{2000\}", r"[a{9999}]", r"a{1,2000}b?", r"\p{Lu}{3}", "(a|b{500}){9}"]
)
def test_expressions_that_only_look_long(grammars: Grammars, pattern: str) -> None:
    assert grammars.regex(pattern)().allowed().any()


@pytest.mark.parametrize(
    ("pattern", "text"), [("a/b", "a/b"), ("a\nb", "a\nb"), (r"\d\.[/]", "7./"), ('"#', '"#')]
)
def test_expressions_match_what_they_say(
    shipped: tuple[LanguageModel, Tokenizer], grammars: Grammars, pattern: str, text: str
) -> None:
    follow = grammars.regex(pattern)()
    for token in shipped[1].encode(text):
        assert follow.allowed()[token] or len(text) == 3
        follow.accept(token)
    assert follow.allowed()[shipped[1].eos_id]


def test_compiled_grammars_are_bounded(grammars: Grammars) -> None:
    for i in range(3 * CACHED):
        grammars.json_schema({"const": f"number {i}"})
    assert len(grammars._compiled) == CACHED


def test_what_others_wrote_does_not_use_up_the_states_of_a_text(
    shipped: tuple[LanguageModel, Tokenizer], grammars: Grammars
) -> None:
    """Copies of a compiled grammar share an automaton, which may not grow for ever."""
    constraint = grammars.json_schema({"type": "string", "pattern": "(.*a.{20})|(.*b.{30})"})
    before = write(shipped, constraint, max_new_tokens=12)
    assert before[-1].error is None
    draw, failed = np.random.default_rng(0), 0
    for _ in range(30):
        follow = constraint()
        try:
            for _ in range(40):
                ids = follow.allowed().nonzero()[0]
                follow.accept(int(draw.choice(ids[ids > 0])))
        except (GrammarError, ValueError):
            failed += 1
    assert failed  # there was one that needed too many
    assert write(shipped, constraint, max_new_tokens=12) == before


def test_a_text_that_cannot_go_on_ends_alone(
    shipped: tuple[LanguageModel, Tokenizer], grammars: Grammars
) -> None:
    model, tokenizer = shipped
    config = SamplingConfig(temperature=50.0, top_p=1.0, seed=1, max_new_tokens=400)
    evil = grammars.json_schema({"type": "string", "pattern": "(.*a.{20})|(.*b.{30})"})
    engine = Engine(model, tokenizer)
    bad = engine.submit(Request(ids=[5], config=config, eos_id=tokenizer.eos_ids, constraint=evil))
    good = engine.submit(
        Request(ids=[5], config=config, eos_id=tokenizer.eos_ids, constraint=grammars.json_schema(PERSON))
    )
    last = {event.row: event for event in engine.run()}
    assert isinstance(last[bad].error, GrammarError)
    assert last[good].finish == "eos"


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(LongscanError, match=r"grammars need llguidance: pip install 'longscan\[serve\]'"):
        Grammars(ByteTokenizer())


# the command


def test_generate_follows_a_schema_or_an_expression(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON))
    got = cli("generate", "The king", "The queen", "--json-schema", str(file), "--seed", "1", "--json")
    for text in json.loads(got.out)["texts"]:
        jsonschema.validate(json.loads(text["text"]), PERSON)
        assert text["finish"] == "eos"
    got = cli("generate", "The king", "--regex", "(yes|no)!", "--quiet", "--speculate")
    assert got.out.strip().removeprefix("The king") in ("yes!", "no!")


def test_misuse_of_the_command(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text("[]")
    for code, words, *flags in (
        (2, "expected one of them", "--regex", "a", "--json-schema", str(file)),
        (1, "expected a JSON object", "--json-schema", str(file)),
        (1, "No such file", "--json-schema", str(tmp_path / "none")),
        (1, "unclosed group", "--regex", "("),
    ):
        got = cli("generate", "The king", *flags)
        assert (got.code, words in got.err) == (code, True), got.err


def chained(n: int) -> dict[str, Any]:
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(n - 1)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{n - 1}": {"type": "integer"}}}


def doubled(n: int) -> dict[str, Any]:
    twice = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}] * 2} for i in range(1, n)}
    return {"$ref": f"#/$defs/d{n - 1}", "$defs": {"d0": {"type": "string", "pattern": "a"}, **twice}}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": -(2**70), "maximum": -(2**69)}, "minimum: expected 0 or a number"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-300}, "exclusiveMaximum"),
        (chained(1400), "takes too long, or too much memory"),
        (doubled(30), "takes too long, or too much memory"),
        ({"$ref": "#/default", "default": {"multipleOf": 123456789}}, r"\$ref: expected a reference"),
        ({"type": "object", "minProperties": 2}, "'minProperties' is not supported"),
    ],
    ids=["far below", "close to 0", "a chain", "doubled", "into a note", "minProperties"],
)
def test_schemas_that_crash_or_fill_the_memory_are_refused_and_others_go_on(
    schema: dict[str, Any], words: str
) -> None:
    _, tokenizer = longscan.load("longscan-tiny-en")
    assert tokenizer is not None
    grammars = Grammars(tokenizer)
    with pytest.raises(GrammarError, match=words):
        grammars.json_schema(schema)
    assert grammars.json_schema({"type": "boolean"})().allowed().any()


def test_blanks_in_a_regular_expression_hide_no_repetitions() -> None:
    _, tokenizer = longscan.load("longscan-tiny-en")
    assert tokenizer is not None
    with pytest.raises(GrammarError, match="the flag x"):
        Grammars(tokenizer).regex("(?x) a {1000} {1000} ")
