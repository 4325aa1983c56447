"""Rows of a larger state, boundaries of packed sequences, and shapes that depend on other arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.compat.conv import causal_conv1d_update, causal_conv1d_varlen_states
from longscan.compat.inner import mamba_inner_fn
from longscan.compat.selective_scan import selective_scan_fn
from longscan.compat.split_conv import mamba_split_conv1d_scan_combined
from longscan.compat.ssd import mamba_chunk_scan_combined
from longscan.compat.state_update import selective_state_update

N_ROWS, CHANNELS, WIDTH, D_STATE = 4, 6, 3, 5
Update = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def t(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv_update(state: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    return causal_conv1d_update(x, state, t(CHANNELS, WIDTH), t(CHANNELS), "silu", None, rows)


def ring_update(state: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    position = torch.full((x.shape[0],), 7, dtype=torch.int32)
    return causal_conv1d_update(x, state, t(CHANNELS, WIDTH), t(CHANNELS), None, position, rows)


def state_update(state: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    B = t(1, D_STATE, seed=1).repeat(x.shape[0], 1)
    A, D = -t(CHANNELS, D_STATE).abs(), t(CHANNELS)
    return selective_state_update(state, x, x.abs(), A, B, B, D, x, D, True, rows)


UPDATES = pytest.mark.parametrize("update", [conv_update, ring_update, state_update])


@UPDATES
@pytest.mark.parametrize("rows", [[-1, 0, 2], [3, -1, -7], [-1, -1, -1]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_negative_row_is_padding(update: Update, rows: list[int], dtype: torch.dtype) -> None:
    before, x = t(N_ROWS, CHANNELS, D_STATE, seed=2), t(3, CHANNELS, seed=3)
    state = before.clone()
    y = update(state, x, torch.tensor(rows, dtype=dtype))
    expected = before.clone()
    for index, row in enumerate(rows):
        if row < 0:
            assert torch.equal(y[index], torch.zeros(CHANNELS, dtype=torch.float64))
            continue
        own = before[row : row + 1].clone()
        torch.testing.assert_close(y[index : index + 1], update(own, x[index : index + 1], None))
        expected[row] = own[0]
    torch.testing.assert_close(state, expected)


@UPDATES
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, 0, 1], r"_indices: expected every row of the state once, got \[1, 0, 1\]"),
        ([1, 0, N_ROWS], "_indices: expected less than the state's 4 rows, got 4"),
        ([1, 0], r"_indices: expected shape \(batch=3,\), got \(2,\)"),
    ],
)
def test_refuses_other_rows(update: Update, rows: list[int], message: str) -> None:
    before = t(N_ROWS, CHANNELS, D_STATE, seed=2)
    state = before.clone()
    with pytest.raises(ValueError, match=message):
        update(state, t(3, CHANNELS), torch.tensor(rows))
    assert torch.equal(state, before)


@UPDATES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_refuses_rows_that_are_no_integers(update: Update, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="_indices: expected integers, got torch"):
        update(t(N_ROWS, CHANNELS, D_STATE), t(2, CHANNELS), torch.tensor([1, 0]).to(dtype))


def packed_conv(boundaries: Tensor) -> Tensor:
    return causal_conv1d_varlen_states(t(9, CHANNELS), boundaries, 4)


def packed_ssd(boundaries: Tensor) -> Any:
    B = t(1, 9, 1, D_STATE)
    return mamba_chunk_scan_combined(
        *(t(1, 9, 2, 3), t(1, 9, 2), -t(2).abs(), B, B, 4),
        cu_seqlens=boundaries,
        return_varlen_states=True,
    )


@pytest.mark.parametrize("function", [packed_conv, packed_ssd])
@pytest.mark.parametrize("values", [[0, 4], [0, 4, 10], [1, 9], [0, 5, 4, 9], [9], [0]])
def test_refuses_other_boundaries(function: Callable[[Tensor], Any], values: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens: expected boundaries that rise from 0 to 9, got"):
        function(torch.tensor(values))


@pytest.mark.parametrize("function", [packed_conv, packed_ssd])
def test_refuses_boundaries_of_other_kinds(function: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens: expected shape .*, got \(1, 3\)"):
        function(torch.tensor([[0, 4, 9]]))
    with pytest.raises(TypeError, match=r"cu_seqlens: expected integers, got torch\.float32"):
        function(torch.tensor([0.0, 4.0, 9.0]))


@pytest.mark.parametrize("function", [packed_conv, packed_ssd])
def test_a_packed_sequence_may_be_empty(function: Callable[[Tensor], Any]) -> None:
    def states(*boundaries: int) -> Tensor:
        result = function(torch.tensor(boundaries))
        return result if isinstance(result, Tensor) else result[1]

    expected = states(0, 4, 9)
    found = states(0, 4, 4, 9)
    torch.testing.assert_close(found[[0, 2]], expected)
    assert not found[1].any()


def test_c_with_as_many_entries_as_b() -> None:
    x, dt, A = t(2, 8, 4, 3), t(2, 8, 4), -t(4).abs()
    with pytest.raises(
        ValueError,
        match=r"C: expected shape \(batch=2, seq_len=8, n_groups=2, d_state=4\), got \(2, 8, 4, 2\)",
    ):
        mamba_chunk_scan_combined(x, dt, A, t(2, 8, 2, 4), t(2, 8, 4, 2), 4)


@pytest.mark.parametrize("name", ["B", "C"])
def test_groups_divide_the_channels(name: str) -> None:
    for A in (-t(CHANNELS, D_STATE).abs(), torch.complex(-t(CHANNELS, D_STATE).abs(), t(CHANNELS, D_STATE))):
        length = 9 * (2 if A.is_complex() else 1)
        matrices = dict.fromkeys(("B", "C"), t(2, 1, D_STATE, length)) | {name: t(2, 4, D_STATE, length)}
        with pytest.raises(ValueError, match=f"{name}: expected a number of groups that divides 6 channels"):
            selective_scan_fn(t(2, CHANNELS, 9), t(2, CHANNELS, 9), A, **matrices)


@pytest.mark.parametrize("given", [(), ("B",), ("C",), ("B", "C")])
def test_rows_of_the_projection(given: tuple[str, ...]) -> None:
    """Those of a B or C that is given may be there; one row more or fewer is refused."""
    rank, matrix = 3, t(2, D_STATE, 9, seed=4)

    def call(rows: int) -> Tensor:
        return mamba_inner_fn(
            *(t(2, 2 * CHANNELS, 9), t(CHANNELS, 1, WIDTH), None, t(rows, CHANNELS), t(CHANNELS, rank)),
            *(t(7, CHANNELS), None, -t(CHANNELS, D_STATE).abs()),
            **dict.fromkeys(given, matrix),
        )

    fewest, most = rank + (2 - len(given)) * D_STATE, rank + 2 * D_STATE
    for rows in {fewest, most}:
        assert call(rows).shape == (2, 9, 7)
    for rows in {fewest - 1, fewest + 1, most - 1, most + 1}:
        with pytest.raises(ValueError, match=rf"x_proj_weight: expected shape .*, got \({rows}, 6\)"):
            call(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zxbcdt": t(2, 9, 31)}, "zxbcdt: expected at least 30 channels, and an even number more, got 31"),
        ({"conv1d_weight": t(19, WIDTH)}, "conv1d_weight: expected 8 channels of x, .*, got 19"),
        ({"ngroups": 4}, "conv1d_weight: expected 8 channels of x, and 4 groups of B .*, got 18"),
        ({"outproj_bias": t(7)}, "outproj_bias: expected an outproj_weight too, got None"),
    ],
)
def test_channels_of_the_block(changes: dict[str, Any], message: str) -> None:
    fits: dict[str, Any] = {"zxbcdt": t(2, 9, 30), "conv1d_weight": t(18, WIDTH), "ngroups": 1, "headdim": 2}
    arguments = {"conv1d_bias": None, "dt_bias": t(4), "A": -t(4).abs(), "D": t(4), "chunk_size": 4}
    mamba_split_conv1d_scan_combined(**fits, **arguments)
    with pytest.raises(ValueError, match=message):
        mamba_split_conv1d_scan_combined(**(fits | changes), **arguments)
