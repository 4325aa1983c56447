"""Mamba with parts undone: the whole is Mamba, and a complex A is what its equation says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models import Mamba
from longscan.models.mamba import MambaConfig
from longscan.reproduce.mamba_variants import Variant, VariantConfig, VariantMixer

CONSTANT = {"select_dt": False, "select_B": False, "select_C": False}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"gate": False},
    {"select_dt": False},
    {"select_B": False},
    {"select_C": False},
    CONSTANT,
    {"A_init": "half"},
    {"A_init": "random"},
    {"A_init": "complex"},
    {**CONSTANT, "A_init": "complex"},
]


def variant(**fields: Any) -> Variant:
    config = VariantConfig(d_model=16, n_layers=2, vocab_size=11, d_state=4, **fields)
    return Variant(config, torch.Generator().manual_seed(0)).double().eval()


def test_nothing_undone_is_mamba() -> None:
    model, ids = variant(), torch.randint(11, (2, 20))
    mamba = Mamba(MambaConfig(d_model=16, n_layers=2, vocab_size=11, d_state=4)).double().eval()
    mamba.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, mamba(ids).logits)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_chunks_and_steps_are_one_pass(fields: dict[str, Any]) -> None:
    model, ids = variant(**fields), torch.randint(11, (2, 20))
    whole = model(ids).logits
    first, state = model.prefill(ids[:, :7])
    rest = [first[:, -1] if first.dim() == 3 else first]
    for t in range(7, 20):
        logits, state = model.step(ids[:, t], state)
        rest.append(logits)
    assert torch.allclose(torch.stack(rest, 1), whole[:, 6:])
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.numel())


@pytest.mark.parametrize("part", ["dt", "B", "C"])
def test_what_is_constant_does_not_depend_on_the_input(part: str) -> None:
    mixer = variant(**{f"select_{part}": False}).backbone.layers[0].mixer
    one, other = (mixer._select(torch.randn(1, 5, 32).double()) for _ in range(2))
    for name, a, b in zip(("dt", "B", "C"), one, other, strict=True):
        assert torch.equal(a, b) == (name == part)


def test_a_complex_state() -> None:
    config = VariantConfig(d_model=8, n_layers=1, vocab_size=11, d_state=6, A_init="complex")
    mixer = VariantMixer(config, torch.Generator().manual_seed(0)).double()
    tokens = torch.randn(2, 20, 8).double()
    u, z = mixer.in_proj(tokens).chunk(2, -1)
    windows = F.pad(u, (0, 0, 3, 0)).unfold(1, 4, 1)
    u = F.silu((windows * mixer.conv1d.weight[:, 0]).sum(-1) + mixer.conv1d.bias)
    dt, B, C = mixer.x_proj(u).split(mixer.widths, -1)
    dt = F.softplus(mixer.dt_proj(dt) + mixer.dt_proj.bias)
    A = torch.complex(-mixer.A_log.exp(), mixer.A_imag.double())
    assert torch.allclose(A[0].imag, torch.arange(3).double())
    B, C = (torch.complex(*M.chunk(2, -1)) for M in (B, C))
    h, ys = torch.zeros(2, 16, 3, dtype=torch.complex128), []
    for t in range(20):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append(2 * (h * C[:, t, None]).real.sum(-1) + mixer.D * u[:, t])
    y, state = mixer(tokens)
    assert torch.allclose(y, mixer.out_proj(torch.stack(ys, 1) * F.silu(z)), atol=1e-7)
    assert torch.allclose(torch.complex(*state.ssm.chunk(2, -1)), h, atol=1e-7)


def test_without_its_gate_a_block_has_half_an_in_proj() -> None:
    assert variant(gate=False).backbone.layers[0].mixer.in_proj.weight.shape == (32, 16)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"d_state": 3, "A_init": "complex"}, "d_state: expected an even number"),
        ({"inner_norms": "plain"}, "inner_norms: expected 'none'"),
    ],
)
def test_impossible_variants(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(LongscanError, match=words):
        VariantConfig(d_model=8, n_layers=1, vocab_size=11, **fields)


def test_packed_rows_need_a_real_state() -> None:
    mixer = variant(A_init="complex").backbone.layers[0].mixer
    with pytest.raises(ValueError, match="seq_idx: expected None with a complex A"):
        mixer(torch.randn(1, 4, 16).double(), None, torch.zeros(1, 4, dtype=torch.long))
