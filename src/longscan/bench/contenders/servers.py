"""Servers as processes of their own: longscan's and its peers'."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import longscan
from longscan.errors import LongscanError

__all__ = ["Process", "llama_cpp", "null", "ours", "running", "transformers"]

SLOTS = 32
PATIENCE = 180.0  # seconds until a server must answer
CONTEXT = 8192  # tokens


class Process:
    """A server that runs.

    Args:
        process: of it.
        port: on 127.0.0.1.
        log: what it writes.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
        self.pid, self.port, self._process, self._log = process.pid, port, process, log

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def output(self) -> str:
        """Return what it has written."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def ready(self, path: str) -> bool:
        """Whether it answers a GET request with 200.

        Args:
            path: to ask for.
        """
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            try:
                connection.request("GET", path)
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False

    def stop(self) -> int:
        """End it and return its exit status; after ten seconds by force."""
        self._process.terminate()
        try:
            return self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


@contextlib.contextmanager
def running(
    command: Sequence[str], path: str, threads: int, environment: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Yield a server that answers; it ends with the context.

    Args:
        command: with "{port}" for the port.
        path: that answers once it is ready.
        threads: for it.
        environment: more variables.

    Raises:
        LongscanError: it ends early, or does not answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = str(Path(longscan.__file__).parent.parent)
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        **(environment or {}),
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=variables,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its servers
        )
        server = Process(process, port, log)
        try:
            end = time.monotonic() + PATIENCE
            while not server.ready(path):
                if server.ended or time.monotonic() > end:
                    said = server.output().strip().splitlines()
                    why = said[-1] if said else "it wrote nothing"
                    raise LongscanError(f"{' '.join(command[1:3])} does not answer: {why}")
                time.sleep(0.1)
            yield server
        finally:
            server.stop()


def ours(model: str, precision: str, threads: int, *flags: str) -> list[str]:
    """Return the command of `longscan serve`.

    Args:
        model: a directory or a name.
        precision: of its weights.
        threads: of the engine.
        flags: more of them.
    """
    command = [sys.executable, "-m", "longscan", "serve", "--model", model, "--port", "{port}", "--quiet"]
    return [*command, "--precision", precision, "--threads", str(threads), *flags]


def llama_cpp(path: str, threads: int) -> list[str]:
    """Return the command of llama-cpp-python's server.

    By itself it drops a running answer when another request comes; here requests wait for each other, which
    is the only other way it has.

    Args:
        path: a GGUF file.
        threads: for prefill and decode.
    """
    command = [sys.executable, "-m", "llama_cpp.server", "--model", path, "--model_alias", "model"]
    sizes = ["--n_ctx", str(CONTEXT), "--n_threads", str(threads), "--n_threads_batch", str(threads)]
    return [*command, *sizes, "--interrupt_requests", "false", "--verbose", "false", "--port", "{port}"]


def transformers(directory: str, dtype: str) -> list[str]:
    """Return the command of `transformers serve`.

    Args:
        directory: of a model.
        dtype: of its weights, as torch calls it.
    """
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", directory, "--device", "cpu", "--dtype", dtype]
    return [*command, "--host", "127.0.0.1", "--port", "{port}"]


def null() -> list[str]:
    """Return the command of a server that computes nothing."""
    return [sys.executable, "-m", "longscan.bench.contenders.null_server", "{port}"]
