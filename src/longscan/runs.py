"""The directory of a training run: one process at a time, metrics without gaps, signals in good order."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any, Self

from longscan.errors import LongscanError
from longscan.files import atomic_write, read_json

__all__ = ["SETTINGS", "VERB", "Metrics", "Signals", "lock", "read_settings", "refuse_content"]

SETTINGS = "train.json"  # the resolved configuration; it also marks a directory as a run's
VERB = "verb"  # a key in it: what resumes the run
LOCK = ".lock"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold a run's directory for this process; the system lets go when the process ends, however it does.

    What processes killed in the middle of writing left behind is removed.

    Args:
        directory: the run's.

    Raises:
        LongscanError: another process holds it; the message says which.
        OSError: the directory is not writable.
    """
    with open(
        directory / LOCK, "a+", encoding="ascii"
    ) as file:  # never removed: another may be waiting at it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LongscanError(
                f"{directory} is in use: process {file.read().strip() or 'unknown'} is training there. "
                "Wait for it, stop it with Ctrl-C, or choose another directory."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for leftover in directory.glob(".*.new"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield


def refuse_content(directory: Path) -> None:
    """Insist that a new run's directory is new or empty.

    Args:
        directory: where the run is to be.

    Raises:
        LongscanError: there is something in it, which is never overwritten.
    """
    try:
        names = sorted(set(os.listdir(directory)) - {LOCK})
    except FileNotFoundError:
        return
    except OSError as error:
        raise LongscanError(f"{directory}: {error.strerror}. Choose another directory.") from error
    if SETTINGS in names:
        with lock(directory):  # says so if the run is going on
            pass
        raise LongscanError(
            f"{directory} already holds a run. Continue it with: "
            f"longscan {_verb(directory)} --resume {directory}\n"
            "Or choose another directory: nothing is overwritten."
        )
    if not all(fnmatch(name, f".{SETTINGS}.*.new") for name in names):  # those of a run killed at its start
        raise LongscanError(
            f"{directory} is not empty (it holds {', '.join(names[:3])}{', ...' if names[3:] else ''}). "
            "Choose a new directory: nothing is overwritten."
        )


def read_settings(directory: Path, verb: str) -> dict[str, Any]:
    """Return the configuration of the run in a directory.

    Args:
        directory: the run's.
        verb: what it has to be a run of.

    Returns:
        The fields of its configuration.

    Raises:
        LongscanError: there is no run, or it is another verb's.
    """
    if not (directory / SETTINGS).is_file():
        raise LongscanError(
            f"no run to resume in {directory}: expected the {SETTINGS} that `longscan {verb}` writes."
        )
    if (actual := _verb(directory)) != verb:
        raise LongscanError(
            f"{directory} is a run of another kind. Continue it with: longscan {actual} --resume {directory}"
        )
    return {name: value for name, value in read_json(directory / SETTINGS).items() if name != VERB}


def _verb(directory: Path) -> str:
    """Return what resumes the run in a directory."""
    return str(read_json(directory / SETTINGS).get(VERB, "train"))


class Metrics:
    """`metrics.jsonl`: one JSON object a line, each with its `step`, in the order of steps.

    Args:
        path: the file; created when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._newest: dict[str, tuple[int, Any]] = {}  # key -> its last step and value

    def rewind(self, step: int) -> None:
        """Read the file, drop what came after a step, and open it for more.

        Args:
            step: the last one to keep; a line that a killed process left half-written is dropped too.
        """
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                record = json.loads(line)
                if record["step"] > step:
                    break
            except (ValueError, TypeError, KeyError):
                break
            self._keep(record)
        atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - `close` closes it

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it survives the death of this process from here on.

        Args:
            record: JSON values, among them `step`.
        """
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self.path)  # the system does not say where
            raise
        self._keep(record)

    def sync(self) -> None:
        """Make what is written survive a power cut as well."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # a disk that is full says so a second time
            self._file.close()

    def has(self, step: int, key: str) -> bool:
        """Tell whether the present step has a record with a key.

        Args:
            step: the present step.
            key: of the record.
        """
        return self._newest.get(key, (-1, None))[0] == step

    def last(self, key: str) -> Any:
        """Return the newest value of a key, or None.

        Args:
            key: of a record.
        """
        return self._newest.get(key, (-1, None))[1]

    def _keep(self, record: dict[str, Any]) -> None:
        """Remember a record that is in the file."""
        self.records.append(record)
        self._newest.update({key: (record["step"], value) for key, value in record.items()})


class Signals:
    """Catches SIGINT and SIGTERM while a run goes on; the second SIGINT is an ordinary KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; elsewhere signals are the caller's affair.
        main = threading.current_thread() is threading.main_thread()
        self._before = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM) if main
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
