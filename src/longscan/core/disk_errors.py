"""Errors of a disk that is full, read-only or failing: they name the file and a remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["name_disk_error", "writing"]


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Make disk errors name the file that could not be written, and a remedy.

    Args:
        path: the file being written.

    Raises:
        OSError: it could not be written.
    """
    try:
        yield
    except Exception as error:
        name_disk_error(error, Path(path))
        raise


_SPACE = "free some space, or choose a directory on another disk"

_OTHER = "choose a directory that you can write to"

_REMEDIES = {
    **{errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE},
    **{errno.EACCES: _OTHER, errno.EPERM: _OTHER, errno.EROFS: _OTHER},
    errno.EFBIG: "choose a file system that takes files of this size",
    errno.EIO: "the disk may be failing; choose another one",
}

# how torch, NumPy and safetensors report that a write was incomplete
_INCOMPLETE = re.compile(
    r"os error (?P<errno>\d+)|unexpected pos \d+|PytorchStreamWriter|file write failed|"
    r"requested and \d+ written|(?P<full>No space left on device)"
)


def name_disk_error(error: BaseException, path: Path, temporary: Path | None = None) -> None:
    """Raise an OSError that names `path` and a remedy if `error` means that it could not be written.

    Args:
        error: any.
        path: the final path.
        temporary: the path it is written under.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        match = _INCOMPLETE.search(str(error)) if isinstance(error, Exception) else None
        if not match:
            return
        number = int(match["errno"] or 0) or (errno.ENOSPC if match["full"] else 0)
    elif isinstance(error, OSError) and error.filename is not None:
        name = Path(os.fsdecode(error.filename)) if not isinstance(error.filename, int) else path
        ours = {path, temporary} & {name, *name.parents} if temporary else {path} & {name}
        if not ours:
            return  # another file, which could not be read, say
    elif number == errno.EPIPE:
        return  # stdout is a closed pipe
    reason = (
        os.strerror(number) if number else f"it could not be written completely ({error}): is the disk full?"
    )
    remedy = _REMEDIES.get(number)
    raise OSError(number or errno.EIO, f"{reason}; {remedy}" if remedy else reason, str(path)) from error
