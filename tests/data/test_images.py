"""Labelled images: every layout, every kind of file, and what is refused; resizing and augmentation."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from labelled_images import LABELS, bars, write_folder, write_npz
from longscan.core.random import RandomStream, image_stream
from longscan.data.augmentation import Augmentation, central_crop, mix, to_tensor
from longscan.data.image_files import image_paths, is_animated, read_image
from longscan.data.images import Images, read_images
from longscan.errors import LongscanError, UsageError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(content: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(read_image(content, "it", channels))


def classes(images: Images) -> list[str]:
    return [images.labels[label] for label in images.truth]


# layouts


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 12)
    (folder / "across" / "Thumbs.db").write_bytes(b"x")
    (folder / "across" / "._000.png").write_bytes(b"x")
    (folder / ".git").mkdir()
    found = read_images([folder], check=True)
    assert found.labels == ("across", "disc", "down")
    assert classes(found) == ["across"] * 4 + ["disc"] * 4 + ["down"] * 4
    assert found.name(5) == str(folder / "disc" / "005.png")
    assert (found.size, found.channels) == (None, 3)
    expected = bars(12)[0][5]
    assert np.array_equal(np.asarray(found.image(5)), np.stack([expected] * 3, 2))
    assert np.array_equal(np.asarray(found.image(5, 1)), expected)


def test_images_may_be_deeper_in_the_folder_of_their_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", 6)
    deep = tmp_path / "images" / "disc" / "2024" / "may"
    deep.mkdir(parents=True)
    (tmp_path / "images" / "disc" / "002.png").rename(deep / "002.png")
    found = read_images([tmp_path / "images"])
    assert found.labels == ("across", "disc", "down")
    assert classes(found).count("disc") == 2


def test_a_folder_around_the_classes_and_those_of_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "around" / "data" / "train", 12)
    write_folder(tmp_path / "around" / "data" / "val", 6)
    (tmp_path / "around" / "README.txt").write_text("hello")
    assert len(read_images([tmp_path / "around"])) == 12
    assert len(read_images([tmp_path / "around"], split="test")) == 6
    assert len(read_images([tmp_path / "around" / "data" / "val"])) == 6


def test_digits_are_sorted_as_numbers(tmp_path: Path) -> None:
    for label in ("10", "9", "2"):
        (tmp_path / label).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / label / "a.png")
    assert read_images([tmp_path]).labels == ("2", "9", "10")


def test_links_in_a_folder_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 6)
    (folder / "disc").rename(tmp_path / "elsewhere")
    (folder / "disc").symlink_to(tmp_path / "elsewhere")
    (folder / "across" / "again").symlink_to(folder)
    assert len(read_images([folder])) == 6


def test_arrays(tmp_path: Path) -> None:
    x, y = bars(9)
    found = read_images([write_npz(tmp_path / "a.npz", 9)])
    assert (found.size, found.channels, len(found)) == ((16, 16), 1, 9)
    assert classes(found) == [LABELS[label] for label in y]
    assert np.array_equal(np.asarray(found.image(4)), x[4])
    np.savez(
        tmp_path / "b.npz", x_train=x, y_train=y, x_test=np.stack([x[:3]] * 3, 3), y_test=["u", "v", "u"]
    )
    assert read_images([tmp_path / "b.npz"]).labels == ("0", "1", "2")
    test = read_images([tmp_path / "b.npz"], split="test")
    assert (test.labels, test.channels, test.image(1).mode) == (("u", "v"), 3, "RGB")


def test_encoded_images_in_an_array(tmp_path: Path) -> None:
    files = [encoded(Image.fromarray(image).convert("RGB"), "JPEG") for image in bars(4)[0]]
    arrays = {
        "test_jpeg": np.frombuffer(b"".join(files), np.uint8),
        "test_offsets": np.cumsum([0, *map(len, files)]),
        "test_labels": np.array([2, 0, 1, 1], np.uint8),
        "classes": np.array(["cat", "ant", "bee"]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    found = read_images([tmp_path / "a.npz"], split="test")
    assert classes(found) == ["bee", "cat", "ant", "ant"]
    assert np.array_equal(np.asarray(found.image(2)), pixels(files[2]))
    np.savez(tmp_path / "b.npz", **{**arrays, "test_offsets": np.array([0, 9, 5])})
    with pytest.raises(LongscanError, match="test_offsets that increase"):
        read_images([tmp_path / "b.npz"], split="test")


def tarred(folder: Path, path: Path, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder, "images")
    return path


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize(
    "pack", [lambda f, p: tarred(f, p / "a.tar.gz"), lambda f, p: zipped(f, p / "a.ZIP")]
)
def test_archives(pack: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 12)
    from_folder, from_archive = read_images([folder]), read_images([pack(folder, tmp_path)], check=True)
    assert from_archive.labels == from_folder.labels
    assert np.array_equal(from_archive.truth, from_folder.truth)
    assert np.array_equal(np.asarray(from_archive.image(7)), np.asarray(from_folder.image(7)))


def test_several_sources_go_together(tmp_path: Path) -> None:
    folder, path = write_folder(tmp_path / "images", 6), write_npz(tmp_path / "a.npz", 6)
    both = read_images([folder, path])
    assert (len(both), both.labels, both.size, both.channels) == (12, ("across", "disc", "down"), None, 3)
    x, y = bars(6)
    for number in range(6):
        assert classes(both)[6 + number] == LABELS[y[number]]
        assert np.array_equal(np.asarray(both.image(6 + number, 1)), x[number])


def test_the_split_is_stratified_and_always_the_same(tmp_path: Path) -> None:
    found = read_images([write_npz(tmp_path / "a.npz", 60)])
    train, valid = found.divide(0.1)
    assert (len(train), sorted(classes(valid))) == (54, ["across"] * 2 + ["disc"] * 2 + ["down"] * 2)
    assert {*train.index} | {*valid.index} == set(range(60))
    assert np.array_equal(found.divide(0.1)[1].index, valid.index)


def test_the_fingerprint_covers_names_labels_and_the_content_of_archives(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 6)
    whole = read_images([folder])
    assert whole.fingerprint() == read_images([folder]).fingerprint()
    assert whole.fingerprint() != whole.select(range(5)).fingerprint()
    before = [read_images([pack]).fingerprint() for pack in (tarred(folder, tmp_path / "a.tar", "w"),
              zipped(folder, tmp_path / "a.zip"), write_npz(tmp_path / "a.npz", 6))]  # fmt: skip
    moved = folder.rename(tmp_path / "moved")
    assert read_images([moved]).fingerprint() == whole.fingerprint()
    Image.new("L", (4, 4), 9).save(moved / "disc" / "002.png")
    x, _ = bars(6)
    after = [read_images([pack]).fingerprint() for pack in (tarred(moved, tmp_path / "a.tar", "w"),
             zipped(moved, tmp_path / "a.zip"), write_npz(tmp_path / "a.npz", 6, x=255 - x))]  # fmt: skip
    assert not {*before} & {*after}
    (moved / "disc" / "002.png").rename(moved / "disc" / "other.png")
    assert read_images([moved]).fingerprint() != whole.fingerprint()
    (moved / "disc").rename(moved / "disk")
    assert read_images([moved]).fingerprint() != whole.fingerprint()


def test_large_folders_are_not_read_into_memory(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 6)
    found = read_images([folder])
    (folder / "disc" / "002.png").write_bytes(encoded(Image.new("RGB", (3, 5), "red")))
    assert found.image(2).size == (3, 5)


# kinds of files


def test_exif_rotation_is_honoured() -> None:
    image = Image.new("RGB", (8, 4), "white")
    image.paste("red", (0, 0, 8, 2))  # above
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    turned = read_image(encoded(image, "PNG", exif=exif), "it", 3)
    assert turned.size == (4, 8)
    assert turned.getpixel((3, 4)) == (255, 0, 0)
    assert turned.getpixel((0, 4)) == (255, 255, 255)


def test_transparent_pixels_are_white() -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    assert pixels(encoded(image)).tolist() == [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    assert pixels(encoded(image), 1).tolist() == [[76, 255, 127]]
    assert pixels(encoded(Image.new("LA", (1, 1), (10, 0)))).tolist() == [[[255, 255, 255]]]


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 200, 100, 0])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[9, 8, 7], [200, 100, 0]]]
    assert pixels(encoded(image, transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 0]]]
    assert pixels(encoded(image, "GIF")).tolist() == [[[9, 8, 7], [200, 100, 0]]]


def test_sixteen_bits_are_scaled() -> None:
    values = np.array([[0, 257, 32896, 65535, 65407, 128]], np.uint16)
    assert pixels(encoded(Image.fromarray(values)), 1).tolist() == [[0, 1, 128, 255, 255, 0]]
    assert pixels(encoded(Image.fromarray(values), "TIFF")).tolist() == [
        [[v] * 3 for v in (0, 1, 128, 255, 255, 0)]
    ]


def test_cmyk_greyscale_and_bits() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels(encoded(cmyk, "JPEG", quality=100)).astype(int) - [255, 0, 0]).max() < 8
    assert pixels(encoded(Image.new("L", (1, 1), 77))).tolist() == [[[77] * 3]]
    assert pixels(encoded(Image.new("1", (2, 1), 1)), 1).tolist() == [[255, 255]]
    assert pixels(encoded(Image.new("RGB", (1, 1), (0, 255, 0))), 1).tolist() == [[150]]


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert is_animated(content, "it")
    assert not is_animated(encoded(frames[0], "GIF"), "it")
    assert pixels(content)[0, 0].tolist() == [255, 0, 0]
    folder = write_folder(tmp_path / "images", 6)
    (folder / "disc" / "b.gif").write_bytes(content)
    assert read_images([folder], check=True).animated == (str(folder / "disc" / "b.gif"),)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 2)])
def test_tiny_and_narrow_images(size: tuple[int, int]) -> None:
    image = read_image(encoded(Image.new("RGB", size, (10, 20, 30))), "it", 3)
    assert to_tensor(central_crop(image, 16, 0.875))[:, 3, 3].tolist() == [10, 20, 30]
    altered = Augmentation(16, magnitude=0, erase=0)(image, RandomStream(0, 0))
    assert altered.shape == (3, 16, 16)
    assert (altered == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()


# hostile files


def test_a_transparent_grey_of_16_bits_is_white() -> None:
    grey = Image.fromarray(np.array([[257, 20_000], [65_535, 20_000]], np.uint16))
    content = encoded(grey, transparency=20_000)
    assert pixels(content, 1).tolist() == [[1, 255], [255, 255]]


def bomb(width: int, height: int) -> bytes:
    """A PNG of these sizes, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


