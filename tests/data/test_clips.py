"""Clips: every kind of file and layout, the choice of frames, and what is refused."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import tarfile
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labelled_clips import (
    moving,
    write_animation,
    write_arrays,
    write_class_folders,
    write_frames,
    write_video,
)
from longscan.core.random import RandomStream, clip_stream
from longscan.data.clips import Clips, read_clips
from longscan.data.image_folders import image_files
from longscan.data.images import read_images
from longscan.data.video_files import index_video, video_frames
from longscan.data.videos import Clip, choose_frames, clip_of_files, natural, open_clip
from longscan.errors import LongscanError, UsageError

CLIP = moving(2)[0][0]  # (6, 16, 16)


def grey(n: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A video whose frame k is k times 8 everywhere."""
    return np.stack([np.full(size, 8 * time % 256, np.uint8) for time in range(n)])


def values(clip: Clip, positions: list[int], channels: int = 1) -> list[int]:
    return [int(np.asarray(frame)[9, 9].ravel()[0]) for frame in clip.frames(positions, channels)]


def pixels(clip: Clip, positions: list[int] | None = None, channels: int = 1) -> np.ndarray:
    every = list(range(clip.n_frames)) if positions is None else positions
    return np.stack([np.asarray(frame) for frame in clip.frames(every, channels)])


def opened(path: Path) -> Clip:
    return open_clip(path, str(path))


# which frames


def test_the_middle_of_each_segment() -> None:
    assert choose_frames(8, 8) == list(range(8))
    assert choose_frames(16, 4) == [2, 6, 10, 14]
    assert choose_frames(100, 3) == [16, 50, 83]
    assert choose_frames(3, 8) == [0, 0, 0, 1, 1, 2, 2, 2]


def test_a_random_frame_of_each_segment() -> None:
    seen = [set[int]() for _ in range(4)]
    for index in range(200):
        chosen = choose_frames(10, 4, clip_stream(0, 0, index))
        assert chosen == choose_frames(10, 4, clip_stream(0, 0, index))
        assert chosen == sorted(chosen)
        for found, position in zip(seen, chosen, strict=True):
            found.add(position)
    assert seen == [{0, 1, 2}, {2, 3, 4}, {5, 6, 7}, {7, 8, 9}]
    assert choose_frames(10, 4, clip_stream(0, 0, 1)) != choose_frames(10, 4, clip_stream(0, 1, 1))


def test_numbers_in_names_count() -> None:
    names = ["frame10.png", "frame2.png", "frame1.png", "b", "a2", "a10", "frame2.jpg", "frame02.png"]
    assert sorted(names, key=natural) == [
        *("a2", "a10", "b", "frame1.png", "frame2.jpg", "frame02.png", "frame2.png", "frame10.png"),
    ]


# kinds of files


def test_a_folder_of_frames(tmp_path: Path) -> None:
    clip = grey(12, (10, 12))
    folder = write_frames(tmp_path / "clip", clip)
    files = [path.name for path in folder.iterdir()]
    found = clip_of_files(files, lambda name: folder / name, str(folder))
    assert found.n_frames == 12
    assert np.array_equal(pixels(found), clip)
    assert pixels(found, [3], 3).shape == (1, 10, 12, 3)


@pytest.mark.parametrize("shape", [(6, 16, 16), (6, 16, 16, 1), (6, 16, 16, 3)])
def test_an_array(shape: tuple[int, ...], tmp_path: Path) -> None:
    clip = np.broadcast_to(CLIP.reshape(6, 16, 16, *[1] * (len(shape) - 3)), shape)
    np.savez(tmp_path / "a.npz", frames=clip, fps=np.array(25))
    np.savez(tmp_path / "b.npz", clip)
    for name in ("a.npz", "b.npz"):
        assert np.array_equal(pixels(opened(tmp_path / name)), CLIP)


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animation(kind: str, tmp_path: Path) -> None:
    clip = grey(7)
    found = opened(write_animation(tmp_path / f"a.{kind}", clip))
    assert found.n_frames == 7
    assert np.array_equal(pixels(found), clip)
    assert np.array_equal(pixels(found, [1, 1, 5]), clip[[1, 1, 5]])


