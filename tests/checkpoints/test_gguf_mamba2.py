"""Mamba-2 in GGUF files: there and back, the layout of each tensor, llama.cpp's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gguf_bytes as raw
from llama_cpp_oracle import AGREEMENT, agree
from longscan.checkpoints.gguf.model import ARCHITECTURES, GGUFType, save_gguf
from longscan.checkpoints.gguf.parser import check
from longscan.checkpoints.load import load
from longscan.checkpoints.save import convert, save
from longscan.errors import LongscanError
from longscan.models import Llama, LlamaConfig, Mamba2, Mamba2Config
from longscan.models.common.quantization import dequantized, kind_of, quantize_model
from longscan.tokenizers.base import ByteTokenizer

pytest.importorskip("gguf")

KINDS: tuple[GGUFType, ...] = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
STORED = {"BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"n_groups": 4, "d_head": 8, "tie_embeddings": False},
    "odd": {"vocab_size": 301, "d_conv": 3, "d_state": 5, "n_groups": 2, "norm_eps": 1e-6},
    "wide": {"expand": 3, "d_head": 24, "n_groups": 2},
}
IDS = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(1))


def make(**fields: Any) -> Mamba2:
    """A model with no parameter as it started."""
    sizes = {"d_model": 32, "n_layers": 2, "vocab_size": 257, "d_state": 16, "d_head": 16}
    draw = torch.Generator().manual_seed(0)
    model = Mamba2(Mamba2Config.from_dict(sizes | fields), draw).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path: Path, fields: dict[str, Any], kind: GGUFType) -> None:
    model = make(**fields)
    save_gguf(model, tmp_path / "a.gguf", ByteTokenizer(), kind)
    again, tokenizer = load(tmp_path / "a.gguf", dtype=None)
    assert isinstance(tokenizer, ByteTokenizer)
    assert again.config == model.config
    assert kind_of(again) == STORED.get(kind)
    if kind == "F32":
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
        for name, values in again.state_dict().items():
            expected = model.state_dict()[name]
            if name.endswith("A_log"):
                torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(values, expected), name
    save_gguf(again, tmp_path / "b.gguf", tokenizer, kind)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_matrices_alone_get_fewer_bits(tmp_path: Path) -> None:
    model = make(n_groups=2)
    save_gguf(model, tmp_path / "a.gguf", None, "Q4_0")
    types = {name: info.type for name, info in check(tmp_path / "a.gguf").tensors.items()}
    narrow = {"token_embd.weight", *(f"blk.{i}.ssm_{m}.weight" for i in range(2) for m in ("in", "out"))}
    assert {name for name, kind in types.items() if kind == "Q4_0"} == narrow
    assert {kind for name, kind in types.items() if name not in narrow} == {"F32"}
    quantize_model(model, "int4")
    save_gguf(model, tmp_path / "b.gguf", None)
    again, _ = load(tmp_path / "b.gguf", dtype=None)
    for name in ("backbone.embedding.weight", "backbone.layers.1.mixer.in_proj.scale"):
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])


def test_the_layout_of_a_file_of_others(tmp_path: Path) -> None:
    """Each tensor of a file that was written number by number, where the equations expect it."""
    (tmp_path / "model.gguf").write_bytes(raw.mamba2())
    model, tokenizer = load(tmp_path / "model.gguf")
    assert tokenizer is not None
    assert model.config == Mamba2Config(
        d_model=6,
        n_layers=1,
        vocab_size=8,
        pad_vocab_size_multiple=10,
        d_state=2,
        d_head=3,
        n_groups=2,
        d_conv=3,
    )
    values = {name: torch.tensor(numbers) for name, (_, numbers) in raw.mamba2_values().items()}
    state, mixer = model.state_dict(), "backbone.layers.0.mixer."
    for name in state:
        slot = ARCHITECTURES["mamba2"].locate(name, tuple(state[name].shape), model.config)
        expected = values.pop(slot.name).view(state[name].shape)
        expected = (-expected).log() if name == f"{mixer}A_log" else expected
        torch.testing.assert_close(state[name], expected, rtol=1e-6, atol=1e-7)
    assert not values
    assert state[f"{mixer}conv1d.weight"].shape == (20, 1, 3)
    assert [tuple(state[mixer + n].shape) for n in ("A_log", "D", "norm.weight")] == [(4,), (4,), (12,)]


def test_the_layout_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(raw.mamba2())
    model, _ = load(tmp_path / "a.gguf")
    save_gguf(model, tmp_path / "b.gguf", None, "F32")
    old, new = check(tmp_path / "a.gguf"), check(tmp_path / "b.gguf")
    assert {name: info.shape for name, info in new.tensors.items()} == {
        name: info.shape for name, info in old.tensors.items()
    }
    for key, value in old.metadata.items():
        assert key.startswith("tokenizer.") or new.metadata[key] == value, key
    data = [(tmp_path / name).read_bytes() for name in ("a.gguf", "b.gguf")]
    for name in old.tensors:
        infos = zip(data, (old.tensors[name], new.tensors[name]), strict=True)
        a, b = (bytes_[info.begin : info.begin + info.n_bytes] for bytes_, info in infos)
        assert a == b or name == "blk.0.ssm_a"  # which is rounded on the way


def test_no_bias_of_conv1d_becomes_zeros(tmp_path: Path) -> None:
    model = make(conv_bias=False)
    save_gguf(model, tmp_path / "a.gguf", None)
    again, _ = load(tmp_path / "a.gguf")
    assert not again.get_parameter("backbone.layers.0.mixer.conv1d.bias").any()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {"gated_norm": "norm-first"},
        {"gated_norm": "none"},
        {"bias": True},
        {"D_per_channel": True},
        {"dt_limit": (0.01, 0.1)},
        {"d_ssm": 32},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_llama_cpp_can_not_compute(tmp_path: Path, fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(LongscanError, match=f"llama.cpp computes no such Mamba-2: {name} = "):
        save_gguf(make(**fields), tmp_path / "a.gguf", None)
    assert not list(tmp_path.iterdir())


def test_other_models_are_not_written(tmp_path: Path) -> None:
    model = Llama(LlamaConfig(d_model=8, n_layers=1, vocab_size=9, n_heads=2))
    with pytest.raises(LongscanError, match="Llama: expected a Mamba, a Mamba-2 or a hybrid"):
        save_gguf(model, tmp_path / "a.gguf", None)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"time_step_rank": raw.u32(5)}, "a multiple of mamba2.ssm.time_step_rank = 5, got 12"),
    "width": ({"embedding_length": raw.u32(5)}, "a multiple of mamba2.embedding_length = 5, got 12"),
    "no-groups": ({"group_count": ...}, "mamba2.ssm.group_count: expected a whole number"),
    "groups": ({"group_count": raw.u32(3)}, "n_groups: expected a divisor of 4"),
    "one-group": ({"group_count": raw.u32(1)}, "blk.0.ssm_norm.weight (2, 6) instead of (1, 12)"),
    "state": ({"state_size": raw.u32(3)}, "blk.0.ssm_conv1d.weight (20, 3) instead of (24, 3)"),
    "layers": ({"block_count": raw.u32(9)}, "mamba2.block_count is 9, the file has 11 tensors"),
    "epsilon": ({"layer_norm_rms_epsilon": ...}, "mamba2.attention.layer_norm_rms_epsilon: expected"),
    "missing": ({"drop": "blk.0.ssm_norm.weight"}, "1 missing: blk.0.ssm_norm.weight"),
    "mamba": ({"architecture": raw.string("mamba")}, "mamba.block_count: expected a whole number"),
    "rwkv": ({"architecture": raw.string("rwkv7")}, "expected mamba, mamba2, "),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_wrong_metadata(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / "model.gguf").write_bytes(raw.mamba2(**changes))
    with pytest.raises(LongscanError) as caught:
        load(tmp_path / "model.gguf")
    assert str(caught.value).startswith(str(tmp_path / "model.gguf"))
    assert words in str(caught.value)


def test_conversions(tmp_path: Path) -> None:
    model = make()
    save(model, tmp_path / "model", ByteTokenizer())
    convert(tmp_path / "model", tmp_path / "a.gguf", gguf_type="Q8_0")
    convert(tmp_path / "a.gguf", tmp_path / "back", dtype=torch.float32)
    again, tokenizer = load(tmp_path / "back")
    assert isinstance(tokenizer, ByteTokenizer)
    stored = dequantized(load(tmp_path / "a.gguf", dtype=None)[0])
    assert again.fingerprint() == stored.fingerprint()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(tmp_path: Path, fields: dict[str, Any], kind: GGUFType) -> None:
    save_gguf(make(**fields), tmp_path / "a.gguf", ByteTokenizer(), kind)
    model, tokenizer = load(tmp_path / "a.gguf", dtype=None)
    assert tokenizer is not None
    agree(model, tokenizer, tmp_path / "a.gguf", AGREEMENT[kind])
