"""Mamba-2's scan and block against the recurrence, step by step in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.compat import fused_kernels, split_conv, ssd
from longscan.compat.generation import InferenceParams
from longscan.compat.mamba2 import Mamba2

BATCH, HEADS, WIDTH, GROUPS, D_STATE = 2, 4, 3, 2, 5
NO_LIMIT = (0.0, float("inf"))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seq_len: int) -> dict[str, Tensor]:
    return {
        "x": normal(BATCH, seq_len, HEADS, WIDTH, seed=0),
        "dt": normal(BATCH, seq_len, HEADS, seed=1),
        "A": -normal(HEADS, seed=2).exp(),
        "B": normal(BATCH, seq_len, GROUPS, D_STATE, seed=3),
        "C": normal(BATCH, seq_len, GROUPS, D_STATE, seed=4),
        "D": normal(HEADS, WIDTH, seed=5),
        "z": normal(BATCH, seq_len, HEADS, WIDTH, seed=6),
        "dt_bias": normal(HEADS, seed=7),
        "initial_states": normal(BATCH, HEADS, WIDTH, D_STATE, seed=8),
    }


def literal(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> tuple[Tensor, Tensor]:
    """y and the final states, one step at a time, with softplus."""
    dt = F.softplus(dt if dt_bias is None else dt + dt_bias).clamp(*dt_limit)
    B, C = (M.repeat_interleave(HEADS // GROUPS, dim=2) for M in (B, C))
    h = x.new_zeros(BATCH, HEADS, WIDTH, D_STATE)[: x.shape[0]] if initial_states is None else initial_states
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            h = torch.where((seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None], h, 0.0)
        step = dt[:, t, :, None, None]
        h = torch.exp(step * A[:, None, None]) * h + step * x[:, t, ..., None] * B[:, t, :, None]
        y = (h * C[:, t, :, None]).sum(-1)
        y = y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x[:, t]
        ys.append(y if z is None else y * F.silu(z[:, t]))
    return torch.stack(ys, 1), h


def ours(**named: Any) -> Any:
    return ssd.mamba_chunk_scan_combined(**named, chunk_size=256, dt_softplus=True, return_final_states=True)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seq_len", [1, 3, 4, 13])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_states_and_gradients(seq_len: int, packed: bool) -> None:
    seq_idx = None
    if packed:  # the second value comes back after another one
        seq_idx = torch.tensor([[0] * 3 + [1] * 4 + [0] * 6, [2] * 5 + [3] * 8])[:, :seq_len]
    results = []
    for function in (ours, literal):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs(seq_len).items()}
        y, state = function(**leaves, seq_idx=seq_idx)
        loss = (y * torch.arange(y.numel()).view_as(y)).sum() + state.square().sum()
        results.append((y, state, *torch.autograd.grad(loss, list(leaves.values()))))
    for found, expected in zip(*results, strict=True):
        close(found, expected)


def test_chunks_of_their_real_size() -> None:
    named = inputs(150)
    for found, expected in zip(ours(**named), literal(**named), strict=True):
        close(found, expected)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_states"])
def test_scan_without(absent: str) -> None:
    named = inputs(7)
    del named[absent]
    close(ours(**named)[0], literal(**named)[0])


def test_scalar_skip_and_limits() -> None:
    named = inputs(7) | {"D": normal(HEADS, seed=9)}
    limit = (0.3, 0.9)
    found = ssd.mamba_chunk_scan_combined(**named, chunk_size=4, dt_softplus=True, dt_limit=limit)
    close(found, literal(**named, dt_limit=limit)[0])


def test_dtypes() -> None:
    named = {name: tensor.bfloat16() for name, tensor in inputs(7).items()}
    y, state = ours(**named)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact = literal(**{name: tensor.double() for name, tensor in named.items()})[0]
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)


def test_states_of_packed_sequences() -> None:
    named = {
        name: tensor[:1] if name in ("x", "dt", "B", "C", "z") else tensor
        for name, tensor in inputs(11).items()
    }
    del named["initial_states"]
    bounds, seq_idx = torch.tensor([0, 4, 5, 11]), torch.tensor([[0] * 4 + [1] + [2] * 6])
    y, states = ssd.mamba_chunk_scan_combined(
        **named,
        chunk_size=4,
        dt_softplus=True,
        seq_idx=seq_idx,
        cu_seqlens=bounds,
        return_varlen_states=True,
    )
    for index, (a, b) in enumerate([(0, 4), (4, 5), (5, 11)]):
        part = {key: v[:, a:b] if key in ("x", "dt", "B", "C", "z") else v for key, v in named.items()}
        expected, state = literal(**part)
        close(y[:, a:b], expected)
        close(states[index : index + 1], state)
    with pytest.raises(NotImplementedError, match="return_varlen_states: expected cu_seqlens"):
        ssd.mamba_chunk_scan_combined(**named, chunk_size=4, return_varlen_states=True)


def test_groups_must_divide_heads() -> None:
    named = inputs(3)
    for name in ("B", "C"):
        named[name] = normal(BATCH, 3, 3, D_STATE, seed=0)
    with pytest.raises(ValueError, match="divides 4 heads, got 3"):
        ours(**named)


def test_forward_and_backward_functions() -> None:
    named = inputs(9)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in named.items()}
    y, states = literal(**leaves)
    dout, dfinal = normal(*y.shape, seed=30), normal(*states.shape, seed=31)
    expected = torch.autograd.grad([y, states], list(leaves.values()), [dout, dfinal])
    settings: dict[str, Any] = {"chunk_size": 4, "dt_softplus": True}
    found, before, *_, final = fused_kernels._mamba_chunk_scan_combined_fwd(**named, **settings)
    close(found, y.detach())
    close(final, states.detach())
    close(before, literal(**(named | {"z": None}))[0])
    buffer = torch.empty_like(named["x"])
    *gradients, again = fused_kernels._mamba_chunk_scan_combined_bwd(
        dout, **named, **settings, out=None, dfinal_states=dfinal, dx=buffer, recompute_output=True
    )
    assert gradients[0] is buffer
    close(again, y.detach())
    for gradient, theirs in zip(gradients, expected, strict=True):
        close(gradient, theirs)


def test_the_discrete_form() -> None:
    named = inputs(9)
    dt = F.softplus(named["dt"])
    B, C = (named[name].repeat_interleave(HEADS // GROUPS, dim=2) for name in ("B", "C"))
    y, state = ssd.ssd_minimal_discrete(
        named["x"] * dt[..., None], dt * named["A"], B, C, 3, named["initial_states"][:, None]
    )
    bare = {name: named[name] for name in ("x", "dt", "A", "B", "C", "initial_states")}
    expected, last = literal(**bare)
    close(y, expected)
    close(state, last)


# the block


def block(d_mlp: int = 0) -> dict[str, Any]:
    d_inner, d_bc = HEADS * WIDTH, GROUPS * D_STATE
    return {
        "zxbcdt": normal(BATCH, 8, 2 * d_mlp + 2 * d_inner + 2 * d_bc + HEADS, seed=10),
        "conv1d_weight": normal(d_inner + 2 * d_bc, 4, seed=11),
        "conv1d_bias": normal(d_inner + 2 * d_bc, seed=12),
        "dt_bias": normal(HEADS, seed=13),
        "A": -normal(HEADS, seed=14).exp(),
        "D": normal(HEADS, seed=15),
        "rmsnorm_weight": normal(d_inner, seed=16),
        "outproj_weight": normal(3, d_mlp + d_inner, seed=17),
        "outproj_bias": normal(3, seed=18),
    }


def literal_block(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    rmsnorm_weight: Tensor | None,
    outproj_weight: Tensor | None,
    outproj_bias: Tensor | None,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor]:
    d_inner, d_bc = HEADS * WIDTH, GROUPS * D_STATE
    d_mlp = (zxbcdt.shape[-1] - 2 * d_inner - 2 * d_bc - HEADS) // 2
    gate, value, z, conv_in, dt = zxbcdt.split([d_mlp, d_mlp, d_inner, d_inner + 2 * d_bc, HEADS], dim=-1)
    padded = F.pad(conv_in, (0, 0, 3, 0))
    taps = sum(conv1d_weight[:, k] * padded[:, k : k + 8] for k in range(4))
    x, B, C = F.silu(taps + conv1d_bias).split([d_inner, d_bc, d_bc], dim=-1)
    heads = x.unflatten(-1, (HEADS, WIDTH))
    B, C = (M.unflatten(-1, (GROUPS, D_STATE)) for M in (B, C))
    y, state = literal(heads, dt, A, B, C, D, None, dt_bias)
    y = y.flatten(2)
    gated = F.silu(z)
    if rmsnorm_weight is None:
        y = y * gated
    else:
        y = y if norm_before_gate else y * gated
        groups = y.unflatten(-1, (GROUPS, -1))
        groups = groups / (groups.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = groups.flatten(-2) * rmsnorm_weight
        y = y * gated if norm_before_gate else y
    y = torch.cat([F.silu(gate) * value, y], -1)
    return (y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)), state


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(("d_mlp", "bare"), [(0, False), (2, False), (2, True)])
def test_block_and_its_gradients(d_mlp: int, bare: bool, norm_before_gate: bool) -> None:
    named = block(d_mlp)
    absent = dict.fromkeys(("rmsnorm_weight", "outproj_weight", "outproj_bias")) if bare else {}
    settings = {"chunk_size": 4, "headdim": WIDTH, "ngroups": GROUPS, "return_final_states": True}
    results = []
    for function in (split_conv.mamba_split_conv1d_scan_combined, literal_block):
        leaves = {name: t.clone().requires_grad_() for name, t in named.items() if name not in absent}
        more: Any = {} if function is literal_block else settings
        y, state = function(**leaves, **absent, norm_before_gate=norm_before_gate, **more)  # type: ignore[operator]
        loss = (y * torch.arange(y.numel()).view_as(y)).sum() + state.square().sum()
        results.append((y, state, *torch.autograd.grad(loss, list(leaves.values()))))
    for found, expected in zip(*results, strict=True):
        close(found, expected, 1e-8)


def test_block_keeps_packed_sequences_apart() -> None:
    named = block()
    seq_idx = torch.tensor([[0] * 3 + [1] * 5] * BATCH, dtype=torch.int32)
    settings: dict[str, Any] = {"chunk_size": 4, "headdim": WIDTH, "ngroups": GROUPS}
    y = split_conv.mamba_split_conv1d_scan_combined(**named, **settings, seq_idx=seq_idx)
    for part in (slice(0, 3), slice(3, 8)):
        alone = split_conv.mamba_split_conv1d_scan_combined(
            **(named | {"zxbcdt": named["zxbcdt"][:, part]}), **settings
        )
        close(y[:, part], alone)


def test_block_says_what_it_lacks() -> None:
    named = block()
    with pytest.raises(ValueError, match="headdim: expected"):
        split_conv.mamba_split_conv1d_scan_combined(**named, chunk_size=4)
    named["zxbcdt"] = named["zxbcdt"][..., :20]
    with pytest.raises(ValueError, match=r"zxbcdt: expected at least .* got 20"):
        split_conv.mamba_split_conv1d_scan_combined(**named, chunk_size=4, headdim=WIDTH)


@pytest.mark.parametrize(
    "settings",
    [{}, {"ngroups": 2}, {"D_has_hdim": True}, {"rmsnorm": False}, {"d_ssm": 8}, {"dt_limit": (0.01, 0.05)}],
)
def test_mamba2_decodes_what_it_computes_in_one_pass(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Mamba2(8, d_state=4, headdim=4, layer_idx=0, dtype=torch.float64, **settings)
    u = normal(2, 9, 8, seed=20)
    expected = model(u)
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    with torch.no_grad():
        parts = [model(u[:, :5], inference_params=params)]
        for t in range(5, 9):
            params.seqlen_offset = t
            parts.append(model(u[:, t : t + 1], inference_params=params))
    close(torch.cat(parts, 1), expected.detach())
    flat = model(u.flatten(0, 1), seqlen=9)
    close(flat, expected.flatten(0, 1))


def test_mamba2_caches_packed_sequences() -> None:
    torch.manual_seed(0)
    model = Mamba2(8, d_state=4, headdim=4, layer_idx=0, dtype=torch.float64)
    u, bounds = normal(1, 9, 8, seed=21), torch.tensor([0, 2, 9])
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    with torch.no_grad():
        y = model(u, cu_seqlens=bounds, inference_params=params)
        params.seqlen_offset = 1
        token = normal(2, 1, 8, seed=22)
        following = model(token, inference_params=params)
        for index, (a, b) in enumerate([(0, 2), (2, 9)]):
            alone = model(torch.cat([u[:, a:b], token[index : index + 1]], 1))
            close(y[:, a:b], alone[:, :-1])
            close(following[index : index + 1], alone[:, -1:])


def test_mamba2_refuses_tensor_parallelism() -> None:
    with pytest.raises(NotImplementedError, match=r"process_group: .* no tensor parallelism"):
        Mamba2(8, headdim=4, process_group=object())
