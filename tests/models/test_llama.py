"""Llama: sizes, rotations, the cache, files of states, and the verbs."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longscan
from llama_models import assert_close, draw_ids, make
from longscan.errors import LongscanError
from longscan.models import Llama, LlamaConfig, Mamba, MambaConfig
from longscan.models.common.attention import rotate
from longscan.models.common.growable import KV
from longscan.models.common.quantization import dequantized, quantize_model
from longscan.models.llama import PRESETS
from longscan.models.mamba import PRESETS as MAMBA_PRESETS
from longscan.tokenizers.base import ByteTokenizer


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_heads": 0}, "n_heads"),
        ({"n_heads": 5}, "n_heads: expected a divisor of d_model"),
        ({"n_kv_heads": 3}, "n_kv_heads: expected a divisor of 4 heads"),
        ({"d_head": 3}, "d_head: expected an even width"),
        ({"d_model": 4}, "d_head: expected an even width"),
        ({"d_ff": 0}, "d_ff"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"max_positions": 0}, "max_positions"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.items())),
)
def test_impossible_sizes_are_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(LongscanError, match=word):
        make(**change)


def test_presets_are_about_as_large_as_those_of_mamba() -> None:
    with torch.device("meta"):
        for name in ("tiny-lm", "130m"):
            mine = Llama(LlamaConfig(**PRESETS[name])).num_parameters()
            others = Mamba(MambaConfig(**MAMBA_PRESETS[name])).num_parameters()
            assert abs(mine / others - 1) < 0.05
        # 12 (4 d^2 + 3 d d_ff + 2 d) + d + padded V d
        assert mine == 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768 + 50280 * 768


def test_how_it_starts() -> None:
    model = Llama(
        LlamaConfig(d_model=256, n_layers=8, vocab_size=1000, n_heads=4), torch.Generator().manual_seed(0)
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            wanted = (
                0.005 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            )  # 0.02 / sqrt(16)
            assert abs(parameter.std().item() / wanted - 1) < 0.02


# rotations


def test_rotations_are_products_of_complex_numbers() -> None:
    """And only the distance of two positions matters to a query and a key."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=draw)
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)

    def turned(x: Tensor, position: int) -> Tensor:
        angles = position * frequencies
        return rotate(x, angles.cos(), angles.sin())

    pairs = torch.complex(q[:4], q[4:]) * torch.exp(1j * 13 * frequencies)
    torch.testing.assert_close(turned(q, 13), torch.cat([pairs.real, pairs.imag]))
    torch.testing.assert_close(turned(q, 105) @ turned(k, 100), turned(q, 5) @ k)


def test_a_model_without_positions_would_not_see_the_order() -> None:
    """The first of two tokens is seen by the second at a distance, so swapping what is before changes it."""
    model = make(torch.float64)
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.allclose(model(ids).logits[:, -1], model(ids[:, [1, 0, 2]]).logits[:, -1], atol=1e-6)


# the cache


def test_the_cache_grows_seldom_and_by_doubling() -> None:
    model, ids = make(n_kv_heads=2), draw_ids(1, 100)
    state, rooms = model.init_state(1), []
    assert (state.nbytes, state.growth) == (
        3 * 8,
        3 * 2 * 4 * 2 * 8,
    )  # a length; layers, k and v, bytes, heads
    for column in ids.unbind(1):
        model.step(column, state)
        rooms.append(state.layers[0].capacity)
    assert sorted(set(rooms)) == [16, 32, 64, 128]
    assert state.clone().layers[0].capacity == 100
    assert state.clone().nbytes == 3 * 8 + 100 * state.growth


def test_reading_does_not_touch_the_state_it_is_given() -> None:
    model, ids = make(), draw_ids(1)
    _, state = model.prefill(ids)
    before = state.map(torch.clone)
    model.prefill(ids, state)
    state.reserve(10)
    model(ids, state=state)
    for layer, old in zip(state.used().layers, before.layers, strict=True):
        assert all(map(torch.equal, layer, old))


def test_steps_go_on_where_reading_ended() -> None:
    model, ids = make(torch.float64), draw_ids(2, 40)
    _, state = model.prefill(ids[:, :30], chunk_size=13)
    expected = model(ids).logits
    for t in range(30, 40):
        logits, state = model.step(ids[:, t], state)
        assert_close(logits, expected[:, t], 1e-12)
    assert [layer.length.tolist() for layer in state.layers] == 3 * [[40, 40]]


def test_a_marked_state_goes_back() -> None:
    model, ids = make(), draw_ids(2)
    _, state = model.prefill(ids)
    other = state.clone()
    mark = state.mark()
    for token in (3, 4, 5):
        model.step(torch.tensor([token, token]), state)
    state.rewind(mark)
    got, expected = (model.step(torch.tensor([7, 8]), s)[0] for s in (state, other))
    assert torch.equal(got, expected)


