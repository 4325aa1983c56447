"""States that clients save by name: files of one directory, which outlive the server.

A name has two files: the state, and a small JSON that names it by its hash and is written last. Whatever is
interrupted, a name stands for its old state or its new one; what no JSON names is removed at the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longscan.core.files import read_json, write_json
from longscan.core.lock import only_writer
from longscan.errors import LongscanError
from longscan.inference.turns import Known
from longscan.models import LanguageModel, State
from longscan.models.common.state import SavedState
from longscan.serve.bodies import NAME
from longscan.serve.errors import ApiError
from longscan.tokenizers.chat import Pieces

__all__ = ["StateStore"]

STATE = re.compile(rf"({NAME})\.[0-9a-f]{{16}}\.state")
TEMPORARY = re.compile(rf"\.({NAME})(\.[0-9a-f]{{16}}\.state|\.json)\.[0-9]+\.new")
FORMAT = "longscan served state 1"
HEADER = 1 << 14  # bytes that a file has beside its tensors, about


class StateStore:
    """The saved states of a server; threads may share it. See `open`.

    Args:
        directory: of nothing else.
        max_bytes: of all files together; a save beyond is refused, since clients count on what they saved.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes, self._lock = directory, max_bytes, threading.Lock()

    @classmethod
    @contextlib.contextmanager
    def open(cls, directory: Path, max_bytes: int) -> Iterator[StateStore]:
        """Yield the states of a directory, which no other server may use meanwhile.

        Args:
            directory: created if it is missing.
            max_bytes: see `StateStore`.

        Raises:
            LongscanError: another server uses it, it is a file, or what describes a state is damaged.
            OSError: it can't be read or written.
        """
        if directory.exists() and not directory.is_dir():
            raise LongscanError(f"--state-dir: expected a directory, got the file {directory}.")
        directory.mkdir(parents=True, exist_ok=True)
        with only_writer(directory, directory / ".lock"):
            store = cls(directory, max_bytes)
            store._sweep()
            yield store

    @property
    def nbytes(self) -> int:
        """The size of all files in bytes."""
        return sum(path.stat().st_size for path in self._directory.iterdir() if path.is_file())

    def listed(self) -> list[dict[str, Any]]:
        """Return what clients may know of each state, the newest first.

        Raises:
            ApiError: the directory can't be read, or a description in it is damaged.
        """
        with self._lock, _for_clients():
            found = [
                self._described(path.stem) for path in self._directory.iterdir() if path.suffix == ".json"
            ]
        return sorted((one for one in found if one), key=lambda one: -one["created"])

    def describe(self, name: str) -> dict[str, Any]:
        """Return what clients may know of a state.

        Args:
            name: of it.

        Raises:
            ApiError: there is none, or its description is damaged.
        """
        with self._lock, _for_clients():
            return self._described(name) or _missing(name)

    def save(
        self, name: str, model: LanguageModel, fingerprint: str, known: Known, served: str
    ) -> dict[str, Any]:
        """Save a state, in place of one of this name, and return what clients may know of it.

        Args:
            name: of the state.
            model: of it.
            fingerprint: of the model.
            known: the state, and the pieces of a chat that it holds; no pieces: those of a prompt.
            served: the name of the model.

        Raises:
            ApiError: the directory is full, or the file can't be written.
        """
        with self._lock:
            size = known.nbytes + HEADER + len(str(known.pieces))
            file = self._directory / f"{name}.{secrets.token_hex(8)}.state"
            try:
                before = self._files(name)
                left = self._max_bytes - self.nbytes + sum(path.stat().st_size for path in before)
                if size > left:
                    message = (
                        f"the state {name!r} takes {size:,} bytes, and of {self._max_bytes:,} "
                        f"{max(left, 0):,} are left: delete another one."
                    )
                    raise ApiError(507, message, "state_dir_full", "save_state")
                state, position, pending = known.saved
                state.save(file, position=position, pending=pending, model=model, fingerprint=fingerprint)
                content = {
                    "format": FORMAT,
                    "file": file.name,
                    "sha256": _hash(file),
                    "holds": known.pieces,
                    "model": served,
                    "position": known.length,
                    "created": int(time.time()),
                }
                write_json(self._directory / f"{name}.json", content)
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
                message = f"the state {name!r} was not saved: {error.strerror or error}."
                raise ApiError(507, message, "state_not_saved", "save_state") from error
            for path in before:
                if path.suffix == ".state":
                    path.unlink(missing_ok=True)
            found = self._described(name)
        assert found is not None
        return found

    def load(self, name: str, model: LanguageModel, fingerprint: str) -> Known:
        """Return a state and what it holds.

        Args:
            name: of the state.
            model: that it has to belong to.
            fingerprint: of the model.

        Raises:
            ApiError: there is none of this name, it is another model's, or it is damaged.
        """
        with self._lock:
            with _for_clients():
                content = self._content(name) or _missing(name)
            file = self._directory / content["file"]
            try:
                if _hash(file) != content["sha256"]:
                    raise LongscanError("its file is damaged.")
                saved: SavedState = State.load(file, model, fingerprint=fingerprint)
            except FileNotFoundError as error:
                message = f"the file of the state {name!r} is missing: save it again."
                raise ApiError(400, message, "state_mismatch", "load_state") from error
            except (OSError, LongscanError) as error:
                # without the path, which is nobody's business
                reason = str(error).replace(str(file), "it").splitlines()[0]
                message = f"the state {name!r}, of the model {content['model']!r}: {reason}"
                raise ApiError(400, message, "state_mismatch", "load_state") from error
        if saved.state.batch_size != 1:
            raise ApiError(400, f"the state {name!r} is damaged.", "state_mismatch", "load_state")
        return Known(content["holds"], saved)

    def delete(self, name: str) -> None:
        """Remove a state, also a damaged one.

        Args:
            name: of it.

        Raises:
            ApiError: there is none.
        """
        with self._lock, _for_clients():
            if not re.fullmatch(NAME, name) or not (self._directory / f"{name}.json").is_file():
                _missing(name)
            for path in sorted(self._files(name), key=lambda path: path.suffix != ".json"):
                path.unlink(missing_ok=True)

    def _content(self, name: str) -> dict[str, Any] | None:
        """Return what describes a state, or None if there is no state of this name.

        Raises:
            _DamagedError: the file is not what `save` writes.
        """
        path = self._directory / f"{name}.json"
        if not re.fullmatch(NAME, name):
            return None
        try:
            content = read_json(path)
        except FileNotFoundError:
            return None
        except LongscanError as error:
            raise _DamagedError(path, str(error).removeprefix(str(path)).lstrip(": ").rstrip(".")) from error
        if content.get("format") != FORMAT:
            raise _DamagedError(path, f"expected the format {FORMAT!r}, got {content.get('format')!r}"[:200])
        kinds = {"file": str, "sha256": str, "holds": list, "model": str, "position": int, "created": int}
        wrong = [key for key, kind in kinds.items() if type(content.get(key)) is not kind]
        match = STATE.fullmatch(str(content.get("file")))
        if match is None or match[1] != name:
            wrong.append("file")
        pieces: Pieces = [] if "holds" in wrong else content["holds"]
        if not all(type(piece) in (str, int) for piece in pieces):
            wrong.append("holds")
        if wrong:
            raise _DamagedError(path, f"its field {wrong[0]!r} is missing or wrong")
        return content

    def _described(self, name: str) -> dict[str, Any] | None:
        """Return what clients may know of a state, or None if there is none."""
        content = self._content(name)
        if content is None:
            return None
        size = sum(path.stat().st_size for path in self._files(name))
        kind = "chat" if content["holds"] else "prompt"
        fields = {key: content[key] for key in ("model", "position", "created")}
        return {"name": name, "object": "state", "kind": kind, "bytes": size, **fields}

    def _files(self, name: str) -> list[Path]:
        """Return the files of a name that are there."""
        found = [
            path
            for path in self._directory.iterdir()
            if (match := STATE.fullmatch(path.name)) and match[1] == name
        ]
        json = self._directory / f"{name}.json"
        return [*found, *([json] if json.is_file() else [])]

    def _sweep(self) -> None:
        """Remove what an interrupted save has left; nothing if a description is damaged."""
        known = {
            content["file"]
            for path in self._directory.glob("*.json")
            if (content := self._content(path.stem)) is not None
        }
        for path in list(self._directory.iterdir()):
            orphan = STATE.fullmatch(path.name) and path.name not in known
            if orphan or TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


class _DamagedError(LongscanError):
    """A file that describes a state is damaged."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} does not describe a saved state: {reason}. Restore it, or delete it: the state "
            f"{path.stem!r} is lost without it, and its file is removed at the next start."
        )
        self.path, self.reason = path, reason


@contextlib.contextmanager
def _for_clients() -> Iterator[None]:
    """Raise errors of the directory as clients may see them: without its path, which is nobody's business."""
    try:
        yield
    except _DamagedError as error:
        message = (
            f"{error.path.name} in the server's --state-dir does not describe a saved state: {error.reason}. "
            f"Delete the state {error.path.stem!r}, or save it again."
        )
        raise ApiError(500, message, "state_damaged") from error
    except OSError as error:
        message = f"the saved states can't be read: {error.strerror or error}."
        raise ApiError(503, message, "state_dir_unavailable") from error


def _missing(name: str) -> Any:
    """Raise: there is no such state."""
    raise ApiError(
        404, f"there is no state {name[:80]!r}: see GET /v1/state.", "state_not_found", "load_state"
    )


def _hash(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
