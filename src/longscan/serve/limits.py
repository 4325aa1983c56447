"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    Attributes:
        slots: texts of a model that decode at a time.
        queue: requests that wait.
        max_length: tokens of a text, prompt and continuation together.
        deadline: seconds that a request may take.
        cache_bytes: of the states of a model's conversations, and as much again of prefixes.
        body_bytes: of a request.
        connections: at a time.
        head_seconds: for the headers of a request.
        body_seconds: for its body.
    """

    slots: int = 8
    queue: int = 64
    max_length: int = 32768
    deadline: float = 600.0
    cache_bytes: int = 256 << 20
    body_bytes: int = 4 << 20
    connections: int = 1024
    head_seconds: float = 10.0
    body_seconds: float = 60.0
