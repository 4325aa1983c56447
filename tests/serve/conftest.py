"""A server with the model that ships."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import longscan
from live_server import serving
from longscan.serve.service import Service


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[Service, int]]:
    """A service and its port."""
    model, tokenizer = longscan.load("longscan-tiny-en")
    assert tokenizer is not None
    with serving(model, tokenizer, "longscan-tiny-en") as server:
        yield server
