"""What every test may use."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before anything imports the hub: no test reaches for the network

import hypothesis
import pytest

from longscan.cli import main
from longscan.ops import _native

# under nohup and in background jobs of shells these are ignored, and tests send them
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# for tests/test_fuzz.py, see CONTRIBUTING.md
hypothesis.settings.register_profile("fuzz", max_examples=20_000, print_blob=True)


_ARM = ("neon", "dotprod")
ISAS = _ARM if _native.info.isa in _ARM else ("baseline", "avx2", "avx512", "avx512vnni")


@contextlib.contextmanager
def chosen(isa: str) -> Iterator[str]:
    """Run the kernels of an instruction set, if this processor has it."""
    library = _native._library
    if library is None or library.ls_choose_isa(isa.encode()):
        pytest.skip(f"no {isa} kernels here")
    yield isa
    library.ls_choose_isa(os.environ.get("LONGSCAN_ISA", "").encode())


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on every instruction set."""
    with chosen(request.param) as isa:
        yield isa


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test on the fallback and on every instruction set."""
    if request.param == "reference":
        monkeypatch.setattr(_native, "_library", None)
        yield "reference"
    else:
        with chosen(request.param) as isa:
            yield isa


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Typed(io.TextIOWrapper):
    """Standard input that is typed at a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run the command line in this process: cli("generate", "Hello", "--seed", 0, stdin="") -> Done."""

    def run(*argv: object, stdin: str | bytes = "", terminal: bool = False) -> Done:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        kind = Typed if terminal else io.TextIOWrapper
        monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run
