"""Model directories that are damaged or hostile: refused with what is wrong."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longscan.checkpoints.load import load, load_translator
from longscan.checkpoints.save import convert, save
from longscan.errors import LongscanError
from longscan.models import MODELS, Mamba
from longscan.tokenizers.base import ByteTokenizer
from model_directories import EMBEDDING, assert_same, edit, refusal, rewrite

# ---- damaged weights


def test_cut_download(saved: Path) -> None:
    file = saved / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    message = f"{file} is shorter than its header says (expected {size:,} bytes, found {size - 1000:,})."
    assert refusal(saved).startswith(message)
    assert "delete the file and fetch it again" in refusal(saved)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "shorter than its header says"),
    "seven-bytes": (lambda data: data[:7], "shorter than its header says"),
    "cut-in-header": (lambda data: data[:100], "shorter than its header says"),
    "longer": (lambda data: data + b"more", "4 bytes more than its header says"),
    "html": (lambda data: b"<!doctype html>" + data, "not a safetensors file"),
    "lfs": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "header": (lambda data: data[:9] + b"\xff" * 20 + data[29:], "damaged header"),
    "list": (lambda data: (2).to_bytes(8, "little") + b"[7]", "damaged header"),
    "type": (lambda data: data.replace(b'"F32"', b'"F99"', 1), "is damaged"),
    "offsets": (lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1), "is damaged"),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_safetensors(saved: Path, damage: Callable[[bytes], bytes], expected: str) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert expected in refusal(saved)
    assert str(file) in refusal(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_random_damage_is_never_unforeseen(saved: Path, name: str, tmp_path: Path) -> None:
    if name.endswith(".bin"):
        saved = tmp_path / "official"
        convert(tmp_path / "saved", saved, layout="official")
    file, rng = saved / name, random.Random(0)
    data = file.read_bytes()
    for _ in range(60):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            bad[rng.randrange(min(len(bad), 2000))] = rng.randrange(256)
        file.write_bytes(bad if rng.random() < 0.7 else bad[: rng.randrange(len(bad))])
        try:
            load(saved)
        except LongscanError:
            continue


def test_everything_that_does_not_fit_is_listed(saved: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["backbone.extra"] = torch.zeros(3)
        tensors["backbone.norm_f.weight"] = torch.ones(7)
        for name in [name for name in tensors if "layers.1." in name]:
            del tensors[name]

    rewrite(saved, change)
    message = refusal(saved)
    assert "10 missing: backbone.layers.1.mixer.A_log, backbone.layers.1.mixer.D, " in message
    assert "and 2 more" in message
    assert "1 unexpected: backbone.extra" in message
    assert "1 of another shape: backbone.norm_f.weight (7,) instead of (16,)" in message


def test_a_tensor_has_one_name(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update({"backbone.embedding.weight": tensors[EMBEDDING] + 1}))
    expected = "is another name of backbone.embedding.weight, and both hold different numbers"
    message = refusal(saved)
    assert message.startswith(str(saved))
    assert expected in message


def test_a_tied_head_is_the_embedding(model: Mamba, saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert_same(load(saved)[0], model)
    head = load_file(saved / "model.safetensors")[EMBEDDING]
    for other in (head + 1, head[:9].clone(), head.half()):
        rewrite(saved, lambda tensors, other=other: tensors.update({"lm_head.weight": other}))
        assert "config.json says the head is the embedding, the file holds another lm_head" in refusal(saved)


def test_quantised_weights(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].to(torch.int8)}))
    assert "backbone.embeddings.weight is int8, expected float32" in refusal(saved)


def test_no_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    expected = "expected model.safetensors or pytorch_model.bin, found config.json, generation_config.json, "
    assert expected in refusal(saved)


# ---- pickles


class Trap:
    """Unpickling this makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_with_code_is_refused(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    file, trap = saved / "pytorch_model.bin", Trap(tmp_path / "executed")
    torch.save({"backbone.embedding.weight": trap}, file)
    assert f"{file} contains code (posix.mkdir): refused" in refusal(saved)
    file.write_bytes(pickle.dumps({"backbone.embedding.weight": trap}))
    assert "may contain code and is refused" in refusal(saved)
    torch.save(torch.nn.Linear(2, 2), file)
    assert "contains code (torch.nn.modules.linear.Linear)" in refusal(saved)
    assert not trap.path.exists()


def test_pickle_of_something_else(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    file = saved / "pytorch_model.bin"
    for value in ({"model": {"a": torch.zeros(1)}}, torch.zeros(1), {"step": 3}):
        torch.save(value, file)
        assert "expected a dictionary of tensors" in refusal(saved)
    torch.save({"a": torch.zeros(10_000)}, file)
    os.truncate(file, 5_000)
    assert "fetch it again" in refusal(saved)


HOLLOW: dict[str, Callable[[], Any]] = {
    "stride-0": lambda: {"a": torch.zeros(1).expand(2**28)},
    "overlapping": lambda: {"a": torch.zeros(99).as_strided((9, 9), (1, 1))},
    "one-storage": lambda: {f"a{i}": tensor for tensor in [torch.zeros(9_999)] for i in range(99)},
    "meta": lambda: {"a": torch.empty(3, device="meta")},
    "sparse": lambda: {"a": torch.eye(3).to_sparse()},
    "nested": lambda: {"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])},
    "memory": lambda: {"a": bytearray(9)},
    "numbered": lambda: {0: torch.zeros(1)},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make_tensors", HOLLOW.values(), ids=HOLLOW)
def test_pickles_hold_the_numbers_they_describe(saved: Path, make_tensors: Callable[[], Any]) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(make_tensors(), saved / "pytorch_model.bin")
    assert str(saved / "pytorch_model.bin") in refusal(saved)


def test_a_compressed_archive_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    file = saved / "pytorch_model.bin"
    torch.save({"a": torch.zeros(100_000)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert "is compressed" in refusal(saved)


def test_safetensors_come_first(model: Mamba, saved: Path) -> None:
    (saved / "pytorch_model.bin").write_bytes(b"anything")
    assert_same(load(saved)[0], model)


# ---- configurations


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"hidden_sise": 16}, "unknown field 'hidden_sise'; did you mean 'hidden_size'?"),
    "time-step-limit": ({"time_step_limit": [0.0, 0.1]}, "unknown field 'time_step_limit'"),
    "falcon": (
        {"use_bcdt_rms": True, "mixer_rms_eps": 1e-6},
        "unknown field 'use_bcdt_rms', 'mixer_rms_eps'.",
    ),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "expected the quant_method 'longscan'"),
    "activation": ({"hidden_act": "relu"}, "hidden_act: expected 'silu', got 'relu'"),
    "layer-norm": ({"rms_norm": False}, "rms_norm: expected True, got False"),
    "missing": ({"hidden_size": ...}, "needs hidden_size"),
    "zero": ({"hidden_size": 0}, "hidden_size: expected 1 or more, got 0"),
    "text": ({"state_size": "16"}, "state_size: expected int, got '16' (str)"),
    "fraction": ({"expand": 1.5}, "expand: expected int, got 1.5"),
    "negative": ({"time_step_min": -1.0}, "time_step_min, time_step_max: expected 0 <"),
    "other-inner": (
        {"intermediate_size": 48},
        "intermediate_size: expected 32, as the other fields say, got 48",
    ),
    "vocabulary": (
        {"unpadded_vocab_size": 999},
        "unpadded_vocab_size: expected 1 to vocab_size = 264, got 999",
    ),
    "layers": ({"num_hidden_layers": 10**9}, "config.json says 1,000,000,000 layers, 22 tensors are there"),
    "huge": ({"hidden_size": 10**12, "intermediate_size": ...}, "the sizes in config.json are impossible"),
    "huger": ({"state_size": 10**30}, "the sizes in config.json are impossible"),
    "wide": ({"hidden_size": 10**6, "intermediate_size": ...}, "(264, 16) instead of (264, 1000000)"),
    "type": ({"model_type": "rwkv"}, "model_type: no model called 'rwkv'"),
    "neither": ({"model_type": ...}, "neither a Hugging Face configuration (no model_type) nor an official"),
}


@pytest.mark.parametrize(("changes", "expected"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_config(saved: Path, changes: dict[str, Any], expected: str) -> None:
    edit(saved, **changes)
    assert expected in refusal(saved)
    assert str(saved) in refusal(saved)


OFFICIAL_IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "mamba2": ({"ssm_cfg": {"layer": "Mamba9"}}, "'Mamba3', got 'Mamba9'"),
    "attention": ({"attn_layer_idx": [1]}, "attn_layer_idx: expected [], got [1]"),
    "mlp": ({"d_intermediate": 64}, "d_intermediate: expected 0, got 64"),
    "unknown": ({"n_layers": 2}, "unknown field 'n_layers'; did you mean 'n_layer'?"),
    "unknown-ssm": ({"ssm_cfg": {"dstate": 4}}, "unknown field 'dstate'; did you mean 'd_state'?"),
    "no-object": ({"ssm_cfg": 3}, "ssm_cfg: expected an object"),
    "zero": ({"n_layer": 0}, "n_layer: expected 1 or more, got 0"),
}


@pytest.mark.parametrize(("changes", "expected"), OFFICIAL_IMPOSSIBLE.values(), ids=OFFICIAL_IMPOSSIBLE)
def test_impossible_official_config(
    saved: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    convert(saved, tmp_path / "official", layout="official")
    edit(tmp_path / "official", **changes)
    assert expected in refusal(tmp_path / "official")


@pytest.mark.parametrize("size", [2**24, 2**31, 2**62])
def test_sizes_are_compared_with_the_tensors_first(size: int, tmp_path: Path) -> None:
    entry = MODELS["transformer"]
    fields = {**entry.presets["tiny"], "vocab_size": 257}
    save(entry.cls(entry.config.from_dict(fields)), tmp_path / "translator", ByteTokenizer())
    edit(tmp_path / "translator", d_ff=size)
    with pytest.raises(LongscanError, match=f"impossible .d_ff = {size:,}, and all"):
        load_translator(tmp_path / "translator")


def test_config_is_not_json(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "mam')
    assert "config.json is not valid JSON" in refusal(saved)
