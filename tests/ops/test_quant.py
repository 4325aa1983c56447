"""Stored weights: rounding, packing, and the products with them, on every instruction set."""

import pytest
import torch

from longscan import ops
from longscan.ops import _native
from longscan.ops.quant import FEW_ROWS, Kind

KINDS: tuple[Kind, ...] = ("bf16", "int8", "int4")
# how far rounding may take a normal matrix, in its own root mean square
ERROR = {"bf16": 0.002, "int8": 0.01, "int4": 0.09}
# activations are rounded to 16 bits for integers, and not at all for bfloat16
TOLERANCE = {"bf16": 2e-6, "int8": 5e-5, "int4": 5e-5, "int8-blocks": 5e-5}


def matrix(n_out: int, n_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))


def stored(kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kind != "int8-blocks":
        return ops.quantize(weight, kind)  # type: ignore[arg-type]
    blocks = weight.reshape(len(weight), -1, 32)
    scale = (blocks.abs().amax(2) / 127).half()
    q = (blocks / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return q.flatten(1), scale


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_close(kind: Kind) -> None:
    weight = matrix(40, 96)
    q, scale = ops.quantize(weight, kind)
    error = (ops.dequantize_ref(q, scale) - weight).square().mean().sqrt()
    assert 0 < error < ERROR[kind]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantising_what_was_quantised_changes_nothing_in_zeros_and_extremes(kind: Kind) -> None:
    weight = torch.zeros(3, 64)
    weight[1, 5], weight[2, 40] = 3.0, -7.0
    restored = ops.dequantize_ref(*ops.quantize(weight, kind))
    torch.testing.assert_close(restored, weight, rtol=1e-3, atol=0)


def test_nibbles_survive_packing_in_the_documented_order() -> None:
    nibbles = torch.randint(0, 16, (5, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    q = ops.pack_int4(nibbles)
    assert q.shape == (5, 48)
    assert torch.equal(ops.unpack_int4(q), nibbles)
    words = q[0, 16:32].contiguous().view(torch.int16).int()  # the second block
    for k in range(4):
        assert torch.equal((words >> (4 * k)) & 15, nibbles[0, 32 + 8 * k : 40 + 8 * k].int())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        ops.quantize(torch.zeros(2, 40), "int4")
    with pytest.raises(ValueError, match="finite"):
        ops.quantize(torch.tensor([[float("nan")]]), "int8")
    with pytest.raises(ValueError, match="int4 expects numbers up to 524,032, got 6e\\+05"):
        ops.quantize(torch.full((1, 32), 6e5), "int4")  # a scale of infinity would make a block of zeros
    with pytest.raises(ValueError, match="n_out, n_in"):
        ops.quantize(torch.zeros(4), "bf16")


@pytest.mark.parametrize("kind", [*KINDS, "int8-blocks"])
def test_native_dequantisation_is_exact(isa: str, kind: str) -> None:
    q, scale = stored(kind, matrix(37, 96))
    assert torch.equal(ops.dequantize(q, scale), ops.dequantize_ref(q, scale))


@pytest.mark.parametrize("n_in", [1, 17, 32, 48, 96, 288, 544])
@pytest.mark.parametrize("kind", [*KINDS, "int8-blocks"])
def test_products_with_few_rows(isa: str, kind: str, n_in: int) -> None:
    if kind in ("int4", "int8-blocks") and n_in % 32:
        pytest.skip("blocks of 32")
    q, scale = stored(kind, matrix(35, n_in))
    x, bias = matrix(FEW_ROWS, n_in, seed=1), torch.linspace(-1, 1, 35)
    expected = x.double() @ ops.dequantize_ref(q, scale).double().T + bias.double()
    with torch.no_grad():
        y = ops.quant_linear(x, q, scale, bias)
        alone = torch.cat([ops.quant_linear(row[None], q, scale, bias) for row in x])
    assert torch.equal(y, alone), "a row depends on its neighbours"
    assert (y - expected).abs().max() <= TOLERANCE[kind] * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_stay_visible(isa: str, kind: Kind, bad: float) -> None:
    q, scale = ops.quantize(matrix(9, 512), kind)
    x = torch.ones(1, 512)
    x[0, 300] = bad
    with torch.no_grad():
        assert not ops.quant_linear(x, q, scale).isfinite().any()
        x[0, 300] = 1e30  # large, and a number
        assert ops.quant_linear(x, q, scale).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_and_gradients(kind: Kind) -> None:
    q, scale = ops.quantize(matrix(20, 64), kind)
    x = matrix(70, 64, seed=2).requires_grad_()
    weight = ops.dequantize_ref(q, scale)
    y = ops.quant_linear(x, q, scale)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_out", "n_in"), [(83, 1), (83, 30), (70, 64), (128, 256), (83, 288), (5, 544)])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("kind", ["int8", "int4", "int8-blocks"])
def test_integer_products_with_many_rows(isa: str, kind: str, bits: int, n_out: int, n_in: int) -> None:
    if kind != "int8" and n_in % 32:
        pytest.skip("blocks of 32")
    q, scale = stored(kind, matrix(n_out, n_in))
    x, bias = matrix(61, n_in, seed=1), torch.linspace(-1, 1, n_out)
    expected = ops.quant_linear_ref(x, q, scale, bias, bits)
    with torch.no_grad():
        y = _native.quant_gemm(x, q, scale, bias, 61, bits)
        parts = [
            _native.quant_gemm(part, q, scale, bias, len(part), bits) for part in x.split([1, 7, 40, 13])
        ]
    assert torch.equal(y, torch.cat(parts)), "a row depends on its neighbours"
    ties = 2.0**-bits if isa == "baseline" else 0.0  # it does not fuse, and rounds some to the other side
    assert (y - expected).abs().max() <= (2e-6 + ties) * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("bits", [16, 8])
def test_integers_are_multiplied_where_that_is_fast(isa: str, bits: int) -> None:
    q, scale = ops.quantize(matrix(40, 64), "int8")
    x = matrix(FEW_ROWS + 1, 64, seed=2)
    with torch.no_grad():
        y = ops.quant_linear(x, q, scale, None, bits)
    rounded = ops.quant_linear_ref(x, q, scale, None, bits)
    exact = x @ ops.dequantize_ref(q, scale).T
    near, far = (rounded, exact) if _native.multiplies_integers(bits) else (exact, rounded)
    assert (y - near).abs().max() < 1e-5 < (1 if bits == 16 else (y - far).abs().max())


def test_the_precision_of_activations_does_not_depend_on_the_rows(isa: str) -> None:
    if not _native.multiplies_integers(8):
        pytest.skip(f"{isa} multiplies no integers")
    q, scale = ops.quantize(matrix(40, 64), "int8")
    x = matrix(FEW_ROWS + 5, 64, seed=2)
    with torch.no_grad():
        alone = torch.cat([ops.quant_linear(row[None], q, scale, None, 8) for row in x])
        assert torch.equal(ops.quant_linear(x, q, scale, None, 8), alone)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_stays_visible_and_alone(isa: str, kind: Kind, bad: float) -> None:
    q, scale = ops.quantize(matrix(9, 512), kind)
    x = torch.ones(40, 512)
    x[17, 300] = bad
    for bits in (16, 8):
        with torch.no_grad():
            finite = ops.quant_linear(x, q, scale, None, bits).isfinite()
        assert not finite[17].any()
        assert finite[torch.arange(40) != 17].all()


def test_activations_have_8_or_16_bits() -> None:
    with pytest.raises(ValueError, match="expected 8 or 16, got 4"):
        ops.quant_linear(matrix(2, 32), *ops.quantize(matrix(3, 32), "int8"), None, 4)


def test_opcheck() -> None:
    for kind in KINDS:
        torch.library.opcheck(torch.ops.longscan.dequantize.default, ops.quantize(matrix(6, 32), kind))
