"""Image files in a folder for each class, on the disk or in an archive: their names and classes."""

from __future__ import annotations

import hashlib
import stat
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from longscan.core.files import utf8
from longscan.data.archives import check_expansion, foreign, has_suffix, iter_tar
from longscan.data.image_files import SUFFIXES, image_paths, is_image
from longscan.errors import LongscanError

__all__ = ["ARCHIVES", "ImageFiles", "image_files"]

ZIP = ".zip"
ARCHIVES = (ZIP, ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")
# what the folders of splits are called, in lower case
SPLITS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
ANY_SPLIT = {name for names in SPLITS.values() for name in names}


class ImageFiles(NamedTuple):
    """Image files with classes.

    Attributes:
        names: of the files, relative to the folder.
        truth: class indices.
        labels: names of the classes.
        get: name -> the file, or its content.
        content: a hash of the content of an archive, "" of a folder.
    """

    names: list[str]
    truth: list[int]
    labels: tuple[str, ...]
    get: Callable[[str], Path | bytes]
    content: str = ""


def image_files(path: Path, split: str) -> ImageFiles:
    """Return the image files below a folder or in an archive; nothing is decoded.

    Args:
        path: a folder, which is read lazily, like a .zip; or a tar, which is read into memory.
        split: "train" or "test", if the folders of the classes are in folders of that name.

    Raises:
        LongscanError: there are no images, an image without class, a class without images; an archive is
            damaged, has links, or names that lead out of it.
        OSError: a folder can't be read.
    """
    if path.is_dir():
        names = image_paths(path)
        return _classified(path, names, split, lambda name: path / name, lambda below: _folders(path / below))
    if has_suffix(path, ZIP):
        return _zip(path, split)
    members = {_inside(path, name): content for name, content in iter_tar(path, is_image)}
    digest = hashlib.sha256()
    for name in sorted(members):
        digest.update(hashlib.sha256(members[name]).digest())
    found = _classified(path, sorted(members), split, members.__getitem__, lambda below: ())
    return found._replace(content=digest.hexdigest())


def _classified(
    path: Path,
    names: list[str],
    split: str,
    get: Callable[[str], Path | bytes],
    folders: Callable[[str], Iterable[str]],
) -> ImageFiles:
    """Return the files with their classes; `folders` names those directly below one."""
    expected = f"({', '.join(SUFFIXES)})"
    if not names:
        raise LongscanError(f"{path}: expected images there {expected}, got none.")
    names, depth = _chosen(names, split)
    parts = [PurePosixPath(name).parts for name in names]
    loose = next((name for name, part in zip(names, parts, strict=True) if len(part) < depth + 2), None)
    if loose is not None:
        raise LongscanError(f"{path}: {loose} has no class. Put it in the folder of its class.")
    labels = tuple(sorted({part[depth] for part in parts}))
    for label in labels:
        utf8(label.encode(errors="surrogateescape"), f"{path}: the name of the class folder {label!r}")
    for folder in folders("/".join(parts[0][:depth])):
        if folder not in labels:
            raise LongscanError(f"{path}: the class folder {folder} has no images {expected}. Remove it.")
    index = {label: number for number, label in enumerate(labels)}
    return ImageFiles(names, [index[part[depth]] for part in parts], labels, get)


def _chosen(names: list[str], split: str) -> tuple[list[str], int]:
    """Return the names of a split, and how many folders enclose those of the classes."""
    parts = [PurePosixPath(name).parts for name in names]
    depth, shallowest = 0, min(map(len, parts))
    while depth + 1 < shallowest:
        tops = sorted({part[depth] for part in parts})
        if {top.lower() for top in tops} <= ANY_SPLIT:
            top = next((top for top in tops if top.lower() in SPLITS[split]), tops[0])
            return [name for name, part in zip(names, parts, strict=True) if part[depth] == top], depth + 1
        if len(tops) > 1 or depth + 2 >= shallowest or len({part[depth + 1] for part in parts}) < 2:
            break
        depth += 1  # one folder around all those of the classes
    return names, depth


def _folders(path: Path) -> list[str]:
    """Return the names of the folders in a folder, without hidden ones."""
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _zip(path: Path, split: str) -> ImageFiles:
    """Read the list of a .zip."""
    with foreign(path, "no .zip archive"):
        archive = zipfile.ZipFile(path)  # stays open: to list it again for each image takes long
    members, folders = {}, []
    for info in archive.infolist():
        name = _inside(path, info.filename)
        if name.startswith("__MACOSX"):
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            raise LongscanError(f"{path}: {info.filename} is a link. Pack what it points to.")
        if info.is_dir():
            folders.append(PurePosixPath(name))
        elif is_image(name):
            members[name] = info
    check_expansion(path, sum(info.file_size for info in members.values()))

    def get(name: str) -> bytes:
        with foreign(path / name, f"no file that {path.name} holds"):
            return archive.read(members[name])

    def below(prefix: str) -> list[str]:
        return [f.name for f in folders if f.parent == PurePosixPath(prefix) and f.name[0] != "."]

    sums = " ".join(f"{members[name].CRC:x}" for name in sorted(members))
    found = _classified(path, sorted(members), split, get, below)
    return found._replace(content=hashlib.sha256(sums.encode()).hexdigest())


def _inside(path: Path, name: str) -> str:
    """Return the name of a member; raise if it leads out of the archive."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or (parts and parts[0].endswith(":")):
        raise LongscanError(f"{path}: the name {name!r} leads out of the archive. Pack it again.")
    return str(PurePosixPath(name))
