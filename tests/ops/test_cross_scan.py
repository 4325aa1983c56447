"""The directions of a scan, and the ops: against their references, their adjoints and a closed form."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

from longscan import ops
from op_inputs import generator, real

MODES = get_args(ops.ScanMode)
SHAPES = [(1, 1), (1, 5), (7, 1), (3, 5), (8, 8), (2, 3, 4), (3, 1, 2)]


def case(mode: ops.ScanMode, shape: tuple[int, ...], channels: int = 3) -> tuple[ops.ScanPattern, Tensor]:
    return ops.scan_pattern(shape, mode, window=2), real(generator(*shape), 2, *shape, channels)


# the directions


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_direction_visits_every_position_once(mode: ops.ScanMode, shape: tuple[int, ...]) -> None:
    pattern, _ = case(mode, shape)
    steps = torch.arange(pattern.order.shape[1]).expand_as(pattern.order)
    assert torch.equal(pattern.order.sort(1).values, steps)
    assert torch.equal(pattern.order.gather(1, pattern.inverse), steps)


def test_the_cross_is_rows_columns_and_both_reversed() -> None:
    assert ops.scan_pattern((2, 3)).order.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


def test_a_cascade_is_lines_of_their_own() -> None:
    pattern = ops.scan_pattern((2, 3), "cascade")
    assert pattern.order[1].tolist() == [5, 4, 3, 2, 1, 0]
    assert pattern.order[2].tolist() == [0, 3, 1, 4, 2, 5]
    assert pattern.seq_idx is not None
    assert pattern.seq_idx.tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[0, 0, 1, 1, 2, 2]] * 2


@pytest.mark.parametrize("shape", [(4, 7), (3, 4, 5), (2, 2, 2, 3)], ids=str)
def test_a_zigzag_never_jumps(shape: tuple[int, ...]) -> None:
    grid = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1).flatten(0, -2)
    pattern = ops.scan_pattern(shape, "zigzag")
    assert len({tuple(order.tolist()) for order in pattern.order}) == 2 * len(shape)
    for order in pattern.order:
        assert torch.equal(grid[order].diff(dim=0).abs().sum(1), torch.ones(len(order) - 1, dtype=torch.long))


def test_windows_are_finished_one_after_the_other() -> None:
    order = ops.scan_pattern((3, 5), "window", window=2).order
    assert order[0].tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert order[1].tolist() == [0, 5, 1, 6, 10, 11, 2, 7, 3, 8, 12, 13, 4, 9, 14]
    whole, lines = ops.scan_pattern((3, 5), "window", window=9), ops.scan_pattern((3, 5))
    assert torch.equal(whole.order, lines.order)


def test_a_video_is_scanned_by_frames_or_by_pixels() -> None:
    positions = torch.arange(24).view(2, 3, 4)
    spatial, temporal = (ops.scan_pattern((2, 3, 4), f"{mode}_first") for mode in ("spatial", "temporal"))
    assert torch.equal(spatial.order, torch.stack([positions.flatten(), positions.flatten().flip(0)]))
    assert torch.equal(temporal.order[0], positions.permute(1, 2, 0).flatten())
    both = ops.scan_pattern((2, 3, 4), "spatiotemporal").order
    assert torch.equal(both[[0, 2, 1, 3]], torch.cat([spatial.order, temporal.order]))


def test_directions_may_be_repeated() -> None:
    once, twice = (ops.scan_pattern((2, 3), "bidirectional", repeat=n) for n in (1, 2))
    assert torch.equal(twice.order, once.order[[0, 0, 1, 1]])


# the ops


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_ops_are_their_references(mode: ops.ScanMode, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pattern, x = case(mode, shape)
    x = x.to(dtype)
    xs = ops.cross_scan(x, pattern)
    assert torch.equal(xs, ops.cross_scan_ref(x, pattern))
    tolerance = {torch.bfloat16: 4e-2, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    y, expected = ops.cross_merge(xs, pattern), ops.cross_merge_ref(xs.double(), pattern)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_merging_a_scan_multiplies_by_the_directions(mode: ops.ScanMode) -> None:
    pattern, x = case(mode, (3, 5))
    torch.testing.assert_close(ops.cross_merge(ops.cross_scan(x, pattern), pattern), len(pattern.order) * x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_merge_is_the_adjoint_of_the_scan(mode: ops.ScanMode, shape: tuple[int, ...]) -> None:
    pattern, x = case(mode, shape)
    y = real(generator(1), *ops.cross_scan(x, pattern).shape)
    forth, back = (ops.cross_scan(x, pattern) * y).sum(), (x * ops.cross_merge(y, pattern)).sum()
    torch.testing.assert_close(forth, back)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_any_order(mode: ops.ScanMode, shape: tuple[int, ...]) -> None:
    pattern, x = case(mode, shape, 1)
    weights = real(generator(2), 1)

    def round_trip(x: Tensor) -> Tensor:
        return ops.cross_merge(ops.cross_scan(x, pattern) * ops.cross_scan(x * weights, pattern), pattern)

    x.requires_grad_()
    assert torch.autograd.gradcheck(round_trip, (x,))
    assert torch.autograd.gradgradcheck(round_trip, (x,))


def test_the_ops_pass_opcheck() -> None:
    pattern, x = case("cross", (3, 5))
    tensors = pattern.order, pattern.inverse
    namespace = torch.ops.longscan
    torch.library.opcheck(namespace.cross_scan, (x.flatten(1, 2).requires_grad_(), *tensors))
    torch.library.opcheck(namespace.cross_merge, (ops.cross_scan(x, pattern).requires_grad_(), *tensors))


def test_strides_do_not_matter() -> None:
    pattern, x = case("cross", (3, 5), 4)
    turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(ops.cross_scan(turned, pattern), ops.cross_scan(x, pattern))
    y = ops.cross_scan(x, pattern)
    apart = torch.cat([y, y], -1)[..., ::2]
    torch.testing.assert_close(ops.cross_merge(apart, pattern), ops.cross_merge(apart.contiguous(), pattern))


def test_a_constant_system_scanned_in_all_lines_is_a_separable_sum() -> None:
    """With constant A, B, C the cascade's rows and columns are sums over lines, in closed form."""
    height, width, channels, n = 4, 7, 3, 2
    g = generator(height, width)
    x = real(g, 1, height, width, channels)
    A, B, C = -real(g, channels, n).abs() - 0.1, real(g, channels, n), real(g, channels, n)
    dt = torch.ones_like(x).flatten(1, 2)
    pattern = ops.scan_pattern((height, width), "cascade")
    assert pattern.seq_idx is not None
    xs = ops.cross_scan(x, pattern)
    ys = [ops.selective_scan(xs[:, :, k], dt, A, B, C, seq_idx=pattern.seq_idx[k, None])[0] for k in range(4)]
    y = ops.cross_merge(torch.stack(ys, 2), pattern)

    def kernel(size: int) -> Tensor:  # K[i, j] = C exp(|i - j| A) B, twice on the diagonal: both directions
        distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()[..., None, None]
        K = (C * torch.exp(distance * A) * B).sum(-1)  # (size, size, channels)
        return K + torch.diag_embed(K.diagonal()).permute(1, 2, 0)

    expected = torch.einsum("ijd,bhjd->bhid", kernel(width), x) + torch.einsum(
        "ijd,bjwd->biwd", kernel(height), x
    )
    torch.testing.assert_close(y, expected)


