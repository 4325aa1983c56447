"""Mamba-3: the equations of the paper token by token, the sizes of the published models, and long texts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.models import MODELS, Mamba3, Mamba3Config
from longscan.models.common.trapezoid import Past, before, last
from longscan.models.mamba3 import Mamba3Mixer, Mamba3State, heavy_tail
from longscan.ops.rotary import accumulate, rotate, wrapped

TOLERANCE = 1e-12  # of float64 sums in another order
SIZES: dict[str, dict[str, Any]] = {
    "siso": {},
    "siso-all-channels": {"rope_fraction": 1.0, "n_groups": 2},
    "siso-odd": {"d_state": 7, "outproj_norm": True},
    "siso-softplus": {"A_activation": "softplus", "A_floor": 0.7},
    "mimo": {"mimo_rank": 4},
    "mimo-all-channels": {"mimo_rank": 3, "rope_fraction": 1.0, "n_groups": 4},
    "mimo-norm": {"mimo_rank": 2, "outproj_norm": True},
    "mimo-of-one": {"mimo_rank": 1},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(**fields: Any) -> Mamba3Config:
    sizes = {"d_model": 8, "n_layers": 2, "vocab_size": 11, "d_state": 8, "d_head": 4}
    return Mamba3Config(**{**sizes, **fields})


def mixer(**fields: Any) -> Mamba3Mixer:
    """In float64, with every parameter far from its start."""
    made = Mamba3Mixer(config(**fields), seeded())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=seeded(1))
    return made.double()


def draw_state(made: Mamba3Mixer, rows: int) -> Mamba3State:
    g = seeded(2)
    shapes = (tensor.shape for tensor in made.init_state(rows))
    return Mamba3State(
        *(torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes)
    )


# the equations


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, theta: Tensor, halves: bool) -> Tensor:
    """Pairs as complex numbers, channel by channel; x (..., N), theta (..., n_angles)."""
    channels = list(x.unbind(-1))
    for i in range(theta.shape[-1]):
        a, b = (i, i + len(channels) // 2) if halves else (2 * i, 2 * i + 1)
        pair = torch.complex(channels[a], channels[b]) * torch.exp(1j * theta[..., i])
        channels[a], channels[b] = pair.real, pair.imag
    return torch.stack(channels, -1)


def token_by_token(made: Mamba3Mixer, u: Tensor, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
    """The recurrence of the paper in its own letters."""
    c, (theta, S, k_prev, v_prev) = made.config, state
    H, P, R, G, N = c.n_heads, c.d_head, c.rank, c.n_groups, c.d_state
    mimo = c.mimo_rank is not None
    one = torch.ones(H, R, P, dtype=u.dtype)
    x_r, z_r, o_r = (getattr(made, f"mimo_{name}") if mimo else one for name in "xzo")
    outs = []
    for t in range(u.shape[1]):
        z, x, B, C, dd_dt, dd_A, trap, angle = torch.split(made.in_proj(u[:, t]), list(c.splits), -1)
        z, v = z.view(-1, H, P), x.view(-1, H, P)
        q, k = (
            rms(M.view(-1, R, G, N), norm.weight).repeat_interleave(H // G, 2) + bias.transpose(0, 1)
            for M, norm, bias in ((C, made.C_norm, made.C_bias), (B, made.B_norm, made.B_bias))
        )
        dt, lam = F.softplus(dd_dt + made.dt_bias), trap.sigmoid()
        positive = (
            dd_A.exp().log1p()
            if c.A_activation == "softplus"
            else torch.where(dd_A >= 0, 1 + dd_A, 1 / (1 - dd_A.clamp(max=0)))
        )
        alpha = torch.exp(dt * -positive.clamp(min=c.A_floor))
        beta, gamma = (1 - lam) * dt * alpha, lam * dt
        theta = (theta + math.pi * torch.tanh(angle)[:, None] * dt[..., None]) % (2 * math.pi)
        q, k = (turned(M, theta[:, None], halves=mimo) for M in (q, k))
        S = alpha[..., None, None] * S
        ys = []
        for r in range(R):
            S = S + beta[..., None, None] * (v_prev * x_r[:, r])[..., None] * k_prev[:, r, :, None]
            S = S + gamma[..., None, None] * (v * x_r[:, r])[..., None] * k[:, r, :, None]
        for r in range(R):
            y = (S * q[:, r, :, None]).sum(-1) + made.D[:, None] * v * x_r[:, r]
            gate = F.silu(z * z_r[:, r])
            y = y * gate if made.norm is None else rms(y, made.norm.weight.view(H, P)) * gate
            ys.append(y * o_r[:, r])
        outs.append(made.out_proj(sum(ys).flatten(1)))
        k_prev, v_prev = k, v
    return torch.stack(outs, 1), Mamba3State(theta, S, k_prev, v_prev)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    assert (got - expected).detach().abs().max() <= tolerance * max(1.0, float(expected.detach().abs().max()))


@pytest.mark.parametrize("fields", SIZES.values(), ids=SIZES)
def test_forward_is_the_recurrence_of_the_paper(fields: dict[str, Any]) -> None:
    """Values, final states and gradients, more than one chunk, from a state that is not zero."""
    made = mixer(**fields)
    state = draw_state(made, 2)
    u = torch.randn(2, 70, 8, generator=seeded(3), dtype=torch.float64, requires_grad=True)
    leaves, results = [u, *state, *made.parameters()], []
    for function in (made, lambda *inputs: token_by_token(made, *inputs)):
        y, after = function(u, state)
        turns = torch.cat([after.angle.cos(), after.angle.sin()])  # whole turns do not count
        outputs = [y, turns, after.ssm, after.k, after.v]
        g = seeded(4)
        loss = sum((o * torch.randn(o.shape, generator=g, dtype=o.dtype)).sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])  # type: ignore[arg-type]
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("fields", SIZES.values(), ids=SIZES)
def test_steps_are_the_recurrence_of_the_paper(fields: dict[str, Any]) -> None:
    made = mixer(**fields)
    state = Mamba3State(*(tensor.detach().clone() for tensor in draw_state(made, 2)))
    u = torch.randn(2, 9, 8, generator=seeded(3), dtype=torch.float64)
    with torch.no_grad():
        expected, after = token_by_token(made, u, Mamba3State(*(tensor.clone() for tensor in state)))
        got = torch.stack([made.step(u[:, t], state) for t in range(9)], 1)
    assert_close(got, expected)
    for name, tensor in after._asdict().items():
        whole = 2 * math.pi * ((tensor - state.angle) / (2 * math.pi)).round() if name == "angle" else 0
        assert_close(getattr(state, name), tensor - whole)


def test_the_heavy_tail() -> None:
    x = torch.tensor([-1e6, -3.0, -1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = heavy_tail(x)
    assert_close(y, torch.tensor([1 / (1 + 1e6), 0.25, 0.5, 1.0, 3.0], dtype=torch.float64))
    [slope] = torch.autograd.grad(y.sum(), x)
    assert_close(slope, torch.tensor([(1 + 1e6) ** -2, 1 / 16, 0.25, 1.0, 1.0], dtype=torch.float64))


# sizes and initialisation


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("siso-187m", 186_849_600),
        ("mimo-187m", 187_291_968),
        ("siso-1.5b", 1_494_723_584),
        ("mimo-1.5b", 1_497_082_880),
    ],
)
def test_the_published_models_have_these_sizes(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = Mamba3(Mamba3Config.from_dict(MODELS["mamba3"].presets[preset]))
    assert model.num_parameters() == count


def test_shapes_of_the_official_code() -> None:
    with torch.device("meta"):
        model = Mamba3(Mamba3Config.from_dict(MODELS["mamba3"].presets["mimo-187m"]))
    prefix = "backbone.layers.0."
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith(prefix)}
    assert {name.removeprefix(prefix): shape for name, shape in shapes.items()} == {
        "norm.weight": (768,),
        "mixer.in_proj.weight": (4200, 768),
        "mixer.dt_bias": (24,),
        "mixer.B_bias": (24, 4, 128),
        "mixer.C_bias": (24, 4, 128),
        "mixer.B_norm.weight": (128,),
        "mixer.C_norm.weight": (128,),
        "mixer.mimo_x": (24, 4, 64),
        "mixer.mimo_z": (24, 4, 64),
        "mixer.mimo_o": (24, 4, 64),
        "mixer.D": (24,),
        "mixer.out_proj.weight": (768, 1536),
        "norm2.weight": (768,),
        "mlp.fc1.weight": (2560, 768),
        "mlp.fc2.weight": (768, 1280),
    }


def test_initialisation() -> None:
    model = Mamba3(config(d_model=64, d_state=16, d_head=2, mimo_rank=4, d_intermediate=64), seeded())
    layer: Any = model.backbone.layers[0]
    made = layer.mixer
    dt = F.softplus(made.dt_bias)
    assert (dt >= 0.99e-3).all()
    assert (dt <= 0.101).all()
    assert dt.std() > 0.01
    for name, value in {
        "B_bias": 1,
        "C_bias": 1,
        "D": 1,
        "mimo_x": 0.25,
        "mimo_z": 1,
        "mimo_o": 0.25,
    }.items():
        assert (getattr(made, name) == value).all()
    for matrix in (made.out_proj.weight, layer.mlp.fc2.weight):
        bound = 1 / math.sqrt(matrix.shape[1] * 2)  # torch's, divided by the root of n_layers
        assert 0.95 * bound < matrix.abs().max() <= bound


# angles


def test_angles_of_a_long_text_are_exact() -> None:
    """A sum in float32 would be off by more than a thousandth; whole turns are left out in the state."""
    turn = torch.full((1, 200_000, 1, 1), 0.3)
    exact = torch.arange(1, 200_001, dtype=torch.float64) * float(turn[0, 0, 0, 0])
    angle = accumulate(turn, torch.zeros(1, 1, 1), None)[0][0, :, 0, 0]
    assert (angle - exact).abs().max() < 1e-6
    assert (wrapped(angle).abs() <= math.pi + 1e-6).all()
    assert (wrapped(angle).cos() - exact.cos()).abs().max() < 1e-6
    assert (turn.cumsum(1)[0, :, 0, 0] - exact).abs().max() > 1e-3


def test_chunks_of_a_long_text_agree() -> None:
    """Float32 states between the chunks: whole turns would cost their last digits."""
    model = Mamba3(config(d_state=4, vocab_size=8), seeded()).eval()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.dt_bias.fill_(1.0)  # type: ignore[union-attr, operator]
    ids = torch.randint(0, 8, (1, 20_000), generator=seeded(1))
    with torch.no_grad():
        expected = model.double()(ids[:, -50:], state=model.prefill(ids[:, :-50])[1]).logits
        model.float()
        for chunk_size in (17_000, 777):
            state = model.prefill(ids[:, :-50], chunk_size=chunk_size)[1]
            got = model(ids[:, -50:], state=state).logits
            assert_close(got.double(), expected, 1e-4)


def test_pairs_that_rotate() -> None:
    x = torch.arange(1.0, 9.0).view(1, 1, 8)
    quarter = torch.full((1, 2), math.pi / 2)
    assert_close(
        rotate((x,), quarter, halves=False)[0][0, 0], torch.tensor([-2.0, 1, -4, 3, 5, 6, 7, 8]), 1e-6
    )
    assert_close(
        rotate((x,), quarter, halves=True)[0][0, 0], torch.tensor([-5.0, -6, 3, 4, 1, 2, 7, 8]), 1e-6
    )
    whole = torch.full((1, 4), math.pi / 2)
    assert_close(
        rotate((x,), whole, halves=True)[0][0, 0], torch.tensor([-5.0, -6, -7, -8, 1, 2, 3, 4]), 1e-6
    )


# packed rows


def test_the_token_before_each_one() -> None:
    seq_idx = torch.tensor([[-1, 5, 5, -1, 5, 7, -1, 7], [-1] * 8])
    x, first = torch.arange(1.0, 17).view(2, 8), torch.tensor([100.0, 200.0])
    past = Past.of(seq_idx)
    inside = seq_idx[0] >= 0
    assert before(x, first, past)[0, inside].tolist() == [100, 2, 3, 0, 6]
    assert last(x, first, past).tolist() == [8, 200]
    assert before(x, first, None)[1].tolist() == [200, *range(9, 16)]
    assert last(x, first, None).tolist() == [8, 16]


def test_a_row_of_padding_keeps_its_state() -> None:
    made = mixer(mimo_rank=2)
    state = draw_state(made, 2)
    seq_idx = torch.tensor([[0, 0, 0], [-1, -1, -1]])
    u = torch.randn(2, 3, 8, generator=seeded(3), dtype=torch.float64)
    _, after = made(u, state, Past.of(seq_idx))
    for name in ("ssm", "k", "v"):
        assert torch.equal(getattr(after, name)[1], getattr(state, name)[1])
    assert_close(after.angle[1], wrapped(state.angle[1]))
