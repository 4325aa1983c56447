"""`longscan chat`: a pipe, a terminal, files, and what goes wrong."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan import save
from longscan.commands import chat
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.chat import CHATML
from small_models import build

Cli = Callable[..., Any]
FEW = ("--max-new-tokens", 8, "--seed", 0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save(build(), path, ByteTokenizer({"default": CHATML}))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "base"
    save(build(), path, ByteTokenizer())
    return path


def test_a_pipe_is_one_message_and_only_the_answer_is_printed(cli: Cli, directory: Path) -> None:
    done = cli("chat", "--model", directory, *FEW, stdin="What is it?\n")
    assert done.code == 0
    assert done.err == ""
    assert done.out.endswith("\n")
    assert 1 < len(done.out) < 30
    assert cli("chat", "--model", directory, *FEW, stdin="What is it?").out == done.out


def test_the_size_of_the_state_is_printed_in_a_pipe(cli: Cli, directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    cli("chat", "--model", directory, *FEW, "--file", file, stdin="What is it?")
    before = file.read_text()
    done = cli("chat", "--model", directory, *FEW, "--file", file, stdin="/state\n")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"[\d.]+ ?[kM]?B after \d+ tokens, however long the conversation gets\n", done.out)
    assert file.read_text() == before


def test_a_terminal(cli: Cli, directory: Path, tmp_path: Path) -> None:
    lines = [
        *(
            "hello",
            "/state",
            "/retry",
            "and?",
            "/back",
            "",
            '"""two',
            'lines"""',
            f"/save {tmp_path}/talk.json",
        ),
        *("/system Be kind.", "again", "/nonsense", "/save", "/load nowhere.json", "/help", "/quit", "never"),
    ]
    done = cli("chat", "--model", directory, *FEW, stdin="\n".join(lines), terminal=True)
    assert done.code == 0, done.err
    assert done.err.count("remembered") == 5
    assert "0 remembered" in done.err
    assert "B after" in done.out
    assert "error: no command /nonsense: see /help." in done.err
    assert "error: /save: expected a file name." in done.err
    assert "error: nowhere.json: No such file" in done.err
    assert "/retry         answer the last question again" in done.err
    assert "plain" not in done.err  # the model has a template
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in talk["messages"] if m["role"] == "user"] == ["hello", "two\nlines"]
    assert (tmp_path / "talk.json.state").is_file()


