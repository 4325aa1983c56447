"""The directory of a training run: one process at a time, metrics without gaps, signals in good order."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any, Self, TextIO

from longscan.errors import LongscanError
from longscan.files import atomic_write, read_json, write_json, writing

__all__ = [
    "SETTINGS",
    "Metrics",
    "Signals",
    "empty",
    "lock",
    "read_earlier",
    "read_settings",
    "refuse_content",
    "write_settings",
]

SETTINGS = "train.json"  # the resolved configuration; it also marks a directory as a run's
VERB = "verb"  # a key in it: what resumes the run
EARLIER = "earlier"  # another: [step, total], until which step the run was to have how many in all
LOCK = ".lock"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold a run's directory for this process; the system lets go when the process ends, however it does.

    What processes killed in the middle of writing left behind is removed.

    Args:
        directory: the run's.

    Raises:
        LongscanError: another process holds it; the message says which. Or there are links in it, through
            which a run would write elsewhere.
        OSError: the directory is not writable.
    """
    _refuse_links(directory)
    path = directory / LOCK
    with _locked(path) as file:
        with writing(path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        for leftover in directory.glob(".*.new"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """Open and lock the file, the one that has this name once it is locked."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(number, "r+", encoding="utf-8", errors="replace") as file:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise LongscanError(f"{path} is another file's name too, or no file. Remove it.")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = file.read(20).strip() or "unknown"
                raise LongscanError(
                    f"{path.parent} is in use: process {owner} is training there. "
                    "Wait for it, stop it with Ctrl-C, or choose another directory."
                ) from None
            try:
                current = os.path.samestat(os.fstat(number), os.lstat(path))
            except FileNotFoundError:
                current = False
            if current:  # else a start that failed has removed it in the meantime
                yield file
                return


def _refuse_links(directory: Path) -> None:
    """Insist that what a run writes stays in its directory."""
    for path in (*directory.glob("*"), *directory.glob("checkpoints/*")):
        if path.is_symlink():
            raise LongscanError(
                f"{path} is a link to {os.readlink(path)}: a run writes nothing outside its directory. "
                "Replace the link by what it points to, or remove it."
            )


def empty(directory: Path, *, remove: bool) -> None:
    """Take back what the preparation of a failed run wrote into its directory, which was empty before.

    Args:
        directory: the run's, locked.
        remove: whether to remove it too.
    """
    for path in directory.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    (directory / LOCK).unlink(missing_ok=True)  # last: from here on another run may begin here
    if remove:
        with contextlib.suppress(OSError):
            directory.rmdir()


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
    fields = read_json(directory / SETTINGS)
    return {name: value for name, value in fields.items() if name not in (VERB, EARLIER)}


def read_earlier(directory: Path) -> list[tuple[int, int]]:
    """Return until which step a run was to have how many in all, if it was made longer.

    Args:
        directory: the run's.

    Raises:
        LongscanError: its settings say something else there.
    """
    pairs = read_json(directory / SETTINGS).get(EARLIER, [])
    if isinstance(pairs, list) and all(map(_is_length, pairs)):
        return [(until, total) for until, total in pairs]
    raise LongscanError(f"{directory / SETTINGS}: {EARLIER}: expected pairs of steps, got {pairs!r}.")


def _is_length(pair: Any) -> bool:
    """Tell whether a JSON value is a step and the length of a run that it lies in."""
    numbers = isinstance(pair, list) and [type(number) for number in pair] == [int, int]
    return numbers and 0 < pair[0] <= pair[1]


def write_settings(
    directory: Path, verb: str, settings: dict[str, Any], earlier: Sequence[tuple[int, int]] = ()
) -> None:
    """Write what `read_settings` and `read_earlier` read.

    Args:
        directory: the run's.
        verb: what resumes the run.
        settings: the fields of its configuration.
        earlier: until which step it was to have how many in all.
    """
    lengths = {EARLIER: [list(pair) for pair in earlier]} if earlier else {}
    write_json(directory / SETTINGS, {VERB: verb, **lengths, **settings})


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


class Signals:
    """Catches SIGINT, SIGTERM and SIGHUP while a run goes on; a second SIGINT is a KeyboardInterrupt.

    What the process was started to ignore, as nohup does with SIGHUP, it goes on ignoring.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; elsewhere signals are the caller's affair.
        main = threading.current_thread() is threading.main_thread()
        self._before = {
            number: signal.signal(number, self._handle)
            for number in self.CAUGHT
            if main and signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
