"""Models by their names: shipped, in a directory, on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longscan.checkpoints.hub import resolve, shipped
from longscan.checkpoints.load import load
from longscan.checkpoints.save import convert, save
from longscan.models import Mamba
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.bpe import train_bpe
from model_directories import assert_same, make, refusal

# ---- names


def test_shipped_model() -> None:
    (name,) = shipped()
    assert (resolve(name) / "config.json").is_file()
    model, tokenizer = load(name)
    assert tokenizer is not None
    assert model.config.vocab_size == tokenizer.vocab_size
    assert f"no such directory; did you mean {name!r}?" in refusal(name[:-1])
    assert "the name of the model is empty" in refusal(" ")


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no model called './nowhere'" in refusal("./nowhere")
    assert "owner/name, for example state-spaces/mamba-130m-hf" in refusal("/nowhere/at/all")
    Path("empty").mkdir()
    assert "empty is not a model directory: expected config.json, found nothing" in refusal("empty")
    Path("empty", "notes.txt").touch()
    assert "found notes.txt" in refusal(Path("empty"))
    assert "notes.txt is a file" in refusal("empty/notes.txt")
    save(make(), "run/model")
    assert "run is a training run: its model is run/model" in refusal("run")
    assert resolve(Path("run") / "model") == Path("run/model")


# ---- the hub, simulated


class Hub:
    """Stands in for huggingface_hub.snapshot_download: repositories are directories; keeps what is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, set[str], dict[str, Any]]] = []
        self.error: Exception | None = None

    def __call__(self, repository: str, *, allow_patterns: list[str], **options: Any) -> str:
        if self.error:
            raise self.error
        self.asked.append((repository, set(allow_patterns), options))
        target = self.root / "cache" / repository
        target.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in (self.root / repository).glob(pattern):
                shutil.copy(file, target)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    return hub


def test_hub_safetensors(model: Mamba, hub: Hub) -> None:
    save(model, hub.root / "some" / "mamba", ByteTokenizer())
    (hub.root / "some" / "mamba" / "pytorch_model.bin").touch()
    again, tokenizer = load("some/mamba", revision="v1", offline=True)
    assert_same(again, model)
    assert tokenizer is not None
    assert [(name, options) for name, _, options in hub.asked] == [
        ("some/mamba", {"revision": "v1", "local_files_only": True})
    ]
    assert not any("bin" in pattern for pattern in hub.asked[0][1])


def test_hub_official(model: Mamba, hub: Hub, tmp_path: Path) -> None:
    save(model, tmp_path / "a")
    convert(tmp_path / "a", hub.root / "state-spaces" / "mamba-1m", layout="official")
    hub.root.joinpath("EleutherAI/gpt-neox-20b").mkdir(parents=True)
    with pytest.warns(UserWarning, match="the model has no tokenizer: no tokenizer in"):
        assert load("state-spaces/mamba-1m")[1] is None
    train_bpe([], 257).save(hub.root / "EleutherAI" / "gpt-neox-20b")
    again, tokenizer = load("state-spaces/mamba-1m")
    assert_same(again, model)
    assert tokenizer is not None
    assert tokenizer.vocab_size == 257
    assert hub.asked[-1][1] == {"tokenizer.json", "tokenizer_config.json"}


def test_hub_repository_of_something_else(hub: Hub) -> None:
    (hub.root / "some" / "data").mkdir(parents=True)
    assert "not a model directory: expected config.json" in refusal("some/data")


def test_hub_errors(hub: Hub) -> None:
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)  # all that the errors look at
    expected = {
        errors.RepositoryNotFoundError("x", response=response): "no such model on the Hugging Face hub",
        errors.GatedRepoError("x", response=response): "is gated: ask for access",
        errors.RevisionNotFoundError("x", response=response): "has no revision 'v1'",
        errors.LocalEntryNotFoundError("x"): "Fetch it once with a connection",
        ConnectionResetError(
            "broken pipe"
        ): "could not be fetched from the Hugging Face hub (ConnectionResetError",
    }
    for error, message in expected.items():
        hub.error = error
        assert message in refusal("some/mamba", revision="v1")


def test_hub_offline() -> None:
    message = refusal("nobody/nothing", offline=True)
    assert "no directory nobody/nothing here" in message
    assert "the hub is not asked (offline)" in message
