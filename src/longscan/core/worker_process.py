"""A process for what may loop, fill the memory or crash: it is asked line by line, and killed if need be."""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import threading
from typing import Any

__all__ = ["WorkerProcess"]


class WorkerProcess:
    """A script that answers each line of JSON by another; it starts when needed, and again after its end.

    Threads may share it; one asks at a time.

    Args:
        script: its file; it is run in isolation, and limits its own memory.
        seconds: that an answer may take.
    """

    def __init__(self, script: str, seconds: float) -> None:
        self._script, self._seconds = script, seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    @property
    def running(self) -> bool:
        """Whether the process has started and not ended."""
        return self._process is not None and self._process.poll() is None

    def ask(self, request: Any) -> Any:
        """Return the answer to a request; None if there is none in time, or the process has died of it.

        Args:
            request: JSON values.
        """
        line = json.dumps(request) + "\n"
        with self._lock:
            process = self._started()
            assert process.stdin
            assert process.stdout
            timer = threading.Timer(self._seconds, process.kill)
            timer.start()
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            except BaseException:  # Ctrl-C: the next request must not get this answer
                self.stop()
                raise
            finally:
                timer.cancel()
            if not answer.endswith("\n"):
                self.stop()
                return None
        return json.loads(answer)

    def _started(self) -> subprocess.Popen[str]:
        """Return the running process."""
        if self._process is None or not self.running:
            self._process = subprocess.Popen(
                [sys.executable, "-I", self._script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is not for it
            )
        return self._process

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream
                with contextlib.suppress(OSError):
                    stream.close()
        self._process = None
