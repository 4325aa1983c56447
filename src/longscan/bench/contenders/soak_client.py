"""Clients of `longscan serve` that behave, and clients that do not; each knows what it must get.

What a prompt is answered with is known before: an engine with one slot has written it, here. So every answer
is compared, and one that belongs to another request is seen.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from longscan.bench.contenders.chat_client import events
from longscan.inference.engine import Engine
from longscan.inference.prefill import encode
from longscan.inference.request import Request
from longscan.inference.sampling import SamplingConfig
from longscan.inference.turns import encode_pieces
from longscan.models import LanguageModel
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import find_template

__all__ = ["KINDS", "Clients", "Known", "known_answers"]

WORDS = (
    "The king",
    "A horse",
    "Who goes there",
    "Love is",
    "Now",
    "O gentle lady",
    "Enter a ghost and",
    "My lord,",
)
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
TIMEOUT = 120.0
AGAIN = 100  # attempts after 429
MALFORMED: tuple[tuple[bytes, int], ...] = (  # body, status
    (b"", 400),
    (b"{", 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": "x", "max_tokens": -1}', 400),
    (b'{"prompt": "x", "temperature": NaN}', 400),
    (b'{"prompt": [99999999]}', 400),
    (b'{"prompt": ' + b"[" * 5000, 400),
    (b'{"prompt": "x", "model": "another"}', 404),
)


@dataclass(frozen=True)
class Known:
    """A request, and the texts that it must be answered with.

    Attributes:
        path: of the request.
        body: of it.
        texts: by choice.
    """

    path: str
    body: dict[str, Any]
    texts: tuple[str, ...]


def known_answers(model: LanguageModel, tokenizer: Tokenizer, name: str, n: int, seed: int) -> list[Known]:
    """Return requests with their answers, each written alone.

    Args:
        model: that the server has.
        tokenizer: of it.
        name: that the server calls it.
        n: requests: two completions of three, else chats.
        seed: of their contents.
    """
    random_ = random.Random(seed)
    template = find_template(tokenizer)
    ends, stops = template.ends(tokenizer)
    found = []
    for i in range(n):
        text = f"{random_.choice(WORDS)} {' '.join(random_.choices(WORDS, k=random_.randrange(12)))} {i}"
        body: dict[str, Any] = {"model": name, "max_tokens": random_.randrange(4, 24), "seed": i}
        body["n"] = random_.choice((1, 1, 1, 2))
        path, is_chat = (CHATS, True) if i % 3 == 2 else (COMPLETIONS, False)
        if is_chat:
            body["messages"] = [{"role": "user", "content": text}]
            ids = encode_pieces(tokenizer, template.render(tokenizer, body["messages"]))
        else:
            body["prompt"] = text
            ids = encode(tokenizer, [text])[0]
        config = SamplingConfig(
            max_new_tokens=body["max_tokens"], temperature=1.0, top_p=1.0, stop=stops if is_chat else ()
        )
        texts = [
            _alone(model, tokenizer, ids, config, i + k, ends if is_chat else tokenizer.eos_ids)
            for k in range(body["n"])
        ]
        found.append(Known(path, body, tuple(texts)))
    return found


def _alone(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    config: SamplingConfig,
    seed: int,
    ends: Sequence[int],
) -> str:
    """Return what an engine with one slot writes."""
    engine = Engine(model, tokenizer, slots=1)
    config = SamplingConfig.from_dict({**config.to_dict(), "seed": seed})
    engine.submit(Request(ids=ids, config=config, eos_id=ends))
    return "".join(event.text for event in engine.run())


class Clients:
    """Requests of all kinds to one server. Threads may share it.

    Args:
        port: on 127.0.0.1.
        known: requests with their answers.
        burst: requests of a flood at once: more than the server takes.

    Attributes:
        again: attempts that got 429 and were repeated.
        refused: requests of floods that got 429.
    """

    def __init__(self, port: int, known: Sequence[Known], burst: int) -> None:
        self._port, self._known, self._burst = port, known, burst
        self.again = self.refused = 0
        self._lock = threading.Lock()

    def whole(self, chance: random.Random) -> None:
        """Ask for a whole answer."""
        one = chance.choice(self._known)
        self._whole(one)

    def streamed(self, chance: random.Random) -> None:
        """Ask for a stream."""
        one = chance.choice(self._known)
        _expect(self._stream(one), one.texts)

    def slow(self, chance: random.Random) -> None:
        """Read a stream with pauses."""
        one = chance.choice(self._known)
        _expect(self._stream(one, pause=0.01), one.texts)

    def leaving(self, chance: random.Random) -> None:
        """Leave a long stream after a few events, or before the first."""
        body = {"prompt": chance.choice(WORDS), "max_tokens": 1500, "ignore_eos": True, "stream": True}
        n = chance.choice((0, 0, 1, 3, 8))
        with contextlib.closing(self._connect()) as connection:
            _post(connection, COMPLETIONS, body)
            if n:
                response = connection.getresponse()
                if response.status == 429:
                    return
                _expect(response.status, 200)
                for _ in range(2 * n):
                    response.readline()
                response.close()

    def malformed(self, chance: random.Random) -> None:
        """Send what no server can answer."""
        body, status = chance.choice(MALFORMED)
        _expect(self._ask(COMPLETIONS, body)[0], status)

    def half(self, chance: random.Random) -> None:
        """Send a part of a request, and leave."""
        whole = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n" + b"{" * 10
        with socket.create_connection(("127.0.0.1", self._port), TIMEOUT) as client:
            client.sendall(whole[: chance.randrange(len(whole) + 1)])

    def flood(self, chance: random.Random) -> None:
        """Ask more at once than the server takes: each gets its answer or 429, and some get the latter."""
        ones = chance.choices([one for one in self._known if one.body["n"] == 1], k=self._burst)
        gate = threading.Barrier(len(ones))

        def ask(one: Known) -> int:
            gate.wait(TIMEOUT)
            status, found, headers = self._ask(one.path, one.body)
            if status == 429:
                _expect(int(headers["retry-after"]) >= 1, True)
            else:
                _expect(status, 200)
                _expect(_texts(found), one.texts)
            return status

        with ThreadPoolExecutor(len(ones)) as pool:
            refused = list(pool.map(ask, ones)).count(429)
        _expect(refused > 0, True)
        with self._lock:
            self.refused += refused

    def _whole(self, one: Known) -> None:
        """Ask for a whole answer until there is room."""
        for _ in range(AGAIN):
            status, found, headers = self._ask(one.path, one.body)
            if status != 429:
                break
            self._wait(headers)
        _expect(status, 200)
        _expect(_texts(found), one.texts)

    def _stream(self, one: Known, pause: float = 0.0) -> tuple[str, ...]:
        """Return the texts of a stream, asked for until there is room."""
        for _ in range(AGAIN):
            texts, finished = [""] * one.body["n"], [0] * one.body["n"]
            try:
                for event in events(self._port, one.path, {**one.body, "stream": True}):
                    time.sleep(pause)
                    for choice in event["choices"]:
                        delta = choice.get("delta") or {}
                        texts[choice["index"]] += delta.get("content") or choice.get("text") or ""
                        finished[choice["index"]] += choice["finish_reason"] is not None
            except RuntimeError as error:
                if not str(error).startswith("status 429"):
                    raise
                self._wait({})
                continue
            _expect(finished, [1] * one.body["n"])
            return tuple(texts)
        raise AssertionError("there was never room for a stream")

    def _wait(self, headers: dict[str, str]) -> None:
        """Wait before another attempt."""
        with self._lock:
            self.again += 1
        time.sleep(min(1.0, float(headers.get("retry-after", 0.1))))

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)

    def _ask(self, path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        """Return the status, JSON and headers of an answer."""
        with contextlib.closing(self._connect()) as connection:
            _post(connection, path, body)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return response.status, json.loads(response.read()), headers


#: kind -> how often, in shares; what it does
KINDS: dict[str, tuple[int, Callable[[Clients, random.Random], None]]] = {
    "whole answers": (30, Clients.whole),
    "streams": (25, Clients.streamed),
    "slow readers": (2, Clients.slow),
    "leaving midway": (20, Clients.leaving),
    "malformed bodies": (15, Clients.malformed),
    "half-sent requests": (8, Clients.half),
}


def _post(connection: http.client.HTTPConnection, path: str, body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"})


def _texts(found: dict[str, Any]) -> tuple[str, ...]:
    """Return the texts of a whole answer, by choice."""
    choices = sorted(found["choices"], key=lambda choice: choice["index"])
    return tuple(c["message"]["content"] if "message" in c else c["text"] for c in choices)


def _expect(got: Any, expected: Any) -> None:
    """Raise unless two values are equal."""
    if got != expected:
        raise AssertionError(f"expected {str(expected)[:200]!r}, got {str(got)[:200]!r}")
