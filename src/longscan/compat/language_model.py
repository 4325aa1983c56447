"""mamba_ssm.models: the language model of blocks, its configuration and initialisation."""

import copy
import dataclasses
import json
import math
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from longscan.compat.block import Block, GatedMLP, add_norm
from longscan.compat.generation import GenerationMixin
from longscan.compat.hf import load_config_hf, load_state_dict_hf
from longscan.compat.mamba import Mamba
from longscan.compat.mamba2 import Mamba2
from longscan.compat.norms import RMSNorm

__all__ = ["MambaConfig", "MambaLMHeadModel", "MixerModel", "_init_weights", "create_block"]

MIXERS: dict[str, type[nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2}
CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@dataclasses.dataclass
class MambaConfig:
    """The configuration of a `MambaLMHeadModel`.

    Attributes:
        d_model: width.
        d_intermediate: inner width of the MLP of each block; none if 0.
        n_layer: blocks.
        vocab_size: ids, before padding.
        ssm_cfg: arguments of the mixer, and "layer": "Mamba1" or "Mamba2".
        attn_layer_idx: blocks with attention, which is not covered: empty.
        attn_cfg: of these.
        rms_norm: whether norms are RMS norms.
        residual_in_fp32: whether the residual stream is float32.
        fused_add_norm: see `Block`.
        pad_vocab_size_multiple: to a multiple of which the vocabulary is padded.
        tie_embeddings: whether the head is the embedding.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    attn_layer_idx: list[int] = dataclasses.field(default_factory=list)
    attn_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """Return a block; arguments as the attributes of `MambaConfig`."""
    if layer_idx in (attn_layer_idx or []):
        raise NotImplementedError(
            "attn_layer_idx: longscan.compat covers blocks of Mamba1 and Mamba2, not attention (modules.mha)"
        )
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    options = copy.deepcopy(ssm_cfg or {})
    name = options.pop("layer", "Mamba1")
    if name not in MIXERS:
        raise NotImplementedError(
            f"ssm_cfg['layer']: longscan.compat covers {' and '.join(MIXERS)}, not {name!r}"
        )
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory)
    mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    block = Block(
        d_model,
        partial(MIXERS[name], layer_idx=layer_idx, **options, **factory),
        mlp if d_intermediate else nn.Identity,
        norm_cls=norm,
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


@torch.no_grad()
def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Initialise a module: zero biases, normal embeddings, output projections scaled for the residual stream.

    Args:
        module: for `torch.nn.Module.apply`.
        n_layer: blocks.
        initializer_range: standard deviation of embeddings.
        rescale_prenorm_residual: whether output projections are initialised anew, scaled.
        n_residuals_per_layer: terms that a block adds to the residual stream.
    """
    if isinstance(module, nn.Linear) and module.bias is not None:
        if not getattr(module.bias, "_no_reinit", False):
            module.bias.zero_()
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks and the last norm.

    Args:
        d_model: see `MambaConfig`; likewise the others.
        n_layer: likewise.
        d_intermediate: likewise.
        vocab_size: rows of the embedding.
        ssm_cfg: likewise.
        attn_layer_idx: likewise.
        attn_cfg: likewise.
        norm_epsilon: of the norms.
        rms_norm: likewise.
        initializer_cfg: arguments of `_init_weights`.
        fused_add_norm: likewise.
        residual_in_fp32: likewise.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int = 0,
        vocab_size: int = 50277,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        settings = (
            ssm_cfg,
            attn_layer_idx,
            attn_cfg,
            norm_epsilon,
            rms_norm,
            residual_in_fp32,
            fused_add_norm,
        )
        self.layers = nn.ModuleList(
            create_block(d_model, d_intermediate, *settings, index, **factory) for index in range(n_layer)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        residuals = 2 if d_intermediate else 1
        init = partial(
            _init_weights, n_layer=n_layer, n_residuals_per_layer=residuals, **(initializer_cfg or {})
        )
        self.apply(init)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Return the states of zeros of each layer."""
        layers: Any = self.layers
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for index, layer in enumerate(layers)
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """Return the hidden states (batch, seq_len, d_model) of ids (batch, seq_len)."""
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        return add_norm(hidden, residual, self.norm_f, self.fused_add_norm, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model of Mamba or Mamba-2 blocks.

    Args:
        config: the configuration.
        initializer_cfg: arguments of `_init_weights`.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the embedding the head, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Return the states of zeros of each layer."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Return the logits (batch, seq_len, vocab_size), as .logits.

        Args:
            input_ids: (batch, seq_len).
            position_ids: without effect.
            inference_params: see `Mamba.forward`.
            num_last_tokens: of how many last tokens; all if 0.
            **mixer_kwargs: for the mixers.
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(logits=self.lm_head(hidden[:, -num_last_tokens:]))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Self:
        """Return a model from a directory or the hub, in the official layout.

        Args:
            pretrained_model_name: directory or hub id.
            device: of the parameters.
            dtype: of the parameters.
            **kwargs: of the class.
        """
        model = cls(
            MambaConfig(**load_config_hf(pretrained_model_name)), device=device, dtype=dtype, **kwargs
        )
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Write pytorch_model.bin and config.json into a directory, made if need be."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), directory / "pytorch_model.bin")
        (directory / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=4))
