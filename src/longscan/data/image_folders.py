"""Image files, or clips, in a folder for each class, on the disk or in an archive: names and classes."""

from __future__ import annotations

import contextlib
import hashlib
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from longscan.core.files import utf8
from longscan.data.archives import check_expansion, foreign, has_suffix, is_hidden, iter_tar
from longscan.data.image_files import SUFFIXES, file_paths, is_animated, is_image
from longscan.data.video_files import SUFFIXES as VIDEOS
from longscan.data.video_files import is_video
from longscan.data.videos import NPZ, is_clip_file, natural
from longscan.errors import LongscanError

__all__ = ["ARCHIVES", "ImageFiles", "group_clips", "image_files", "is_part"]

ZIP = ".zip"
ARCHIVES = (ZIP, ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")
# what the folders of splits are called, in lower case
SPLITS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
ANY_SPLIT = {name for names in SPLITS.values() for name in names}


class ImageFiles(NamedTuple):
    """Image files or clips with classes.

    Attributes:
        names: of the files, relative to the folder; of a clip of image files, that of its folder.
        truth: class indices.
        labels: names of the classes.
        get: name -> the file, or its content.
        content: a hash of the content of an archive, "" of a folder; for clips, also of their lengths.
        frames: name -> the image files of a clip; of the clips that are folders.
    """

    names: list[str]
    truth: list[int]
    labels: tuple[str, ...]
    get: Callable[[str], Path | bytes]
    content: str = ""
    frames: Mapping[str, Sequence[str]] = {}


def is_part(name: str) -> bool:
    """Return whether a name is that of a clip's file, or of an image file, which may be a frame."""
    return is_image(name) or (is_clip_file(name) and not is_hidden(name))


def group_clips(
    names: Iterable[str], get: Callable[[str], Path | bytes], root: Path
) -> dict[str, Sequence[str]]:
    """Return the clips among files: a video, an .npz file, an animated image, or a folder of still images.

    Args:
        names: of files, relative to the root; see `is_part`.
        get: name -> the file, or its content.
        root: the folder or archive, for messages.

    Returns:
        Name -> the image files of a folder, in their order; () for a file.
    """
    clips: dict[str, Sequence[str]] = {}
    folders: dict[str, list[str]] = {}
    for name in names:
        if is_clip_file(name):
            clips[name] = ()
        else:
            folders.setdefault(str(PurePosixPath(name).parent), []).append(name)
    for folder, files in folders.items():
        files.sort(key=natural)
        animated = False
        with contextlib.suppress(LongscanError):  # what is no image is reported when it is opened
            animated = is_animated(get(files[0]), str(root / files[0]))
        clips |= dict.fromkeys(files, ()) if animated else {folder: files}
    return dict(sorted(clips.items()))


def image_files(path: Path, split: str, *, clips: bool = False) -> ImageFiles:
    """Return the image files below a folder or in an archive, or its clips; nothing is decoded.

    Args:
        path: a folder, which is read lazily, like a .zip; or a tar, which is read into memory.
        split: "train" or "test", if the folders of the classes are in folders of that name.
        clips: whether clips are meant; see `group_clips`.

    Raises:
        LongscanError: there are no images, an image without class, a class without images; an archive is
            damaged, has links, or names that lead out of it.
        OSError: a folder can't be read.
    """
    include = is_part if clips else is_image
    if path.is_dir():
        names = file_paths(path, lambda name: include(name) or (not clips and is_video(name)))
        if not clips and (video := next(filter(is_video, names), None)):
            raise LongscanError(
                f"{path}: {video} is a video among images. For clips add --frames, for images remove it."
            )
        found = ImageFiles(names, [], (), lambda name: path / name)
        return _classified(path, found, split, lambda below: _folders(path / below), clips)
    if has_suffix(path, ZIP):
        return _zip(path, split, clips)
    members = {_inside(path, name): content for name, content in iter_tar(path, include)}
    digest = hashlib.sha256()
    for name in sorted(members):
        digest.update(hashlib.sha256(members[name]).digest())
    found = ImageFiles(sorted(members), [], (), members.__getitem__, digest.hexdigest())
    return _classified(path, found, split, lambda below: (), clips)


def _classified(
    path: Path, found: ImageFiles, split: str, folders: Callable[[str], Iterable[str]], clips: bool
) -> ImageFiles:
    """Return the files of a split with their classes; `folders` names those directly below one."""
    names, frames, what, expected = found.names, found.frames, "images", f"({', '.join(SUFFIXES)})"
    if clips:
        what, expected = "clips", f"(folders of frames, {', '.join((*VIDEOS, NPZ))}, animated images)"
    if not names:
        raise LongscanError(f"{path}: expected {what} there {expected}, got none.")
    if clips:
        groups = group_clips(names, found.get, path)
        names, frames = list(groups), {name: files for name, files in groups.items() if files}
    names, depth = _chosen(names, split)
    parts = [PurePosixPath(name).parts for name in names]
    loose = next((name for name, part in zip(names, parts, strict=True) if len(part) < depth + 2), None)
    if loose is not None and loose in frames:
        raise LongscanError(
            f"{path}: {frames[loose][0]} is a still image and in no folder of frames. Put the frames of each "
            "clip into a folder of its own, in that of its class; for images leave out --frames."
        )
    if loose is not None:
        raise LongscanError(f"{path}: {loose} has no class. Put it in the folder of its class.")
    labels = tuple(sorted({part[depth] for part in parts}))
    for label in labels:
        utf8(label.encode(errors="surrogateescape"), f"{path}: the name of the class folder {label!r}")
    for folder in folders("/".join(parts[0][:depth])):
        if folder not in labels:
            raise LongscanError(f"{path}: the class folder {folder} has no {what} {expected}. Remove it.")
    index = {label: number for number, label in enumerate(labels)}
    content = found.content
    if frames := {name: frames[name] for name in names if name in frames}:
        listed = "\0".join(f"{name}/{len(files)}" for name, files in frames.items())
        content += hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()
    truth = [index[part[depth]] for part in parts]
    return found._replace(names=names, truth=truth, labels=labels, content=content, frames=frames)


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


def _zip(path: Path, split: str, clips: bool) -> ImageFiles:
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
        elif is_part(name) if clips else is_image(name):
            members[name] = info
    check_expansion(path, sum(info.file_size for info in members.values()))

    def get(name: str) -> bytes:
        with foreign(path / name, f"no file that {path.name} holds"):
            return archive.read(members[name])

    def below(prefix: str) -> list[str]:
        return [f.name for f in folders if f.parent == PurePosixPath(prefix) and f.name[0] != "."]

    sums = " ".join(f"{members[name].CRC:x}" for name in sorted(members))
    content = hashlib.sha256(sums.encode()).hexdigest()
    return _classified(path, ImageFiles(sorted(members), [], (), get, content), split, below, clips)


def _inside(path: Path, name: str) -> str:
    """Return the name of a member; raise if it leads out of the archive."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or (parts and parts[0].endswith(":")):
        raise LongscanError(f"{path}: the name {name!r} leads out of the archive. Pack it again.")
    return str(PurePosixPath(name))
