"""Frames of video files, decoded through PyAV: only those that are asked for, and never a whole film.

A pass over the packets, which decodes nothing, lists the times of the frames and of the key frames. A frame
is then decoded from the last key frame before it, or from the frame decoded last, whichever is nearer.
"""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from longscan.core.optional import require
from longscan.data.archives import has_suffix
from longscan.data.image_files import open_stream
from longscan.errors import LongscanError

__all__ = ["SUFFIXES", "VideoIndex", "check_video", "index_video", "is_video", "video_frames"]

# no other demuxer is tried: some open further files and addresses that a file names
AVI = ".avi"
FORMATS = {".mp4": "mov", ".mov": "mov", ".m4v": "mov", ".webm": "matroska", ".mkv": "matroska", AVI: "avi"}
SUFFIXES = tuple(FORMATS)
CODECS = tuple(
    "h264 hevc av1 libdav1d libaom-av1 vp8 libvpx vp9 libvpx-vp9 mpeg4 msmpeg4 msmpeg4v2 mpeg1video "
    "mpeg2video h263 mjpeg ffv1 huffyuv prores rawvideo png".split()
)
BOXES = (  # the outermost of .mp4 and .mov files
    *(b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"styp", b"sidx", b"emsg"),
    *(b"meta", b"uuid", b"free", b"skip", b"wide", b"pnot", b"prft"),
)
MAX_PIXELS = 2**25  # of a frame, as 8K has them: a decoder holds up to seventeen
TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)  # anticlockwise
NO_VIDEO = f"no video ({', '.join(SUFFIXES)})"


class VideoIndex(NamedTuple):
    """When the frames of a video are shown.

    Attributes:
        times: of the frames, ascending, in units of the file.
        keys: of the frames that depend on no other, ascending.
        timed: whether the file names times, which .avi files don't: then they are numbers of frames, and all
            frames before the one that is asked for are decoded.
    """

    times: list[int]
    keys: list[int]
    timed: bool


def is_video(name: str | Path) -> bool:
    """Return whether a name is that of a video file."""
    return has_suffix(name, *SUFFIXES)


def check_video(source: Path | bytes, name: str) -> None:
    """Raise unless a file has a video of possible size; no frame is decoded.

    Args:
        source: the file, or its content.
        name: of it, for messages.

    Raises:
        LongscanError: it is something else, has sound only, or PyAV is not installed.
    """
    with _opened(source, name):
        pass


def index_video(source: Path | bytes, name: str) -> VideoIndex:
    """Return the times of the frames.

    Args:
        source: see `check_video`.
        name: likewise.

    Raises:
        LongscanError: likewise; or there are no frames.
    """
    times: list[int] = []
    keys: list[int] = []
    timed = not has_suffix(name, AVI)
    with _opened(source, name) as (container, stream), _parsing(name):
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            timed = timed and packet.pts is not None
            times.append(packet.pts if timed else 0)
            if timed and packet.is_keyframe:
                keys.append(packet.pts)
    if not times:
        raise LongscanError(f"{name}: expected a video with frames, got none. Is it cut short?")
    if not timed or len(set(times)) < len(times):  # a time that several frames have names none of them
        return VideoIndex(list(range(len(times))), [0], False)
    return VideoIndex(sorted(times), sorted(keys), True)


def video_frames(
    source: Path | bytes, name: str, index: VideoIndex, positions: Sequence[int]
) -> Iterator[Image.Image]:
    """Yield frames as RGB images, upright.

    Args:
        source: see `check_video`.
        name: likewise.
        index: of `index_video`.
        positions: of the frames, ascending; a position may be repeated.

    Raises:
        LongscanError: a frame is damaged, or the size changes; or see `check_video`.
    """
    with _opened(source, name) as (container, stream), _parsing(name):
        decoded = _decoded(container, stream, index.timed)
        time, frame = -1, None
        for position in positions:
            wanted = index.times[position]
            start = index.keys[max(0, bisect_right(index.keys, wanted) - 1)] if index.keys else wanted
            if index.timed and start > max(time, index.times[0]):  # nearer than what was decoded last
                container.seek(start, stream=stream)
                decoded, frame = _decoded(container, stream, True), None
            while frame is None or time < wanted:
                following = next(decoded, None)
                if following is None:
                    break
                time, frame = following
            if frame is None or time != wanted:  # another one would pass for it
                raise LongscanError(f"{name}: frame {position:,} can't be decoded: the file is damaged.")
            if frame.is_corrupt:
                raise LongscanError(f"{name}: frame {position:,} is damaged. Encode the video again.")
            if _mirrored(frame):
                raise LongscanError(f"{name} is to be mirrored, which is not supported. Encode it again.")
            image = frame.to_image()
            turn = round(frame.rotation / 90) % 4  # as phones save videos that they took upright
            yield image.transpose(TURNS[turn - 1]) if turn else image


