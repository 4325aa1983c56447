"""selective_scan_fn, the C modules and mamba_inner_fn against the recurrence, step by step in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.compat import inner, scan_kernels
from longscan.compat.selective_scan import selective_scan_fn, selective_scan_fn_without_gate
from longscan.compat.state_update import selective_state_update

BATCH, D_INNER, D_STATE, SEQ_LEN = 2, 6, 5, 11
FORMS = ("constant", "shared", "grouped")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def inputs(form: str = "shared", *, is_complex: bool = False, seed: int = 0) -> dict[str, Any]:
    """Arguments of selective_scan_fn in float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def matrix() -> Tensor:
        length = 2 * SEQ_LEN if is_complex else SEQ_LEN
        if form == "constant":
            M = normal(D_INNER, D_STATE)
            return torch.complex(M, normal(D_INNER, D_STATE)) if is_complex else M
        return normal(*((BATCH, D_STATE, length) if form == "shared" else (BATCH, 3, D_STATE, length)))

    A = -normal(D_INNER, D_STATE).exp()
    return {
        "u": normal(BATCH, D_INNER, SEQ_LEN),
        "delta": normal(BATCH, D_INNER, SEQ_LEN),
        "A": torch.complex(A, normal(D_INNER, D_STATE)) if is_complex else A,
        "B": matrix(),
        "C": matrix(),
        "D": normal(D_INNER),
        "z": normal(BATCH, D_INNER, SEQ_LEN),
        "delta_bias": normal(D_INNER),
    }


