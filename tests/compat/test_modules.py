"""The modules: Mamba and its bidirectional forks, Block, GatedMLP, the language model and its decoding."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.compat.block import Block, BlockV1, GatedMLP
from longscan.compat.generation import (
    InferenceParams,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    sample,
    update_graph_cache,
)
from longscan.compat.language_model import MambaConfig, MambaLMHeadModel, create_block
from longscan.compat.mamba import Mamba
from longscan.compat.norms import RMSNorm
from longscan.models.common.mixer import LanguageModelConfig
from longscan.models.mamba import MambaConfig as OwnConfig
from longscan.models.mamba import MambaMixer

D_MODEL, SEQ_LEN = 8, 10


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mamba(**settings: Any) -> Mamba:
    torch.manual_seed(0)
    model = Mamba(D_MODEL, d_state=4, dtype=torch.float64, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_" in name or name.startswith("D"):  # not the same in every direction
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


X = normal(2, SEQ_LEN, D_MODEL, seed=1)


def direction(model: Mamba, xz: Tensor, suffix: str = "") -> Tensor:
    """One scan of a block, step by step: (batch, seq_len, d_inner) of (batch, seq_len, 2 d_inner)."""
    conv, x_proj, dt_proj = (getattr(model, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
    A, D = -getattr(model, f"A{suffix}_log").exp(), getattr(model, f"D{suffix}")
    x, z = xz.chunk(2, dim=-1)
    x = F.silu(conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
    dt, B, C = x_proj(x).split([model.dt_rank, 4, 4], dim=-1)
    dt = F.softplus(dt @ dt_proj.weight.T + dt_proj.bias)
    h, ys = torch.zeros(2, model.d_inner, 4, dtype=torch.float64), []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None] * x[:, t, :, None]
        ys.append((h * C[:, t, None]).sum(-1) + D * x[:, t])
    return torch.stack(ys, 1) * F.silu(z)


def test_one_direction() -> None:
    model = mamba()
    close(model(X), model.out_proj(direction(model, model.in_proj(X))))


@pytest.mark.parametrize(
    "settings", [{"bimamba_type": "v2"}, {"bimamba": True}, {"bimamba_type": "v2", "if_devide_out": True}]
)
def test_two_directions(settings: dict[str, Any]) -> None:
    model = mamba(**settings)
    xz = model.in_proj(X)
    total = direction(model, xz) + direction(model, xz.flip(1), "_b").flip(1)
    close(model(X), model.out_proj(total / 2 if "if_devide_out" in settings else total))


def test_two_directions_with_shared_weights() -> None:
    model = mamba(bimamba_type="v1")
    assert {name for name, _ in model.named_parameters() if "_b" in name} == {"A_b_log"}
    xz = model.in_proj(X)
    x, z = xz.chunk(2, dim=-1)
    # the convolution is causal in both: the backward scan takes its outputs in reverse
    convolved = F.silu(model.conv1d(x.transpose(1, 2))[..., :SEQ_LEN]).transpose(1, 2)

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dt_rank, self.d_inner = model.dt_rank, model.d_inner
            self.x_proj, self.dt_proj, self.D, self.A_log = (
                model.x_proj,
                model.dt_proj,
                model.D,
                model.A_b_log,
            )

        def conv1d(self, x: Tensor) -> Tensor:
            pre = model.conv1d(xz.chunk(2, dim=-1)[0].transpose(1, 2))[..., :SEQ_LEN]
            return pre.flip(-1)

    backward = direction(Reversed(), torch.cat([convolved, z], -1).flip(1)).flip(1)  # type: ignore[arg-type]
    close(model(X), model.out_proj(direction(model, xz) + backward))


def test_three_directions() -> None:
    model = mamba(bimamba_type="v3", nslices=5)
    xz = model.in_proj(X)
    order = [start * 2 + offset for offset in range(2) for start in range(5)]  # tokens 0 2 4 6 8 1 3 ...
    sliced = direction(model, xz[:, order], "_s")
    total = direction(model, xz) + direction(model, xz.flip(1), "_b").flip(1)
    total = total + sliced[:, torch.tensor(order).argsort()]
    close(model(X), model.out_proj(total))
    with pytest.raises(ValueError, match="a multiple of nslices=5 tokens, got 9"):
        model(X[:, :9])


def test_one_direction_is_never_halved() -> None:
    assert torch.equal(mamba(if_divide_out=True)(X), mamba()(X))


def test_layer_scale() -> None:
    model = mamba(init_layer_scale=0.5)
    plain = mamba()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "gamma"})
    close(model(X), 0.5 * plain(X))


@pytest.mark.parametrize("kind", ["none", "v1", "v2", "v3"])
def test_every_parameter_has_a_gradient(kind: str) -> None:
    model = mamba(bimamba_type=kind, bias=True, init_layer_scale=0.1)
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    for name, parameter in [("x", x), *model.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_parameters_are_those_of_longscans_mixer() -> None:
    own = MambaMixer(OwnConfig(d_model=D_MODEL, n_layers=1, vocab_size=9, d_state=4)).double()
    model = mamba()
    assert isinstance(OwnConfig(d_model=8, n_layers=1, vocab_size=9), LanguageModelConfig)
    own.load_state_dict(model.state_dict())
    close(model(X), own(X)[0])


@pytest.mark.parametrize("prompt", [1, 2, 6])
def test_decoding_continues_the_prompt(prompt: int) -> None:
    model = mamba(layer_idx=3)
    params = InferenceParams(max_seqlen=SEQ_LEN, max_batch_size=2)
    expected = model(X).detach()
    with torch.no_grad():
        parts = [model(X[:, :prompt], inference_params=params)]
        for t in range(prompt, SEQ_LEN):
            params.seqlen_offset = t
            parts.append(model(X[:, t : t + 1], inference_params=params))
    close(torch.cat(parts, 1), expected)
    assert list(params.key_value_memory_dict) == [3]
    shapes = [tuple(state.shape) for state in model.allocate_inference_cache(2, 99)]
    assert shapes == [tuple(state.shape) for state in params.key_value_memory_dict[3]]


def test_what_a_mamba_refuses() -> None:
    with pytest.raises(NotImplementedError, match="bimamba_type: expected one of none, v1, v2, v3, got 'v4'"):
        mamba(bimamba_type="v4")
    with pytest.raises(NotImplementedError, match="dt_init"):
        mamba(dt_init="zero")
    with pytest.raises(TypeError, match="scan_type"):
        mamba(scan_type="v2")
    with pytest.raises(NotImplementedError, match=r"bidirectional Mamba .v2. can't decode"):
        mamba(bimamba_type="v2", layer_idx=0)(X, inference_params=InferenceParams(9, 2))
    with pytest.raises(ValueError, match="layer_idx"):
        mamba()(X, inference_params=InferenceParams(9, 2))
    with pytest.raises(ValueError, match="one token per step, got 10"):
        mamba().step(X, *mamba().allocate_inference_cache(2, 9))


def test_initial_step_sizes() -> None:
    torch.manual_seed(0)
    model = Mamba(64, dt_min=0.01, dt_max=0.02)
    dt = F.softplus(model.dt_proj.bias)
    assert 0.0099 < dt.min() < dt.max() < 0.0201
    assert model.dt_proj.bias._no_reinit
    assert model.dt_proj.weight.abs().max() <= 4**-0.5
    assert torch.equal(model.A_log.exp().round(), torch.arange(1.0, 17).expand(128, -1))


# blocks


class Doubling(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
def test_blocks_of_both_versions(norm: Any, fused: bool) -> None:
    norm = partial(norm, dtype=torch.float64)
    old = BlockV1(D_MODEL, Doubling, norm, fused, True)
    new = Block(D_MODEL, Doubling, nn.Identity, norm, fused, True)
    residual = normal(*X.shape, seed=3)
    for block in (old, new):
        y, total = block(X, residual)
        close(total, X + residual)
        close(y, 2 * block.norm(X + residual))
        assert torch.equal(block(X)[1], X)
    first_names = list(inspect.signature(BlockV1).parameters)[:3]
    assert first_names == ["dim", "mixer_cls", "norm_cls"]
    assert list(inspect.signature(Block).parameters)[2] == "mlp_cls"


def test_a_block_with_mlp() -> None:
    mlp = partial(GatedMLP, hidden_features=5, multiple_of=4, dtype=torch.float64)
    block = Block(D_MODEL, Doubling, mlp, partial(nn.LayerNorm, dtype=torch.float64))
    assert isinstance(block.mlp, GatedMLP)
    assert block.mlp.fc1.weight.shape == (2 * 8, D_MODEL)
    y, total = block(X)
    expected = X + 2 * block.norm(X)
    close(total, expected)
    value, gate = block.mlp.fc1(block.norm2(expected)).chunk(2, dim=-1)
    close(y, block.mlp.fc2(value * F.silu(gate)))


def test_the_residual_can_be_float32() -> None:
    block = Block(
        D_MODEL, Doubling, norm_cls=partial(nn.LayerNorm, dtype=torch.bfloat16), residual_in_fp32=True
    )
    y, total = block(X.bfloat16())
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(TypeError, match="fused_add_norm: expected a LayerNorm or an RMSNorm, got Identity"):
        Block(D_MODEL, Doubling, norm_cls=lambda _: nn.Identity(), fused_add_norm=True)


# the language model

CONFIGS = {
    "mamba": {},
    "mamba2": {"ssm_cfg": {"layer": "Mamba2", "headdim": 4, "d_state": 6}},
    "mlp": {"d_intermediate": 24, "rms_norm": False, "fused_add_norm": False, "tie_embeddings": False},
}


def language_model(name: str) -> MambaLMHeadModel:
    torch.manual_seed(0)
    config = MambaConfig(d_model=D_MODEL, n_layer=2, vocab_size=21, **CONFIGS[name])
    return MambaLMHeadModel(config, initializer_cfg={"initializer_range": 1.0}).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_decoding_is_the_argmax_of_one_pass(name: str) -> None:
    model = language_model(name)
    ids = torch.randint(21, (2, 4), generator=torch.Generator().manual_seed(1))
    output: Any = model.generate(ids, 12, return_dict_in_generate=True, output_scores=True, vocab_size=21)
    assert output.sequences.shape == (2, 12)
    assert torch.equal(output.sequences[:, :4], ids)
    logits = model(output.sequences).logits
    assert logits.shape[-1] == 24  # padded to a multiple of 8
    close(torch.stack(output.scores, 1), logits[:, 3:-1, :21].detach(), 1e-4)
    assert torch.equal(output.sequences[:, 4:], logits[:, 3:-1, :21].argmax(-1))


def test_decoding_with_a_teacher_a_penalty_and_an_end() -> None:
    model = language_model("mamba")
    ids = torch.tensor([[1, 2]])
    teacher = torch.tensor([[1, 2, 5, 6]])
    taught = model.generate(ids, 6, teacher_outputs=teacher)
    assert taught[0, :4].tolist() == [1, 2, 5, 6]
    free = model.generate(ids, 12)
    ended = model.generate(ids, 12, eos_token_id=int(free[0, 3]))
    assert torch.equal(ended, free[:, : ended.shape[1]])
    assert ended.shape[1] in (3, 4)
    fresh = model.generate(ids, 10, repetition_penalty=1e9, vocab_size=21)[0].tolist()
    assert len(set(fresh)) == len(fresh)


def test_save_and_load(tmp_path: Path) -> None:
    model = language_model("mlp")
    model.save_pretrained(str(tmp_path / "model"))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["d_intermediate"] == 24
    loaded = MambaLMHeadModel.from_pretrained(str(tmp_path / "model"), dtype=torch.float64)
    ids = torch.arange(5)[None]
    close(loaded(ids).logits.float(), model(ids).logits, 1e-4)


def test_training_reaches_every_parameter() -> None:
    model = language_model("mamba2")
    ids = torch.randint(21, (2, 9), generator=torch.Generator().manual_seed(2))
    logits = model(ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_what_a_language_model_refuses() -> None:
    with pytest.raises(NotImplementedError, match="Mamba1 and Mamba2, not 'Mamba3'"):
        create_block(8, 0, {"layer": "Mamba3"}, layer_idx=0)
    with pytest.raises(NotImplementedError, match=r"attn_layer_idx: .* not attention"):
        create_block(8, 0, attn_layer_idx=[0], layer_idx=0)
    with pytest.raises(NotImplementedError, match="no CUDA graphs"):
        update_graph_cache(None, None, 1, 1, 1)


def test_sampling() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(2000, 1)
    torch.manual_seed(0)

    def drawn(**settings: Any) -> set[int]:
        return set(sample(logits.clone(), **settings).tolist())

    assert drawn() == {1}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=0) == {0, 1, 2, 3}
    assert drawn(top_k=0, top_p=0.7) == {1, 3}
    assert drawn(top_k=4, top_p=0.5) == {1}
    assert drawn(top_k=0, min_p=0.3) == {1, 3}
    assert drawn(top_k=0, temperature=0.01) == {1}
    with pytest.raises(ValueError, match="top_p: expected 0 to 1"):
        sample(logits, top_k=0, top_p=2.0)


def test_filters_of_logits() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    modify_logits_for_top_k_filtering(logits, 2)
    assert logits.tolist() == [[-torch.inf, 3.0, 1.0]]
    modify_logits_for_min_p_filtering(logits, 0.5)
    assert logits.tolist() == [[-torch.inf, 3.0, 1.0]]
    punished = modify_logit_for_repetition_penalty(
        torch.tensor([[-1.0, 4.0, 1.0]]), torch.tensor([[0, 1]]), 2.0
    )
    assert punished.tolist() == [[-2.0, 2.0, 1.0]]
