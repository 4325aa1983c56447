"""Mamba-2 beside transformers in float32, and beside the equations of the paper in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.checkpoints.load import load
from longscan.models import Mamba2, Mamba2Config

TOLERANCE_F32 = 2e-5  # of the largest value compared
TOLERANCE_F64 = 1e-12

SIZES: dict[str, dict[str, Any]] = {
    "one-group": {"hidden_size": 40, "num_heads": 5, "head_dim": 16, "n_groups": 1, "state_size": 12},
    "groups": {"hidden_size": 36, "num_heads": 6, "head_dim": 12, "n_groups": 3, "state_size": 7},
    "biased": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 2, "use_bias": True},
    "untied": {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def make_peer(transformers: Any, seed: int, **fields: Any) -> Any:
    """A model of theirs with nothing left at zero or one."""
    sizes = {"num_hidden_layers": 3, "vocab_size": 259, "chunk_size": 16, "tie_word_embeddings": True}
    peer = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes | {"state_size": 16} | fields))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter += torch.randn(parameter.shape, generator=g) * (0.5 if parameter.dim() == 1 else 0.05)
            if name.endswith("dt_bias"):
                parameter -= 2
    return peer.eval()


def assert_close(got: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert got.shape == expected.shape
    difference = (got - expected).abs().max()
    assert difference <= tolerance * expected.abs().max(), f"{name}: {difference} of {expected.abs().max()}"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_logits_and_gradients_of_transformers(
    transformers: Any, sizes: str, seed: int, tmp_path: Path
) -> None:
    peer = make_peer(transformers, seed, **SIZES[sizes])
    peer.save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    assert isinstance(model, Mamba2)
    ids = torch.randint(0, 259, (2, 53), generator=torch.Generator().manual_seed(seed))
    expected, got = peer(ids, labels=ids), model(ids, labels=ids)
    assert_close(got.logits, expected.logits, TOLERANCE_F32)
    expected.loss.backward()
    got.loss.backward()
    theirs = {
        name.replace("backbone.embeddings.", "backbone.embedding."): p for name, p in peer.named_parameters()
    }
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, theirs[name].grad, 10 * TOLERANCE_F32, name)


def test_limits_of_dt_hold_in_a_step_where_transformers_forgets_them(
    transformers: Any, tmp_path: Path
) -> None:
    peer = make_peer(transformers, 0, **SIZES["groups"], time_step_limit=(0.05, 0.3))
    peer.save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    ids = torch.randint(0, 259, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        assert_close(whole, peer(ids).logits, TOLERANCE_F32)
        _, state = model.prefill(ids[:, :20])
        stepped = torch.stack([model.step(ids[:, t], state)[0] for t in range(20, 24)], 1)
        assert_close(stepped, whole[:, 20:], TOLERANCE_F32)
        cache, theirs = None, []
        for part in (ids[:, :20], *ids[:, 20:].split(1, 1)):
            out = peer(part, cache_params=cache, use_cache=True)
            cache = out.cache_params
            theirs.append(out.logits[:, -1])
        difference = (torch.stack(theirs[1:], 1) - whole[:, 20:]).abs().max()
        assert difference > 0.01 * whole.abs().max(), "transformers was mended: compare with it here too"


@pytest.mark.parametrize(
    "fields",
    [
        {"n_groups": 2},
        {"gated_norm": "norm-first", "D_per_channel": True, "conv_bias": False},
        {"gated_norm": "none", "d_ssm": 32, "dt_limit": (0.01, 0.2), "bias": True},
    ],
    ids=["groups", "norm-first", "part"],
)
def test_logits_and_gradients_of_the_equations(fields: dict[str, Any]) -> None:
    sizes = {"d_model": 24, "n_layers": 2, "vocab_size": 61, "d_state": 5, "d_head": 8, **fields}
    draw = torch.Generator().manual_seed(0)
    model = Mamba2(Mamba2Config.from_dict(sizes), draw).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    ids = torch.randint(0, 61, (2, 71), generator=draw)
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    expected = literal_logits(weights, model.config, ids)
    got = model(ids).logits
    assert_close(got, expected, TOLERANCE_F64)
    direction = torch.randn(got.shape, generator=draw, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * direction).sum(), list(weights.values()))
    (got * direction).sum().backward()
    for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        assert_close(parameter.grad, gradient, TOLERANCE_F64, name)


def literal_logits(weights: dict[str, Tensor], config: Mamba2Config, ids: Tensor) -> Tensor:
    """The language model, one token and one head after the other, from nothing but the equations."""
    layer, eps, silu = config.layer, config.norm_eps, torch.nn.functional.silu
    n, p, gn = layer.d_state, layer.d_head, layer.n_groups * layer.d_state
    windows = [torch.zeros(len(ids), layer.d_ssm + 2 * gn, layer.d_conv).double() for _ in range(2)]
    states = [torch.zeros(len(ids), layer.n_heads, p, n).double() for _ in range(2)]
    logits = []
    for token in ids.unbind(1):
        residual = weights["backbone.embedding.weight"][token]
        for i in range(2):
            w = {name.removeprefix(f"backbone.layers.{i}."): v for name, v in weights.items()}
            normed = rms(residual, eps) * w["norm.weight"]
            rows = normed @ w["mixer.in_proj.weight"].T + w.get("mixer.in_proj.bias", 0)
            z0, x0, z, xbc, dt = rows.split(
                [layer.d_mlp, layer.d_mlp, layer.d_ssm, layer.d_ssm + 2 * gn, layer.n_heads], 1
            )
            windows[i] = torch.cat([windows[i][:, :, 1:], xbc[:, :, None]], 2)
            xbc = (windows[i] * w["mixer.conv1d.weight"][:, 0]).sum(2) + w.get("mixer.conv1d.bias", 0)
            x, B, C = silu(xbc).split([layer.d_ssm, gn, gn], 1)
            dt = torch.log1p(torch.exp(dt + w["mixer.dt_bias"]))
            dt = dt if config.dt_limit is None else dt.clamp(*config.dt_limit)
            ys, heads = [], []
            for h in range(layer.n_heads):
                group = h // (layer.n_heads // layer.n_groups)
                columns, xh = slice(group * n, group * n + n), x[:, h * p : h * p + p]
                decay = torch.exp(-dt[:, h] * torch.exp(w["mixer.A_log"][h]))
                heads.append(
                    decay[:, None, None] * states[i][:, h]
                    + dt[:, h, None, None] * xh[:, :, None] * B[:, None, columns]
                )
                D = w["mixer.D"][h * p : h * p + p] if config.D_per_channel else w["mixer.D"][h]
                ys.append((heads[-1] * C[:, None, columns]).sum(2) + D * xh)
            states[i], y = torch.stack(heads, 1), torch.cat(ys, 1)
            if config.gated_norm == "gate-first":
                y = rms_groups(y * silu(z), layer.n_groups, eps) * w["mixer.norm.weight"]
            elif config.gated_norm == "norm-first":
                y = rms_groups(y, layer.n_groups, eps) * w["mixer.norm.weight"] * silu(z)
            else:
                y = y * silu(z)
            y = torch.cat([silu(z0) * x0, y], 1)
            residual = residual + y @ w["mixer.out_proj.weight"].T + w.get("mixer.out_proj.bias", 0)
        logits.append(
            (rms(residual, eps) * weights["backbone.norm_f.weight"]) @ weights["backbone.embedding.weight"].T
        )
    return torch.stack(logits, 1)


def rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(1, keepdim=True) + eps)


def rms_groups(x: Tensor, n_groups: int, eps: float) -> Tensor:
    return torch.cat([rms(part, eps) for part in x.chunk(n_groups, 1)], 1)
