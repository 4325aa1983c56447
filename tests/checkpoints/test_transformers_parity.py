"""The same numbers as others: Mamba in transformers in float32, and the equations of the paper in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.checkpoints.formats import FORMATS
from longscan.models import Mamba, MambaConfig

TOLERANCE_F32 = 2e-4  # of the largest value compared
TOLERANCE_F64 = 1e-9

SHAPES = {
    "tiny": ({"d_model": 48, "n_layers": 3, "vocab_size": 264, "d_state": 8, "bias": True}, 2, 61),
    "130m": ({"d_model": 768, "n_layers": 2, "vocab_size": 50280}, 1, 24),
}


def make_model(fields: dict[str, Any]) -> Mamba:
    """An official start, moved a little so that nothing is zero or one."""
    draw = torch.Generator().manual_seed(0)
    model = Mamba(MambaConfig(**fields), draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def draw_ids(fields: dict[str, Any], batch: int, seq_len: int) -> Tensor:
    return torch.randint(
        0, fields["vocab_size"], (batch, seq_len), generator=torch.Generator().manual_seed(1)
    )


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_of_transformers(shape: str) -> None:
    fields, batch, seq_len = SHAPES[shape]
    transformers = pytest.importorskip("transformers")
    model, ids = make_model(fields), draw_ids(fields, batch, seq_len)
    config = model.config
    peer = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            state_size=config.d_state,
            use_bias=config.bias,
        )
    )
    names = {theirs: FORMATS["mamba"].ours(theirs) for theirs in peer.state_dict()}
    ours = {**model.state_dict(), "lm_head.weight": model.backbone.embedding.weight}
    peer.load_state_dict({theirs: ours[name] for theirs, name in names.items()})

    expected = peer(ids, labels=ids)
    output = model(ids, labels=ids)
    in_pieces = model(ids, labels=ids, return_logits=False)
    assert in_pieces.logits is None
    assert_close(output.logits, expected.logits, TOLERANCE_F32)
    assert_close(output.loss, expected.loss, TOLERANCE_F32)
    assert_close(in_pieces.loss, expected.loss, TOLERANCE_F32)

    expected.loss.backward()
    wanted = {names[name]: parameter.grad for name, parameter in peer.named_parameters()}
    for loss in (output.loss, in_pieces.loss):
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, wanted[name], TOLERANCE_F32)


@pytest.mark.parametrize("norms", ["none", "plain", "learned"])
def test_logits_loss_and_gradients_of_the_equations(norms: str) -> None:
    fields, batch, seq_len = SHAPES["tiny"]
    fields = {**fields, "inner_norms": norms, "inner_norm_eps": 1e-3}
    fields = {**fields, "vocab_size": 261}  # padded to 264, of which the loss must not see the last three
    model, ids = make_model(fields).double(), draw_ids(fields, batch, seq_len)
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    expected = literal_logits(weights, fields, ids)
    expected_loss = F.cross_entropy(expected[:, :-1, :261].flatten(0, 1), ids[:, 1:].flatten())
    wanted = dict(zip(weights, torch.autograd.grad(expected_loss, list(weights.values())), strict=True))

    output = model(ids, labels=ids)
    assert_close(output.logits, expected, TOLERANCE_F64)
    for loss in (output.loss, model(ids, labels=ids, return_logits=False).loss):
        assert_close(loss, expected_loss, TOLERANCE_F64)
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, wanted[name], TOLERANCE_F64)


def literal_logits(weights: dict[str, Tensor], fields: dict[str, Any], ids: Tensor) -> Tensor:
    """The language model, one token after the other, from nothing but the equations."""
    batch, seq_len = ids.shape
    d_inner, d_state, rank = 2 * fields["d_model"], fields["d_state"], fields["d_model"] // 16
    embedding, n_layers = weights["backbone.embedding.weight"], fields["n_layers"]
    windows = [torch.zeros(batch, d_inner, 4, dtype=torch.float64) for _ in range(n_layers)]
    states = [torch.zeros(batch, d_inner, d_state, dtype=torch.float64) for _ in range(n_layers)]
    logits = []
    for t in range(seq_len):
        residual = embedding[ids[:, t]]
        for i in range(n_layers):
            layer = f"backbone.layers.{i}."
            w = {
                name.removeprefix(layer + "mixer."): v
                for name, v in weights.items()
                if name.startswith(layer)
            }
            x, z = (
                rms(residual, w[layer + "norm.weight"]) @ w["in_proj.weight"].T + w["in_proj.bias"]
            ).chunk(2, 1)
            windows[i] = torch.cat([windows[i][:, :, 1:], x[:, :, None]], 2)
            x = silu((windows[i] * w["conv1d.weight"][:, 0]).sum(2) + w["conv1d.bias"])
            selected = (x @ w["x_proj.weight"].T).split([rank, d_state, d_state], 1)
            if fields["inner_norms"] != "none":
                ones = [torch.ones(part.shape[1], dtype=torch.float64) for part in selected]
                scales = map(w.get, [f"{part}_layernorm.weight" for part in ("dt", "b", "c")], ones)
                selected = tuple(rms(part, scale, 1e-3) for part, scale in zip(selected, scales, strict=True))
            dt, B, C = selected
            dt = torch.log1p(torch.exp(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
            A_bar = torch.exp(dt[:, :, None] * -torch.exp(w["A_log"]))
            states[i] = A_bar * states[i] + (dt * x)[:, :, None] * B[:, None, :]
            y = (states[i] * C[:, None, :]).sum(2) + w["D"] * x
            residual = residual + (y * silu(z)) @ w["out_proj.weight"].T + w["out_proj.bias"]
        logits.append(rms(residual, weights["backbone.norm_f.weight"]) @ embedding.T)
    return torch.stack(logits, 1)


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / torch.sqrt((x * x).mean(1, keepdim=True) + eps) * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
