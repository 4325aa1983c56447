"""The same numbers as others: Mamba in transformers in float32, and the equations of the paper in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.checkpoints.formats import FORMATS
from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.models import Mamba, MambaConfig
from model_directories import assert_same

TOLERANCE_F32 = 2e-4  # of the largest value compared
FALCON_TOLERANCE = 1e-5
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


FALCONS: dict[str, dict[str, Any]] = {
    "usual": {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 264, "state_size": 8},
    "odd": {
        **{"hidden_size": 35, "num_hidden_layers": 2, "vocab_size": 41, "state_size": 5, "conv_kernel": 3},
        **{"time_step_rank": 7, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
        **{"mixer_rms_eps": 1e-3, "layer_norm_epsilon": 1e-4, "expand": 3},
    },
    "published": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 65, "expand": 16}
    | {"intermediate_size": 64, "tie_word_embeddings": False},
}


def make_falcon(fields: dict[str, Any], seed: int) -> Any:
    """transformers' Falcon Mamba, with no parameter as it started."""
    transformers = pytest.importorskip("transformers")
    draw = torch.Generator().manual_seed(seed)
    peer = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            scale = 0.3 if parameter.dim() > 1 and "A_log" not in name else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=draw)
    return peer


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", FALCONS)
def test_falcon_mamba_of_transformers_there_and_back(shape: str, seed: int, tmp_path: Path) -> None:
    peer = make_falcon(FALCONS[shape], seed)
    peer.save_pretrained(tmp_path / "theirs")
    model, _ = load(tmp_path / "theirs")
    assert isinstance(model, Mamba)
    assert model.config.inner_norms == "plain"
    ids = draw_ids(FALCONS[shape], 2, 21)
    with torch.no_grad():
        whole, expected = model(ids).logits, peer(ids).logits
        assert_close(whole[..., : expected.shape[-1]], expected, FALCON_TOLERANCE)
        theirs, state, cache = [], model.init_state(2), None
        for t in range(21):
            output = peer(ids[:, t : t + 1], cache_params=cache, use_cache=True)
            cache = output.cache_params
            theirs.append(output.logits[:, 0])
            step, state = model.step(ids[:, t], state)
            assert_close(step[..., : expected.shape[-1]], theirs[-1], FALCON_TOLERANCE)
        _, state = model.prefill(ids[:, :8])
        rest, _ = model.advance(ids[:, 8:], state)
        assert_close(rest, whole[:, 8:], FALCON_TOLERANCE)

    save(model, tmp_path / "ours")
    again, _ = load(tmp_path / "ours")
    assert_same(again, model)
    returned = type(peer).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        assert_close(returned(ids).logits, expected, FALCON_TOLERANCE)


def test_transformers_restarts_falcon_mamba_in_a_chunk() -> None:
    """Its chunked prefill forgets the state: several tokens after others are no oracle, single ones are."""
    peer = make_falcon(FALCONS["usual"], 0)
    ids = draw_ids(FALCONS["usual"], 1, 21)
    with torch.no_grad():
        expected = peer(ids).logits
        cache = peer(ids[:, :8], use_cache=True).cache_params
        rest = peer(ids[:, 8:], cache_params=cache, use_cache=True).logits
    assert (rest - expected[:, 8:]).abs().max() > 0.5 * expected.std()


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "mamba"])
@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_transformers_never_samples_the_padding(name: str, way: str, tmp_path: Path) -> None:
    """The rows behind the vocabulary belong to no token, whatever they hold."""
    transformers = pytest.importorskip("transformers")
    from longscan.checkpoints.save import padding_ids, save
    from longscan.compat.causal_lm import wrap
    from small_models import build

    model = build(vocab_size=13, name=name).float()
    assert padding_ids(model) == [13, 14, 15]
    assert model.lm_head is not None
    with torch.no_grad():  # so likely that something else could hardly be sampled
        model.lm_head.weight[13:] = 50 * model.lm_head.weight[:3]
    if way == "save":
        save(model, tmp_path / "model")
    else:
        wrap(model).save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert int(theirs(ids).logits[0, :, 13:].max() > theirs(ids).logits[0, :, :13].max())
    torch.manual_seed(0)
    found = theirs.generate(ids.expand(8, -1), max_new_tokens=12, do_sample=True, pad_token_id=0)
    assert int(found.max()) < 13
    torch.manual_seed(0)
    found = wrap(model).generate(ids.expand(8, -1), max_new_tokens=12, do_sample=True, pad_token_id=0)
    assert int(found.max()) < 13
