"""mamba_ssm.modules.mamba_simple.Mamba, with the arguments of its bidirectional forks.

bimamba_type="v1" scans backwards with an A of its own, "v2" with a convolution and projections of its own
too, and "v3" adds a third scan, over nslices interleaved slices. bimamba=True is "v2". Parameters have the
official names.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.compat.conv import causal_conv1d_update, convolve
from longscan.compat.inner import bimamba_inner_fn, mamba_inner_fn_no_out_proj
from longscan.compat.norms import wide
from longscan.compat.selective_scan import scan
from longscan.compat.state_update import selective_state_update

__all__ = ["Mamba", "init_dt_bias"]

TYPES = ("none", "v1", "v2", "v3")


class Mamba(nn.Module):
    """The Mamba block: (batch, seq_len, d_model) to the same.

    Args:
        d_model: width.
        d_state: entries of the state per channel.
        d_conv: taps of the convolution.
        expand: d_inner / d_model.
        dt_rank: width of dt before its projection; "auto" is d_model / 16, rounded up.
        dt_min: smallest initial step size.
        dt_max: largest.
        dt_init: of the projection of dt: "random" or "constant".
        dt_scale: of this initialisation.
        dt_init_floor: below which no initial step size is.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections have biases.
        use_fast_path: without effect: there is one path.
        layer_idx: the key of this layer's states.
        device: of the parameters.
        dtype: of the parameters; A_log and D are float32.
        bimamba_type: see above; likewise bimamba.
        if_divide_out: whether "v2" halves the sum of both directions.
        init_layer_scale: the initial factor of each output channel, gamma; no such parameter if None.
        bimamba: see above.
        if_devide_out: another spelling of if_divide_out.
        nslices: of "v3"; seq_len must be a multiple.
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str | None = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        bimamba: bool = False,
        if_devide_out: bool = False,
        nslices: int = 5,
    ) -> None:
        super().__init__()
        self.bimamba_type = "v2" if bimamba and bimamba_type in (None, "none") else bimamba_type or "none"
        if self.bimamba_type not in TYPES:
            raise NotImplementedError(
                f"bimamba_type: expected one of {', '.join(TYPES)}, got {bimamba_type!r}"
            )
        if dt_init not in ("random", "constant"):
            raise NotImplementedError(f"dt_init: expected 'random' or 'constant', got {dt_init!r}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = dt_rank if isinstance(dt_rank, int) else math.ceil(d_model / 16)
        self.use_fast_path, self.layer_idx, self.nslices = use_fast_path, layer_idx, nslices
        self.bimamba, self.if_divide_out = self.bimamba_type != "none", if_divide_out or if_devide_out
        self.if_devide_out, self.init_layer_scale = self.if_divide_out, init_layer_scale
        self.activation, self.act = "silu", nn.SiLU()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, device=device))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        own = {"none": ("",), "v1": ("",), "v2": ("", "_b"), "v3": ("", "_b", "_s")}[self.bimamba_type]
        for suffix in own:
            self._add_direction(suffix, conv_bias, factory)
        if self.bimamba_type == "v1":
            self.A_b_log = self._decay(device)
        init_dt_bias(self.dt_proj.bias, dt_min, dt_max, dt_init_floor)
        bound = self.dt_rank**-0.5 * dt_scale
        with torch.no_grad():
            if dt_init == "constant":
                self.dt_proj.weight.fill_(bound)
            else:
                self.dt_proj.weight.uniform_(-bound, bound)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _add_direction(self, suffix: str, conv_bias: bool, factory: dict[str, Any]) -> None:
        """Add the parameters of a scan: convolution, projections, A and D."""
        d_inner, taps = self.d_inner, self.d_conv
        modules = {
            "conv1d": nn.Conv1d(
                d_inner, d_inner, taps, groups=d_inner, padding=taps - 1, bias=conv_bias, **factory
            ),
            "x_proj": nn.Linear(d_inner, self.dt_rank + 2 * self.d_state, bias=False, **factory),
            "dt_proj": nn.Linear(self.dt_rank, d_inner, **factory),
        }
        for name, module in modules.items():
            setattr(self, name + suffix, module)
        D = nn.Parameter(torch.ones(d_inner, device=factory["device"], dtype=torch.float32))
        D._no_weight_decay = True  # type: ignore[attr-defined]
        setattr(self, f"A{suffix}_log", self._decay(factory["device"]))
        setattr(self, f"D{suffix}", D)

    def _decay(self, device: Any) -> nn.Parameter:
        """Return log(1 ... d_state) for each channel: S4D-real."""
        n = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device)
        A_log = nn.Parameter(n.log().repeat(self.d_inner, 1))
        A_log._no_weight_decay = True  # type: ignore[attr-defined]
        return A_log

    def forward(self, hidden_states: Tensor, inference_params: Any = None, T: int = 1) -> Tensor:
        """Return the block's outputs.

        Args:
            hidden_states: (batch, seq_len, d_model).
            inference_params: of `InferenceParams`: fills the states, or from seqlen_offset > 0 on continues.
            T: frames of a video; without effect.
        """
        if inference_params is not None:
            out = self._cached(hidden_states, inference_params)
        else:
            xz = self.in_proj(hidden_states).transpose(1, 2)
            if self.bimamba_type == "v1":
                out = bimamba_inner_fn(
                    *(xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight),
                    out_proj_weight=self.out_proj.weight,
                    out_proj_bias=self.out_proj.bias,
                    A=-wide(self.A_log).exp(),
                    A_b=-wide(self.A_b_log).exp(),
                    D=wide(self.D),
                    delta_bias=wide(self.dt_proj.bias),
                )
            else:
                out = self.out_proj(self._directions(xz).transpose(1, 2))
        return out if self.init_layer_scale is None else out * self.gamma

    def _directions(self, xz: Tensor) -> Tensor:
        """Return the sum of the scans, (batch, d_inner, seq_len)."""
        y = self._direction(xz, "")
        if self.bimamba_type in ("v2", "v3"):
            y = y + self._direction(xz.flip(-1), "_b").flip(-1)
        if self.bimamba_type == "v3":
            n, seq_len = self.nslices, xz.shape[-1]
            if seq_len % n:
                raise ValueError(f"hidden_states: expected a multiple of nslices={n} tokens, got {seq_len}")
            interleaved = torch.unflatten(xz, -1, (n, -1)).transpose(-1, -2).flatten(-2)
            y = y + torch.unflatten(self._direction(interleaved, "_s"), -1, (-1, n)).transpose(
                -1, -2
            ).flatten(-2)
        return y / 2 if self.if_divide_out and self.bimamba_type == "v2" else y

    def _direction(self, xz: Tensor, suffix: str) -> Tensor:
        conv, x_proj, dt_proj = (getattr(self, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        A, D = -wide(getattr(self, f"A{suffix}_log")).exp(), wide(getattr(self, f"D{suffix}"))
        return mamba_inner_fn_no_out_proj(
            *(xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, A, None, None, D),
            delta_bias=wide(dt_proj.bias),
        )

    def _cached(self, hidden_states: Tensor, inference_params: Any) -> Tensor:
        """Return the outputs, with the states in inference_params updated."""
        if self.bimamba_type != "none":
            raise NotImplementedError(
                f"inference_params: a bidirectional Mamba ({self.bimamba_type}) can't decode step by step"
            )
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        conv_state.copy_(F.pad(x, (self.d_conv - x.shape[-1], 0)))
        x, _ = convolve(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, None, None, True)
        dt, B, C = self._selected(x.transpose(1, 2))
        A, bias = -wide(self.A_log).exp(), wide(self.dt_proj.bias)
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        y, state = scan(x, dt.transpose(1, 2), A, B, C, wide(self.D), z, bias, True)
        ssm_state.copy_(state)
        out: Tensor = self.out_proj(y.transpose(1, 2))
        return out

    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dt (without its bias), B and C of x (..., d_inner)."""
        dt, B, C = torch.split(self.x_proj(x), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(dt, self.dt_proj.weight), B, C

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of one more token, and the states, which are updated in place.

        Args:
            hidden_states: (batch, 1, d_model).
            conv_state: (batch, d_inner, d_conv).
            ssm_state: (batch, d_inner, d_state).
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states: expected one token per step, got {hidden_states.shape[1]}")
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        dt, B, C = self._selected(x)
        y = selective_state_update(
            *(ssm_state, x, dt, -wide(self.A_log).exp(), B, C, self.D, z, self.dt_proj.bias, True)
        )
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return states of zeros, of the shapes in `step`; max_seqlen is without effect."""
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        return conv, self.dt_proj.weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return this layer's states, of zeros the first time."""
        if self.layer_idx is None:
            raise ValueError("inference_params: expected a Mamba with a layer_idx, the key of its states")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        states: tuple[Tensor, Tensor] = cache[self.layer_idx]
        if initialize_states:
            for state in states:
                state.zero_()
        return states


@torch.no_grad()
def init_dt_bias(bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """Set a bias to the inverse of softplus at step sizes drawn log-uniformly from [dt_min, dt_max]."""
    dt = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max))
    dt = dt.exp().clamp(min=floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    bias._no_reinit = True  # type: ignore[attr-defined]
