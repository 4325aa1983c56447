"""What can be wrong with a model or a request: one clear error, no traceback, nothing lost."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import longscan
from longscan.models.mamba import Mamba, MambaConfig
from longscan.tokenizers.base import ByteTokenizer

SIZES = {"d_model": 16, "n_layers": 1, "vocab_size": 257}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small healthy model directory."""
    directory = tmp_path / "model"
    longscan.save(Mamba(MambaConfig(**SIZES), torch.Generator().manual_seed(0)), directory, ByteTokenizer())
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def corrupted_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20] + b"\xff" * 20 + path.read_bytes()[40:])


def endless_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def wrong_shape(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["backbone.layers.0.mixer.D"] = torch.ones(7)
    save_file(tensors, path, metadata={"format": "pt"})


def missing_tensor(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["backbone.norm_f.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def pickle_with_code(directory: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path(directory / "owned").touch, ())

    (directory / "model.safetensors").unlink()
    torch.save({"backbone.embedding.weight": Attack()}, directory / "pytorch_model.bin")


def bare_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def unknown_field(directory: Path) -> None:
    edit_config(directory, time_step_limit=[0.0, 1.0])


def impossible_field(directory: Path) -> None:
    edit_config(directory, state_size=-16)


def wrong_type(directory: Path) -> None:
    edit_config(directory, num_hidden_layers="many")


def no_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, "config.json"),
        (truncated, "shorter than its header says"),
        (emptied, "model.safetensors"),
        (corrupted_header, "model.safetensors"),
        (endless_header, "model.safetensors"),
        (wrong_shape, "(7,)"),
        (missing_tensor, "backbone.norm_f.weight"),
        (pickle_with_code, "refused"),
        (bare_pickle, "pytorch_model.bin"),
        (unknown_field, "time_step_limit"),
        (impossible_field, "-16"),
        (wrong_type, "many"),
        (no_json, "config.json"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_model(cli: Any, model: Path, damage: Callable[[Path], None], words: str) -> None:
    assert cli("generate", "a", "--model", model, "--max-new-tokens", 1).code == 0
    damage(model)
    before = sorted(path.name for path in model.iterdir())
    done = cli("generate", "a", "--model", model, "--max-new-tokens", 1)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert words in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert "not foreseen" not in done.err
    assert sorted(path.name for path in model.iterdir()) == before, "reading a model changed its directory"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", -1), "temperature"),
        (("--temperature", "nan"), "temperature"),
        (("--top-p", 3), "top"),
        (("--top-k", -1), "top"),
        (("--min-p", 1), "min"),
        (("--repetition-penalty", 0), "repetition"),
        (("--max-new-tokens", 0), "max"),
        (("--stop", ""), "stop"),
        (("--seed", -1), "seed"),
        (("--no-such-flag",), "--no-such-flag"),
    ],
    ids=str,
)
def test_an_impossible_request(cli: Any, model: Path, flags: tuple[Any, ...], words: str) -> None:
    done = cli("generate", "a", "--model", model, *flags)
    assert (done.code, done.out) == (2, "")
    assert words in done.err.lower()
    assert "Traceback" not in done.err


def test_no_such_model(cli: Any, tmp_path: Path) -> None:
    for name in ("mamba-hundred-and-thirty", tmp_path / "nowhere", "state-spaces/mamba-130m"):
        done = cli("evaluate", name, Path(__file__))
        assert done.code == 1
        assert str(name) in " ".join(done.err.split())
        assert "Traceback" not in done.err


def test_huge_numbers(cli: Any, model: Path, tmp_path: Path) -> None:
    done = cli("generate", "a", "--model", model, "--threads", 1_000_000)
    assert (done.code, done.out) == (2, "")
    assert "threads: expected 1 to 1,024, got 1000000." in done.err
    (tmp_path / "text.txt").write_text("some words to learn from\n" * 200)
    flags = ("--out", tmp_path / "run", "--tokenizer", "bytes")
    done = cli("train", tmp_path / "text.txt", *flags, "--threads", 1_000_000)
    assert done.code == 2
    done = cli("train", tmp_path / "text.txt", *flags, "--seq-len", 16, "--d-model", 99_999_999)
    assert done.code == 1
    assert "not enough memory for a model of d_model 99,999,999" in done.err
    assert not (tmp_path / "run").exists()
