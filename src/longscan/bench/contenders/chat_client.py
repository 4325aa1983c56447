"""A client of chat servers: the same for every one of them. Runs in the workers.

A stream is a thread that reads server-sent events and notes when each arrives. Threads share one core, and
the jobs say how much of it they took: were it much, the client would be what is measured.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from longscan.bench.contenders.chat_model import text
from longscan.bench.worker import Run

__all__ = ["Answer", "Endpoint", "answer_of", "conversation", "events", "load", "percentile"]

TIMEOUT = 600.0  # seconds without a byte


@dataclass(frozen=True)
class Endpoint:
    """A chat server.

    Attributes:
        port: on 127.0.0.1.
        pid: of its process.
        model: its name there.
        vocab_size: of its tokenizer; see `chat_model`.
    """

    port: int
    pid: int
    model: str
    vocab_size: int


@dataclass
class Answer:
    """A streamed answer.

    Attributes:
        begin: when it was asked for, in seconds.
        times: when each piece of its text came.
        text: of the answer.
        finish: why it ended.
    """

    begin: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    finish: str | None = None

    @property
    def first(self) -> float:
        """Seconds to its first piece."""
        return self.times[0] - self.begin

    @property
    def gaps(self) -> list[float]:
        """Seconds between its pieces."""
        return [after - before for before, after in pairwise(self.times)]


def load(endpoint: dict[str, Any], streams: int, prompt: int, n_tokens: int) -> Run:
    """Prepare concurrent streams, each with a prompt of its own.

    Args:
        endpoint: fields of `Endpoint`.
        streams: at a time.
        prompt: tokens of each message.
        n_tokens: of each answer.

    Returns:
        What to measure: its "seconds" are those in which all tokens come.
    """
    server, seeds, runs = Endpoint(**endpoint), count(1_000_000 * streams), list[list[Answer]]()
    shares: list[float] = []

    def run() -> dict[str, Any]:
        bodies = [_message("user", text(prompt, next(seeds), server.vocab_size)) for _ in range(streams)]
        begin, busy = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(streams) as pool:
            answers = list(pool.map(lambda body: answer_of(server, [body], n_tokens), bodies))
        seconds = time.perf_counter() - begin
        runs.append(answers)
        shares.append((time.process_time() - busy) / seconds)
        # a random model may end an answer: of 50,000 tokens one does
        tokens = sum(n_tokens if a.finish == "length" else len(a.times) for a in answers)
        counted = [answer for one in runs[1:] or runs for answer in one]  # the first run warms up
        firsts = [answer.first for answer in counted]
        gaps = [gap for answer in counted for gap in answer.gaps]
        return {
            "seconds": seconds * streams * n_tokens / tokens,
            "first_p50": percentile(firsts, 50),
            "first_p99": percentile(firsts, 99),
            "gap_p50": percentile(gaps, 50),
            "gap_p99": percentile(gaps, 99),
            "client_share": max(shares),
            "server_peak_bytes": _peak(server.pid),
        }

    return run


def conversation(endpoint: dict[str, Any], turns: int, message: int, n_tokens: int) -> Run:
    """Prepare a conversation that grows with every turn.

    Args:
        endpoint: fields of `Endpoint`.
        turns: of it.
        message: tokens of each message.
        n_tokens: of each answer.

    Returns:
        What to measure: `firsts` are the seconds to the first token, by turn, of each conversation.
    """
    server, seeds, firsts = Endpoint(**endpoint), count(7_000_000), list[list[float]]()

    def run() -> dict[str, Any]:
        messages, mine = list[dict[str, str]](), list[float]()
        for _ in range(turns):
            messages.append(_message("user", text(message, next(seeds), server.vocab_size)))
            answer = answer_of(server, messages, n_tokens)
            messages.append(_message("assistant", answer.text))
            mine.append(answer.first)
        firsts.append(mine)
        return {"firsts": firsts[1:] or firsts, "server_peak_bytes": _peak(server.pid)}

    return run


def answer_of(server: Endpoint, messages: Sequence[dict[str, str]], n_tokens: int) -> Answer:
    """Return a streamed answer to messages.

    Args:
        server: to ask.
        messages: of the chat.
        n_tokens: at most.

    Raises:
        RuntimeError: the server refuses, fails, or says nothing.
    """
    body = {
        "model": server.model,
        "messages": list(messages),
        "max_tokens": n_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "stream": True,
    }
    answer = Answer(time.perf_counter())
    for event in events(server.port, "/v1/chat/completions", body):
        if "choices" not in event:
            raise RuntimeError(f"the server says {json.dumps(event)[:300]}")
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                answer.times.append(time.perf_counter())
                answer.text += piece
            answer.finish = choice.get("finish_reason") or answer.finish
    if not answer.times:
        raise RuntimeError("the server answers without text")
    return answer


def events(port: int, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a streamed answer.

    Args:
        port: on 127.0.0.1.
        path: of the request.
        body: of the request.

    Raises:
        RuntimeError: the answer is an error.
    """
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(300).decode(errors='replace')}")
        for line in response:
            data = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                yield json.loads(data)


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Return a percentile of values; None without any.

    Args:
        values: in any order.
        percent: 50 is the median.
    """
    if len(values) < 2:
        return next(iter(values), None)
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _peak(pid: int) -> int | None:
    """Return the peak resident set of a process in bytes, None where it is unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