VIDEOS = [
    ("a.mp4", "libx264"),
    ("a.mov", "libx264"),
    ("a.MKV", "libx264"),
    ("a.avi", "libx264"),
    ("a.avi", "mpeg4"),
    ("a.webm", "libvpx-vp9"),
    ("a.webm", "libvpx"),
    ("a.mkv", "ffv1"),
]


@pytest.mark.parametrize(("name", "codec"), VIDEOS)
def test_a_video(name: str, codec: str, tmp_path: Path) -> None:
    """Any frames are those that decoding all of them gives."""
    path = write_video(tmp_path / name.lower(), grey(30), codec).rename(tmp_path / name)
    clip = opened(path)
    assert clip.n_frames == 30
    every = pixels(clip, channels=3)
    assert np.abs(every[:, 9, 9, 0].astype(int) - 8 * np.arange(30)).max() < 6
    for positions in ([29], [0, 13, 13, 14, 28], [7, 8, 9], [16], [3, 20]):
        assert np.array_equal(pixels(clip, positions, 3), every[positions])
    content = open_clip(path.read_bytes(), f"archive/{name}")
    assert np.array_equal(pixels(content, [5, 25], 3), every[[5, 25]])
    assert np.asarray(next(clip.frames([4], 1))).ndim == 2


def test_a_turned_video_is_upright(tmp_path: Path) -> None:
    """Phones save what they took upright as it came from the sensor, with a matrix that turns it."""
    bright_above = grey(4) * 0
    bright_above[:, :24] = 200
    content = write_video(tmp_path / "a.mp4", bright_above).read_bytes()
    one, plain = 2**16, [2**16, 0, 0, 0, 2**16, 0, 0, 0, 2**30]
    start = content.rindex(np.array(plain, ">u4").tobytes())
    for matrix, side in (
        ([0, one, 0, 2**32 - one, 0, 0, 0, 0, 2**30], np.s_[:, -20:]),  # clockwise: above -> right
        ([2**32 - one, 0, 0, 0, 2**32 - one, 0, 0, 0, 2**30], np.s_[-20:]),
    ):
        turned = content[:start] + np.array(matrix, ">u4").tobytes() + content[start + 36 :]
        [frame] = pixels(open_clip(turned, "a.mp4"), [1])
        assert frame.shape == ((64, 48) if matrix[0] == 0 else (48, 64))
        assert frame[side].min() > 150
        assert (frame > 150).mean() == pytest.approx(0.5, abs=0.05)


def test_frames_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    """A frame that is damaged further on does not matter to what comes before it."""
    folder = write_frames(tmp_path / "clip", CLIP)
    (folder / "frame4.png").write_bytes((folder / "frame4.png").read_bytes()[:60])
    found = clip_of_files([path.name for path in folder.iterdir()], folder.joinpath, str(folder))
    assert len(pixels(found, [0, 1, 2, 3])) == 4
    with pytest.raises(LongscanError, match=r"clip/frame4\.png.*damaged"):
        pixels(found)


# what is refused


def test_without_pyav_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(LongscanError, match=r"video files need av: pip install 'longscan\[video\]'"):
        opened(tmp_path / "a.mp4")


def test_sound_only(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="the extra 'video' is not installed")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(LongscanError, match=r"a\.mp4: expected a video stream, got sound only"):
        opened(tmp_path / "a.mp4")


def a_playlist(path: Path) -> None:
    """What would make FFmpeg open another file, if it guessed the format."""
    secret = write_video(path.parent / "secret.mp4", grey(9))
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n")


def a_list(path: Path) -> None:
    secret = write_video(path.parent / "secret.mp4", grey(9))
    path.write_text(f"ffconcat version 1.0\nfile {secret}\n")


