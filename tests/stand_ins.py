"""Objects that tests pass in: something real, of which one thing is replaced."""

from __future__ import annotations

from typing import Any

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


class PowerCut(Display):
    """Ends a run with an error in the step after some number of them."""

    def __init__(self, after: int) -> None:
        self.after = after

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.step > self.after:
            raise OSError("the power is gone")
