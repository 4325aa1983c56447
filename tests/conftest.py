"""What every test may use."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before anything imports the hub: no test reaches for the network

import hypothesis
import pytest

from longscan.cli import main

# for tests/test_fuzz.py, see CONTRIBUTING.md
hypothesis.settings.register_profile("fuzz", max_examples=20_000, print_blob=True)


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run the command line in this process: cli("generate", "Hello", "--seed", 0, stdin="") -> Done."""

    def run(*argv: object, stdin: str | bytes = "") -> Done:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run
