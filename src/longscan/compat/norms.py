"""mamba_ssm.ops.triton.layer_norm: norms with an added residual, and RMSNorm. They sum in float32."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan import ops
from longscan.compat.checks import NUMBER, expect, requires_tensors

__all__ = [
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "normalize",
    "rms_norm_fn",
    "rms_norm_ref",
]

Result = Tensor | tuple[Tensor | None, ...]


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, is_rms_norm: bool = False
) -> Tensor:
    """Return the layer norm or RMS norm over the last axis, in float32 (float64 for float64 x).

    Args:
        x: (..., d_model).
        weight: (d_model,).
        bias: (d_model,).
        eps: added to the variance or the mean square.
        is_rms_norm: which of the two.
    """
    x = wide(x)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not is_rms_norm:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    y = ops.rms_norm(x, weight, eps)
    return y if bias is None else y + bias


@requires_tensors
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Result:
    """Return the norm of dropout(x) + residual.

    Args:
        x: (..., d_model).
        weight: (d_model,).
        bias: (d_model,).
        residual: (..., d_model), added before the norm.
        x1: (..., d_model), dropped out likewise and added.
        weight1: (d_model,) of a second norm of the same sum.
        bias1: (d_model,) of the second norm.
        eps: of the norms.
        dropout_p: the probability that an entry of x or x1 is zero.
        rowscale: (...), a factor of x; not together with x1.
        prenorm: whether to return the sum too, the residual of the next layer.
        residual_in_fp32: whether this sum is float32 where no residual is given; else it has x's dtype. With
            a residual it has the residual's.
        is_rms_norm: whether the norms are RMS norms.
        return_dropout_mask: whether to return what was not dropped out, of x and of x1.

    Returns:
        The norm, in x's dtype, then those of the second norm, the sum and the two masks that were requested.
    """
    weights = {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}
    _check(x, weights, residual, x1, rowscale)
    if x1 is not None and rowscale is not None:
        raise NotImplementedError("rowscale: not together with x1")
    total, masks = wide(x), [None, None]
    total = total if rowscale is None else total * rowscale[..., None]
    total, masks[0] = _dropout(total, dropout_p)
    if x1 is not None:
        added, masks[1] = _dropout(wide(x1), dropout_p)
        total = total + added
    dtype = torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype
    if residual is not None:
        dtype, total = residual.dtype, total + wide(residual)
    results: list[Tensor | None] = [normalize(total, weight, bias, eps, is_rms_norm=is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        results.append(normalize(total, weight1, bias1, eps, is_rms_norm=is_rms_norm).to(x.dtype))
    if prenorm:
        results.append(total.to(dtype))
    if return_dropout_mask:
        results += masks
    first = results[0]
    assert first is not None
    return first if len(results) == 1 else tuple(results)


def _check(
    x: Tensor,
    weights: dict[str, Tensor | None],
    residual: Tensor | None,
    x1: Tensor | None = None,
    rowscale: Tensor | None = None,
) -> None:
    """Check x, the weights and biases by name, and what has x's shape."""
    expect({}, x=(x, x.shape))
    if x.dim() == 0:
        raise ValueError("x: expected shape (..., d_model), got ()")
    expect({}, **{name: (weight, x.shape[-1:]) for name, weight in weights.items()})
    expect({}, residual=(residual, x.shape), x1=(x1, x.shape), rowscale=(rowscale, x.shape[:-1]))


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Any]:
    """Return x after dropout, and the mask of what is left, None without dropout."""
    if p == 0:
        return x, None
    mask = torch.rand_like(x) >= p
    return x * mask / (1 - p), mask


@requires_tensors
def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Result:
    """Return the result of `layer_norm_fn` with RMS norms."""
    return layer_norm_fn(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm),
        *(residual_in_fp32, True, return_dropout_mask),
    )


@requires_tensors
def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Result:
    """Return the result of `layer_norm_fn`, with given dropout masks; the sum is float32 if upcast."""
    return _reference(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm),
        *(dropout_mask, dropout_mask1, upcast, False),
    )


@requires_tensors
def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Result:
    """Return the result of `layer_norm_ref` with RMS norms."""
    return _reference(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm),
        *(dropout_mask, dropout_mask1, upcast, True),
    )


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x1: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    eps: float,
    dropout_p: float,
    rowscale: Tensor | None,
    prenorm: bool,
    dropout_mask: Tensor | None,
    dropout_mask1: Tensor | None,
    upcast: bool,
    is_rms_norm: bool,
) -> Result:
    """Apply the masks, then `layer_norm_fn` without the dropout that they stand for."""
    weights = {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}
    _check(x, weights, residual, x1, rowscale)
    expect({}, NUMBER, dropout_mask=(dropout_mask, x.shape), dropout_mask1=(dropout_mask1, x.shape))
    dtype, scale = x.dtype, 1 / (1 - dropout_p)
    if upcast:
        x = wide(x)
    if rowscale is not None:
        x, rowscale = x * rowscale[..., None], None
    if dropout_mask is not None:
        x, x1 = (
            x * dropout_mask * scale,
            x1 if x1 is None or dropout_mask1 is None else x1 * dropout_mask1 * scale,
        )
        dropout_p = 0.0
    residual = None if residual is None else residual.to(x.dtype)
    result = layer_norm_fn(
        *(
            x,
            weight,
            bias,
            residual,
            x1,
            weight1,
            bias1,
            eps,
            dropout_p,
            rowscale,
            prenorm,
            False,
            is_rms_norm,
        )
    )
    if isinstance(result, Tensor):
        return result.to(dtype)
    n_norms = 1 if weight1 is None else 2
    return tuple(t if t is None or i >= n_norms else t.to(dtype) for i, t in enumerate(result))


@requires_tensors
def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Result:
    """Return a linear map of the norm of x + residual (..., d_out), and with prenorm the sum."""
    _check(x, {"norm_weight": norm_weight, "norm_bias": norm_bias}, residual)
    expect({}, linear_weight=(linear_weight, ("d_out", x.shape[-1])))  # type: ignore[arg-type]
    expect({}, linear_bias=(linear_bias, linear_weight.shape[:1]))
    y, total = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    assert isinstance(y, Tensor)
    y = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (y, total) if prenorm else y


class RMSNorm(nn.Module):
    """An RMS norm with an optional residual.

    Args:
        hidden_size: d_model.
        eps: added to the mean square.
        dropout_p: of the input, in training.
        device: of the weight.
        dtype: of the weight.
    """

    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.p = eps, dropout_p
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Result:
        """Return the norm of x + residual (..., d_model), and with prenorm the sum."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=self.p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