def cut_short(path: Path) -> None:
    whole = write_video(path.parent / "whole.mp4", grey(30))
    path.write_bytes(whole.read_bytes()[:700])


def a_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(800))


@pytest.mark.parametrize(
    "make",
    [
        a_playlist,
        a_list,
        cut_short,
        a_sound,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>404</html>"),
        lambda path: Image.new("L", (9, 9)).save(path, "PNG"),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_what_is_no_video(make: Callable[[Path], None], suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra 'video' is not installed")
    path = tmp_path / f"a{suffix}"
    make(path)
    with pytest.raises(
        LongscanError, match=rf"a{suffix}.*no video|a{suffix}: expected a video|a{suffix}.*cut short"
    ):
        opened(path)


def test_damage_is_an_error_or_a_picture(tmp_path: Path) -> None:
    """Bytes changed anywhere never end in anything but a clear error or frames of the right size."""
    whole = write_video(tmp_path / "whole.mp4", grey(20)).read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(40):
        content = bytearray(whole)
        for place in draw.integers(0, len(whole), 8):
            content[place] = int(draw.integers(256))
        with contextlib.suppress(LongscanError):
            clip = open_clip(bytes(content), "a.mp4")
            assert len(pixels(clip, choose_frames(clip.n_frames, 4), 3)) == 4


def test_a_frame_too_large_for_a_decoder(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", grey(2), "rawvideo", pix_fmt="bgr24")
    content = path.read_bytes()
    size = np.array([64, -48], "<i4").tobytes()  # as the header has it: upside down
    assert content.count(size) == 1
    path.write_bytes(content.replace(size, np.array([8000, -6000], "<i4").tobytes()))
    with pytest.raises(
        LongscanError, match=r"a\.avi: expected frames of 1 to 33,554,432 pixels, got 8,000 × 6,000"
    ):
        pixels(opened(path))


def test_a_pipe_is_no_video(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra 'video' is not installed")
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(LongscanError, match=r"a\.mp4: expected a file"):
        opened(tmp_path / "a.mp4")


def test_one_frame_is_no_clip(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", frames=CLIP[:1])
    write_frames(tmp_path / "folder", CLIP[:1])
    with pytest.raises(LongscanError, match=r"a\.npz: expected a clip of two frames or more, got 1"):
        opened(tmp_path / "a.npz")
    with pytest.raises(LongscanError, match="folder: expected a clip of two frames or more, got 1"):
        clip_of_files(["frame0.png"], (tmp_path / "folder").joinpath, "folder")
    Image.new("L", (4, 4)).save(tmp_path / "a.gif")
    with pytest.raises(LongscanError, match=r"a\.gif is a still image: expected a clip"):
        opened(tmp_path / "a.gif")


def test_one_frame_of_video_is_no_clip(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", grey(1))
    with pytest.raises(LongscanError, match=r"a\.mp4: expected a clip of two frames or more, got 1"):
        opened(path)


def test_frames_have_one_size(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", CLIP)
    Image.new("L", (9, 16)).save(folder / "frame3.png")
    found = clip_of_files([path.name for path in folder.iterdir()], folder.joinpath, "clip")
    with pytest.raises(
        LongscanError, match="clip: expected frames of one size, 16 × 16, got 9 × 16 for frame 3"
    ):
        pixels(found)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"frames": np.zeros((4, 8, 8), np.float32)}, r"of bytes, with 1, 3 or 4.*float32 \(4, 8, 8\)"),
        ({"frames": np.zeros((4, 8, 8, 2), np.uint8)}, r"got uint8 \(4, 8, 8, 2\)"),
        ({"frames": np.zeros((8, 8), np.uint8)}, r"got uint8 \(8, 8\)"),
        ({"a": CLIP, "b": CLIP}, "expected the array frames, or only one array; got a, b"),
    ],
)
def test_arrays_that_are_no_clip(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(LongscanError, match=message):
        opened(tmp_path / "a.npz")


# layouts


def classes(clips: Clips) -> list[str]:
    return [clips.labels[label] for label in clips.truth]


def test_a_folder_for_each_class_with_every_kind_of_clip(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "clips", 12)
    (folder / "left" / "notes.txt").write_text("x")
    found = read_clips([folder], check=True)
    assert found.labels == ("left", "right")
    assert classes(found) == ["left"] * 6 + ["right"] * 6
    assert found.name(0) == str(folder / "left" / "001")
    expected = moving(12)[0]
    for number in range(12):
        source = int(Path(found.name(number)).stem)
        assert np.array_equal(pixels(found.item(number, 1)), expected[source])


def test_videos_in_class_folders(tmp_path: Path) -> None:
    for label in ("a", "b"):
        write_video(tmp_path / "clips" / label / "x.mp4", grey(5))
    found = read_clips([tmp_path / "clips"], check=True)
    assert [found.item(n).n_frames for n in range(2)] == [5, 5]


def test_a_folder_around_the_classes_and_those_of_splits(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "around" / "data" / "train", 12)
    write_class_folders(tmp_path / "around" / "data" / "val", 6)
    assert len(read_clips([tmp_path / "around"])) == 12
    assert len(read_clips([tmp_path / "around"], split="test")) == 6


def test_one_class_of_folders_of_frames(tmp_path: Path) -> None:
    for number in range(3):
        write_frames(tmp_path / "data" / "left" / f"clip{number}", CLIP)
    assert classes(read_clips([tmp_path / "data"])) == ["left"] * 3


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives(kind: str, tmp_path: Path) -> None:
    folder, path = write_class_folders(tmp_path / "clips", 12), tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(folder, "clips")
    from_folder, from_archive = read_clips([folder]), read_clips([path], check=True)
    assert np.array_equal(from_archive.truth, from_folder.truth)
    for number in range(12):
        assert np.array_equal(pixels(from_archive.item(number)), pixels(from_folder.item(number)))


def test_labelled_arrays(tmp_path: Path) -> None:
    found = read_clips([write_arrays(tmp_path / "a.npz", 8)])
    assert (found.size, found.channels, len(found)) == ((16, 16), 1, 8)
    assert classes(found) == ["right", "left"] * 4
    assert np.array_equal(pixels(found.item(3)), moving(8)[0][3])
    colour = write_arrays(tmp_path / "b.npz", 8, x=np.stack([moving(8)[0]] * 3, 4))
    assert read_clips([colour]).channels == 3
    both = read_clips([colour, write_class_folders(tmp_path / "clips", 6)])
    assert (len(both), both.labels) == (14, ("left", "right"))


def test_images_and_clips_are_not_confused(tmp_path: Path) -> None:
    clips = write_arrays(tmp_path / "a.npz", 8, x=np.zeros((8, 4, 9, 9, 3), np.uint8))
    with pytest.raises(LongscanError, match=r"got uint8 \(8, 4, 9, 9, 3\)\. For clips .* --frames 8"):
        read_images([clips])
    images = write_arrays(tmp_path / "b.npz", 8, x=np.zeros((8, 9, 9), np.uint8))
    with pytest.raises(LongscanError, match=r"expected clips x.*For images leave out --frames"):
        read_clips([images])
    photos = write_arrays(tmp_path / "c.npz", 8, x=np.zeros((8, 9, 9, 3), np.uint8))
    with pytest.raises(LongscanError, match=r"expected clips x.*For images leave out --frames"):
        read_clips([photos])


def still_images(folder: Path) -> None:
    write_frames(folder / "left", CLIP)


def an_empty_class(folder: Path) -> None:
    (folder / "empty").mkdir()


def a_loose_clip(folder: Path) -> None:
    np.savez(folder / "loose.npz", CLIP)


def a_bad_frame(folder: Path) -> None:
    (folder / "left" / "001" / "frame0.png").write_text("no")


def a_bad_video(folder: Path) -> None:
    pytest.importorskip("av", reason="the extra 'video' is not installed")
    (folder / "left" / "z.mp4").write_text("no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (still_images, r"left/frame0\.png is a still image and in no folder of frames"),
        (an_empty_class, r"the class folder empty has no clips \(folders of frames, \.mp4"),
        (a_loose_clip, r"loose\.npz has no class"),
        (a_bad_frame, r"left/001/frame0\.png is no image"),
        (a_bad_video, r"z\.mp4 is no video"),
    ],
)
def test_folders_without_sense(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "clips", 4)
    change(folder)
    with pytest.raises(LongscanError, match=message):
        read_clips([folder], check=True)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name folders of clips"):
        read_clips([])
    with pytest.raises(LongscanError, match="expected clips there"):
        read_clips([tmp_path])
    with pytest.raises(LongscanError, match="no such file"):
        read_clips([tmp_path / "nowhere"])


def test_the_fingerprint_covers_the_number_of_frames(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "clips", 6)
    before = read_clips([folder]).fingerprint()
    assert before == read_clips([folder]).fingerprint()
    (folder / "left" / "001" / "frame5.png").unlink()
    assert read_clips([folder]).fingerprint() != before


def test_random_streams_of_clips_are_their_own() -> None:
    words = {tuple(stream.raw(2).tolist()) for stream in (clip_stream(0, 0, 0), clip_stream(0, 0, 1),
             clip_stream(0, 1, 0), RandomStream(0, 0))}  # fmt: skip
    assert len(words) == 4


def test_a_frame_that_cannot_be_decoded_is_never_replaced_by_another(tmp_path: Path) -> None:
    pytest.importorskip("av")
    import av

    shades = np.stack([np.full((16, 16), 6 * n, np.uint8) for n in range(24)])
    path = write_video(tmp_path / "a.mkv", shades)
    with av.open(str(path)) as container:
        first = next(packet for packet in container.demux(video=0) if packet.size)
        content, payload = path.read_bytes(), bytes(first)
    at = content.index(payload[-200:])
    path.write_bytes(content[:at] + bytes(200) + content[at + 200 :])
    index = index_video(path, path.name)
    assert len(index.times) == 24
    with pytest.raises(LongscanError, match=r"a\.mkv.*(frame 0 can't be decoded|damaged)"):
        list(video_frames(path, path.name, index, [0]))


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_video_that_is_cut_short_is_refused(suffix: str, share: float, tmp_path: Path) -> None:
    """FFmpeg would take it for a shorter clip: of .mkv and .avi, and of .mp4 whose index comes first."""
    clip = np.random.default_rng(0).integers(0, 255, (24, 64, 64), np.uint8)
    path = write_video(tmp_path / f"a{suffix}", clip, "mpeg4" if suffix == ".avi" else "libx264")
    content = path.read_bytes()
    assert opened(path).n_frames == 24
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(LongscanError, match=rf"a\{suffix}: expected [\d,]+ bytes or more, got .* cut short"):
        opened(path)


def test_a_mirrored_video_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = write_video(tmp_path / "a.mp4", np.zeros((4, 16, 16), np.uint8))
    content = path.read_bytes()
    at = content.index(b"tkhd") + 4 + 4 + 20 + 16
    matrix = struct.pack(">9i", -65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:at] + matrix + content[at + 36 :])
    with pytest.raises(LongscanError, match=r"a\.mp4 is to be mirrored"):
        list(video_frames(path, path.name, index_video(path, path.name), [0]))


def test_a_video_among_images_is_no_image(tmp_path: Path) -> None:
    write_frames(tmp_path / "a", np.zeros((2, 16, 16), np.uint8))
    (tmp_path / "a" / "b.mp4").write_bytes(b"")
    with pytest.raises(LongscanError, match=r"b\.mp4 is a video among images\. For clips add --frames"):
        image_files(tmp_path, "train")
