"""Connections: how many there may be at a time, and how long one may take to ask."""

from __future__ import annotations

import asyncio
import json
import logging
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from longscan.serve.answers import error
from longscan.serve.errors import ApiError

__all__ = ["limited"]

LOG = logging.getLogger("longscan.serve")
LINGER = 1.0  # seconds for a refused client to read why


class _Protocol(H11Protocol):
    """uvicorn's, which by itself waits for ever for the end of a request's headers.

    Attributes:
        most: connections at a time.
        patience: seconds for the headers of a request.
    """

    most: int
    patience: float
    _timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or refuse it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) <= self.most:
            self._timer = self.loop.call_later(self.patience, self._late)
            return
        LOG.info("a connection was refused: there are %d", self.most)
        message = f"too many connections: expected at most {self.most}. Try again, or close some."
        self._answer(ApiError(503, message, "too_many_connections", headers={"Retry-After": "1"}))
        # closing now, with a request unread, would reset the connection before the client has read the answer
        self._refused, self._timer = True, self.loop.call_later(LINGER, transport.close)
        self.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Process data, and see whether a request has begun and has no end."""
        if self._refused:
            return
        super().data_received(data)
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not begun:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.patience, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape of all errors."""
        self._answer(ApiError(400, msg, "invalid_http"))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """Answer a request for a WebSocket like any other, without uvicorn's advice on how to get them."""
        return False

    def _late(self) -> None:
        """End a connection that does not ask; browsers open some in advance, and expect no answer there."""
        if self.conn.trailing_data[0]:
            message = f"expected the headers of a request within {self.patience:g} seconds."
            self._answer(ApiError(408, message, "request_timeout"))
        self.transport.close()

    def _answer(self, refusal: ApiError) -> None:
        """Write an answer that no application gives."""
        body = json.dumps(error(str(refusal), refusal.kind, refusal.code)).encode()
        phrase = HTTPStatus(refusal.status).phrase
        headers = {
            "Content-Type": "application/json",
            "Content-Length": len(body),
            "Connection": "close",
            **refusal.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(f"HTTP/1.1 {refusal.status} {phrase}\r\n{head}\r\n".encode() + body)

    def _stop_timer(self) -> None:
        """Let a connection be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def limited(connections: int, patience: float) -> type[asyncio.Protocol]:
    """Return the protocol of a server.

    Args:
        connections: at a time; others get 503.
        patience: seconds for the headers of a request; then it gets 408.
    """
    return type("Limited", (_Protocol,), {"most": connections, "patience": patience})
