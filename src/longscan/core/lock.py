"""One writer at a time: a lock file beside a target."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from longscan.core.disk_errors import name_disk_error
from longscan.errors import LongscanError

__all__ = ["only_writer"]


@contextlib.contextmanager
def only_writer(path: Path, lock: Path) -> Iterator[None]:
    """Hold a lock file beside a target; the system releases it when the process ends, even by a crash.

    Args:
        path: the target, for the messages.
        lock: the lock file; created, and removed at the end.

    Raises:
        LongscanError: another process holds it.
        OSError: it can't be created.
    """
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            name_disk_error(error, path, lock)
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise LongscanError(
                f"{path} is being written by another process: wait for it, or choose another name."
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        os.close(descriptor)  # the last holder has removed the file meanwhile: try again
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
