"""A server in this process, and asking it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import longscan
from longscan.models import LanguageModel
from longscan.serve.guard import Access
from longscan.serve.limits import Limits
from longscan.serve.run import bind, make_server
from longscan.serve.served import Served
from longscan.serve.service import Service
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import ChatTemplate, find_template

__all__ = ["JSON", "NAME", "ask", "post", "running", "serving", "serving_all", "until"]

NAME = "longscan-tiny-en"
JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def serving(
    model: LanguageModel,
    tokenizer: Tokenizer,
    name: str,
    *,
    limits: Limits | None = None,
    access: Access | None = None,
    template: ChatTemplate | None = None,
) -> Iterator[tuple[Service, int]]:
    """Yield a service and its port."""
    service = Service(model, tokenizer, name, template or find_template(tokenizer, None), limits)
    with serving_all(Served(service), access) as (_, port):
        yield service, port


@contextlib.contextmanager
def serving_all(served: Served, access: Access | None = None) -> Iterator[tuple[Served, int]]:
    """Yield the models of a server and its port."""
    listener = bind("127.0.0.1", 0)
    server = make_server(served, access or Access())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    served.worker.start()
    thread.start()
    try:
        yield served, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        served.worker.stop()
        listener.close()


@contextlib.contextmanager
def running(
    limits: Limits | None = None,
    access: Access | None = None,
    loaded: tuple[LanguageModel, Tokenizer] | None = None,
    template: ChatTemplate | None = None,
) -> Iterator[tuple[Service, int]]:
    """Yield a service of the shipped model, or of another, and its port."""
    model, tokenizer = loaded or longscan.load(NAME)
    assert tokenizer is not None
    with serving(model, tokenizer, NAME, limits=limits, access=access, template=template) as server:
        yield server


def ask(
    port: int, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Return status, JSON (or text) and headers, in small letters, of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    connection.request(method, path, data, {**JSON, **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    found = {name.lower(): value for name, value in response.getheaders()}
    is_json = bool(text) and "json" in found.get("content-type", "")
    return response.status, json.loads(text) if is_json else text, found


def post(port: int, path: str, body: Any) -> tuple[int, Any]:
    """Return status and JSON of an answer."""
    status, found, _ = ask(port, path, body)
    return status, found


def until(true: Any, seconds: float = 20.0) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)
