"""The linear op against torch in float64, for every path a shape can take."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import ops
from longscan.ops import _native


@pytest.fixture(params=["default", "onednn", "no-library"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each way of multiplying, whatever this processor prefers."""
    if request.param == "no-library":
        monkeypatch.setattr(_native, "_library", None)
    elif request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(_native, "_PREFERS_ONEDNN", request.param == "onednn")
    return str(request.param)


@pytest.mark.parametrize(
    ("shape", "n_out"),
    [
        ((1, 5), 3),
        ((2, 3, 17), 70),
        ((8, 33), 35),
        ((3, 40, 20), 7),
        ((50, 8), 130),
        ((0, 6), 4),
        ((2, 0, 6), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_linear(path: str, shape: tuple[int, ...], n_out: int, biased: bool) -> None:
    g = torch.Generator().manual_seed(n_out)
    leaves: list[Tensor] = [torch.randn(shape, generator=g), torch.randn(n_out, shape[-1], generator=g)]
    leaves += [torch.randn(n_out, generator=g)] if biased else []
    dy = torch.randn(*shape[:-1], n_out, generator=g)
    ours, exact = (
        [leaf.to(dtype).requires_grad_() for leaf in leaves] for dtype in (torch.float32, torch.float64)
    )
    y, expected = ops.linear(*ours), F.linear(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-5)
    gradients = torch.autograd.grad(y, ours, dy)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
@pytest.mark.parametrize("rows", [3, 40])
def test_what_is_frozen_gets_no_gradient(path: str, rows: int, frozen: str) -> None:
    g = torch.Generator().manual_seed(rows)
    leaves = {"x": (rows, 20), "weight": (7, 20), "bias": (7,)}
    tensors = {name: torch.randn(shape, generator=g).requires_grad_() for name, shape in leaves.items()}
    dy = torch.randn(rows, 7, generator=g)
    ops.linear(*tensors.values()).backward(dy)
    whole = {name: tensor.grad for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    ops.linear(*(t.requires_grad_(name != frozen) for name, t in tensors.items())).backward(dy)
    for name, tensor in tensors.items():
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, whole[name], rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_keeps_no_input_and_can_be_differentiated_twice() -> None:
    x, weight = torch.randn(40, 20, dtype=torch.float64, requires_grad=True), torch.randn(7, 20).double()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.linear(x, weight)
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in saved)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.pow(2).sum(), x)
    again = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad((again @ weight.T).pow(3).sum(), again, create_graph=True)
    (second,) = torch.autograd.grad(expected.pow(2).sum(), again)
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(ddx, second)


def test_a_gradient_that_is_one_number_repeated(path: str) -> None:
    x, weight = torch.randn(40, 600, requires_grad=True), torch.randn(300, 600, requires_grad=True)
    ops.linear(x, weight).sum().backward()  # 40 rows: oneDNN would take seconds for its strides of zero
    for tensor, like in ((x, weight), (weight, x)):
        torch.testing.assert_close(tensor.grad, like.detach().sum(0).expand_as(tensor), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (40, 7, 9), (9, 7, 40), (0, 3, 4), (3, 0, 4)], ids=str)
def test_multiply_takes_any_strides(path: str, sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    g = torch.Generator().manual_seed(m)
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    for left in (a, a.T.contiguous().T):
        for right in (b, b.T.contiguous().T):
            torch.testing.assert_close(ops.multiply(left, right), a @ b, rtol=1e-5, atol=1e-5)


def test_other_types_go_to_torch() -> None:
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    assert torch.equal(ops.linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))


def test_opcheck() -> None:
    for rows in (2, 30):
        x, weight, bias = torch.randn(rows, 6), torch.randn(4, 6), torch.randn(4)
        arguments = tuple(t.requires_grad_() for t in (x, weight, bias))
        torch.library.opcheck(torch.ops.longscan.linear.default, arguments)
