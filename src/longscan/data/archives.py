"""Archives of data: tars and NumPy files, verified to their end and limited in the memory they may take.

For all data files, suffixes are case-insensitive, and hidden files (a name that begins with a dot, or a file
in such a folder) are skipped when a folder or an archive is searched.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from longscan.errors import LongscanError

__all__ = ["check_expansion", "foreign", "has_suffix", "is_hidden", "iter_tar", "map_npy", "read_npz"]

FREE, RATIO = 2**26, 100  # bytes that any file may expand to; beyond that, the largest expansion ratio
BLOCK = 2**20  # bytes read at a time
HEADERS = b"LKxgX"  # types of the members of a tar that describe others
COMPRESSIONS: dict[bytes, Callable[..., IO[bytes]]] = {
    b"\x1f\x8b": cast(Any, gzip.open),
    b"\xfd7zXZ\x00": cast(Any, lzma.open),
    b"BZh": cast(Any, bz2.open),
}


def is_hidden(path: Path | str) -> bool:
    """Return whether a file, or a folder it is in, is hidden: .DS_Store, ._0.wav, .git/config.

    Args:
        path: relative to the folder or archive that is searched.
    """
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(path).parts)


def has_suffix(path: Path | str, *suffixes: str) -> bool:
    """Return whether a name ends in one of these suffixes, in either case.

    Args:
        path: the file.
        suffixes: in lower case.
    """
    return str(path).lower().endswith(suffixes)


def check_expansion(path: Path | str, size: int, own: int | None = None) -> None:
    """Raise LongscanError if a small file would expand to a lot of memory.

    Args:
        path: the file, compressed or not.
        size: bytes that it expands to.
        own: bytes that it has; None: those of the file.

    Raises:
        LongscanError: more than 64 MB, and more than 100 times the file's own size.
    """
    own = Path(path).stat().st_size if own is None else own
    if size > FREE and size > RATIO * own:
        raise LongscanError(
            f"{path}: expected at most {RATIO} times its {own:,} bytes, it claims {size:,} or more. "
            "If that is intended, save it without compression."
        )


@contextlib.contextmanager
def foreign(path: Path | str, what: str) -> Iterator[None]:
    """Turn any exception of a parser about a damaged file into one clear error.

    Args:
        path: the file.
        what: what the error says it is, such as "no tar".

    Raises:
        LongscanError: the parser failed, by any exception but an OSError of the disk.
    """
    try:
        yield
    except (gzip.BadGzipFile, tarfile.TarError) as error:
        raise LongscanError(f"{path} is {what}, or is damaged ({error}). Fetch it again.") from error
    except LongscanError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise LongscanError(f"{path} is {what}, or is damaged ({error}).") from error  # bz2's word for it
    except Exception as error:  # of NumPy alone, nine kinds were seen
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise LongscanError(f"{path} is {what}, or is damaged ({said}).") from error


class _Member(tarfile.TarInfo):
    """A member that rejects a damaged header, which tarfile would take for the end of the archive.

    It rejects long headers of names and the like as well, which tarfile reads as a whole.
    """

    @classmethod
    def frombuf(cls, *args: Any, **kwargs: Any) -> Any:
        member = super().frombuf(*args, **kwargs)
        if member.type in HEADERS and member.size > BLOCK:
            raise tarfile.ReadError(f"a header claims {member.size:,} bytes")
        return member

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":
                raise
            raise tarfile.ReadError(f"at byte {tarfile_.offset:,}: {error}") from error


def iter_tar(path: Path, include: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield files of a tar, which may be compressed as gzip, xz or bzip2, in its order.

    Args:
        path: the tar.
        include: whether to yield the file of this name; hidden ones are skipped.

    Yields:
        Names and contents.

    Raises:
        LongscanError: it is no tar, is damaged or cut short anywhere up to its checksum, has sparse files
            or links, or claims too much.
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        magic = file.read(6)
    opener = next((one for start, one in COMPRESSIONS.items() if magic.startswith(start)), open)
    total = 0
    with (
        foreign(path, "no tar"),
        opener(path, "rb") as stream,
        tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar,
    ):
        for member in tar:
            if is_hidden(member.name) or not include(member.name):
                continue
            if member.issym() or member.islnk():
                raise LongscanError(
                    f"{path}: {member.name} is a link to {member.linkname}. "
                    "Pack the tar with --dereference --hard-dereference."
                )
            if not member.isfile():
                continue
            if member.issparse():
                raise LongscanError(f"{path}: {member.name} is a sparse file. Pack the tar without --sparse.")
            total += member.size
            check_expansion(path, total)
            inside = tar.extractfile(member)
            assert inside is not None  # it is a file
            yield member.name, inside.read()
        assert tar.fileobj is not None
        while block := tar.fileobj.read(BLOCK):  # up to the checksum of the compression
            if block.strip(b"\0"):
                raise LongscanError(
                    f"{path} has data after its end: it is damaged, or several tars. Pack it again."
                )


def read_npz(source: Path | bytes, name: Path | str = "") -> dict[str, npt.NDArray[Any]]:
    """Read an .npz file of plain arrays, checksums included.

    Args:
        source: the file, or its content.
        name: of it, for messages; that of the file if empty.

    Returns:
        The arrays by name.

    Raises:
        LongscanError: it is something else, is damaged, holds Python objects, or claims too much.
        OSError: it can't be read.
    """
    arrays = {}
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    own = len(source) if isinstance(source, bytes) else source.stat().st_size
    with foreign(name or str(source), "no .npz file of plain arrays"), zipfile.ZipFile(file) as archive:
        check_expansion(name or str(source), sum(info.file_size for info in archive.infolist()), own)
        for info in archive.infolist():
            with archive.open(info) as member:
                arrays[info.filename.removesuffix(".npy")] = np.lib.format.read_array(
                    member, allow_pickle=False
                )
                if member.read(1):  # to its end, where the checksum is compared
                    raise ValueError(f"bytes behind the array in {info.filename}")
    return arrays


def map_npy(path: Path) -> npt.NDArray[Any]:
    """Map an .npy file into memory.

    Args:
        path: the file.

    Returns:
        The array, read-only.

    Raises:
        LongscanError: it is something else, or damaged.
        OSError: it can't be read.
    """
    with foreign(path, "not an npy file of numbers"):
        return np.lib.format.open_memmap(path, mode="r")
