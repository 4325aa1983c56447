"""Conversations: a turn prefills only what is new, and says what a fresh start would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longscan.errors import LongscanError, UsageError
from longscan.inference.chat import Conversation
from longscan.inference.generate import generate_ids
from longscan.inference.sampling import SamplingConfig
from longscan.models import LanguageModel
from longscan.tokenizers.bpe import train_bpe
from longscan.tokenizers.chat import find_template
from longscan.tokenizers.special_tokens import END_OF_TEXT
from small_models import NAMES, build

SPECIAL = ("<|im_start|>", "<|im_end|>", END_OF_TEXT)
TOKENIZER = train_bpe(["a few words to learn from, and a few more words"], 290, SPECIAL)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(TOKENIZER.vocab_size, name=request.param)


@pytest.fixture(scope="module")
def mamba() -> LanguageModel:
    return build(TOKENIZER.vocab_size)


def talk(
    model: LanguageModel, template: str = "chatml", system: str | None = None, **sampling: Any
) -> Conversation:
    config = SamplingConfig.from_dict({"temperature": 0, "max_new_tokens": 12, "seed": 0, **sampling})
    return Conversation(model, TOKENIZER, find_template(TOKENIZER, template), config=config, system=system)


def say(conversation: Conversation, text: str) -> str:
    return "".join(conversation.say(text))


class Recorded(Conversation):
    """Notes all ids that the model has seen, and the answers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.seen: list[int] = []
        self.before: list[int] = []
        super().__init__(*arguments, **options)

    def _encode(self, pieces: Any) -> Any:
        ids = super()._encode(pieces)
        self.seen += ids.tolist()
        self.before = list(self.seen)
        return ids

    def _keep(self, prompt: Any, written: Any, saved: Any, ended: bool = False) -> None:
        self.seen += written.ids[: saved.position + len(saved.pending) - written.begin]
        super()._keep(prompt, written, saved, ended)


def test_a_turn_prefills_only_what_is_new(model: LanguageModel) -> None:
    system = "You are a " + "very " * 300 + "patient listener."
    template = find_template(TOKENIZER, "chatml")
    conversation = Recorded(model, TOKENIZER, template, config=GREEDY, system=system)
    for turn in range(5):
        say(conversation, f"question {turn}")
        from_scratch = generate_ids(model, [conversation.before], GREEDY, eos_id=None)
        assert [event.token for event in from_scratch] == conversation.seen[len(conversation.before) :]
        fresh = talk(model)
        fresh.messages = conversation.messages[:-2]
        say(fresh, f"question {turn}")
        assert fresh.turn.remembered == 0
        took = conversation.turn
        assert took.written == 12
        assert took.finish == "length"
        # the end of the last answer, the roles, the question: not what came before
        assert took.read < 40 if turn else took.read > 600
        assert took.read + took.remembered == pytest.approx(fresh.turn.read, abs=12 * (turn + 1))
        assert conversation.position == took.read + took.remembered + 12


def test_an_answer_that_ends_itself_needs_no_tokens_again(mamba: LanguageModel) -> None:
    conversation = talk(mamba, temperature=50.0, top_p=1.0, max_new_tokens=5_000)
    for _ in range(4):
        say(conversation, "more")
        assert conversation.turn.finish == "eos"
    if conversation.turn.remembered:
        assert conversation.turn.read < 40


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_an_answer_that_ends_itself_is_not_read_again(mamba: LanguageModel, template: str) -> None:
    long = "s" * 300
    first = Recorded(mamba, TOKENIZER, find_template(TOKENIZER, template), config=GREEDY, system=long)
    say(first, "a")
    written = first.seen[len(first.before) :]
    at = next(i for i in range(1, 12) if written[i] not in written[:i])
    second = Recorded(mamba, TOKENIZER, find_template(TOKENIZER, template), config=GREEDY, system=long)
    second._ends = (written[at],)
    text = say(second, "a")
    assert second.turn.finish == "eos"
    assert second.turn.written == at + 1
    say(second, "b")
    # the plain template puts a space before an answer that has none
    assert second.turn.remembered > 300
    assert second.turn.read < (50 if template == "chatml" or text[:1].isspace() else 80)


def test_an_answer_that_a_stop_string_ends_is_not_read_again(model: LanguageModel) -> None:
    first = talk(model, system="s" * 300)
    text = say(first, "a")
    stop = next(text[i : i + 3] for i in range(4, len(text) - 3) if text.find(text[i : i + 3]) == i)
    config = SamplingConfig(temperature=0, max_new_tokens=12, stop=(stop,))
    template = find_template(TOKENIZER, "chatml")
    second = Recorded(model, TOKENIZER, template, config=config, system="s" * 300)
    assert say(second, "a") == text[: text.index(stop)]
    assert second.turn.finish == "stop"
    say(second, "b")
    assert second.turn.remembered > first.turn.read
    assert second.turn.read < 50
    written = [event.token for event in generate_ids(model, [second.before], GREEDY, eos_id=None)]
    held = second.seen[len(second.before) :]
    assert held
    assert held == written[: len(held)]


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_retry_and_back(mamba: LanguageModel, template: str) -> None:
    conversation = talk(mamba, template, temperature=1.5)
    with pytest.raises(UsageError, match="no answer yet"):
        next(conversation.retry())
    assert not conversation.undo()
    first = say(conversation, "one")
    second = say(conversation, "two")
    again = "".join(conversation.retry())
    assert again != second
    assert conversation.turn.read < 12  # the generation prompt: the question is known
    assert [m["content"] for m in conversation.messages] == ["one", first, "two", again]
    assert conversation.undo()
    assert [m["content"] for m in conversation.messages] == ["one", first]
    say(conversation, "three")
    assert len(conversation.messages) == 4
    # the plain template puts a space before an answer, whether or not the model wrote one
    assert conversation.turn.read < (40 if template == "chatml" else 80)
    conversation.system("now different")
    say(conversation, "four")
    assert conversation.turn.remembered == 0
    assert [m["role"] for m in conversation.messages[:2]] == ["system", "user"]
    conversation.system("")
    assert conversation.messages[0]["role"] == "user"


