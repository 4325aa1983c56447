"""Files are the old version or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longscan.core.files import (
    atomic_directory,
    atomic_file,
    atomic_write,
    find_directory,
    read_json,
    read_toml,
    recover_directory,
    write_json,
)
from longscan.errors import LongscanError


def listing(folder: Path) -> list[str]:
    """Everything below a folder, hidden names too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: path.write_bytes(bytes(10**6)),
    "torch": lambda path: torch.save(torch.zeros(10**6), path),
    "numpy": lambda path: np.save(path.with_suffix(""), np.zeros(10**6)),
    "tofile": lambda path: np.zeros(10**6).tofile(path),
    "safetensors": lambda path: save_file({"x": torch.zeros(10**6)}, path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
def test_a_disk_that_takes_no_more_is_named(write: Callable[[Path], object], tmp_path: Path) -> None:
    """Whoever writes, and however it says so: the error has the path and what helps."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r".") as directory, atomic_directory(tmp_path / "model") as new:
            write(new / "a.npy")
        with pytest.raises(OSError, match=r".") as file, atomic_file(tmp_path / "a") as name:
            write(name.with_suffix(".npy"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert directory.value.filename == str(tmp_path / "model")
    told = str(directory.value.strerror)
    assert "choose a file system" in told or "is the disk full?" in told
    assert not (tmp_path / "model").exists()
    assert file.value.strerror


def test_what_could_not_be_read_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_directory(tmp_path / "model"):
        (tmp_path / "source").read_bytes()
    assert caught.value.filename == str(tmp_path / "source")
    with pytest.raises(RuntimeError, match=r"^something else$"), atomic_directory(tmp_path / "model"):
        raise RuntimeError("something else")


def test_a_full_disk_is_told_with_a_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"free some space.*model") as caught,
        atomic_directory(tmp_path / "model"),
    ):
        full_disk()
    assert caught.value.errno == errno.ENOSPC


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "note.txt"
    atomic_write(target, "größer")
    assert target.read_bytes() == "größer".encode()
    atomic_write(str(target), b"\x00")
    assert target.read_bytes() == b"\x00"
    assert listing(tmp_path) == ["note.txt"]


def test_atomic_write_follows_the_umask_and_links(tmp_path: Path) -> None:
    target, link = tmp_path / "real", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    atomic_write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    (tmp_path / "usual").write_text("")
    assert target.stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    target = tmp_path / "note.txt"
    atomic_write(target, "old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["note.txt"]


def test_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with atomic_directory(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")
        assert not target.exists()
    assert listing(tmp_path) == ["deep", "deep/run", "deep/run/inner", "deep/run/inner/a"]


def test_directory_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_directory(tmp_path / "run") as folder:
            (folder / name).write_text(name)
    assert listing(tmp_path) == ["run", "run/second"]


def test_failure_inside_keeps_the_old_directory(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "run") as folder:
        (folder / "old").write_text("old")

    def fail() -> None:
        with atomic_directory(tmp_path / "run") as folder:
            (folder / "new").write_text("half")
            full_disk()

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert listing(tmp_path) == ["run", "run/old"]


@pytest.mark.parametrize("failing", [1, 2])
def test_failing_rename_keeps_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    with atomic_directory(tmp_path / "run") as folder:
        (folder / "old").write_text("old")
    calls = []

    def rename(source: Path, target: Path, usual: Any = os.rename) -> None:
        calls.append(source)
        if len(calls) == failing:
            full_disk()
        usual(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"), atomic_directory(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    assert listing(tmp_path) == ["run", "run/old"]


def test_power_cut_between_the_renames_is_repaired(tmp_path: Path) -> None:
    (tmp_path / ".run.old").mkdir()
    (tmp_path / ".run.old" / "kept").write_text("kept")
    (tmp_path / ".run.new").mkdir()
    (tmp_path / ".run.new" / "half").write_text("half")
    recover_directory(tmp_path / "run")
    assert (tmp_path / "run" / "kept").read_text() == "kept"
    with atomic_directory(tmp_path / "run") as folder:
        assert not listing(folder)
    assert listing(tmp_path) == ["run"]


def test_marker_protects_the_folders_of_others(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with atomic_directory(tmp_path / "photos", marker="config.json") as folder:  # empty: nothing to lose
        (folder / "config.json").write_text("{}")
    with atomic_directory(tmp_path / "photos", marker="config.json") as folder:  # ours: replaced
        (folder / "cat.jpg").write_text("cat")
    with (
        pytest.raises(LongscanError, match=r"photos exists .*\(no config\.json in it\)"),
        atomic_directory(tmp_path / "photos", marker="config.json"),
    ):
        pytest.fail("the directory is not ours")
    assert listing(tmp_path) == ["photos", "photos/cat.jpg"]


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(NotADirectoryError), atomic_directory(tmp_path / "run"):
        pytest.fail("there is a file in the way")
    assert (tmp_path / "run").read_text() == "mine"


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"ä": [1, 2.5, None, True], "b": {"c": "d"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1', "line 1, column 8"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00garbage\x80", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"7" * 5000, "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
    ids=["cut", "empty", "binary", "list", "digits", "brackets"],
)
def test_bad_json_names_the_file_and_the_place(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LongscanError, match=words) as caught:
        read_json(tmp_path / "config.json")
    assert "config.json" in str(caught.value)


def test_a_name_that_is_not_utf8_travels_through_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"data": ["caf\udce9.txt", "café"]})
    assert read_json(tmp_path / "a.json") == {"data": ["caf\udce9.txt", "café"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a = " + b"[" * 2000 + b"]" * 2000, "nested too deep"),
        (b"a = [\n" + b"[" * 2000 + b"\n" + b"]" * 2000 + b"]", "nested too deep"),
        (b".".join([b"a"] * 50_000) + b" = 1", "in lines of at most 4,096. Break a long list"),
        (b"a = 1\n" * 20_000, "at most 65,536 bytes"),
        (b"a = \xff", "can't decode"),
        (b"a = ", "Invalid value"),
    ],
    ids=["deep", "deep-lines", "key", "long", "latin-1", "toml"],
)
def test_settings_that_are_none(text: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(text)
    with pytest.raises(LongscanError, match=words):
        read_toml(tmp_path / "a.toml")


def test_a_target_has_one_writer(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "run") as folder:
        (folder / "a").write_text("a")
        with (
            pytest.raises(LongscanError, match="run is being written by another process"),
            atomic_directory(tmp_path / "run"),
        ):
            pytest.fail("there are two writers")
    with atomic_directory(tmp_path / "run"):  # the lock is gone
        pass
    assert listing(tmp_path) == ["run"]


def test_a_file_has_one_writer_if_it_asks_for_that(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a", exclusive=True) as new:
        new.write_text("a")
        with (
            pytest.raises(LongscanError, match="a is being written by another process"),
            atomic_file(tmp_path / "a", exclusive=True),
        ):
            pytest.fail("there are two writers")
    assert (tmp_path / "a").read_text() == "a"
    assert listing(tmp_path) == ["a"]


@pytest.mark.parametrize("rule", [{"new": True}, {"marker": "config.json"}], ids=["new", "marker"])
def test_what_appears_meanwhile_is_not_replaced(rule: dict[str, Any], tmp_path: Path) -> None:
    """A training run may begin in the directory that a conversion is about to fill."""
    run = tmp_path / "run"

    def write() -> None:
        with atomic_directory(run, **rule) as folder:
            (folder / "config.json").write_text("{}")
            run.mkdir()
            (run / "train.json").write_text("{}")

    with pytest.raises(LongscanError, match="run exists and"):
        write()
    assert listing(tmp_path) == ["run", "run/train.json"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "a", new=True) as new:
            new.write_text("ours")
            (tmp_path / "a").write_text("theirs")

    with pytest.raises(LongscanError, match="a exists"):
        write()
    assert (tmp_path / "a").read_text() == "theirs"
    assert listing(tmp_path) == ["a"]


def test_an_empty_directory_may_be_new(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with atomic_directory(tmp_path / "run", new=True) as folder:
        (folder / "a").write_text("a")
    assert listing(tmp_path / "run") == ["a"]
    with pytest.raises(LongscanError, match="not an empty directory"):
        atomic_directory(tmp_path / "run", new=True).__enter__()


def test_a_lock_of_a_killed_process_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").write_text("")
    with atomic_directory(tmp_path / "run"):
        pass
    assert listing(tmp_path) == ["run"]


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    left, running = tmp_path / f".a.{int(done.stdout)}.new", tmp_path / f".a.{os.getppid()}.new"
    for path in (left, running, tmp_path / ".a.b.new", tmp_path / f".ab.{int(done.stdout)}.new"):
        path.write_text("half")
    atomic_write(tmp_path / "a", "whole")
    assert listing(tmp_path) == sorted([running.name, ".a.b.new", f".ab.{int(done.stdout)}.new", "a"])


def test_files_in_a_directory_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    with atomic_directory(tmp_path / "run") as folder:
        os.close(os.open(folder / "private", os.O_CREAT, 0o600))
    assert (tmp_path / "run" / "private").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_directory_that_was_left_aside_is_found(tmp_path: Path) -> None:
    assert find_directory(tmp_path / "run") == tmp_path / "run"
    (tmp_path / ".run.old").mkdir()
    assert find_directory(tmp_path / "run") == tmp_path / ".run.old"
    (tmp_path / "run").mkdir()
    assert find_directory(tmp_path / "run") == tmp_path / "run"