GOOD = encoded(Image.fromarray(bars(1, 32)[0][0]))
JPEG = encoded(Image.fromarray(bars(1, 32)[0][0]), "JPEG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no image"),
        (b"hello", "is no image"),
        (GOOD[:20], "is no image"),
        (GOOD[: len(GOOD) // 2], "damaged"),
        (JPEG[: len(JPEG) // 2], "damaged"),
        (GOOD[:60] + b"\xff" * 9 + GOOD[69:], "damaged"),
        (bomb(60_000, 60_000), "is no image|expected at most"),
        (bomb(12_000, 12_000), "expected at most 134,217,728 pixels, got 12,000 × 12,000"),
        (bomb(100, 100), "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
        (encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "expected 8 or 16 bits a channel, got mode F"),
        (encoded(Image.fromarray(np.array([[70_000]], np.int32)), "TIFF"), "8 or 16 bits a channel, got 32"),
        (encoded(Image.fromarray(np.array([[255]], np.int32)), "TIFF"), "8 or 16 bits a channel, got 32"),
    ],
)
def test_bad_images_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(LongscanError, match=message) as caught:
        read_image(path, str(path), 3)
    assert str(path) in str(caught.value)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(LongscanError, match=r"a\.png: expected a file"):
        read_image(tmp_path / "a.png", "a.png", 3)


def test_a_file_that_is_no_image_is_noticed_at_the_start(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 6)
    (folder / "disc" / "zzz.jpg").write_text("<html>404</html>")
    with pytest.raises(LongscanError, match=r"zzz\.jpg is no image"):
        read_images([folder], check=True)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 6)
    (folder / "disc" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(LongscanError, match=r"gone\.png: No such file"):
        read_images([folder], check=True)


def empty_class(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("x")


def loose(folder: Path) -> None:
    (folder / "loose.png").write_bytes(GOOD)


def nothing(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty_class, r"the class folder empty has no images \(\.png"),
        (loose, r"loose\.png has no class"),
        (nothing, r"expected images there \(\.png.*got none"),
    ],
)
@pytest.mark.parametrize("pack", [lambda f, p: f, lambda f, p: zipped(f, p / "a.zip")], ids=["folder", "zip"])
def test_folders_without_sense(
    pack: Callable[[Path, Path], Path], change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "images", 6)
    change(folder)
    with pytest.raises(LongscanError, match=message):
        read_images([pack(folder, tmp_path)])


def test_the_name_of_a_class_is_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 6)
    os.rename(folder / "disc", os.fsencode(folder) + b"/di\xffsc")
    with pytest.raises(LongscanError, match="the name of the class folder"):
        read_images([folder])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_class_folder_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", 6)
    (folder / "disc").chmod(0)
    with pytest.raises(OSError, match="disc"):
        read_images([folder])


def zip_with(path: Path, name: str, mode: int = 0o644, content: bytes = GOOD) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", GOOD)
        info = zipfile.ZipInfo(name)
        info.external_attr, info.compress_type = (stat.S_IFREG | mode) << 16, zipfile.ZIP_DEFLATED
        if mode == 0o777:
            info.external_attr = (stat.S_IFLNK | mode) << 16
        archive.writestr(info, content)
    return path


@pytest.mark.parametrize("name", ["/etc/b/0.png", "../b/0.png", "b/../../0.png", "b\\0.png", "C:/b/0.png"])
def test_names_that_lead_out_of_an_archive(name: str, tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match="leads out of the archive"):
        read_images([zip_with(tmp_path / "a.zip", name)])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(GOOD)
        tar.addfile(info, io.BytesIO(GOOD))
    with pytest.raises(LongscanError, match=r"leads out of the archive|got none"):
        read_images([tmp_path / "a.tar"])


def test_links_in_archives(tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match=r"b/0\.png is a link"):
        read_images([zip_with(tmp_path / "a.zip", "b/0.png", 0o777, b"/etc/passwd")])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("b/0.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(LongscanError, match=r"0\.png is a link"):
        read_images([tmp_path / "a.tar"])


def test_damaged_archives(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK nonsense")
    with pytest.raises(LongscanError, match=r"no \.zip archive"):
        read_images([tmp_path / "a.zip"])
    path = zip_with(tmp_path / "b.zip", "b/0.png")
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF  # in the compressed data of a/0.png
    path.write_bytes(content)
    with pytest.raises(LongscanError, match=r"a/0\.png"):
        read_images([path]).image(0)
    huge = zip_with(tmp_path / "c.zip", "b/0.png", content=bytes(2**27))
    with pytest.raises(LongscanError, match="expected at most 100 times"):
        read_images([huge])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((6, 16, 16), np.float32)}, r"of bytes.*got float32 \(6, 16, 16\)"),
        ({"x": np.zeros((6, 3, 16, 16), np.uint8)}, r"If the channels come first: x\.transpose"),
        ({"x": np.zeros((6, 0, 16), np.uint8)}, "expected images x"),
        ({"y": np.zeros(5, int)}, "expected as many y"),
        ({"y": np.zeros(6, np.float32)}, "expected y of classes"),
        ({"y": np.full(6, 3)}, "expected y from 0 to 2"),
        ({"labels": np.array(["a", "a", "b"])}, "expected labels, one name for each class"),
        ({"labels": np.array([1, 2, 3])}, "expected labels, one name for each class"),
    ],
)
def test_arrays_without_sense(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match=message):
        read_images([write_npz(tmp_path / "a.npz", 6, **arrays)])


