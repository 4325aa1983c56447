"""Tensors from files of torch.save, whose pickles could run code: anything but dense tensors is refused."""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.errors import LongscanError

__all__ = ["AGAIN", "SETTINGS", "check_tensors", "read_tensors", "unpickle"]

MAX_PICKLE = 2**23  # bytes of an archive's data.pkl, a hundred or two a tensor
PLAIN = re.compile(  # what the pickle of dense tensors names
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(Size|\w+Storage)"
    r"|torch\.storage\.(Untyped|Typed)Storage|torch\.(float|bfloat|int|uint)\d+|torch\.bool"
)
AGAIN = "delete the file and fetch it again."


class _Inert:
    """Stands for an object that is no tensor: its class is neither imported nor run."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Ignore it."""


# what checkpoints of a training run hold beside tensors (settings and counters), and what stands for it
SETTINGS: dict[str, type] = {
    **dict.fromkeys(("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath"), _Inert),
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _Inert),
    **dict.fromkeys(("numpy.dtype", "_codecs.encode", "collections.Counter"), _Inert),
    "yacs.config.CfgNode": OrderedDict,  # torch sets items of its own dictionaries only
}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save.

    Args:
        file: an archive that holds a dictionary of tensors, mapped.

    Raises:
        LongscanError: it is damaged, or holds anything else.
    """
    tensors = unpickle(file)
    check_tensors(file, tensors)
    return tensors  # type: ignore[no-any-return]


def unpickle(file: Path, inert: Mapping[str, type] | None = None) -> Any:
    """Return the content of a file of torch.save, whose pickle may name nothing but tensors: no code runs.

    Args:
        file: an archive of torch.save, mapped.
        inert: names of classes -> those of which objects stand in for theirs.

    Raises:
        LongscanError: it is damaged, or names anything else.
    """
    with open(file, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            raise LongscanError(
                f"{file} is not an archive of torch.save: a bare pickle may contain code and is refused.\n"
                "Ask for the model as safetensors, or save it again with a recent torch."
            )
    inert = inert or {}
    _check_archive(file, inert)
    skipped: list[Any] = [(stand_in, name) for name, stand_in in inert.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(skipped):
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is raised
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise LongscanError(f"{file} is damaged ({type(error).__name__}): {AGAIN}") from error


def check_tensors(file: Path, tensors: Any) -> None:
    """Raise unless this is a dictionary of tensors, which the file holds as a whole.

    Args:
        file: where it is from.
        tensors: anything.

    Raises:
        LongscanError: it is something else, or its tensors have more numbers than the file.
    """
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise LongscanError(f"{file}: expected a dictionary of tensors by name, as state_dict() returns.")
    _check_sizes(file, tensors)


def _check_archive(file: Path, inert: Collection[str]) -> None:
    """Raise unless an archive of torch.save is uncompressed and names nothing but dense tensors."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise LongscanError(f"{file} is compressed, which torch.save never does: {AGAIN}")
            pickles = [entry for entry in entries if re.fullmatch(r"[^/]+/data\.pkl", entry.filename)]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                raise LongscanError(f"{file} has no small data.pkl, as torch.save writes it: {AGAIN}")
            operations = list(pickletools.genops(archive.read(pickles[0])))
    except LongscanError:
        raise
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise LongscanError(f"{file} is damaged ({type(error).__name__}): {AGAIN}") from error
    for operation, argument, _ in operations:
        if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise LongscanError(f"{file} is of a pickle protocol that torch.save does not use: {AGAIN}")
        if operation.name != "GLOBAL" or (name := str(argument).replace(" ", ".")) in inert:
            continue
        if not PLAIN.fullmatch(name):
            if name.startswith("torch._utils._rebuild"):
                raise LongscanError(f"{file} holds tensors made by {name}: expected dense ones with numbers.")
            raise LongscanError(
                f"{file} contains code ({name}): refused, because loading would run it.\n"
                "Expected tensors only: ask for the model as safetensors."
            )


def _check_sizes(file: Path, tensors: dict[str, Tensor]) -> None:
    """Raise unless a file holds the numbers it describes; a head may share those of the embedding."""
    total = 0
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.element_size()
        total += n_bytes
        hollow = tensor.layout != torch.strided or tensor.is_meta
        if hollow or n_bytes > tensor.untyped_storage().nbytes() or _overlaps(tensor):
            raise LongscanError(
                f"{file}: {name} {tuple(tensor.shape)} is not stored as a whole: expected dense tensors."
            )
    if total > 2 * (size := file.stat().st_size):
        raise LongscanError(
            f"{file} describes tensors of {total:,} bytes and has {size:,}: the file is not meant well."
        )


def _overlaps(tensor: Tensor) -> bool:
    """Return whether several elements of a tensor may be one number, which training would change at once."""
    last = 0  # offset of the last element along the axes so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            return True
        last += stride * max(0, size - 1)
    return False