def test_rows_of_different_lengths_step_together() -> None:
    model = make(torch.float64)
    ids = draw_ids(3, 20)
    lengths = (20, 1, 9)
    together = model.init_state(3)
    for i, length in enumerate(lengths):
        together.copy_row_(i, model.prefill(ids[i : i + 1, :length])[1], 0)
    got, _ = model.step(torch.tensor([1, 2, 3]), together)
    for i, length in enumerate(lengths):
        row = torch.cat([ids[i, :length], torch.tensor([i + 1])])[None]
        assert_close(got[i], model(row).logits[0, -1], 1e-12)


def test_a_narrow_model_keeps_narrow_keys() -> None:
    model, ids = make(torch.bfloat16), draw_ids()
    output = model(ids)
    assert output.state.layers[0].k.dtype == torch.bfloat16
    expected = make()(ids).logits
    assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_quantised_weights(kind: Any, tmp_path: Path) -> None:
    """Through the files and step by step; the cache is as wide as the activations."""
    model, ids = make(d_model=64), draw_ids(1, 20)
    quantize_model(model, kind)
    longscan.save(model, tmp_path / "model")
    again, _ = longscan.load(tmp_path / "model")
    output = again(ids)
    assert_close(output.logits, dequantized(again)(ids).logits, 1e-5)
    assert output.state.layers[0].k.dtype == torch.float32
    state = again.init_state(1)
    for column in ids.unbind(1):
        logits, _ = again.step(column, state)
    # decoding rounds activations to 16 bits for the integer formats
    assert_close(logits, output.logits[:, -1], 1e-5 if kind == "bf16" else 3e-4)


def test_more_positions_than_it_was_made_for_are_read_with_a_warning() -> None:
    model, ids = make(max_positions=8), draw_ids(1, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = model.prefill(ids[:, :8])
    with pytest.warns(UserWarning, match="longer than the 8 positions"):
        model.step(ids[:, 8], state)
    with pytest.warns(UserWarning, match="longer than the 8 positions"):
        logits = model(ids).logits
    assert logits.isfinite().all()
    assert math.isclose(0.0, (logits - make(max_positions=9)(ids).logits).abs().max().item())


# files of states


def test_a_state_in_a_file(tmp_path: Path) -> None:
    model, ids = make(), draw_ids(1)
    _, state = model.prefill(ids)
    model.step(ids[:, 0], state)
    state.save(tmp_path / "state", position=58, pending=[5])
    saved = longscan.State.load(tmp_path / "state", model)
    assert (saved.position, saved.pending) == (58, [5])
    for layer, old in zip(saved.state.layers, state.used().layers, strict=True):
        assert isinstance(layer, KV)
        assert all(map(torch.equal, layer, old))
    assert (tmp_path / "state").stat().st_size < 58 * state.growth + 3000  # no room in the file


def test_a_state_of_another_model_or_with_impossible_lengths(tmp_path: Path) -> None:
    model = make()
    _, state = model.prefill(draw_ids(2, 5))
    state.save(tmp_path / "state")
    with pytest.raises(LongscanError, match=r"of other weights|of another model"):
        longscan.State.load(tmp_path / "state", make(n_kv_heads=2))
    mamba = Mamba(MambaConfig(d_model=32, n_layers=3, vocab_size=261))
    with pytest.raises(LongscanError, match="expected Mamba of 3 layers, got 'Llama'"):
        longscan.State.load(tmp_path / "state", mamba)
    state.layers[1].length[0] = 77
    state.layers[1].length[1] = -1
    with pytest.raises(LongscanError, match="impossible lengths"):
        saved_as_is(state, tmp_path / "wrong", model)


def saved_as_is(state: Any, path: Path, model: Llama) -> None:
    """Write a state whatever it says, and read it."""
    from longscan.models.common import state_file
    from longscan.models.common.state import _identity

    owner = _identity(model)
    state_file.write(path, owner, dict(state.named_tensors()), 5, torch.empty(0, dtype=torch.int64))
    longscan.State.load(path, model)


# the verbs


def test_the_command_writes_drafts_and_goes_on(cli: Any, tmp_path: Path) -> None:
    longscan.save(make(), tmp_path / "model", ByteTokenizer())
    asked = ("generate", "--model", tmp_path / "model", "--temperature", 0, "--quiet")
    whole = cli(*asked, "Call me", "--max-new-tokens", 30)
    assert whole.code == 0, whole.err
    assert cli(*asked, "Call me", "--max-new-tokens", 30, "--speculate").out == whole.out
    state = tmp_path / "state"
    first = cli(*asked, "Call me", "--max-new-tokens", 12, "--save-state", state)
    assert whole.out.startswith(first.out.rstrip("\n\ufffd"))
    assert cli(*asked, "--load-state", state, "--max-new-tokens", 5).code == 0
    refused = cli("generate", "--model", "longscan-tiny-en", "--load-state", state)
    assert refused.code == 1
    assert "expected Mamba of 8 layers, got 'Llama' of '3'" in refused.err


def test_models_says_that_its_memory_grows(cli: Any) -> None:
    page = cli("models", "llama")
    assert page.code == 0
    assert "8.19 kB/token" in page.out
    found = json.loads(cli("models", "llama", "--json").out)
    assert found["presets"]["130m"]["state_bytes_per_token"] == 12 * 2 * 768 * 4
