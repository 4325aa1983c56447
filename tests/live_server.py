"""A server in this process, and raw requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import longscan
from longscan.serve.guard import Access
from longscan.serve.run import bind, make_server
from longscan.serve.service import Limits, Service
from longscan.tokenizers.chat import find_template

NAME = "longscan-tiny-en"


@contextlib.contextmanager
def serving(limits: Limits | None = None, template: str | None = None) -> Iterator[tuple[Service, int]]:
    """Yield a service of the shipped model, and its port."""
    model, tokenizer = longscan.load(NAME)
    assert tokenizer is not None
    service = Service(model, tokenizer, NAME, find_template(tokenizer, template), limits)
    listener = bind("127.0.0.1", 0)
    server = make_server(service, Access())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    service.worker.start()
    thread.start()
    try:
        yield service, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        service.worker.stop()
        listener.close()


def post(port: int, path: str, body: Any) -> tuple[int, Any]:
    """Return status and JSON of an answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def until(true: Any, seconds: float = 20.0) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)
