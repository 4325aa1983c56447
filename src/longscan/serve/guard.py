"""What a request must pass before any route sees it: its host, its origin, its key, its size.

A server on loopback is reachable from every web page in a browser of the same machine, by a name that
resolves to 127.0.0.1, or by a form. So the Host header must be a name of this machine, and a request that
carries an Origin must come from this server or from one that was allowed.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from longscan.serve.answers import error
from longscan.serve.metrics import Metrics

__all__ = ["LOOPBACK", "Access", "Guard"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/", "/health", "/line")  # without a key
PAGE = "/page/"  # likewise, whatever is below: files that everyone has
LOG = logging.getLogger("longscan.serve")


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        keys: one of them must be in the Authorization header; empty: none is needed.
        hosts: names in the Host header; empty: any.
        origins: of web pages that may ask, beside the server's own.
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] = LOOPBACK
    origins: Sequence[str] = ()


class Guard:
    """An ASGI application around another one.

    Args:
        app: what answers.
        access: who may ask.
        metrics: count requests.
        routes: the paths that exist, for the metrics.
    """

    def __init__(self, app: App, access: Access, metrics: Metrics, routes: Sequence[str]) -> None:
        self._app, self._access, self._metrics, self._routes = app, access, metrics, set(routes)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if (origin := _header(scope, b"origin")) and origin in self._access.origins:
                    message["headers"] = [
                        *message["headers"],
                        (b"access-control-allow-origin", origin.encode("latin-1")),
                        (b"vary", b"origin"),
                    ]
            await send(message)

        try:
            refused = self._refuse(scope)
            if refused:
                await _answer(counted, *refused)
            elif scope["method"] == "OPTIONS" and _header(scope, b"origin"):
                asked = _header(scope, b"access-control-request-headers") or "authorization, content-type"
                headers = [*PREFLIGHT, (b"access-control-allow-headers", asked.encode("latin-1"))]
                await _answer(counted, 204, None, headers)
            else:
                await self._app(scope, receive, counted)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            seconds = time.monotonic() - begin
            self._metrics.count(route, status)
            self._metrics.whole.add(seconds)
            LOG.info("%s %s %d %.3f s", scope["method"], route, status, seconds)

    def _refuse(self, scope: Message) -> tuple[int, dict[str, Any], list[tuple[bytes, bytes]]] | None:
        """Return the status, body and headers of a refusal, or None."""
        kind, access = "invalid_request_error", self._access
        host = _name(_header(scope, b"host"))
        if access.hosts and host not in access.hosts:
            message = (
                f"the host {host[:80]!r} is not this server's: expected one of {', '.join(access.hosts)}."
            )
            return 403, error(message, kind, "host_not_allowed"), []
        origin = _header(scope, b"origin")
        if origin and origin not in access.origins and not _same(origin, _header(scope, b"host")):
            message = f"requests of the web page {origin[:80]!r} are not allowed: see --allow-origin."
            return 403, error(message, kind, "origin_not_allowed"), []
        preflight = scope["method"] == "OPTIONS" and origin
        is_open = scope["path"] in OPEN or scope["path"].startswith(PAGE)
        if access.keys and not is_open and not preflight:
            scheme, _, key_given = _header(scope, b"authorization").partition(" ")
            given = key_given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
            # all are compared, so that the time does not tell which one it was
            if not max([hmac.compare_digest(given, key.encode()) for key in access.keys]):
                message = "the API key is missing or wrong: expected Authorization: Bearer KEY."
                return 401, error(message, kind, "invalid_api_key"), [(b"www-authenticate", b"Bearer")]
        return None


PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST, DELETE"),
    (b"access-control-max-age", b"600"),
]


async def _answer(
    send: Send, status: int, body: dict[str, Any] | None, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Send a whole answer."""
    content = b"" if body is None else json.dumps(body).encode()
    kind = [(b"content-type", b"application/json")] if content else []
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*kind, length, *headers]})
    await send({"type": "http.response.body", "body": content})


def _header(scope: Message, name: bytes) -> str:
    """Return a header, or ""."""
    return next((bytes(value).decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(origin: str, host: str) -> bool:
    """Whether a page comes from this server."""
    return origin in (f"http://{host}", f"https://{host}")
