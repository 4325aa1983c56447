"""Atomic writes, so that a file is the old version or the new one, never a mixture; JSON, TOML and UTF-8."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longscan.core.disk_errors import name_disk_error, writing
from longscan.core.lock import only_writer
from longscan.errors import LongscanError

__all__ = [
    "atomic_directory",
    "atomic_file",
    "atomic_write",
    "find_directory",
    "read_json",
    "read_toml",
    "recover_directory",
    "utf8",
    "write_json",
    "writing",
]


MAX_TOML, MAX_TOML_LINE = 2**16, 2**12  # bytes


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file atomically: a crash or a full disk leaves the previous one.

    Args:
        path: the file to create or replace; its directory must exist.
        data: the content; text is written as UTF-8.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: str | Path, *, exclusive: bool = False, new: bool = False) -> Iterator[Path]:
    """Yield a path to write to; the file gets its final name only when it is complete.

    Args:
        path: the file to create or replace; its directory must exist.
        exclusive: whether a second writer is refused while the first one is at work, as for a directory; if
            not, the last one to finish wins.
        new: whether an existing file is refused, also one that appeared meanwhile.

    Yields:
        A temporary path beside it, for the caller to write to.

    Raises:
        LongscanError: another process is writing it, and `exclusive` is set; or it exists, and `new` is.
        OSError: the directory is missing or not writable, or the disk is full; the previous file is intact.
    """
    path = Path(os.path.realpath(path))  # so that a link is kept and its target replaced
    with only_writer(path, _aside(path, "lock")) if exclusive else contextlib.nullcontext():
        yield from _replace(path, new)


def _replace(path: Path, new: bool) -> Iterator[Path]:
    """Do the work of `atomic_file`."""
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield temporary
        _open_up(temporary)
        _sync(temporary)
        if new and path.exists():
            raise LongscanError(f"{path} exists: choose another name.")
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        name_disk_error(error, path, temporary)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | Path, *, marker: str | None = None, new: bool = False) -> Iterator[Path]:
    """Yield a directory to fill; it gets its final name only when it is complete.

    No portable call swaps two directories, so the old one is first renamed to `.NAME.old`, and renamed back
    if the second rename fails. After a power cut between the two, `recover_directory`, which this function
    calls first, restores it. While one process writes a target, a second one gets an error.

    Args:
        path: the directory to create or replace; missing parents are created.
        marker: if given, an existing directory is replaced only if it is empty or holds a file of this name,
            so that a mistyped path deletes nothing.
        new: whether an existing directory is replaced only if it is empty. This and `marker` are checked
            again at the end: another program may have written there meanwhile.

    Yields:
        An empty directory beside the target, for the caller to fill.

    Raises:
        LongscanError: the target is not empty and `new` is set or has no `marker`, or another process is
            writing it.
        OSError: the directory is not writable, the disk is full, or `path` is a file; the previous directory
            is intact.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(path, _aside(path, "lock")):
        yield from _fill(path, marker, new)


def _fill(path: Path, marker: str | None, new: bool) -> Iterator[Path]:
    """Do the work of `atomic_directory` while its lock is held."""
    recover_directory(path)
    _refuse_existing(path, marker, new)
    temporary = _aside(path, "new")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _open_up(Path(folder, name))
                _sync(Path(folder, name))
            _sync(Path(folder))
        _refuse_existing(path, marker, new)
        _swap(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        name_disk_error(error, path, temporary)
        raise


def _refuse_existing(path: Path, marker: str | None, new: bool) -> None:
    """Raise if what a target holds may not be replaced; see `atomic_directory`."""
    names = os.listdir(path) if path.exists() else []
    if names and new:
        raise LongscanError(f"{path} exists and is not an empty directory: choose another name.")
    if names and marker and marker not in names:
        raise LongscanError(
            f"{path} exists and was not written by longscan (no {marker} in it). "
            "It would be replaced as a whole: choose another directory, or empty this one."
        )


def recover_directory(path: str | Path) -> None:
    """Restore the directory that an interrupted `atomic_directory` renamed, if there is one.

    Args:
        path: its final path.
    """
    path = Path(os.path.realpath(path))
    old = _aside(path, "old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.rename(old, path)


def find_directory(path: str | Path) -> Path:
    """Return where a directory is: an interrupted `atomic_directory` may have renamed it.

    Args:
        path: its final path.

    Returns:
        The same path, or that of the old version if only that exists.
    """
    path = Path(path)
    old = _aside(path, "old") if path.name else path
    return old if old.is_dir() and not path.exists() else path


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Args:
        path: the file to create or replace.
        value: any JSON value; NaN and infinities raise ValueError, as standard JSON excludes them.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, text.encode(errors="backslashreplace"))  # a file name that is not UTF-8 has surrogates


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the content of a JSON file whose top level is an object.

    Args:
        path: the file.

    Returns:
        The object as a dictionary.

    Raises:
        LongscanError: the file is not UTF-8, not JSON, or holds something other than an object.
        OSError: the file cannot be read.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise LongscanError(f"{path} is not valid JSON ({position}). Was it cut short?") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, 100,000 brackets
        raise LongscanError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise LongscanError(f"{path}: expected a JSON object {{...}}, got {type(value).__name__}.")
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the fields of a TOML file of settings.

    Args:
        path: the file.

    Returns:
        Its fields.

    Raises:
        LongscanError: it is no TOML, or too large for settings; tomllib takes a minute for a key of 50,000
            parts.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_TOML + 1)
    longest = max(map(len, raw.split(b"\n")))
    if len(raw) > MAX_TOML or longest > MAX_TOML_LINE:
        raise LongscanError(
            f"{path}: expected settings of at most {MAX_TOML:,} bytes in lines of at most {MAX_TOML_LINE:,}. "
            "Break a long list into lines."
        )
    import tomllib  # which most commands have no use for

    try:
        return tomllib.loads(raw.decode())
    except ValueError as error:  # tomllib's and Unicode's
        raise LongscanError(f"{path}: {error}") from error
    except RecursionError as error:
        raise LongscanError(f"{path}: its brackets are nested too deep.") from error


def _remove_stale(path: Path) -> None:
    """Remove the temporary files of killed processes, not those of running ones."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.new"):
        owner = other.name.removesuffix(".new").rpartition(".")[2]
        if owner.isascii() and owner.isdigit() and other.is_file() and not _runs(int(owner)):
            other.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _open_up(path: Path) -> None:
    """Give a file the permissions of the umask: some libraries write theirs for the owner only."""
    if path.is_file() and not path.is_symlink():
        path.chmod(0o666 & ~_UMASK)


def _umask() -> int:
    """Return the umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()  # only once, as setting it affects files that other threads write


def _aside(path: Path, suffix: str) -> Path:
    """Return a hidden path beside `path`, hence on the same file system."""
    return path.with_name(f".{path.name}.{suffix}")


def _swap(new: Path, target: Path) -> None:
    """Rename directory `new` to `target`, an empty one at once; remove the old one only afterwards."""
    old = _aside(target, "old")
    if target.exists() and os.listdir(target):
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or the entries of a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def utf8(data: bytes, what: str) -> str:
    """Return bytes decoded as strict UTF-8.

    Args:
        data: the bytes.
        what: a name for them in the message.

    Returns:
        The text.

    Raises:
        LongscanError: the bytes are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise LongscanError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02X} at offset {error.start:,} "
            f"({error.reason}). Convert it first, for example with iconv -f CODE -t UTF-8."
        ) from error