def literal(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """y and the last state, one channel and one step at a time."""

    def at(M: Tensor, b: int, d: int, t: int) -> Tensor:
        if M.dim() == 2:
            return M[d]
        row = M[b] if M.dim() == 3 else M[b, d // (u.shape[1] // M.shape[1])]
        return torch.complex(row[:, 2 * t], row[:, 2 * t + 1]) if A.is_complex() else row[:, t]

    rows, states = [], []
    for b in range(u.shape[0]):
        for d in range(u.shape[1]):
            h, ys = torch.zeros_like(A[d]), []
            for t in range(u.shape[2]):
                dt = delta[b, d, t] if delta_bias is None else delta[b, d, t] + delta_bias[d]
                dt = F.softplus(dt) if delta_softplus else dt
                h = torch.exp(dt * A[d]) * h + dt * at(B, b, d, t) * u[b, d, t]
                y = (at(C, b, d, t) * h).sum()
                y = 2 * y.real if A.is_complex() else y
                y = y if D is None else y + D[d] * u[b, d, t]
                ys.append(y if z is None else y * F.silu(z[b, d, t]))
            rows.append(torch.stack(ys))
            states.append(h)
    return torch.stack(rows).view_as(u), torch.stack(states).view(u.shape[0], *A.shape)


def gradients(function: Callable[..., Any], named: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output, and the gradients of a fixed weighting of all outputs."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in named.items() if tensor is not None}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = torch.zeros((), dtype=torch.float64)
    for index, output in enumerate(outputs):
        flat = torch.view_as_real(output) if output.is_complex() else output
        weights = torch.linspace(-1, 1 + index, flat.numel(), dtype=torch.float64).view_as(flat)
        total = total + (flat * weights).sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    return outputs[0].detach(), dict(zip(leaves, found, strict=True))


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_scan_and_its_gradients(form: str, is_complex: bool) -> None:
    named = inputs(form, is_complex=is_complex)

    def ours(**tensors: Tensor) -> Any:
        return selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)

    y, found = gradients(ours, named)
    expected_y, expected = gradients(literal, named)
    close(y, expected_y)
    for name in NAMES:
        close(found[name], expected[name])


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias"])
def test_scan_without(absent: str) -> None:
    named = inputs() | {absent: None}
    close(selective_scan_fn(**named, delta_softplus=True), literal(**named)[0])


def test_scan_mixes_groups_and_a_shared_matrix() -> None:
    named = inputs("grouped") | {"C": inputs()["C"]}
    close(selective_scan_fn(**named, delta_softplus=True), literal(**named)[0])


def test_scan_has_the_input_dtype_and_layout() -> None:
    named = {name: tensor.float() for name, tensor in inputs("grouped").items()}
    low = {
        name: tensor.bfloat16() if name in ("u", "delta", "z") else tensor for name, tensor in named.items()
    }
    y, state = selective_scan_fn(**low, delta_softplus=True, return_last_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert y.view(BATCH, 2, -1, SEQ_LEN).shape == (BATCH, 2, D_INNER // 2, SEQ_LEN)
    expected = literal(**{name: tensor.double() for name, tensor in low.items()})[0]
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


def test_positional_order() -> None:
    named = inputs()
    values = list(named.values())
    close(selective_scan_fn(*values, True, True)[0], literal(**named)[0])
    named["z"] = None
    older = selective_scan_fn_without_gate(*values[:6], values[7], True, 1)
    close(older, literal(**named)[0])


@pytest.mark.parametrize("name", ["use_mambapy", "chunk_size"])
def test_an_unknown_keyword_is_an_error(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        selective_scan_fn(**inputs(), **{name: True})


@pytest.mark.parametrize("function", [selective_scan_fn, inner.mamba_inner_fn, selective_state_update])
def test_signatures_name_every_keyword(function: Callable[..., Any]) -> None:
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


# the C modules


def test_fwd_returns_states_at_odd_places() -> None:
    named = inputs("grouped")
    y, x, gated = scan_kernels.fwd(*named.values(), True)
    expected, state = literal(**named)
    close(gated, expected)
    close(y, literal(**(named | {"z": None}))[0])
    assert x.shape == (BATCH, D_INNER, 1, 2 * D_STATE)
    close(x[:, :, -1, 1::2], state)
    dt = F.softplus(named["delta"] + named["delta_bias"][:, None]).sum(-1)
    close(x[:, :, -1, 0::2], torch.exp(dt[..., None] * named["A"]))


def test_fwd_has_a_state_for_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_kernels, "CHUNK", 4)
    for form, is_complex in (("constant", False), ("grouped", True)):
        named = inputs(form, is_complex=is_complex) | {"z": None}
        y, x = scan_kernels.fwd(*named.values(), True)
        assert x.shape[2] == 3
        close(y, literal(**named)[0])
        prefix = {key: named[key][..., :8] for key in ("u", "delta")}
        prefix |= {
            key: named[key] if named[key].dim() == 2 else named[key][..., : 16 if is_complex else 8]
            for key in ("B", "C")
        }
        close(x[:, :, 1, 1::2], literal(**(named | prefix))[1])


def test_bwd() -> None:
    named = inputs("grouped")
    dout = torch.linspace(-1, 1, named["u"].numel(), dtype=torch.float64).view_as(named["u"])
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in named.items()}
    expected_y, _ = literal(**leaves)
    expected = torch.autograd.grad(expected_y, list(leaves.values()), dout)
    tensors, dz = list(named.values()), torch.empty_like(named["z"])
    _, x, _ = scan_kernels.fwd(*tensors, True)
    *found, given, y = scan_kernels.bwd(*tensors, dout, x, None, dz, True, True)
    close(y, expected_y.detach())
    assert given is dz
    for ours, name in zip([*found, dz], ("u", "delta", "A", "B", "C", "D", "delta_bias", "z"), strict=True):
        close(ours, expected[NAMES.index(name)])


@pytest.mark.parametrize("module", ["core", "oflex"])
def test_modules_without_gate(module: str) -> None:
    named = inputs("grouped") | {"z": None}
    tensors = [tensor for name, tensor in named.items() if name != "z"]
    forward, backward = getattr(scan_kernels, f"{module}_fwd"), getattr(scan_kernels, f"{module}_bwd")
    y, x = forward(*tensors, True, 1, *([True] if module == "oflex" else []))
    dout = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    close(y, literal(**named)[0])
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    names = [name for name in named if name != "z"]
    expected = torch.autograd.grad(literal(**dict(zip(names, leaves, strict=True)))[0], leaves, dout)
    for ours, theirs in zip(backward(*tensors, dout, x, True, 1), expected, strict=True):
        close(ours, theirs)


def test_oflex_computes_half_precision_in_float() -> None:
    u, *rest = (tensor.float() for name, tensor in inputs("grouped").items() if name != "z")
    y, x = scan_kernels.oflex_fwd(u.bfloat16(), *rest, True, 1, True)
    assert y.dtype == torch.float32
    assert scan_kernels.oflex_fwd(u.bfloat16(), *rest, True, 1, False)[0].dtype == torch.bfloat16
    du = scan_kernels.oflex_bwd(u.bfloat16(), *rest, torch.ones_like(y), x, True, 1)[0]
    exact = scan_kernels.oflex_bwd(u.bfloat16().float(), *rest, torch.ones_like(y), x, True, 1)[0]
    assert torch.equal(du, exact.bfloat16())


def test_bwd_without_optional_inputs() -> None:
    named = inputs() | {"D": None, "z": None, "delta_bias": None}
    found = scan_kernels.bwd(*named.values(), torch.ones_like(named["u"]), None, None, None, True, False)
    assert [gradient is None for gradient in found] == [False] * 5 + [True] * 2


# mamba_inner_fn


def block(*, is_complex: bool = False) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    rank, d_model, entries = 3, 4, 2 * D_STATE if is_complex else D_STATE

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    A = -normal(D_INNER, D_STATE).exp()
    return {
        "xz": normal(BATCH, 2 * D_INNER, SEQ_LEN),
        "conv1d_weight": normal(D_INNER, 1, 4),
        "conv1d_bias": normal(D_INNER),
        "x_proj_weight": normal(rank + 2 * entries, D_INNER),
        "delta_proj_weight": normal(D_INNER, rank),
        "out_proj_weight": normal(d_model, D_INNER),
        "out_proj_bias": normal(d_model),
        "A": torch.complex(A, normal(D_INNER, D_STATE)) if is_complex else A,
        "D": normal(D_INNER),
        "delta_bias": normal(D_INNER),
    }


def rms(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def literal_block(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    A_b: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
) -> Tensor:
    x, z = xz.chunk(2, dim=1)
    padded = F.pad(x, (3, 0))
    x = F.silu(
        sum(conv1d_weight[:, :, k] * padded[..., k : k + SEQ_LEN] for k in range(4)) + conv1d_bias[:, None]
    )
    selected = torch.einsum("bdl,nd->bln", x, x_proj_weight)
    rank = delta_proj_weight.shape[1]
    n = (selected.shape[-1] - rank) // 2
    delta = rms(selected[..., :rank] @ delta_proj_weight.T, dt_rms_weight)
    B = selected[..., rank : rank + n]
    B = rms(B if B_proj_bias is None else B + B_proj_bias, b_rms_weight)
    C = rms(selected[..., rank + n :], c_rms_weight)

    def ordered(M: Tensor, step: int) -> Tensor:
        M = M[:, ::step] if step == 1 else M.flip(1)
        if not A.is_complex():
            return M.transpose(1, 2)
        return torch.stack([M[..., 0::2], M[..., 1::2]], -1).transpose(1, 2).reshape(BATCH, -1, 2 * SEQ_LEN)

    y = literal(x, delta.transpose(1, 2), A, ordered(B, 1), ordered(C, 1), D, z, delta_bias)[0]
    if A_b is not None:
        back = (x.flip(-1), delta.transpose(1, 2).flip(-1), A_b, ordered(B, -1), ordered(C, -1))
        y = y + literal(*back, D, z.flip(-1), delta_bias)[0].flip(-1)
    return torch.einsum("bdl,md->blm", y, out_proj_weight) + out_proj_bias


@pytest.mark.parametrize("extra", ["nothing", "B_proj_bias", "norms", "A_b", "complex", "complex A_b"])
def test_inner_and_its_gradients(extra: str) -> None:
    named = block(is_complex="complex" in extra)
    function: Callable[..., Any] = inner.mamba_inner_fn
    if extra == "B_proj_bias":
        named["B_proj_bias"] = torch.linspace(-1, 1, D_STATE, dtype=torch.float64)
    if extra == "norms":
        named["b_rms_weight"] = torch.linspace(0.5, 1, D_STATE, dtype=torch.float64)
        named["c_rms_weight"] = torch.linspace(1, 2, D_STATE, dtype=torch.float64)
        named["dt_rms_weight"] = torch.linspace(1, 2, D_INNER, dtype=torch.float64)
    if extra.endswith("A_b"):
        function, named["A_b"] = inner.bimamba_inner_fn, 2 * named["A"]
    y, found = gradients(function, named)
    expected_y, expected = gradients(literal_block, named)
    close(y, expected_y)
    for name, gradient in expected.items():
        close(found[name], gradient, 1e-8)


def test_inner_without_projection() -> None:
    named = block()
    expected = inner.mamba_inner_fn(**named)
    out_weight, out_bias = named.pop("out_proj_weight"), named.pop("out_proj_bias")
    y = inner.mamba_inner_fn_no_out_proj(**named)
    assert y.shape == (BATCH, D_INNER, SEQ_LEN)
    close(F.linear(y.transpose(1, 2), out_weight, out_bias), expected)


def test_inner_takes_given_matrices() -> None:
    named, matrices = block(), inputs()
    given = {name: matrices[name] for name in ("B", "C")}
    named["x_proj_weight"] = named["x_proj_weight"][:3]  # only delta is computed
    y = inner.mamba_inner_fn_no_out_proj(
        **{key: value for key, value in named.items() if not key.startswith("out_")}, **given
    )
    x, z = named["xz"].chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), named["conv1d_weight"], named["conv1d_bias"], groups=D_INNER))
    delta = named["delta_proj_weight"] @ (named["x_proj_weight"] @ x)
    expected = literal(x, delta, named["A"], **given, D=named["D"], z=z, delta_bias=named["delta_bias"])[0]
    close(y, expected)


def test_inner_takes_groups_beside_a_computed_matrix() -> None:
    named = block()
    named = {key: value for key, value in named.items() if not key.startswith("out_")}
    B = inputs("grouped")["B"]
    named["x_proj_weight"] = torch.cat([named["x_proj_weight"][:3], named["x_proj_weight"][-D_STATE:]])
    y = inner.mamba_inner_fn_no_out_proj(**named, B=B)
    x, z = named["xz"].chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), named["conv1d_weight"], named["conv1d_bias"], groups=D_INNER))
    delta = named["delta_proj_weight"] @ (named["x_proj_weight"][:3] @ x)
    C = named["x_proj_weight"][3:] @ x
    close(y, literal(x, delta, named["A"], B, C, named["D"], z, named["delta_bias"])[0])


