"""metrics.jsonl: one line per record, without gaps or repetitions after a resume."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from longscan.core.files import atomic_write, writing

__all__ = ["Metrics"]


class Metrics:
    """`metrics.jsonl`: one JSON object per line, each with its `step`, in the order of steps.

    Args:
        path: the file; created when missing.
        writes: whether this process writes it; the others of a run only remember.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.records: list[dict[str, Any]] = []
        self._newest: dict[str, tuple[int, Any]] = {}  # key -> its last step and value

    def rewind(self, step: int) -> None:
        """Load the file, drop the records after a step, and open it for appending.

        Args:
            step: the last one to retain; an incomplete line of a killed process is dropped too.
        """
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                record = json.loads(line)
                if record["step"] > step:
                    break
            except (ValueError, TypeError, KeyError):
                break
            self._add(record)
        if not self.writes:
            return
        atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._file = open(number, "a", encoding="utf-8")  # noqa: SIM115 - `close` closes it

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; from here on it survives the death of this process.

        Args:
            record: JSON values, among them `step`.
        """
        if self.writes:
            with writing(self.path):
                self._file.write(json.dumps(record, allow_nan=False) + "\n")
                self._file.flush()
        self._add(record)

    def sync(self) -> None:
        """Flush to the disk, so that the records survive a power cut as well."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if not self.writes:
            return
        with contextlib.suppress(OSError):  # a full disk has already been reported
            self._file.close()

    def has(self, step: int, key: str) -> bool:
        """Whether the current step has a record with a key.

        Args:
            step: the current step.
            key: of the record.
        """
        return self._newest.get(key, (-1, None))[0] == step

    def latest(self, prefix: str) -> dict[str, float]:
        """Return the newest value of every numeric key with a prefix.

        Args:
            prefix: of the keys.
        """
        newest = {key: value for key, (_, value) in self._newest.items() if key.startswith(prefix)}
        return {key: value for key, value in newest.items() if isinstance(value, (int, float))}

    def last(self, key: str) -> Any:
        """Return the newest value of a key, or None.

        Args:
            key: of a record.
        """
        return self._newest.get(key, (-1, None))[1]

    def _add(self, record: dict[str, Any]) -> None:
        """Add a record that is in the file to those in memory."""
        self.records.append(record)
        self._newest.update({key: (record["step"], value) for key, value in record.items()})
