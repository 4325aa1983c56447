"""mamba_ssm.modules.mamba2.Mamba2, with the official parameter names."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.compat.conv import causal_conv1d_update, causal_conv1d_varlen_states
from longscan.compat.gated_norms import RMSNorm
from longscan.compat.mamba import init_dt_bias
from longscan.compat.norms import wide
from longscan.compat.split_conv import mamba_split_conv1d_scan_combined
from longscan.compat.ssd import NO_LIMIT, Limits
from longscan.compat.state_update import selective_state_update

__all__ = ["Mamba2"]


class Mamba2(nn.Module):
    """The Mamba-2 block: (batch, seq_len, d_model) to the same.

    Args:
        d_model: width.
        d_state: entries of the state per channel.
        d_conv: taps of the convolution.
        conv_init: bound of the uniform initialisation of the convolution; torch's if None.
        expand: d_inner / d_model.
        headdim: channels of a head.
        d_ssm: channels that pass through the recurrence, d_inner if None; the rest are a gated MLP.
        ngroups: groups of heads, each with its B and C.
        A_init_range: range of the initial -A.
        D_has_hdim: whether D has an entry for each channel instead of one for each head.
        rmsnorm: whether the output passes through a gated RMS norm.
        norm_before_gate: whether the norm comes before the gate.
        dt_min: smallest initial step size.
        dt_max: largest.
        dt_init_floor: below which no initial step size is.
        dt_limit: the range that step sizes are clamped to.
        bias: whether the projections have biases.
        conv_bias: whether the convolution has a bias.
        chunk_size: of their kernel; without effect on the result.
        use_mem_eff_path: without effect: there is one path.
        layer_idx: the key of this layer's states.
        process_group: tensor parallelism, which is not covered: None.
        sequence_parallel: without effect.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Limits = NO_LIMIT,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise NotImplementedError("process_group: longscan.compat has no tensor parallelism; pass None")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.conv_init, self.process_group, self.sequence_parallel = conv_init, None, sequence_parallel
        self.world_size, self.local_rank, self.headdim, self.ngroups = 1, 0, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim:
            raise ValueError(f"headdim: expected a divisor of d_ssm={self.d_ssm}, got {headdim}")
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.activation, self.chunk_size = dt_limit, "silu", chunk_size
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx
        self.d_mlp, self.conv_dim = self.d_inner - self.d_ssm, self.d_ssm + 2 * ngroups * d_state

        width = 2 * self.d_mlp + self.d_ssm + self.conv_dim + self.nheads  # MLP, gate, [x; B; C], dt
        self.in_proj = nn.Linear(d_model, width, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            *(self.conv_dim, self.conv_dim, d_conv),
            groups=self.conv_dim,
            padding=d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.act = nn.SiLU()
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **factory))
        init_dt_bias(self.dt_bias, dt_min, dt_max, dt_init_floor)
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(dtype=dtype))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if rmsnorm:
            group_size = self.d_ssm // ngroups
            self.norm = RMSNorm(self.d_ssm, 1e-5, group_size, norm_before_gate, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Return the block's outputs, of u's shape.

        Args:
            u: (batch, seq_len, d_model), or with seqlen (batch seq_len, d_model).
            seqlen: seq_len of a flat u.
            seq_idx: (batch, seq_len) for packed rows.
            cu_seqlens: (n_sequences + 1,) boundaries in a batch of one packed row; every sequence is cached.
            inference_params: of `InferenceParams`: fills the states, or from seqlen_offset > 0 on continues.
        """
        x = u if seqlen is None else torch.unflatten(u, 0, (-1, seqlen))
        states = None
        if inference_params is not None:
            batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            states = self._get_states_from_cache(inference_params, batch)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *states)[0]
        projected = self.in_proj(x)
        if states is not None and cu_seqlens is not None:
            return self._prefill_varlen(projected, cu_seqlens, seq_idx, states)
        y, state = self._mix(projected, seq_idx)
        if states is not None:
            self._remember(projected, states[0])
            states[1].copy_(state)
        return y if seqlen is None else y.flatten(0, 1)

    def _mix(self, projected: Tensor, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs and the final state of the recurrence."""
        norm = self.norm if self.rmsnorm else None
        y, state = mamba_split_conv1d_scan_combined(
            *(projected, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias),
            *(-wide(self.A_log).exp(), self._skip(), self.chunk_size),
            seq_idx=seq_idx,
            dt_limit=self.dt_limit,
            return_final_states=True,
            rmsnorm_weight=None if norm is None else norm.weight,
            rmsnorm_eps=1e-6 if norm is None else norm.eps,
            headdim=self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        return self.out_proj(y), state

    def _skip(self) -> Tensor:
        """Return D as (n_heads,) or (n_heads, d_head)."""
        return torch.unflatten(self.D, 0, (-1, self.headdim)) if self.D_has_hdim else self.D

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the MLP's two halves, the gate, [x; B; C] and dt."""
        widths = [2 * self.d_mlp, self.d_ssm, self.conv_dim, self.nheads]
        mlp, z, conv_in, dt = torch.split(projected, widths, dim=-1)
        return mlp, z, conv_in, dt

    def _remember(self, projected: Tensor, conv_state: Tensor) -> None:
        conv_in = self._split(projected)[2].transpose(1, 2)
        conv_state.copy_(F.pad(conv_in, (self.d_conv - conv_in.shape[-1], 0)))

    def _prefill_varlen(
        self, projected: Tensor, cu_seqlens: Tensor, seq_idx: Tensor | None, states: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the outputs of a packed row, with the states of its sequences."""
        if projected.shape[0] != 1:
            raise ValueError(f"cu_seqlens: expected a batch of one packed row, got {projected.shape[0]}")
        conv_state, ssm_state = states
        conv_in = self._split(projected)[2]
        conv_state.copy_(causal_conv1d_varlen_states(conv_in.squeeze(0), cu_seqlens, conv_state.shape[-1]))
        bounds = cu_seqlens.tolist()
        parts = [self._mix(projected[:, a:b]) for a, b in itertools.pairwise(bounds)]
        ssm_state.copy_(torch.cat([state for _, state in parts]))
        return torch.cat([y for y, _ in parts], 1)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of one more token, and the states, which are updated in place.

        Args:
            hidden_states: (batch, 1, d_model).
            conv_state: (batch, d_ssm + 2 ngroups d_state, d_conv).
            ssm_state: (batch, nheads, headdim, d_state).
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states: expected one token per step, got {hidden_states.shape[1]}")
        mlp, z, conv_in, dt = self._split(self.in_proj(hidden_states.squeeze(1)))
        conv_in = causal_conv1d_update(
            conv_in, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu"
        )
        d_bc, heads = self.ngroups * self.d_state, (self.nheads, self.headdim)
        x, B, C = torch.split(conv_in, [self.d_ssm, d_bc, d_bc], dim=-1)
        dt = F.softplus(wide(dt) + wide(self.dt_bias)).clamp(*self.dt_limit)
        A, D = -wide(self.A_log).exp(), self._skip()
        y = selective_state_update(
            ssm_state,
            torch.unflatten(x, -1, heads),
            dt[..., None].expand(-1, -1, self.headdim),
            A[:, None, None].expand(*heads, self.d_state),
            torch.unflatten(B, -1, (self.ngroups, -1)),
            torch.unflatten(C, -1, (self.ngroups, -1)),
            D if self.D_has_hdim else D[:, None].expand(heads),
            None if self.rmsnorm else torch.unflatten(z, -1, heads),
        ).flatten(1)
        y = self.norm(y, z) if self.rmsnorm else y
        if self.d_mlp > 0:
            gate, value = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(gate) * value, y], -1)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return states of zeros, of the shapes in `step`; max_seqlen is without effect."""
        conv = self.conv1d.weight.new_zeros(batch_size, self.d_conv, self.conv_dim, dtype=dtype)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        return conv.transpose(1, 2), self.in_proj.weight.new_zeros(shape, dtype=dtype)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return this layer's states, of zeros the first time."""
        if self.layer_idx is None:
            raise ValueError("inference_params: expected a Mamba2 with a layer_idx, the key of its states")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        states: tuple[Tensor, Tensor] = cache[self.layer_idx]
        if initialize_states:
            for state in states:
                state.zero_()
        return states
