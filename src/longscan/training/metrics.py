"""metrics.jsonl: a line per step, without gaps after a resume."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from longscan.core.files import atomic_write, writing

__all__ = ["Metrics"]


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
        number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._file = open(number, "a", encoding="utf-8")  # noqa: SIM115 - `close` closes it

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it survives the death of this process from here on.

        Args:
            record: JSON values, among them `step`.
        """
        with writing(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        self._keep(record)

    def sync(self) -> None:
        """Make what is written survive a power cut as well."""
        with writing(self.path):
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

    def latest(self, prefix: str) -> dict[str, float]:
        """Return the newest value of every key that begins with a prefix and has numbers.

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

    def _keep(self, record: dict[str, Any]) -> None:
        """Remember a record that is in the file."""
        self.records.append(record)
        self._newest.update({key: (record["step"], value) for key, value in record.items()})