def test_other_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to read"):
        read_images([])
    with pytest.raises(LongscanError, match="no such file or folder"):
        read_images([tmp_path / "gone"])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(LongscanError, match=r"expected a folder, \.zip or tar"):
        read_images([tmp_path / "a.csv"])
    np.savez(tmp_path / "a.npz", x_train=np.zeros((2, 4, 4), np.uint8), y_train=[0, 1])
    with pytest.raises(
        LongscanError, match="expected arrays x and y, or x_test and y_test; got x_train, y_train"
    ):
        read_images([tmp_path / "a.npz"], split="test")
    assert image_paths(tmp_path) == []


# resizing and augmentation


def test_the_central_crop_is_that_of_a_resized_image() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 147, 3), np.uint8))
    resized = image.resize((73 * 147 // 90, 73), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 64) / 2), round((73 - 64) / 2)
    expected = resized.crop((left, top, left + 64, top + 64))
    difference = np.asarray(central_crop(image, 64, 64 / 73), int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 1
    same = Image.fromarray(bars(1, 32)[0][0])
    assert np.array_equal(np.asarray(central_crop(same, 32, 1.0)), np.asarray(same))
    assert np.array_equal(np.asarray(central_crop(same, 28, 0.875)), np.asarray(same)[2:30, 2:30])


def test_a_very_long_image_takes_no_memory() -> None:
    assert central_crop(Image.new("L", (2, 1_000_000)), 224, 0.875).size == (224, 224)


def image_of_noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 30, 3), np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(mode: str) -> None:
    image, augment = image_of_noise(mode), Augmentation(16, 0.3, 0.5, 9.0, 0.5)
    found = [augment(image, image_stream(3, epoch, index)) for epoch in range(2) for index in range(20)]
    again = [augment(image, image_stream(3, epoch, index)) for epoch in range(2) for index in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert len({one.numpy().tobytes() for one in found}) == 40
    assert {(*one.shape, one.dtype) for one in found} == {(len(image.getbands()), 16, 16, torch.uint8)}


def test_no_augmentation_resizes_the_whole_image() -> None:
    image = image_of_noise()
    expected = to_tensor(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert torch.equal(Augmentation(16, 1.0, 0.0, 0.0, 0.0)(image, RandomStream(0, 0)), expected)
    assert torch.equal(Augmentation(16, 1.0, 1.0, 0.0, 0.0)(image, RandomStream(0, 0)), expected.flip(2))


def test_random_crops_have_the_areas_that_are_asked_for() -> None:
    ramp = np.arange(100, dtype=np.uint8)
    image = Image.fromarray(
        np.stack([np.tile(ramp, (100, 1)), np.tile(ramp, (100, 1)).T, np.zeros((100, 100), np.uint8)], 2)
    )
    areas = []
    for index in range(200):
        crop = Augmentation(50, 0.25, 0.0, 0.0, 0.0)(image, image_stream(0, 0, index)).int()
        width, height = ((crop[c].max() - crop[c].min()).item() / 100 for c in (0, 1))
        areas.append(width * height)
        assert 0.7 < width / height < 1.4
    assert 0.2 < min(areas) < 0.35
    assert 0.85 < max(areas) <= 1.0


def test_erasing_replaces_a_rectangle() -> None:
    image = Image.new("RGB", (40, 40), "black")
    for index in range(20):
        changed = (Augmentation(40, 1.0, 0.0, 0.0, 1.0)(image, image_stream(0, 0, index)) > 0).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert 0.015 < area.item() / 1600 < 0.36
        assert changed.sum() > 0.9 * area


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_images_and_labels_are_mixed_in_the_same_proportion(mixup: float, cutmix: float) -> None:
    images, targets = torch.zeros(2, 1, 20, 20), torch.eye(2)
    images[1] = 1
    shares = []
    for number in range(40):
        mixed, truth = mix(images, targets, mixup, cutmix, RandomStream(0, number))
        assert torch.allclose(truth.sum(1), torch.ones(2))
        assert torch.allclose(mixed.mean((1, 2, 3)), truth[:, 1], atol=1e-5)
        shares.append(truth[0, 0].item())
        if not cutmix:
            assert mixed[0].unique().numel() == 1
    assert max(shares) - min(shares) > 0.5
    assert torch.equal(mix(images, targets, 0.0, 0.0, RandomStream(0, 0))[0], images)
    assert torch.equal(mix(images[:1], targets[:1], 1.0, 1.0, RandomStream(0, 0))[0], images[:1])