def test_a_stopped_answer_stays(model: LanguageModel) -> None:
    conversation = talk(model, max_new_tokens=200)
    answer = conversation.say("go on")
    begun = "".join(next(answer) for _ in range(5))
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": begun}
    assert conversation.turn.finish is None
    assert conversation.turn.written == 5
    after = say(conversation, "and now?")
    fresh = talk(model, max_new_tokens=200)
    fresh.messages = conversation.messages[:-2]
    assert say(fresh, "and now?") == after


def test_a_message_that_the_template_rejects_changes_nothing(mamba: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "strict.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('bad word') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    conversation = talk(mamba, str(file))
    say(conversation, "good")
    before = list(conversation.messages)
    with pytest.raises(UsageError, match="bad word"):
        say(conversation, "bad")
    assert conversation.messages == before
    say(conversation, "good again")  # and a template without a generation prompt works
    assert conversation.turn.remembered > 0


def test_what_was_removed_is_not_saved(mamba: LanguageModel, tmp_path: Path) -> None:
    conversation, file = talk(mamba), tmp_path / "talk.json"
    say(conversation, "my secret")
    conversation.save(file)
    assert conversation.position > 0
    conversation.undo()
    assert conversation.position == 0
    conversation.save(file)
    assert "secret" not in file.read_text()
    assert not (tmp_path / "talk.json.state").exists()
    assert not talk(mamba).load(file)


def test_what_changed_during_an_answer_stays(mamba: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text('[{"role": "user", "content": "loaded"}]')
    conversation = talk(mamba)
    answer = conversation.say("a")
    next(answer)
    conversation.load(tmp_path / "l.json")
    answer.close()
    assert conversation.messages == [{"role": "user", "content": "loaded"}]
    with pytest.raises(LongscanError, match="got a directory"):
        conversation.save(tmp_path)


def test_one_answer_at_a_time(mamba: LanguageModel) -> None:
    conversation = talk(mamba)
    answer = conversation.say("a")
    next(answer)
    with pytest.raises(UsageError, match="an answer is being written"):
        next(conversation.say("b"))
    rest = list(answer)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert rest
    say(conversation, "c")


def test_a_template_by_name_and_one_that_renders_nothing(mamba: LanguageModel, tmp_path: Path) -> None:
    assert Conversation(mamba, TOKENIZER, "chatml").template.name == "chatml"
    (tmp_path / "empty.jinja").write_text("")
    with pytest.raises(LongscanError, match="renders nothing to answer"):
        say(talk(mamba, str(tmp_path / "empty.jinja")), "a")


def test_a_list_of_messages_is_a_conversation(mamba: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"role": "user", "content": "a"}]')
    conversation = talk(mamba)
    assert not conversation.load(tmp_path / "list.json")
    assert conversation.messages == [{"role": "user", "content": "a"}]


def test_saved_and_loaded(model: LanguageModel, tmp_path: Path) -> None:
    conversation = talk(model, system="s")
    say(conversation, "first")
    conversation.save(tmp_path / "talk.json")
    loaded = talk(model)
    assert loaded.load(tmp_path / "talk.json")
    assert loaded.messages == conversation.messages
    assert say(loaded, "second") == say(conversation, "second")
    assert loaded.turn.remembered == conversation.turn.remembered > 0
    loaded.save(tmp_path / "talk.json")  # over the old one
    assert talk(model).load(tmp_path / "talk.json")


@pytest.mark.parametrize("damage", ["missing", "older", "cut", "other model", "no pieces", "no hash"])
def test_a_state_that_does_not_belong_is_not_used(mamba: LanguageModel, tmp_path: Path, damage: str) -> None:
    path, state = tmp_path / "talk.json", tmp_path / "talk.json.state"
    conversation = talk(mamba)
    say(conversation, "first")
    conversation.save(path)
    older = state.read_bytes()
    say(conversation, "second")
    conversation.save(path)
    content = json.loads(path.read_text())
    model = mamba
    if damage == "missing":
        state.unlink()
    elif damage == "older":
        state.write_bytes(older)  # killed between the two files
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:-4])
    elif damage == "other model":
        model = build(TOKENIZER.vocab_size, seed=1)
    else:
        content["state"].pop({"no pieces": "holds", "no hash": "sha256"}[damage])
        path.write_text(json.dumps(content))
    loaded = talk(model)
    assert not loaded.load(path)
    assert loaded.messages == conversation.messages
    answer = say(loaded, "third")
    fresh = talk(model)
    fresh.messages = conversation.messages
    assert say(fresh, "third") == answer


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("3", "expected a JSON object"),
        ("{}", "a list of messages"),
        ('{"messages": [{"role": "god"}]}', r"messages\[0\].role"),
        ("not JSON", "as JSON"),
    ],
)
def test_a_damaged_conversation_is_an_error(
    mamba: LanguageModel, tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "talk.json").write_text(content)
    conversation = talk(mamba)
    with pytest.raises(LongscanError, match=words):
        conversation.load(tmp_path / "talk.json")
    assert conversation.messages == []


def test_old_states_make_way(mamba: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from longscan.inference import chat

    monkeypatch.setattr(chat, "BUDGET", 1)
    conversation = talk(mamba)
    for _ in range(4):
        say(conversation, "more")
        assert conversation._turns.count == 2
    assert conversation.turn.read < 40