# one step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_update_is_a_step_of_the_scan(dtype: torch.dtype) -> None:
    named = inputs()
    expected, last = literal(**named)
    A, D, bias = named["A"], named["D"], named["delta_bias"]
    state = torch.zeros(BATCH, D_INNER, D_STATE, dtype=dtype)
    for t in range(SEQ_LEN):
        u, dt, B, C, z = (named[name][..., t].to(dtype) for name in ("u", "delta", "B", "C", "z"))
        y = selective_state_update(state, u, dt, A, B, C, D, z, bias, True)
        assert (y.dtype, y.shape) == (dtype, u.shape)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
        close(y.double(), expected[..., t], tolerance)
    close(state.double(), last, tolerance)


def test_state_update_of_heads_and_chosen_rows() -> None:
    draw = torch.Generator().manual_seed(2)
    heads, width, groups = 4, 3, 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    cache = normal(5, heads, width, D_STATE)
    before, rows = cache.clone(), torch.tensor([3, 1], dtype=torch.int32)
    x, dt, z = (normal(BATCH, heads, width) for _ in range(3))
    A, D, bias = -normal(heads, width, D_STATE).exp(), normal(heads, width), normal(heads, width)
    B, C = normal(BATCH, groups, D_STATE), normal(BATCH, groups, D_STATE)
    y = selective_state_update(cache, x, dt, A, B, C, D, z, bias, True, rows)
    for b, row in enumerate(rows.tolist()):
        for head in range(heads):
            step = F.softplus(dt[b, head] + bias[head])[:, None]
            group = head // (heads // groups)
            h = torch.exp(step * A[head]) * before[row, head] + step * B[b, group] * x[b, head][:, None]
            close(cache[row, head], h)
            close(y[b, head], (h @ C[b, group] + D[head] * x[b, head]) * F.silu(z[b, head]))
    untouched = [0, 2, 4]
    assert torch.equal(cache[untouched], before[untouched])


def test_state_update_writes_through_a_strided_state() -> None:
    named = inputs()
    strided = torch.zeros(BATCH, D_STATE, D_INNER, dtype=torch.float64).transpose(1, 2)
    plain = torch.zeros(BATCH, D_INNER, D_STATE, dtype=torch.float64)
    u, dt, B, C = (named[name][..., 0] for name in ("u", "delta", "B", "C"))
    outputs = [selective_state_update(state, u, dt, named["A"], B, C) for state in (strided, plain)]
    assert torch.equal(*outputs)
    assert torch.equal(strided, plain)
    assert strided.abs().min() > 0


def test_state_update_refuses_groups_that_do_not_divide() -> None:
    x = torch.zeros(1, 4, 2)
    state, A, B = torch.zeros(1, 4, 2, 3), torch.zeros(4, 2, 3), torch.zeros(1, 3, 3)
    with pytest.raises(ValueError, match="divides 4 heads, got 3"):
        selective_state_update(state, x, x, A, B, B)
