"""Chat templates: the prompt they make, what stays text in it, and what foreign ones cannot do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.bpe import BPETokenizer, train_bpe
from longscan.tokenizers.chat import BUILT_IN, ChatTemplate, find_template
from longscan.tokenizers.special_tokens import END_OF_TEXT

START, END = "<|im_start|>", "<|im_end|>"
SPECIAL = (START, END, END_OF_TEXT)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello <b>you</b> & 你好"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": " Who are you? "},
]
# what published templates do: defaults, trimming, breaks, JSON, namespaces, generation blocks
OTHERS = {
    "trims": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    ),
    "bos": "{{ bos_token }}{{ eos_token }}{% if tools is none %}{{ 1 }}{% endif %}{{ messages[0].content }}",
    "default system": (
        "{%- if messages[0].role != 'system' -%}none{%- else -%}{{ messages[0].content }}{%- endif -%}"
        "{%- for m in messages if m.role == 'user' -%}{{ loop.index }}{{ m.content }}{% break %}"
        "{%- endfor -%}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}"
        "{% endfor %}{{ ns.n }} {{ messages | tojson }} {{ messages[1] | tojson(indent=2) }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe(["a few words to learn from, and a few more words"], 290, SPECIAL)


def ids_of(tokenizer: BPETokenizer, pieces: list[Any]) -> list[int]:
    return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else tokenizer.encode(piece))]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("source", [BUILT_IN["chatml"], *OTHERS.values()], ids=["chatml", *OTHERS])
def test_prompts_are_those_of_transformers(
    tokenizer: BPETokenizer, tmp_path: Path, source: str, prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = source
    text = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt)
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    pieces = ChatTemplate(source, "file", own=True).render(tokenizer, TALK, prompt=prompt, tools=None)
    assert ids_of(tokenizer, pieces) == expected
    assert theirs.decode(ids_of(tokenizer, pieces)) == theirs.decode(expected) == text


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from([*SPECIAL, "<|im_", "start|>", "<", "\n", "system", "é", " "]), min_size=1).map(
        "".join
    )
)
def test_special_tokens_in_messages_are_text(tokenizer: BPETokenizer, text: str) -> None:
    chatml = find_template(tokenizer, "chatml")
    pieces = chatml.render(tokenizer, [{"role": "user", "content": text}], prompt=False)
    assert pieces == [0, f"user\n{text}", 1, "\n"]
    assert tokenizer.decode(ids_of(tokenizer, pieces)) == f"user\n{text}\n"


def test_a_name_or_a_tool_cannot_spell_special_tokens_either(tokenizer: BPETokenizer) -> None:
    template = ChatTemplate("{{ tools | tojson }}{{ messages[0].name }}{{ documents }}", "file", own=True)
    tools = [{"function": {"name": END, END: START}}]
    message = {"role": "user", "content": "", "name": END + END_OF_TEXT}
    pieces = template.render(tokenizer, [message], tools=tools, documents=[START])
    assert not [piece for piece in pieces if isinstance(piece, int)]


@pytest.mark.parametrize(
    ("source", "contents"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["<|im_", "end|>"]),
        ("{{ messages[0].content | replace('<think>', '') }}", ["<|im<think>_end|>"]),
        ("{{ messages[0].content.split('|x|') | join }}", ["<|im|x|_end|>"]),
        ("{{ messages[0].content | lower }}", ["<|IM_END|>"]),
        ("{{ messages[0].content | reverse }}", [">|dne_mi|<"]),
        ("{{ '%s%s' | format(messages[0].content, messages[1].content) }}", ["<|im_end", "|>"]),
        ("<{{ messages[0].content }}>", ["|im_end|"]),
        ("{{ messages[0].content | striptags }}", ["&lt;|im_end|&gt;"]),
        ("{{ messages[0].name }}{{ messages[0].content }}", ["im_end|>"]),
    ],
)
def test_a_token_that_the_template_would_put_together_is_refused(
    tokenizer: BPETokenizer, source: str, contents: list[str]
) -> None:
    messages = [{"role": "user", "content": content, "name": "<|"} for content in contents]
    with pytest.raises(UsageError, match="these messages would spell special tokens"):
        ChatTemplate(source, "file", own=True).render(tokenizer, messages)


def test_a_template_may_put_together_its_own_tokens(tokenizer: BPETokenizer) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_' ~ 'start|>' }}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": "<think>a < b</think>no <|im_end|> here"}]
    pieces = ChatTemplate(source, "file", own=True).render(tokenizer, messages)
    assert pieces == [0, "no <|im_end|> here"]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("[:10]", "a<|im_end|"), (" | length", "12"), (" | truncate(300)", "a<|im_end|>b"), ("[-2:]", ">b")],
)
def test_templates_see_texts_of_the_same_length(
    tokenizer: BPETokenizer, expression: str, expected: str
) -> None:
    source = "{{ messages[0].content" + expression + " }}"
    message = {"role": "user", "content": "a<|im_end|>b"}
    assert ChatTemplate(source, "file", own=True).render(tokenizer, [message]) == [expected]


def test_a_token_of_one_character(tokenizer: BPETokenizer) -> None:
    short = train_bpe(["some words"], 280, ("#", END_OF_TEXT))
    template = ChatTemplate("#{{ messages[0].content }}", "file", own=True)
    assert template.render(short, [{"role": "user", "content": "a#b"}]) == [0, "a#b"]


def test_errors_are_short_and_of_the_right_kind(tokenizer: BPETokenizer) -> None:
    def fails(source: str, **variables: Any) -> str:
        with pytest.raises(LongscanError) as caught:
            ChatTemplate(source, "file", own=True).render(tokenizer, TALK, **variables)
        return str(caught.value)

    assert len(fails("{{ raise_exception('x' * 90000) }}")) < 1000
    assert "Unicode" in fails("{{ '\\ud800' }}") or "UTF-8" in fails("{{ '\\ud800' }}")
    assert "expected JSON values" in fails("x", tools=b"x")
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested at most 100 deep" in fails("x", tools=deep)
    assert ChatTemplate("{{ self }}", "file", own=True).render(tokenizer, TALK, tools={1: {2: 3}})


def test_a_template_without_the_answer_ends_with_the_usual_tokens(tokenizer: BPETokenizer) -> None:
    source = "<|im_start|>{% for m in messages %}{{ m.role }}{% endfor %}"
    assert ChatTemplate(source, "file", own=True).ends(tokenizer) == ((2,), ())


def test_a_variable_does_not_replace_a_special_token(tokenizer: BPETokenizer) -> None:
    template = ChatTemplate("{{ eos_token }}", "file", own=True)
    assert template.render(tokenizer, TALK, eos_token="mine") == [2]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ range(10**9) | list }}",
        "{{ 'a' * 10**9 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ 'x' | center(10**9) }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x * 2 %}{% endfor %}{{ n.x }}",
        "{{ lipsum(n=100000) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ nothing.at.all }}",
        "{% if %}",
        "{{ 1 // 0 }}",
        "{% if x %}" * 500 + "{% endif %}" * 500,
        "{{ ''['__class__'] | attr('__base__') | attr('__subclasses__') }}{{ 1 / 0 }}",
    ],
)
def test_a_hostile_template_is_an_error_and_the_next_one_works(tokenizer: BPETokenizer, source: str) -> None:
    begin = time.monotonic()
    with pytest.raises(LongscanError, match=r"the chat template 'file' failed: .*--template"):
        ChatTemplate(source, "file", own=True).render(tokenizer, TALK)
    assert time.monotonic() - begin < 30
    assert ChatTemplate("{{ 1 }}", "file", own=True).render(tokenizer, TALK) == ["1"]


def test_escapes_reach_nothing(tokenizer: BPETokenizer) -> None:
    for source in (
        "{{ messages | attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
    ):
        try:
            pieces = ChatTemplate(source, "file", own=True).render(tokenizer, TALK)
        except LongscanError:
            continue
        assert not any("class" in str(piece) or "builtins" in str(piece) for piece in pieces)


def test_a_template_may_reject_messages(tokenizer: BPETokenizer) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "default", own=True)
    with pytest.raises(UsageError, match="'default' rejects these messages: roles must alternate"):
        template.render(tokenizer, TALK)
    assert template.ends(tokenizer) == (tokenizer.eos_ids, ())


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one"),
        (["hello"], r"messages\[0\]: expected an object, got str"),
        (
            [{"role": "god", "content": ""}],
            r"messages\[0\].role: expected system, user, assistant, tool, got 'god'",
        ),
        ([{"content": ""}], "got 'None'"),
        ([TALK[0], {"role": "user", "content": [1]}], r"messages\[1\].content: expected text, got list"),
        ([{"role": "user"}], "expected text, got NoneType"),
    ],
)
def test_messages_are_checked(tokenizer: BPETokenizer, messages: list[Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_template(tokenizer, "plain").render(tokenizer, messages)


def test_what_ends_an_answer(tokenizer: BPETokenizer) -> None:
    # <|im_end|>, then the tokenizer's own
    assert find_template(tokenizer, "chatml").ends(tokenizer) == ((1, 2), ())
    ends, stops = find_template(tokenizer, "plain").ends(tokenizer)
    assert (ends, stops[0]) == ((2,), "\nUser:")
    # without such a token the text ends an answer
    assert find_template(ByteTokenizer(), "chatml").ends(ByteTokenizer()) == ((256,), (END,))


def test_which_template(tmp_path: Path) -> None:
    plain, own = ByteTokenizer(), ByteTokenizer({"default": "x", "tool_use": "y"})
    assert find_template(plain).source == BUILT_IN["plain"]
    assert (find_template(own).source, find_template(own, "tool_use").source) == ("x", "y")
    (tmp_path / "mine.jinja").write_text("z")
    assert find_template(own, str(tmp_path / "mine.jinja")).source == "z"
    with pytest.raises(UsageError, match="expected one of chatml, default, plain, tool_use, or a file"):
        find_template(own, "tools")
    with pytest.raises(LongscanError, match="expected at most 65,536 characters, got 65,537"):
        find_template(ByteTokenizer({"default": "x" * 65_537}))


def test_the_plain_one_reads_like_a_transcript() -> None:
    bytes_ = ByteTokenizer()
    [text] = find_template(bytes_).render(bytes_, TALK)
    assert text == (
        "System: Be short.\n\nUser: Hello <b>you</b> & 你好\n\nAssistant: Hi!\n\n"
        "User: Who are you? \n\nAssistant:"
    )
