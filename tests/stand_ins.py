"""Objects that tests pass in: something real, of which one thing is replaced."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Literal

from longscan.core.progress import Display, Snapshot
from longscan.tokenizers.base import Tokenizer


class Instead:
    """Passes everything on to an object except the attributes given in place of its own."""

    def __init__(self, inner: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def instead(inner: Any, **attributes: Any) -> Any:
    """An object like another, also in the name of its class, but with these attributes."""
    return type(type(inner).__name__, (Instead,), {})(inner, **attributes)


def watched(tokenizer: Tokenizer) -> tuple[Any, list[int]]:
    """The tokenizer, and the list that collects the lengths of the texts it encodes."""
    lengths: list[int] = []

    def encode_batch(texts: list[str]) -> list[list[int]]:
        lengths.extend(map(len, texts))
        return tokenizer.encode_batch(texts)

    return instead(tokenizer, encode_batch=encode_batch, encode=lambda text: encode_batch([text])[0]), lengths


@contextmanager
def ctrl_c(
    name: Literal["stdout", "stderr"],
    text: str = "",
    *,
    at: int = 1,
    times: int = 1,
    terminal: bool = False,
    number: signal.Signals = signal.SIGINT,
) -> Iterator[None]:
    """Press Ctrl-C once a command has written something to a stream: SIGINT, to this process.

    Args:
        name: of the stream.
        text: what is written; anything if empty.
        at: the how-manieth write of that text.
        times: how often to press.
        terminal: whether the stream is a terminal.
        number: another signal to send.
    """
    stream, seen = getattr(sys, name), 0

    def write(written: str) -> int:
        nonlocal seen
        n: int = stream.write(written)
        seen += text in written
        if text in written and seen == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return n

    changed = {"write": write, **({"isatty": lambda: True} if terminal else {})}
    redirect = redirect_stdout if name == "stdout" else redirect_stderr
    # the tests themselves may have been started to ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with redirect(instead(stream, **changed)):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


class PowerCut(Display):
    """Ends a run with an error in the step after some number of them."""

    def __init__(self, after: int) -> None:
        self.after = after

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.step > self.after:
            raise OSError("the power is gone")
