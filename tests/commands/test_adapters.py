"""`--adapter`, several times: in a conversation, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters import write_adapter
from longscan import save
from longscan.checkpoints.adapter import CONFIG
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.chat import CHATML
from small_models import build

Cli = Callable[..., Any]
FEW = ("--max-new-tokens", 8, "--temperature", 0, "--seed", 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    save(build(), path / "base", ByteTokenizer({"default": CHATML}))
    for seed, name in enumerate(("one", "two")):
        write_adapter(build(), path / name, seed, std=2.0)
    return path


def answers(cli: Cli, home: Path, *flags: Any, lines: list[str]) -> Any:
    return cli("chat", "--model", home / "base", *FEW, *flags, stdin="\n".join(lines), terminal=True)


def test_a_conversation_changes_adapters(cli: Cli, home: Path) -> None:
    both = ("--adapter", home / "one", "--adapter", f"second={home / 'two'}")
    lines = ["hello", "/adapter", "/adapter second", "/retry", "/adapter none", "/retry", "/adapter none"]
    done = answers(cli, home, *both, lines=[*lines, "/adapter three", "/adapter one", "/retry"])
    assert done.code == 0, done.err
    assert "adapter one · /adapter switches" in done.err
    listed = "  none\n* one\n  second\n"
    note = (
        "second answers from now on, in place of one; the next turn prefills all, as a state is of one model"
    )
    assert note in done.err
    assert "none answers already" in done.err
    assert "error: /adapter three: there is none of this name: expected none, one, second." in done.err
    assert done.err.count(" 0 remembered") == 4  # nothing of the others' states

    def alone(*flags: Any) -> str:
        return answers(cli, home, *flags, lines=["hello"]).out

    of_one, of_two, of_base = alone(*both[:2]), alone("--adapter", home / "two"), alone()
    assert len({of_one, of_two, of_base}) == 3
    assert done.out == of_one + listed + of_two + of_base + of_one
    assert cli("chat", "--model", home / "base", *FEW, *both, stdin="hello").out == of_one


def test_a_saved_state_is_of_one_adapter(cli: Cli, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    answers(cli, home, "--adapter", home / "one", "--file", file, lines=["hello"])
    done = answers(cli, home, "--adapter", home / "two", "--file", file, lines=["and?"])
    assert "another model's: the next turn prefills all" in done.err
    done = answers(cli, home, "--adapter", home / "two", "--file", file, lines=["and?"])
    assert "another model's" not in done.err
    assert " 0 remembered" not in done.err


def generated(cli: Cli, home: Path, *flags: Any) -> Any:
    done = cli("generate", "--model", home / "base", *FEW, *flags)
    assert done.code == 0, done.err
    return done


def test_generate_compares_adapters(cli: Cli, home: Path) -> None:
    both = ("--adapter", home / "one", "--adapter", f"second={home / 'two'}")
    single = {name: generated(cli, home, "hello", "--adapter", home / name).out for name in ("one", "two")}
    named = generated(cli, home, "hello", "--adapter", f"mine={home / 'one'}")
    assert named.out == single["one"]  # one is merged, whatever its name
    done = generated(cli, home, "hello", *both)
    assert done.out == f"── one ──\n{single['one']}\n── second ──\n{single['two']}\n"
    assert "one, second · " in done.err
    assert "beside the base" in done.err
    done = generated(cli, home, "hello", "bye", *both)
    headings = [line for line in done.out.splitlines() if line.startswith("──")]
    assert headings == [f"── {name} · {i} of 2 ──" for name in ("one", "second") for i in (1, 2)]
    found = json.loads(generated(cli, home, "hello", "bye", *both, "--json", "--temperature", 1).out)
    assert [(one["adapter"], one["prompt"]) for one in found["texts"]] == [
        (name, prompt) for name in ("one", "second") for prompt in ("hello", "bye")
    ]
    alone = json.loads(
        generated(cli, home, "hello", "bye", "--adapter", home / "two", "--json", "--temperature", 1).out
    )
    assert "adapter" not in alone["texts"][0]
    assert [one["text"] for one in found["texts"][2:]] == [one["text"] for one in alone["texts"]]
    assert found["prompt_tokens"] == alone["prompt_tokens"]
    assert found["tokens"] == sum(one["tokens"] for one in found["texts"])


@pytest.mark.parametrize(
    "flag", [("--speculate",), ("--draft", "x"), ("--load-state", "x"), ("--save-state", "x")]
)
def test_generate_with_several_adapters_has_no_state(cli: Cli, home: Path, flag: tuple[str, ...]) -> None:
    both = ("--adapter", home / "one", "--adapter", home / "two")
    done = cli("generate", "hello", "--model", home / "base", *both, *flag)
    assert (done.code, done.out) == (2, "")
    assert "--adapter: expected one beside --load-state" in " ".join(done.err.split())


FAULTS = {
    "twice": (["{home}/one", "{home}/one"], "'one' is also the name of {home}/one. Use NAME=DIR."),
    "the-base": (["{base}={home}/one"], "'{base}' is also the name of the base"),
    "no-name": (["={home}/one"], "expected a name of letters"),
    "none": (["none={home}/one"], "which is not 'none', got 'none'"),
    "slash": (["../x={home}/one"], "found no directory"),
    "nothing": (["a={home}/nowhere"], "nowhere: expected an adapter"),
    "another-model": (["a={other}"], "it is damaged, or of another model"),
    "another-rank": (["a={rank}"], "r: expected 3, the rank of the matrices, got 7"),
}


@pytest.mark.parametrize("verb", ["chat", "serve", "generate"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(cli: Cli, home: Path, tmp_path: Path, verb: str, fault: str) -> None:
    given, message = FAULTS[fault]
    where = {"home": home, "base": "base" if verb == "serve" else "none"}
    if verb == "generate" and len(given) == 1:
        given = ["more={home}/two", *given]  # a single one is merged, and needs no name
    if verb != "serve" and fault == "the-base":
        message = "which is not 'none'"
    if "other" in given[-1]:
        where["other"] = write_adapter(build(vocab_size=300, name="llama"), tmp_path / "other")
    if "rank" in given[-1]:
        where["rank"] = write_adapter(build(), tmp_path / "rank")
        fields = json.loads((tmp_path / "rank" / CONFIG).read_text())
        (tmp_path / "rank" / CONFIG).write_text(json.dumps({**fields, "r": 7}))
    flags = [flag for one in given for flag in ("--adapter", one.format(**where))]
    port = ("--port", 0) if verb == "serve" else ()
    done = cli(verb, "--model", home / "base", *port, *flags, stdin="hello")
    assert done.code in (1, 2)
    assert done.out == ""
    expected = message.format(**where)
    if fault == "another-model":
        expected = "this model has no such matrix"
    assert expected in " ".join(done.err.split())
