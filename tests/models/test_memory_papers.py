"""Each model of the memory line is the equations of its paper, written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.models import (
    CNN,
    GAU,
    H3,
    LSTM,
    CNNConfig,
    GAUConfig,
    H3Config,
    Hyena,
    HyenaConfig,
    LanguageModel,
    LinearAttentionConfig,
    LinearTransformer,
    LSTMConfig,
)
from longscan.models.linear_attention import EPS, accumulate, encodings, features
from longscan.models.transformer import sinusoids as transformer_sinusoids
from longscan.ops import selective_scan_ref
from memory_models import close, draw, seeded, stirred, tiny

SIZES = {"d_model": 8, "n_layers": 2, "vocab_size": 13}


def mixer_of(model: LanguageModel) -> Any:
    return model.backbone.layers[0].mixer


# LSTM and GRU


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_layers_are_their_equations(cell: str) -> None:
    model = stirred(LSTM(LSTMConfig(**SIZES, cell=cell, d_hidden=5), seeded()))
    mixer, x = mixer_of(model), draw(2, 6, 8)
    rnn = mixer.rnn
    W, U, b, b_hidden = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0
    h = c = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(6):
        from_x, from_h = x[:, t] @ W.T + b, h @ U.T + b_hidden
        if cell == "lstm":
            i, f, g, o = (from_x + from_h).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (rx, zx, nx), (rh, zh, nh) = from_x.chunk(3, 1), from_h.chunk(3, 1)
            z = (zx + zh).sigmoid()
            h = (1 - z) * (nx + (rx + rh).sigmoid() * nh).tanh() + z * h
    y, state = mixer(x, None, None)
    close(y[:, -1], h @ mixer.out_proj.weight.T)
    close(state.h, h)
    if cell == "lstm":
        close(state.c, c)


def test_forget_gates_start_open() -> None:
    kept, shut = (mixer_of(LSTM(LSTMConfig(**SIZES, forget_bias=bias), seeded())).rnn for bias in (1.0, 0.0))
    moved = kept.bias_ih_l0 - shut.bias_ih_l0
    torch.testing.assert_close(moved.chunk(4)[1], torch.ones(8))
    assert not moved.chunk(4)[0].any()
    assert not moved.chunk(4)[2].any()
    assert not moved.chunk(4)[3].any()


# the CNN


def test_dilated_convolutions_are_their_sums() -> None:
    model = stirred(CNN(CNNConfig(**{**SIZES, "n_layers": 3}, d_conv=3, d_inner=5), seeded()))
    x = draw(1, 12, 8)
    for i, layer in enumerate(model.backbone.layers):
        below = x[0]
        for conv in (layer.mixer.lower.conv, layer.mixer.upper.conv):
            rows = []
            for t in range(12):
                row = conv.bias.clone()
                for k in range(3):
                    s = t - (2 - k) * 2**i
                    row = row + (conv.weight[:, :, k] @ below[s] if s >= 0 else 0)
                rows.append(row.relu())
            below = torch.stack(rows)
        close(layer.mixer(x, None, None)[0][0], below)


def test_a_cnn_sees_a_window_and_no_further() -> None:
    model = CNN(CNNConfig(**{**SIZES, "n_layers": 3}, d_conv=2), seeded()).double()
    with torch.no_grad():  # no relu is shut
        for layer in model.backbone.layers:
            for conv in (layer.mixer.lower.conv, layer.mixer.upper.conv):
                conv.weight.abs_()
                conv.bias.fill_(10)
    x = draw(1, 40, 8).requires_grad_()
    hidden, _ = model.backbone.mix(x)
    [gradient] = torch.autograd.grad(hidden[0, -1, 0], x)
    seen = gradient[0].any(1)
    window = 1 + 2 * (2 - 1) * (2**3 - 1)
    assert seen[-window:].all()
    assert not seen[:-window].any()


# linear attention


def test_linear_attention_is_attention_without_a_softmax() -> None:
    model = stirred(LinearTransformer(LinearAttentionConfig(**SIZES, n_heads=2), seeded()))
    mixer, x = mixer_of(model), draw(2, 70, 8)  # more than a chunk
    placed = x + encodings(torch.arange(70), 8)
    q, k, v = ((placed @ W.T).unflatten(-1, (2, 4)) for W in mixer.in_proj.weight.chunk(3))
    weights = torch.einsum("bihd,bjhd->bhij", features(q), features(k)).tril()
    weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2) @ mixer.out_proj.weight.T
    close(mixer(x, None, None)[0], expected)


def test_linear_attention_is_a_state_space_that_forgets_nothing() -> None:
    """A = 0 and dt = 1, so A_bar = 1; B = k and C = q: what is written and read depends on the token."""
    q, k, v = draw(2, 70, 1, 4, seed=1), draw(2, 70, 1, 4, seed=2), draw(2, 70, 1, 3, seed=3)
    start = draw(2, 1, 4, 3, seed=4)
    y, state = accumulate(q, k, v, start)
    A, dt = torch.zeros(3, 4, dtype=torch.float64), torch.ones(2, 70, 3, dtype=torch.float64)
    expected, h = selective_scan_ref(v[:, :, 0], dt, A, k[:, :, 0], q[:, :, 0], initial_state=start[:, 0].mT)
    close(y[:, :, 0], expected)
    close(state[:, 0], h.mT)


def test_positions_are_those_of_the_transformer() -> None:
    sines, cosines = encodings(torch.arange(3, 50), 12).chunk(2, -1)
    close(torch.stack([sines, cosines], -1).flatten(1), transformer_sinusoids(3, 50, 12))


# the gated attention unit


def test_a_gau_is_its_equations() -> None:
    """The bias as two vectors that are turned, the sums as sums."""
    model = stirred(GAU(GAUConfig(**SIZES, d_attention=4, max_positions=50), seeded()))
    mixer, x = mixer_of(model), draw(1, 9, 8)
    u, v, z = F.silu(x[0] @ mixer.in_proj.weight.T).split((16, 16, 4), 1)
    q, k = z * mixer.q_scale + mixer.q_shift, z * mixer.k_scale + mixer.k_shift

    def turned(vector: Tensor, t: int) -> Tensor:
        pairs = torch.complex(*vector.detach().chunk(2))
        angles = t * 10000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)
        return pairs * torch.polar(torch.ones_like(angles), angles)

    rows = []
    for i in range(9):
        heard = torch.zeros(16, dtype=torch.float64)
        for j in range(i + 1):
            bias = (turned(mixer.bias_a, i) * turned(mixer.bias_b, j).conj()).real.sum()
            heard = heard + F.relu(q[i] @ k[j] / 50 + bias).square() * v[j]
        rows.append((u[i] * heard) @ mixer.out_proj.weight.T)
    close(mixer(x, None, None)[0][0], torch.stack(rows))


def test_two_gaus_are_as_large_as_a_transformer_layer() -> None:
    """3 d e + d s and little else, with e = 2 d about 6 d^2: half of the 12 d^2 of attention and its MLP."""
    mixer = mixer_of(GAU(GAUConfig(d_model=512, n_layers=1, vocab_size=13), seeded()))
    weights = sum(parameter.numel() for parameter in mixer.parameters())
    assert weights == 3 * 512 * 1024 + 512 * 128 + 6 * 128
    assert abs(weights / 512**2 - 6) < 0.3


# H3


@pytest.mark.parametrize("d_head", [1, 2])
def test_an_h3_is_its_equations(d_head: int) -> None:
    model = stirred(H3(H3Config(**SIZES, d_state=6, d_shift=3, d_head=d_head), seeded()))
    mixer, x = mixer_of(model), draw(1, 10, 8)
    q, k, v = (x[0] @ mixer.in_proj.weight.T).detach().chunk(3, 1)
    shift, D = mixer.shift.detach(), mixer.ssm.D.detach()
    kernel = mixer.ssm.kernel(10).detach()  # (n_heads, 10)
    shifted = [sum(shift[:, 2 - lag] * k[t - lag] for lag in range(3) if lag <= t) for t in range(10)]
    y = torch.zeros(10, 8, dtype=torch.float64)
    for head in range(8 // d_head):
        part = slice(head * d_head, (head + 1) * d_head)
        written = [torch.outer(shifted[t][part], v[t, part]) for t in range(10)]
        for t in range(10):
            memory = sum(kernel[head, t - s] * written[s] for s in range(t + 1)) + D[head] * written[t]
            y[t, part] = q[t, part] @ memory
    close(mixer(x, None, None)[0][0], y @ mixer.out_proj.weight.T)


def test_an_h3_that_forgets_nothing_is_linear_attention() -> None:
    """No shift, and a state space that only adds up: the sum over the past of (q . k) v, in heads."""
    model = H3(H3Config(**SIZES, d_state=2, d_shift=1, d_head=4), seeded()).double().eval()
    mixer, x = mixer_of(model), draw(2, 70, 8)
    with torch.no_grad():
        mixer.shift.fill_(1)
        mixer.ssm.log_A_real.fill_(math.log(1e-13))
        mixer.ssm.A_imag.zero_()
        mixer.ssm.D.zero_()
        mixer.ssm.C.copy_(torch.stack([0.5 / mixer.ssm.dt[:, None], torch.zeros(2, 1)], -1))
    q, k, v = (t.unflatten(-1, (2, 4)) for t in (x @ mixer.in_proj.weight.T).chunk(3, -1))
    expected, _ = accumulate(q, k, v, torch.zeros(2, 2, 4, 4, dtype=torch.float64))
    close(mixer(x, None, None)[0], expected.flatten(2) @ mixer.out_proj.weight.T)


def test_rescaled_time_stretches_what_an_h3_remembers() -> None:
    mixer = mixer_of(H3(H3Config(**SIZES), seeded()))
    before = mixer.ssm.dt.clone()
    mixer.rescale_time(2)
    torch.testing.assert_close(mixer.ssm.dt, 2 * before)
    with pytest.raises(LongscanError, match="no time step"):
        mixer_of(tiny("cnn")).rescale_time(2)


# Hyena


@pytest.mark.parametrize("order", [2, 3])
def test_a_hyena_is_its_equations(order: int) -> None:
    model = stirred(Hyena(HyenaConfig(**SIZES, order=order, frequency=2.0, max_positions=40), seeded()))
    mixer, x = mixer_of(model), draw(1, 12, 8)
    with torch.no_grad():
        projected = (x[0] @ mixer.in_proj.weight.T).numpy()
        taps, bias = mixer.conv1d.weight[:, 0].numpy(), mixer.conv1d.bias.numpy()
        filters, D = mixer.filters(12).numpy(), mixer.D.numpy()
    channels = projected.shape[1]
    short = [np.convolve(projected[:, c], taps[c, ::-1])[:12] + bias[c] for c in range(channels)]
    *gates, v = np.split(np.stack(short, 1), order + 1, 1)
    for i in range(1, order):
        v = gates[order - i] * v
        long = [np.convolve(v[:, c], filters[i - 1, c])[:12] for c in range(8)]
        v = np.stack(long, 1) + D[i - 1] * v
    expected = torch.from_numpy(gates[0] * v) @ mixer.out_proj.weight.T
    close(mixer(x, None, None)[0][0], expected)


def test_filters_are_functions_of_time_that_fade() -> None:
    mixer = mixer_of(Hyena(HyenaConfig(**SIZES, max_positions=300), seeded()))
    filters = mixer.filters(300)
    assert torch.equal(mixer.filters(40), filters[:, :, :40])
    bound = mixer.filter_out.abs().sum(1)  # sines are at most 1
    t = torch.arange(300) / 300
    for channel, share in ((0, 1.5), (7, 0.3)):
        window = 0.01 ** (t / share)
        assert (filters[0, channel].abs() <= bound[channel] * window * (1 + 1e-5)).all()