def test_what_does_not_fit_is_refused() -> None:
    pattern, x = case("cross", (3, 5))
    with pytest.raises(ValueError, match="expected"):
        ops.cross_scan(x.transpose(1, 2), pattern)
    with pytest.raises(ValueError, match="expected"):
        ops.cross_merge(ops.cross_scan(x, pattern)[:, 1:], pattern)
    with pytest.raises(ValueError, match="positive"):
        ops.scan_pattern((3, 0))
    with pytest.raises(ValueError, match="mode"):
        ops.scan_pattern((3, 5), "diagonal")  # type: ignore[arg-type]


def test_a_pattern_is_the_callers_own() -> None:
    expected = ops.scan_pattern((3, 4)).order.clone()
    ops.scan_pattern((3, 4)).order.zero_()
    assert torch.equal(ops.scan_pattern((3, 4)).order, expected)


def test_a_pattern_made_in_inference_mode_serves_gradients() -> None:
    x = torch.randn(1, 5, 9, 2, requires_grad=True)
    with torch.inference_mode():
        ops.cross_scan(x, ops.scan_pattern((5, 9)))
    ops.cross_scan(x, ops.scan_pattern((5, 9))).sum().backward()
    assert x.grad is not None


def test_a_pattern_made_in_a_trace_is_forgotten() -> None:
    with FakeTensorMode():
        assert is_fake(ops.scan_pattern((4, 11)).order)
    assert not is_fake(ops.scan_pattern((4, 11)).order)


@pytest.mark.parametrize("bad", [(2.0, 3), (0, 3), ()])
def test_sizes_are_positive_whole_numbers(bad: Any) -> None:
    with pytest.raises(ValueError, match="expected positive whole numbers"):
        ops.scan_pattern(bad)
