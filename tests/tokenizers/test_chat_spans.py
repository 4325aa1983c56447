"""What an assistant writes in a conversation: exactly the answers, each with what ends it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import UsageError
from longscan.tokenizers.base import ByteTokenizer, Tokenizer
from longscan.tokenizers.bpe import BPETokenizer, train_bpe
from longscan.tokenizers.chat import BUILT_IN, ChatTemplate, Pieces, find_template, join
from longscan.tokenizers.chat_spans import Ends, Span, spans
from longscan.tokenizers.special_tokens import END_OF_TEXT

START, END = "<|im_start|>", "<|im_end|>"
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model.\nA small one."},
]
# the answers before the last are left out, as templates do with what a model thought
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% else %}(said){% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# nothing ends an answer but the next message
OPEN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe(["a few words to learn from, and a few more words"], 290, (START, END, END_OF_TEXT))


def found(template: ChatTemplate, tokenizer: Tokenizer, talk: list[dict[str, Any]]) -> list[list[Span]]:
    return spans(template, tokenizer, talk, Ends(*template.ends(tokenizer)))


def shown(tokenizer: Tokenizer, pieces: Pieces) -> str:
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    return "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)


def trained(tokenizer: Tokenizer, whole: list[Span]) -> list[str]:
    return [shown(tokenizer, pieces) for pieces, learnt in whole if learnt]


def test_answers_end_with_their_token(tokenizer: BPETokenizer) -> None:
    (whole,) = found(ChatTemplate(BUILT_IN["chatml"], "chatml", True), tokenizer, TALK)
    assert trained(tokenizer, whole) == [f"Hi!{END}", f"A model.\nA small one.{END}"]
    before = [shown(tokenizer, pieces) for pieces, learnt in whole if not learnt]
    assert before[0].endswith(f"{START}user\nHello{END}\n{START}assistant\n")
    assert before[1] == f"\n{START}user\nWho are you?{END}\n{START}assistant\n"


def test_answers_of_the_plain_template_end_where_the_user_speaks() -> None:
    tokenizer = ByteTokenizer()
    (whole,) = found(find_template(tokenizer), tokenizer, TALK)
    assert trained(tokenizer, whole) == [" Hi!\n\nUser:", " A model.\nA small one.\n\nUser:"]
    assert [shown(tokenizer, pieces) for pieces, learnt in whole if not learnt][1] == (
        " Who are you?\n\nAssistant:"
    )


def test_where_nothing_ends_an_answer_it_is_the_end_of_text(tokenizer: BPETokenizer) -> None:
    (whole,) = found(ChatTemplate(OPEN, "open", True), tokenizer, TALK)
    assert trained(tokenizer, whole) == [f"Hi!{END_OF_TEXT}", f"A model.\nA small one.{END_OF_TEXT}"]


def test_a_template_that_rewrites_gives_an_example_for_each_answer(tokenizer: BPETokenizer) -> None:
    one, two = found(ChatTemplate(FORGETS, "forgets", True), tokenizer, TALK)
    assert trained(tokenizer, one) == [f"Hi!{END}"]
    assert trained(tokenizer, two) == [f"A model.\nA small one.{END}"]
    assert "(said)" in shown(tokenizer, two[0].pieces)
    assert "Hi!" not in shown(tokenizer, two[0].pieces)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_spans_are_the_conversation_and_prompts_are_those_of_inference(talk: list[tuple[str, str]]) -> None:
    """Together the spans are what is rendered, and each answer stands behind its prompt."""
    tokenizer = train_bpe(["some words"], 280, (START, END, END_OF_TEXT))
    template = ChatTemplate(BUILT_IN["chatml"], "chatml", True)
    messages = [
        {"role": role, "content": text}
        for pair in talk
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    (whole,) = found(template, tokenizer, messages)
    joined = join([piece for pieces, _ in whole for piece in pieces])
    rendered = template.render(tokenizer, messages, prompt=False)
    assert shown(tokenizer, rendered).startswith(shown(tokenizer, joined))
    assert shown(tokenizer, rendered).removeprefix(shown(tokenizer, joined)) in ("", "\n")
    so_far: list[str | int] = []
    for number, span in enumerate(whole):
        if span.trained:
            prompt = template.render(tokenizer, messages[:number])
            assert join(so_far) == prompt
            assert trained(tokenizer, [span]) == [messages[number]["content"] + END]
        so_far += span.pieces


def test_another_role_after_an_answer_leaves_no_stray_user() -> None:
    tokenizer = ByteTokenizer()
    talk = [*TALK[1:3], {"role": "assistant", "content": "More."}, TALK[3], TALK[4]]
    template = find_template(tokenizer)
    (whole,) = found(template, tokenizer, talk)
    joined = "".join(shown(tokenizer, pieces) for pieces, _ in whole)
    assert joined == shown(tokenizer, template.render(tokenizer, talk, prompt=False)) + "User:"
    assert trained(tokenizer, whole) == [" Hi!\n\n", " More.\n\nUser:", " A model.\nA small one.\n\nUser:"]


def test_an_answer_of_no_weight_is_context(tokenizer: BPETokenizer) -> None:
    talk = [{**message, "weight": int(i != 2)} for i, message in enumerate(TALK)]
    for source in (BUILT_IN["chatml"], FORGETS):
        (whole,) = found(ChatTemplate(source, "x", True), tokenizer, talk)
        assert trained(tokenizer, whole) == [f"A model.\nA small one.{END}"]


def test_calls_of_tools_are_learnt_or_refused(tokenizer: BPETokenizer) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    talk = [TALK[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    source = BUILT_IN["chatml"].replace(
        "{{ message.content }}",
        "{{ message.content }}{% for c in message.tool_calls %}{{ c.function | tojson }}{% endfor %}",
    )
    (whole,) = found(ChatTemplate(source, "tools", True), tokenizer, talk)
    assert trained(tokenizer, whole) == [f'{{"name": "look", "arguments": {{"at": "it"}}}}{END}']
    with pytest.raises(UsageError, match="does not write the call of 'look'"):
        found(ChatTemplate(BUILT_IN["chatml"], "chatml", True), tokenizer, talk)


def test_what_lies_too_far_back_is_not_rendered(tokenizer: BPETokenizer) -> None:
    template = ChatTemplate(BUILT_IN["chatml"], "chatml", True)
    ends = Ends(*template.ends(tokenizer))
    (some,) = spans(template, tokenizer, TALK[1:3] * 300, ends, most=2000)
    assert 2000 < sum(len(piece) for pieces, _ in some for piece in pieces if isinstance(piece, str)) < 2100


@pytest.mark.parametrize(
    ("talk", "words"),
    [
        (TALK[:2], "answer of the assistant"),
        ([TALK[1], {"role": "assistant", "content": "  "}], r"messages\[1\].content"),
        ([TALK[1], {"role": "robot", "content": "x"}, TALK[2]], "role"),
    ],
)
def test_nothing_to_learn_is_refused(talk: list[dict[str, Any]], words: str, tokenizer: BPETokenizer) -> None:
    with pytest.raises(UsageError, match=words):
        found(ChatTemplate(BUILT_IN["chatml"], "chatml", True), tokenizer, talk)