def _mirrored(frame: Any) -> bool:
    """Return whether the display matrix of a frame mirrors it, which its rotation does not say."""
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix)[:36])[:5]
    return bool(a * d < b * c)


@contextmanager
def _parsing(name: str) -> Iterator[None]:
    """Turn FFmpeg's errors, of which some pose as errors of the disk, into one that names the file."""
    try:
        yield
    except LongscanError:
        raise
    except Exception as error:
        said = getattr(error, "strerror", None) or type(error).__name__
        raise LongscanError(f"{name} is {NO_VIDEO}, or is damaged ({said}).") from error


def _decoded(container: Any, stream: Any, timed: bool) -> Iterator[tuple[int, Any]]:
    """Yield the time of each frame, and the frame."""
    for number, frame in enumerate(container.decode(stream)):
        yield (frame.pts if timed and frame.pts is not None else number), frame


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the video stream of a file."""
    av = require("av", "video files")
    kind = next((kind for suffix, kind in FORMATS.items() if has_suffix(name, suffix)), None)
    assert kind is not None  # `is_video`
    stream: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else open_stream(source, name)
    options = {"codec_whitelist": ",".join(CODECS)}
    with stream:
        size = stream.seek(0, io.SEEK_END)
        if (stated := _stated_size(stream, kind, size)) > size:  # FFmpeg takes what is there for all
            raise LongscanError(f"{name}: expected {stated:,} bytes or more, got {size:,}: it is cut short.")
        stream.seek(0)
        with _parsing(name):
            container = av.open(stream, format=kind, options=options, metadata_errors="replace")
        with container:
            if not container.streams.video:
                got = "sound only" if container.streams.audio else "none"
                raise LongscanError(f"{name}: expected a video stream, got {got}.")
            video = container.streams.video[0]
            context = video.codec_context
            if context is None or context.name not in CODECS:
                got = "an unknown codec" if context is None else f"the codec {context.name}"
                raise LongscanError(f"{name}: expected H.264, VP9, AV1 or the like, got {got}. Convert it.")
            if not 0 < context.width * context.height <= MAX_PIXELS:
                raise LongscanError(
                    f"{name}: expected frames of 1 to {MAX_PIXELS:,} pixels, got "
                    f"{context.width:,} × {context.height:,}. Make it smaller."
                )
            context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change in the stream
            context.thread_count = 1  # frames are decoded beside training, which has its own threads
            yield container, video


def _stated_size(stream: BinaryIO, kind: str, size: int) -> int:
    """Return where the outermost elements of a file end, by what they say themselves; 0 if they do not."""
    if kind == "matroska":
        stream.seek(0)
        return _stated_size_of_matroska(stream.read(4096))
    at = end = 0
    while at + 8 <= size:
        stream.seek(at)
        head = stream.read(16)
        if kind == "avi":
            length = 8 + int.from_bytes(head[4:8], "little") if head[:4] == b"RIFF" else 0
        else:
            length = int.from_bytes(head[:4], "big") if head[4:8] in BOXES else 0
            length = int.from_bytes(head[8:16], "big") if length == 1 else length
        if length < 8 or length == 2**32 + 7:  # to the end of the file, a stream without size, or no element
            break
        end = at + length
        at = end + end % 2 if kind == "avi" else end
    return end


def _stated_size_of_matroska(head: bytes) -> int:
    """Return where the segment of a Matroska file ends; 0 if it does not say, as that of a live stream."""
    at = 0
    for marker in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # the header, and the segment
        if head[at : at + 4] != marker or not head[at + 4 : at + 5].strip(b"\0"):
            return 0
        n_bytes = 9 - head[at + 4].bit_length()
        length = int.from_bytes(head[at + 4 : at + 4 + n_bytes], "big") & (2 ** (7 * n_bytes) - 1)
        unknown = length == 2 ** (7 * n_bytes) - 1
        at += 4 + n_bytes + length
    return 0 if unknown else at