def test_a_conversation_goes_on_in_its_file(cli: Cli, directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    cli("chat", "--model", directory, *FEW, "--file", file, stdin="one")
    assert "system" not in file.read_text()
    done = cli("chat", "--model", directory, *FEW, "--file", file, stdin="two\n", terminal=True)
    assert "user       one" in done.err
    assert "prefills all" not in done.err
    assert " 0 remembered" not in done.err
    assert [m["role"] for m in json.loads(file.read_text())["messages"]] == ["user", "assistant"] * 2
    file.with_name("talk.json.state").unlink()
    done = cli("chat", "--model", directory, *FEW, "--file", file, stdin="three\n", terminal=True)
    assert "the next turn prefills all" in done.err
    assert " 0 remembered" in done.err


def test_a_base_model_is_told_apart(cli: Cli, base: Path) -> None:
    done = cli("chat", "--model", base, *FEW, stdin="hello\n", terminal=True)
    assert "has no chat template: using 'plain'" in done.err
    assert "Falcon-H1-Tiny-90M-Instruct" in done.err
    assert cli("chat", "--model", base, *FEW, "--quiet", stdin="hello\n", terminal=True).err.split() == [
        "you",
        "you",
    ]


def test_an_answer_does_not_steer_the_terminal(cli: Cli, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = ["\x1b[2J", "\x07ok\u202e", "\x9b31m\r", "\n\tend"]
    monkeypatch.setattr(chat.Conversation, "say", lambda self, text: (piece for piece in hostile))
    assert cli("chat", "--model", base, stdin="hello").out == "[2Jok31m\n\tend\n"


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(
    cli: Cli, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longscan.models import Mamba

    step, steps = Mamba.step, []

    def interrupted(self: Mamba, *arguments: Any) -> tuple[torch.Tensor, Any]:
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(Mamba, "step", interrupted)
    file = tmp_path / "talk.json"
    done = cli(
        "chat", "--model", directory, "--max-new-tokens", 9, "--file", file, stdin="one\ntwo\n", terminal=True
    )
    assert done.code == 0
    assert " …" in done.out
    assert [m["role"] for m in json.loads(file.read_text())["messages"]] == ["user", "assistant"] * 2


def test_what_begins_with_a_slash(cli: Cli, directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "notes.json"
    other.write_text('{"a": 1}')
    file, second = tmp_path / "talk.json", tmp_path / "second.json"
    second.write_text('[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]')
    lines = [
        *('"""/etc is a folder"""', f"/save {other}", "/back 2", "/load", "/save", "/quit now? no"),
        "never",
    ]
    done = cli("chat", "--model", directory, *FEW, "--file", file, stdin="\n".join(lines), terminal=True)
    assert json.loads(file.read_text())["messages"][0]["content"] == "/etc is a folder"
    assert len(json.loads(file.read_text())["messages"]) == 2
    assert f"{other} exists and is no conversation" in done.err
    assert other.read_text() == '{"a": 1}'
    for words in ("expected nothing behind it", "/load: expected a file name", "/save: expected a file name"):
        assert words in done.err
    lines = [f"/load {second}", "more", "/clear", "/state", "/system @/nowhere"]
    done = cli("chat", "--model", directory, *FEW, "--file", file, stdin="\n".join(lines), terminal=True)
    assert len(json.loads(file.read_text())["messages"]) == 2  # the file is left to its conversation
    assert json.loads(second.read_text())["messages"] == []
    assert "after 0 tokens" in done.out
    assert "error: /nowhere: No such file" in done.err


def test_errors_do_not_steer_the_terminal(cli: Cli, base: Path, tmp_path: Path) -> None:
    (tmp_path / "esc.jinja").write_text(r"{{ raise_exception('\x1b]0;pwn\x07\x1b[31mred') }}")
    done = cli("chat", "--model", base, "--template", tmp_path / "esc.jinja", stdin="hi")
    assert (done.code, done.out) == (2, "")
    assert "rejects these messages: ]0;pwn[31mred" in done.err
    done = cli("chat", "--model", base, "--template", tmp_path / "esc.jinja", stdin="hi\n", terminal=True)
    assert "\x1b" not in done.err
    assert "rejects these messages" in done.err


def test_bytes_that_are_no_text(cli: Cli, directory: Path) -> None:
    done = cli("chat", "--model", directory, *FEW, stdin=b"a\xffb\nok\n", terminal=True)
    assert done.code in (0, 1)
    assert "UTF-8" in done.err or "utf-8" in done.err


@pytest.mark.parametrize(
    ("flags", "stdin", "code", "words"),
    [
        (["--temperature", "-1"], "x", 2, "temperature: expected 0 or more"),
        (["--template", "nope"], "x", 2, "no chat template 'nope': expected one of chatml, default, plain"),
        (["--system", "@/nowhere"], "x", 2, "--system @/nowhere: No such file"),
        (["--file", "/nowhere/talk.json"], "x", 1, "in a directory that exists"),
        ([], "", 2, "expected a message on stdin, got nothing"),
        ([], b"\xff", 1, "the message on stdin"),
    ],
)
def test_misuse(cli: Cli, directory: Path, flags: list[str], stdin: Any, code: int, words: str) -> None:
    done = cli("chat", "--model", directory, *flags, stdin=stdin)
    assert (done.code, done.out) == (code, "")
    assert words in done.err
