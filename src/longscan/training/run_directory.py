"""The directory of a training run: its settings, and its lock."""

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
from longscan.errors import LongscanError, UsageError
from longscan.training.config import RunConfig

__all__ = [
    "SETTINGS",
    "empty",
    "lock",
    "read_earlier",
    "read_settings",
    "refuse_changes",
    "refuse_content",
    "write_settings",
]


SETTINGS = "train.json"  # the resolved configuration; its presence marks the directory of a run

VERB = "verb"  # a key in it: the verb that resumes the run

EARLIER = "earlier"  # another: [step, total] pairs, up to which step the run had which length

LOCK = ".lock"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Lock a run's directory for this process; the system releases it when the process ends, even by a crash.

    Also removes temporary files of killed processes.

    Args:
        directory: the run's.

    Raises:
        LongscanError: another process has locked it, or it contains links, through which a run would write
            elsewhere.
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
    """Yield the lock file, opened and locked, and still the one at this path."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(number, "r+", encoding="utf-8", errors="replace") as file:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise LongscanError(f"{path} is not a regular file, or has several names. Remove it.")
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
            if current:  # else a failed start has removed the file meanwhile
                yield file
                return


def _refuse_links(directory: Path) -> None:
    """Raise if a link in a run's directory points elsewhere, where the run would then write."""
    for path in (*directory.glob("*"), *directory.glob("checkpoints/*")):
        if path.is_symlink():
            raise LongscanError(
                f"{path} is a link to {os.readlink(path)}: a run writes nothing outside its directory. "
                "Replace the link by what it points to, or remove it."
            )


def empty(directory: Path, *, remove: bool) -> None:
    """Delete what the preparation of a failed run wrote into its directory, which was empty before.

    Args:
        directory: the run's, locked.
        remove: whether to remove the directory too.
    """
    for path in directory.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    (directory / LOCK).unlink(missing_ok=True)  # last, as from here on another run may start here
    if remove:
        with contextlib.suppress(OSError):
            directory.rmdir()


def refuse_content(directory: Path) -> None:
    """Raise unless the directory of a new run is new or empty.

    Args:
        directory: of the new run.

    Raises:
        LongscanError: it holds files, which are never overwritten.
    """
    try:
        names = sorted(set(os.listdir(directory)) - {LOCK})
    except FileNotFoundError:
        return
    except OSError as error:
        raise LongscanError(f"{directory}: {error.strerror}. Choose another directory.") from error
    if SETTINGS in names:
        with lock(directory):  # raises if the run is still in progress
            pass
        raise LongscanError(
            f"{directory} already holds a run. Resume it with: "
            f"longscan {_verb(directory)} --resume {directory}\n"
            "Or choose another directory: nothing is overwritten."
        )
    if not all(fnmatch(name, f".{SETTINGS}.*.new") for name in names):  # of a run killed at its start
        raise LongscanError(
            f"{directory} is not empty (it holds {', '.join(names[:3])}{', ...' if names[3:] else ''}). "
            "Choose a new directory: nothing is overwritten."
        )


def read_settings(directory: Path, verb: str) -> dict[str, Any]:
    """Return the configuration of the run in a directory.

    Args:
        directory: the run's.
        verb: the verb that it must be a run of.

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
            f"{directory} is a run of another verb. Resume it with: longscan {actual} --resume {directory}"
        )
    fields = read_json(directory / SETTINGS)
    return {name: value for name, value in fields.items() if name not in (VERB, EARLIER)}


def refuse_changes(config: RunConfig, stored: RunConfig, source: Path, *, longer: bool) -> None:
    """Raise unless a run is resumed with the settings that it started with.

    Args:
        config: the settings now.
        stored: those it started with.
        source: the file or directory that holds them.
        longer: whether the length of the run may differ.

    Raises:
        UsageError: a setting differs.
    """
    changed = [name for name in config.changed(stored) if not (longer and name in ("steps", "epochs"))]
    if changed:
        name = changed[0]
        raise UsageError(
            f"{name} cannot change in the middle of a run: {source} was made with "
            f"{_shown(getattr(stored, name))}, got {_shown(getattr(config, name))}. "
            "Leave it out, or start a new run."
        )


def _shown(value: Any) -> str:
    """Return a setting as a user would write it."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def read_earlier(directory: Path) -> list[tuple[int, int]]:
    """Return the earlier lengths of a run that was extended: pairs of the last step and the total then.

    Args:
        directory: the run's.

    Raises:
        LongscanError: its settings hold something else there.
    """
    pairs = read_json(directory / SETTINGS).get(EARLIER, [])
    if isinstance(pairs, list) and all(map(_is_length, pairs)):
        return [(until, total) for until, total in pairs]
    raise LongscanError(f"{directory / SETTINGS}: {EARLIER}: expected pairs of steps, got {pairs!r}.")


def _is_length(pair: Any) -> bool:
    """Whether a JSON value is a pair of a step and a total no smaller."""
    numbers = isinstance(pair, list) and [type(number) for number in pair] == [int, int]
    return numbers and 0 < pair[0] <= pair[1]


def write_settings(
    directory: Path, verb: str, settings: dict[str, Any], earlier: Sequence[tuple[int, int]] = ()
) -> None:
    """Write the settings of a run, for `read_settings` and `read_earlier`.

    Args:
        directory: the run's.
        verb: the verb that resumes the run.
        settings: the fields of its configuration.
        earlier: see `read_earlier`.
    """
    lengths = {EARLIER: [list(pair) for pair in earlier]} if earlier else {}
    write_json(directory / SETTINGS, {VERB: verb, **lengths, **settings})


def _verb(directory: Path) -> str:
    """Return the verb that resumes the run in a directory."""
    return str(read_json(directory / SETTINGS).get(VERB, "train"))
