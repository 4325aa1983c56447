"""Files that are either the old version or the new one, never half of each."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    """Write a whole file so that a crash or a full disk leaves the previous one.

    Args:
        path: the file to create or replace; its directory must exist.
        data: the content; text is written as UTF-8.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Make errors of the disk say which file could not be written and what helps.

    Args:
        path: what is written.

    Raises:
        OSError: it could not be written.
    """
    try:
        yield
    except Exception as error:
        _name_disk_error(error, Path(path))
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Write a file, by whatever means, that appears under its name only when it is complete.

    Args:
        path: the file to create or replace; its directory must exist.
        exclusive: whether a second writer is refused while the first one is at work, as for a directory; if
            not, the last one to finish wins.

    Yields:
        A name beside it, to be written to by the caller.

    Raises:
        LongscanError: another process is writing it, and `exclusive` is set.
        OSError: the directory is missing or not writable, or the disk is full; what was there is intact.
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing to the file instead of becoming it
    with _only_writer(path) if exclusive else contextlib.nullcontext():
        yield from _replace(path)


def _replace(path: Path) -> Iterator[Path]:
    """Do the work of `atomic_file`."""
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield temporary
        _open_up(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_disk_error(error, path, temporary)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | Path, *, marker: str | None = None) -> Iterator[Path]:
    """Fill a directory that appears under its name only when it is complete.

    No portable call swaps two directories, so the old one is renamed aside first and put back if the second
    rename fails. A power cut between the two renames leaves it aside as `.NAME.old`: `recover_directory`,
    which this function calls first, brings it back. A second writer of the same target is refused while the
    first one is at work.

    Args:
        path: the directory to create or replace; missing parents are created.
        marker: if given, a directory that is in the way is replaced only if it is empty or holds a file of
            this name, so that a mistyped path does not cost somebody a folder.

    Yields:
        An empty directory beside the target, to be filled by the caller.

    Raises:
        LongscanError: the target holds something other than what `marker` promises, or another process is
            writing it.
        OSError: the place is not writable, the disk is full, or `path` is a file; what was there is intact.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(path):
        yield from _fill(path, marker)


def _fill(path: Path, marker: str | None) -> Iterator[Path]:
    """Do the work of `atomic_directory` as the only writer."""
    recover_directory(path)
    if path.exists():
        names = os.listdir(path)
        if marker and names and marker not in names:
            raise LongscanError(
                f"{path} exists and was not written by longscan (no {marker} in it). "
                "It would be replaced as a whole: choose another directory, or empty this one."
            )
    temporary = _aside(path, "new")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _open_up(Path(folder, name))
                _sync(Path(folder, name))
            _sync(Path(folder))
        _swap(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name_disk_error(error, path, temporary)
        raise


def recover_directory(path: str | Path) -> None:
    """Bring back the directory that an interrupted `atomic_directory` left aside, if there is one.

    Args:
        path: the directory as its users know it.
    """
    path = Path(os.path.realpath(path))
    old = _aside(path, "old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.rename(old, path)


def find_directory(path: str | Path) -> Path:
    """Say where a directory is: an interrupted `atomic_directory` may have left it aside.

    Args:
        path: the directory as its users know it.

    Returns:
        The same, unless it is missing and its old version stands beside it.
    """
    path = Path(path)
    old = _aside(path, "old") if path.name else path
    return old if old.is_dir() and not path.exists() else path


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Args:
        path: the file to create or replace.
        value: anything JSON can hold; NaN and infinities are refused because other readers refuse them.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, text.encode(errors="backslashreplace"))  # a file name that is not UTF-8 has surrogates


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

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
        place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise LongscanError(f"{path} is not valid JSON ({place}). Was it cut short?") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, 100,000 brackets
        raise LongscanError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise LongscanError(f"{path}: expected a JSON object {{...}}, got {type(value).__name__}.")
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file of settings.

    Args:
        path: the file.

    Returns:
        Its fields.

    Raises:
        LongscanError: it is no TOML, or larger than settings are: tomllib takes a minute for a key of 50,000
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
    try:
        return tomllib.loads(raw.decode())
    except ValueError as error:  # tomllib's and Unicode's
        raise LongscanError(f"{path}: {error}") from error
    except RecursionError as error:
        raise LongscanError(f"{path}: its brackets are nested too deep.") from error


_SPACE = "free some space, or choose a directory on another disk"

_OTHER = "choose a directory that you can write to"

_REMEDIES = {
    **{errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE},
    **{errno.EACCES: _OTHER, errno.EPERM: _OTHER, errno.EROFS: _OTHER},
    errno.EFBIG: "choose a file system that takes files of this size",
    errno.EIO: "the disk may be failing; choose another one",
}

# how torch, NumPy and safetensors say that the system took less than they gave it
_SHORT = re.compile(
    r"os error (?P<errno>\d+)|unexpected pos \d+|PytorchStreamWriter|file write failed|"
    r"requested and \d+ written|(?P<full>No space left on device)"
)


def _name_disk_error(error: BaseException, path: Path, temporary: Path | None = None) -> None:
    """Raise an OSError that names `path` and a remedy if `error` means that it could not be written.

    Args:
        error: any.
        path: as its users know it.
        temporary: the name it is written under.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        found = _SHORT.search(str(error)) if isinstance(error, Exception) else None
        if not found:
            return
        number = int(found["errno"] or 0) or (errno.ENOSPC if found["full"] else 0)
    elif isinstance(error, OSError) and error.filename is not None:
        name = Path(os.fsdecode(error.filename)) if not isinstance(error.filename, int) else path
        ours = {path, temporary} & {name, *name.parents} if temporary else {path} & {name}
        if not ours:
            return  # what could not be read, say
    elif number == errno.EPIPE:
        return  # a reader of stdout has gone
    reason = os.strerror(number) if number else f"it could not be written whole ({error}): is the disk full?"
    remedy = _REMEDIES.get(number)
    raise OSError(number or errno.EIO, f"{reason}; {remedy}" if remedy else reason, str(path)) from error


@contextlib.contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Hold a lock beside a target; the system drops it when its process ends, however it ends."""
    lock = _aside(path, "lock")
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            _name_disk_error(error, path, lock)
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
        os.close(descriptor)  # its holder removed it in between: try again
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left while they wrote a file; those of running ones stay."""
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
    """Give a file the rights that the umask leaves: some libraries write theirs for the owner alone."""
    if path.is_file() and not path.is_symlink():
        path.chmod(0o666 & ~_UMASK)


def _umask() -> int:
    """Read the umask, which the system tells only while setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()  # once, as other threads would write with the wrong one meanwhile


def _aside(path: Path, suffix: str) -> Path:
    """Return a hidden name beside `path`, hence on the same file system."""
    return path.with_name(f".{path.name}.{suffix}")


def _swap(new: Path, target: Path) -> None:
    """Put directory `new` at `target`, removing what was there only after the new one is in place."""
    old = _aside(target, "old")
    if target.exists():
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
    """Decode strictly.

    Args:
        data: bytes of text.
        what: they are, for the message.

    Returns:
        The text.

    Raises:
        LongscanError: they are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise LongscanError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02X} at offset {error.start:,} "
            f"({error.reason}). Convert it first, for example with iconv -f CODE -t UTF-8."
        ) from error
