"""The drop-in functions refuse arguments of other shapes, which they don't broadcast, and of other dtypes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.compat import (
    conv,
    conv_kernels,
    fused_kernels,
    gated_norms,
    inner,
    norms,
    norms_v1,
    scan_kernels,
    selective_scan,
    split_conv,
    ssd,
    state_update,
)

# all sizes differ, so that no axis can stand for another one
BATCH, D_INNER, SEQ_LEN, D_STATE, WIDTH, RANK, D_MODEL, N_HEADS, D_HEAD, N_GROUPS = (
    2,
    12,
    9,
    5,
    4,
    3,
    7,
    6,
    8,
    3,
)
STATE_LEN, ROWS = 10, 11


@dataclass(frozen=True)
class Case:
    """A function, arguments that it takes, and the axes (argument, axis) that may have size 1 as well."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    free: frozenset[tuple[str, int]] = frozenset()
    positional: bool = False

    def __call__(self, **changes: Any) -> Any:
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in (self.arguments | changes).items()}
        return self.function(*copies.values()) if self.positional else self.function(**copies)


def t(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) - 0.5


def ints(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def scan(names: str, **more: Any) -> dict[str, Any]:
    """Arguments of a selective scan, in the order of names."""
    line = t(BATCH, D_INNER, SEQ_LEN)
    tensors = {
        **dict.fromkeys(("u", "delta", "z", "dout", "dz"), line),
        "A": -t(D_INNER, D_STATE).abs(),
        "B": t(BATCH, N_GROUPS, D_STATE, SEQ_LEN),
        "C": t(BATCH, N_GROUPS, D_STATE, SEQ_LEN),
        **dict.fromkeys(("D", "delta_bias"), t(D_INNER)),
    }
    return {name: tensors.get(name, more.get(name)) for name in names.split()}


def convolution(**more: Any) -> dict[str, Any]:
    return {"x": t(BATCH, D_INNER, SEQ_LEN), "weight": t(D_INNER, WIDTH), "bias": t(D_INNER), **more}


def heads(**more: Any) -> dict[str, Any]:
    return {
        "x": t(BATCH, SEQ_LEN, N_HEADS, D_HEAD),
        "dt": t(BATCH, SEQ_LEN, N_HEADS),
        "A": -t(N_HEADS).abs(),
        "B": t(BATCH, SEQ_LEN, N_GROUPS, D_STATE),
        "C": t(BATCH, SEQ_LEN, N_GROUPS, D_STATE),
        "chunk_size": 4,
        "D": t(N_HEADS, D_HEAD),
        "z": t(BATCH, SEQ_LEN, N_HEADS, D_HEAD),
        "dt_bias": t(N_HEADS),
        **more,
    }


def block(**more: Any) -> dict[str, Any]:
    return {
        "xz": t(BATCH, 2 * D_INNER, SEQ_LEN),
        "conv1d_weight": t(D_INNER, 1, WIDTH),
        "conv1d_bias": t(D_INNER),
        "x_proj_weight": t(RANK + 2 * D_STATE, D_INNER),
        "delta_proj_weight": t(D_INNER, RANK),
        "A": -t(D_INNER, D_STATE).abs(),
        **more,
        "D": t(D_INNER),
        "delta_bias": t(D_INNER),
        "B_proj_bias": t(D_STATE),
        "C_proj_bias": t(D_STATE),
    }


def norm(*names: str) -> dict[str, Any]:
    """Arguments of a norm: weights by their name, the rest as x."""
    return {
        name: t(D_MODEL) if name.startswith(("weight", "bias", "norm_")) else t(BATCH, SEQ_LEN, D_MODEL)
        for name in names
    }


INITIAL, STATES = t(BATCH, D_INNER, WIDTH - 1), t(BATCH, N_HEADS, D_HEAD, D_STATE)
PROJECTION = {"out_proj_weight": t(D_MODEL, D_INNER), "out_proj_bias": t(D_MODEL)}
D_XBC = N_HEADS * D_HEAD + 2 * N_GROUPS * D_STATE
MLP = 2
SPLIT = {
    "zxbcdt": t(BATCH, SEQ_LEN, 2 * MLP + N_HEADS * D_HEAD + D_XBC + N_HEADS),
    "conv1d_weight": t(D_XBC, WIDTH),
    "conv1d_bias": t(D_XBC),
    "dt_bias": t(N_HEADS),
    "A": -t(N_HEADS).abs(),
    "D": t(N_HEADS),
    "chunk_size": 4,
    "rmsnorm_weight": t(N_HEADS * D_HEAD),
    "outproj_weight": t(D_MODEL, MLP + N_HEADS * D_HEAD),
    "outproj_bias": t(D_MODEL),
    "headdim": D_HEAD,
    "ngroups": N_GROUPS,
}
UPDATE = {
    "state": t(BATCH, N_HEADS, D_HEAD, D_STATE),
    **dict.fromkeys(("x", "dt", "z"), t(BATCH, N_HEADS, D_HEAD)),
    "A": -t(N_HEADS, D_HEAD, D_STATE).abs(),
    "B": t(BATCH, N_GROUPS, D_STATE),
    "C": t(BATCH, N_GROUPS, D_STATE),
    **dict.fromkeys(("D", "dt_bias"), t(N_HEADS, D_HEAD)),
}
WITHOUT_HEADS = {
    "state": t(BATCH, D_INNER, D_STATE),
    **dict.fromkeys(("x", "dt", "z"), t(BATCH, D_INNER)),
    "A": -t(D_INNER, D_STATE).abs(),
    "B": t(BATCH, D_STATE),
    "C": t(BATCH, D_STATE),
    **dict.fromkeys(("D", "dt_bias"), t(D_INNER)),
}
RING = {
    **convolution(),
    "conv_state": t(ROWS, D_INNER, STATE_LEN),
    "cache_seqlens": ints(BATCH),
    "conv_state_indices": torch.tensor([4, 0]),
}
BUFFERS = {"dx": t(BATCH, D_INNER, SEQ_LEN), "dweight": t(D_INNER, WIDTH), "dbias": t(D_INNER)}
CONTINUED = {"seq_idx": None, "initial_states": INITIAL, "dfinal_states": INITIAL}
# one group instead of several
XZ = frozenset({("conv1d_weight", 2), ("xz", 0), ("xz", 2)})
GROUPS = frozenset({("B", 1), ("C", 1)})
SSD_BUFFERS = {f"d{k}": v for k, v in heads().items() if k in ("x", "dt", "B", "C", "z")}

CASES = {
    "selective_scan_fn": Case(selective_scan.selective_scan_fn, scan("u delta A B C D z delta_bias"), GROUPS),
    "selective_scan_fn_without_gate": Case(
        selective_scan.selective_scan_fn_without_gate, scan("u delta A B C D delta_bias"), GROUPS
    ),
    "fwd": Case(scan_kernels.fwd, scan("u delta A B C D z delta_bias s", s=True), GROUPS, True),
    "core_fwd": Case(scan_kernels.core_fwd, scan("u delta A B C D delta_bias s", s=True), GROUPS, True),
    "oflex_fwd": Case(scan_kernels.oflex_fwd, scan("u delta A B C D delta_bias s", s=True), GROUPS, True),
    "bwd": Case(
        scan_kernels.bwd, scan("u delta A B C D z delta_bias dout x out dz s r", s=True, r=True), GROUPS, True
    ),
    "core_bwd": Case(
        scan_kernels.core_bwd, scan("u delta A B C D delta_bias dout x s", s=True), GROUPS, True
    ),
    "causal_conv1d_fn": Case(
        conv.causal_conv1d_fn,
        convolution(initial_states=INITIAL, return_final_states=True, final_states_out=INITIAL),
        frozenset({("x", 2)}),
    ),
    "causal_conv1d_fn packed": Case(
        conv.causal_conv1d_fn, convolution(seq_idx=ints(BATCH, SEQ_LEN)), frozenset({("weight", 1)})
    ),
    "causal_conv1d_update": Case(
        conv.causal_conv1d_update,
        RING,
        frozenset({("weight", 1), ("x", 2), ("conv_state", 0), ("conv_state", 2)}),
    ),
    "causal_conv1d_varlen_states": Case(
        conv.causal_conv1d_varlen_states,
        {"x": t(SEQ_LEN, D_INNER), "cu_seqlens": torch.tensor([0, 4, SEQ_LEN]), "state_len": 3},
        frozenset({("x", 1)}),
    ),
    "causal_conv1d_fwd": Case(
        conv_kernels.causal_conv1d_fwd,
        convolution(
            seq_idx=None,
            initial_states=INITIAL,
            out=t(BATCH, D_INNER, SEQ_LEN),
            final_states_out=INITIAL,
            silu=True,
        ),
        positional=True,
    ),
    "causal_conv1d_bwd": Case(
        conv_kernels.causal_conv1d_bwd,
        convolution(
            dout=t(BATCH, D_INNER, SEQ_LEN), **CONTINUED, **BUFFERS, dinitial_states=INITIAL, silu=True
        ),
        positional=True,
    ),
    "mamba_inner_fn": Case(
        inner.mamba_inner_fn,
        block(**PROJECTION, b_rms_weight=t(D_STATE), c_rms_weight=t(D_STATE), dt_rms_weight=t(D_INNER)),
        XZ,
    ),
    "mamba_inner_fn_no_out_proj": Case(inner.mamba_inner_fn_no_out_proj, block(), XZ),
    "bimamba_inner_fn": Case(
        inner.bimamba_inner_fn,
        block(**PROJECTION, A_b=t(D_INNER, D_STATE)),
        XZ,
    ),
    "mamba_chunk_scan_combined": Case(
        ssd.mamba_chunk_scan_combined, heads(initial_states=STATES, seq_idx=ints(BATCH, SEQ_LEN))
    ),
    "mamba_chunk_scan": Case(ssd.mamba_chunk_scan, heads()),
    "chunk_scan backward": Case(
        fused_kernels._mamba_chunk_scan_combined_bwd,
        heads(dout=heads()["x"], out=None, initial_states=STATES, dfinal_states=STATES, **SSD_BUFFERS),
    ),
    "ssd_minimal_discrete": Case(
        ssd.ssd_minimal_discrete,
        {
            "X": t(BATCH, SEQ_LEN, N_HEADS, D_HEAD),
            "A": -t(BATCH, SEQ_LEN, N_HEADS).abs(),
            **dict.fromkeys(("B", "C"), t(BATCH, SEQ_LEN, N_HEADS, D_STATE)),
            "block_len": 4,
            "initial_states": STATES[:, None],
        },
    ),
    "mamba_split_conv1d_scan_combined": Case(
        split_conv.mamba_split_conv1d_scan_combined,
        SPLIT | {"initial_states": STATES, "seq_idx": ints(BATCH, SEQ_LEN)},
        frozenset({("conv1d_weight", 1)}),
    ),
    "mamba_conv1d_scan_ref": Case(
        split_conv.mamba_conv1d_scan_ref,
        {k: v for k, v in SPLIT.items() if k in ("conv1d_weight", "conv1d_bias", "A", "dt_bias", "D")}
        | {"xBC": t(BATCH, SEQ_LEN, D_XBC), "dt": t(BATCH, SEQ_LEN, N_HEADS)}
        | {"z": t(BATCH, SEQ_LEN, N_HEADS * D_HEAD), "chunk_size": 4, "ngroups": N_GROUPS},
        frozenset({("conv1d_weight", 1)}),
    ),
    "selective_state_update": Case(state_update.selective_state_update, UPDATE),
    "selective_state_update without heads": Case(state_update.selective_state_update, WITHOUT_HEADS),
    "layer_norm_fn": Case(
        norms.layer_norm_fn, norm("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
    ),
    "rms_norm_fn": Case(norms.rms_norm_fn, norm("x", "weight", "bias") | {"rowscale": t(BATCH, SEQ_LEN)}),
    "layer_norm_ref": Case(norms.layer_norm_ref, norm("x", "weight", "bias", "residual")),
    "rms_norm_ref": Case(norms.rms_norm_ref, norm("x", "weight", "bias", "residual")),
    "layer_norm_linear_fn": Case(
        norms.layer_norm_linear_fn,
        norm("x", "norm_weight", "norm_bias", "residual")
        | {"linear_weight": t(RANK, D_MODEL), "linear_bias": t(RANK)},
    ),
    "layer_norm_fn of version 1": Case(norms_v1.layer_norm_fn, norm("x", "weight", "bias", "residual")),
    "rms_norm_fn of version 1": Case(norms_v1.rms_norm_fn, norm("x", "weight", "bias", "residual")),
    "layernorm_fn": Case(gated_norms.layernorm_fn, norm("x", "weight", "bias", "z")),
    "rmsnorm_fn": Case(gated_norms.rmsnorm_fn, norm("x", "weight", "bias", "z")),
    "layer_norm backward": Case(
        fused_kernels._layer_norm_bwd,
        norm("dy", "x", "weight", "bias", "z", "dz") | {"mean": None, "rstd": None, "eps": 1e-6},
    ),
}


def tensors() -> Iterator[Any]:
    for name, case in CASES.items():
        for argument, value in case.arguments.items():
            if isinstance(value, Tensor):
                yield pytest.param(case, argument, id=f"{name}: {argument}")


def other_shapes(tensor: Tensor, free: set[int]) -> Iterator[Tensor]:
    """A scalar, one axis more, an axis of size 1, one entry more or fewer, and two axes swapped."""
    yield tensor.flatten()[0]
    yield tensor[None]
    yield tensor[..., None]
    for axis, size in enumerate(tensor.shape):
        if axis not in free:
            yield tensor.narrow(axis, 0, 1) if size > 1 else tensor.repeat_interleave(2, axis)
            yield torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
            if size > 2:
                yield tensor.narrow(axis, 0, size - 1)
    for axis in range(1, tensor.dim()):
        yield tensor.transpose(axis - 1, axis)


def refuses(case: Case, argument: str, value: Tensor) -> bool:
    try:
        case(**{argument: value})
    except ValueError as error:
        return re.match(r"\w+: expected .*, got", str(error)) is not None
    return False


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_takes_what_fits(case: Case) -> None:
    case()


@pytest.mark.parametrize(("case", "argument"), list(tensors()))
def test_refuses_other_shapes(case: Case, argument: str) -> None:
    good = case.arguments[argument]
    free = {axis for name, axis in case.free if name == argument}
    taken = [bad.shape for bad in other_shapes(good, free) if not refuses(case, argument, bad)]
    assert not taken, f"{argument} of shape {tuple(good.shape)}"


@pytest.mark.parametrize(("case", "argument"), list(tensors()))
def test_refuses_other_dtypes(case: Case, argument: str) -> None:
    good = case.arguments[argument]
    if good.is_floating_point():
        others = (torch.complex64, torch.int32, torch.int64, torch.bool)
    else:
        others = (torch.float32, torch.bool, torch.complex64)
    for dtype in others:
        if dtype.is_complex and argument == "A" and ("delta" in case.arguments or "xz" in case.arguments):
            continue  # a complex system
        with pytest.raises(TypeError, match=rf"^{argument}: expected (real|integers).*, got {dtype}"):
            case(**{argument: good.to(dtype)})


def required_tensors() -> Iterator[Any]:
    for name, case in CASES.items():
        for argument, parameter in inspect.signature(case.function).parameters.items():
            if parameter.annotation is Tensor:
                yield pytest.param(case, argument, id=f"{name}: {argument}")


@pytest.mark.parametrize(("case", "argument"), list(required_tensors()))
@pytest.mark.parametrize("value", [None, 1.0])
def test_names_a_required_tensor_that_is_missing(case: Case, argument: str, value: float | None) -> None:
    with pytest.raises(TypeError, match=rf"^{argument}: expected a tensor, got {type(value).__name__}"):
        case(**{argument: value})
