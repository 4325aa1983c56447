"""Clients that do not ask, ask slowly, or are too many; and the turn after a stop string."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from live_server import NAME, post, running, until
from longscan.serve.limits import Limits
from longscan.serve.service import Service
from longscan.serve.streaming import stream

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
Live = tuple[Service, int]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with running(Limits(connections=6, head_seconds=0.3, body_seconds=0.4)) as server:
        yield server


def rest(client: socket.socket) -> bytes:
    """What a server sends until it closes."""
    client.settimeout(20)
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def said(answer: bytes) -> tuple[int, str]:
    """Status and code of an error in OpenAI's shape."""
    head, body = answer.split(b"\r\n\r\n", 1)
    found = json.loads(body)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), found["code"]


@pytest.mark.parametrize("begin", [b"PO", HEAD, HEAD + b"Content-Length: 1"], ids=range(3))
def test_headers_that_do_not_end(live: Live, begin: bytes) -> None:
    with socket.create_connection(("127.0.0.1", live[1])) as client:
        client.sendall(begin)
        assert said(rest(client)) == (408, "request_timeout")


def test_a_connection_that_asks_nothing(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", live[1])) as client:
        assert rest(client) == b""


def test_headers_that_come_drop_by_drop(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", live[1])) as client:
        client.settimeout(0.05)
        answer = b""
        for _ in range(100):
            try:
                client.sendall(b"P")
                answer = client.recv(1 << 16)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_the_second_request_of_a_connection_has_no_more_time(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", live[1])) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.settimeout(20)
        answer = b""
        while b'{"status":"ok"}' not in answer:
            answer += client.recv(1 << 16)
        client.sendall(HEAD)
        assert said(rest(client)) == (408, "request_timeout")


@pytest.mark.parametrize("framing", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_body_that_does_not_end(live: Live, framing: bytes) -> None:
    with socket.create_connection(("127.0.0.1", live[1])) as client:
        client.sendall(HEAD + framing)
        assert said(rest(client)) == (408, "request_timeout")


def test_a_body_whose_client_leaves(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        with socket.create_connection(("127.0.0.1", live[1])) as client:
            client.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        until(lambda: any(" 499 " in record.getMessage() for record in caplog.records))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_working_request_is_not_cut(live: Live) -> None:
    """The times are for asking, not for the answer."""
    body = {"prompt": "The", "max_tokens": 1500, "ignore_eos": True}
    status, found = post(live[1], "/v1/completions", body)
    assert (status, found["usage"]["completion_tokens"]) == (200, 1500)


def test_too_many_connections(live: Live) -> None:
    clients = []
    try:
        while len(clients) < 9:
            clients.append(socket.create_connection(("127.0.0.1", live[1])))
            clients[-1].sendall(HEAD + b"Content-Length: 1\r\n\r\n")
        answers = sorted(said(rest(client)) for client in clients)
        assert answers == [(408, "request_timeout")] * 6 + [(503, "too_many_connections")] * 3
    finally:
        for client in clients:
            client.close()
    assert post(live[1], "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_what_is_not_http(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", live[1])) as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert said(rest(client)) == (400, "invalid_http")


def test_a_request_for_a_websocket_is_one_like_others(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", live[1])) as client:
        client.sendall(
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_turn_after_a_stop_string() -> None:
    with running() as (service, port):
        ask = {"model": NAME, "max_tokens": 40, "temperature": 0}
        messages = [{"role": "system", "content": "Speak. " * 50}, {"role": "user", "content": "Who comes?"}]
        _, free = post(port, "/v1/chat/completions", {**ask, "messages": messages})
        text = free["choices"][0]["message"]["content"]
        stop = text[len(text) // 2 :][:4]
        _, first = post(port, "/v1/chat/completions", {**ask, "messages": messages, "stop": stop})
        answer = first["choices"][0]
        assert answer["finish_reason"] == "stop"
        messages += [answer["message"], {"role": "user", "content": "And then?"}]
        for message in messages:
            message.pop("refusal", None)
        service.turns._known = service.turns._known[1:]  # without that of the longer answer
        _, second = post(port, "/v1/chat/completions", {**ask, "messages": messages})
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached > first["usage"]["prompt_tokens"]
        service.turns.clear()
        _, cold = post(port, "/v1/chat/completions", {**ask, "messages": messages})
        assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert cold["choices"] == second["choices"]


def test_a_stream_that_is_dropped_as_it_ends() -> None:
    """At whichever step of the event loop."""
    complaints: list[object] = []

    async def drop(steps: int) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        last = asyncio.Event()

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            yield {}
            await last.wait()

        body = stream(chunks(), []).body_iterator
        await anext(body)
        reader = asyncio.ensure_future(anext(body))
        await asyncio.sleep(0.01)
        last.set()
        for _ in range(steps):
            await asyncio.sleep(0)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
            await reader
        await body.aclose()
        gc.collect()

    for steps in range(8):
        asyncio.run(drop(steps))
    assert not complaints
