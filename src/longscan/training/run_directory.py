"""The directory of a training run: its settings, and a lock for one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TextIO

from longscan.core.files import read_json, write_json, writing
from longscan.errors import LongscanError

__all__ = ["SETTINGS", "empty", "lock", "read_earlier", "read_settings", "refuse_content", "write_settings"]


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
