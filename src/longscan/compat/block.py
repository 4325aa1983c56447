"""Block, of mamba_ssm.modules.block and, in versions before 2, of modules.mamba_simple; GatedMLP."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.compat.norms import RMSNorm, layer_norm_fn

__all__ = ["Block", "BlockV1", "GatedMLP"]

Make = Callable[..., nn.Module]


class Block(nn.Module):
    """Add, norm, mixer, then add, norm, MLP if there is one; the sum is returned beside the output.

    Args:
        dim: d_model.
        mixer_cls: makes the mixer from d_model.
        mlp_cls: makes the MLP from d_model; none if it is torch.nn.Identity.
        norm_cls: makes a norm from d_model.
        fused_add_norm: whether sum and norm are computed together, in float32.
        residual_in_fp32: whether the sum is float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Make,
        mlp_cls: Make = nn.Identity,
        norm_cls: Make = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer, self.mlp = norm_cls(dim), mixer_cls(dim), None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise TypeError(
                f"fused_add_norm: expected a LayerNorm or an RMSNorm, got {type(self.norm).__name__}"
            )

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the sum before it.

        Args:
            hidden_states: (batch, seq_len, d_model).
            residual: the sum that the block before returned.
            inference_params: for the mixer.
            **mixer_kwargs: for the mixer.
        """
        settings = self.fused_add_norm, self.residual_in_fp32
        hidden_states, residual = add_norm(hidden_states, residual, self.norm, *settings)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_norm(hidden_states, residual, self.norm2, *settings)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Return the mixer's states of zeros."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]


def add_norm(
    x: Tensor, residual: Tensor | None, norm: Any, fused: bool, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """Return norm(x + residual) and x + residual; see `Block`."""
    if fused:
        y, total = layer_norm_fn(
            *(x, norm.weight, norm.bias, residual),
            eps=norm.eps,
            prenorm=True,
            residual_in_fp32=residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
        )
        return y, total  # type: ignore[return-value]
    total = x if residual is None else x + residual
    weight = getattr(norm, "weight", None)
    y = norm(total if weight is None else total.to(weight.dtype))
    return y, total.float() if residual_in_fp32 and total.dtype != torch.float64 else total


class BlockV1(Block):
    """A `Block` without MLP, with the order of arguments before version 2.

    Args:
        dim: see `Block`; likewise the others.
        mixer_cls: likewise.
        norm_cls: likewise.
        fused_add_norm: likewise.
        residual_in_fp32: likewise.
        mlp_cls: likewise.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Make,
        norm_cls: Make = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        mlp_cls: Make = nn.Identity,
    ) -> None:
        super().__init__(dim, mixer_cls, mlp_cls, norm_cls, fused_add_norm, residual_in_fp32)


class GatedMLP(nn.Module):
    """fc2(y activation(gate)), [y; gate] = fc1(x).

    Args:
        in_features: d_model.
        hidden_features: the inner width, 8/3 in_features if None, rounded up.
        out_features: in_features if None.
        activation: of the gate.
        bias: whether the projections have biases.
        multiple_of: of which the inner width is a multiple.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = int(8 * in_features / 3) if hidden_features is None else hidden_features
        width = -(-width // multiple_of) * multiple_of
        out = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(in_features, 2 * width, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(width, out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) of x (..., in_features)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(y * self.activation(gate))
        return out
