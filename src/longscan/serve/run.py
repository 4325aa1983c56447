"""A server's life: start, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from longscan.errors import LongscanError
from longscan.serve.app import make_app
from longscan.serve.guard import Access
from longscan.serve.protocol import limited
from longscan.serve.served import Served

__all__ = ["bind", "make_server", "serve"]

PORT = (errno.EADDRINUSE, errno.EACCES)  # errors that another port would cure
DRAIN = 0.05  # seconds between looks whether all texts have ended


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: a name or address of this machine.
        port: 0 takes any that is free.

    Raises:
        LongscanError: the port is in use, or the host is not this machine.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        reason, flag = error.strerror or str(error), "--port" if error.errno in PORT else "--host"
        raise LongscanError(f"{host}:{port}: {reason.lower()}. Choose another one, with {flag}.") from error
    return found


class _Server(uvicorn.Server):
    """uvicorn's, which lets texts end before it stops: a second signal stops it at once."""

    def __init__(self, config: uvicorn.Config, served: Served, drain: float) -> None:
        super().__init__(config)
        self._served, self._drain_seconds = served, drain
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or stop at once if it does so already."""
        worker = self._served.worker
        if worker.draining or worker.failed is not None:
            worker.end_all()
            super().handle_exit(sig, frame)
            return
        worker.draining = True  # `on_tick` sees it

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; called ten times a second."""
        worker = self._served.worker
        if worker.draining and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        if worker.failed is not None:
            self.should_exit = True
        stop: bool = await super().on_tick(counter)
        return stop

    async def _drain(self) -> None:
        """Wait for the texts, end those that take too long, then stop."""
        worker = self._served.worker
        for _ in range(round(self._drain_seconds / DRAIN)):
            if not worker.jobs:
                break
            await asyncio.sleep(DRAIN)
        worker.end_all()
        self.should_exit = True


def make_server(served: Served, access: Access, drain: float = 10.0) -> uvicorn.Server:
    """Return a server; its `run(sockets=[...])` serves until a signal or `should_exit` ends it.

    Args:
        served: what answers; its worker must run.
        access: who may ask.
        drain: seconds that texts may still take after the first signal.
    """
    config = uvicorn.Config(
        make_app(served, access),
        loop="asyncio",
        http=limited(served.limits.connections, served.limits.head_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=1 << 16,
    )
    return _Server(config, served, drain)


def serve(
    served: Served,
    listener: socket.socket,
    access: Access,
    *,
    drain: float = 10.0,
    started: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal ends it.

    Args:
        served: what answers.
        listener: see `bind`.
        access: who may ask.
        drain: see `make_server`.
        started: called once the server answers.

    Raises:
        LongscanError: the engine failed.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # each connection is an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    server = make_server(served, access, drain)
    served.worker.start()
    if started:
        started()
    try:
        server.run(sockets=[listener])
    finally:
        served.worker.stop()
    if served.worker.failed is not None:
        raise LongscanError(f"the engine failed: {served.worker.failed}")
