"""Each translator against its paper written out, and against torch with the same weights."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from longscan.models import MODELS, Bahdanau, Luong, Seq2Seq, Transformer
from longscan.models.bahdanau import AdditiveAttention, GRUCell
from longscan.models.seq2seq import LSTM
from longscan.models.transformer import sinusoids
from translation import SENTENCES, build, close, rows, seeded, source_and_target

DTYPES = [torch.float32, torch.float64]


# Seq2Seq and LSTMs


def copy_lstm(ours: LSTM, theirs: nn.LSTM) -> None:
    """Give torch's LSTM our weights; it has a second bias for nothing."""
    state = {}
    for i, cell in enumerate(ours.layers):
        state |= {f"weight_ih_l{i}": cell.input.weight, f"weight_hh_l{i}": cell.recurrent.weight}
        state |= {f"bias_ih_l{i}": cell.input.bias, f"bias_hh_l{i}": torch.zeros_like(cell.input.bias)}
    theirs.load_state_dict(state)


@torch.no_grad()
def test_seq2seq_is_torchs_lstms_on_the_reversed_source() -> None:
    model, (source, target) = cast(Seq2Seq, build("seq2seq")), source_and_target()
    encoder, decoder = (nn.LSTM(24, 32, 2, batch_first=True, dtype=torch.float64) for _ in range(2))
    copy_lstm(model.encoder, encoder)
    copy_lstm(model.decoder, decoder)
    logits = model(source, target).logits
    for i, sentence in enumerate(SENTENCES):
        _, state = encoder(model.table("source")(rows(sentence).flip(1)))
        hidden, _ = decoder(model.target_embedding(target[i : i + 1]), state)
        close(logits[i], model.head(hidden)[0])


# Bahdanau


def literal_gru(cell: GRUCell, y: Tensor, s: Tensor, c: tuple[Tensor, ...] = ()) -> Tensor:
    """Take one step of the paper's GRU, one hidden unit at a time; c adds to z, r and the candidate."""
    n = len(s)
    W_z, W_r, W = cell.input.weight.split(n)
    b_z, b_r, b = cell.input.bias.split(n)
    U_z, U_r = cell.gates.weight.split(n)
    c_z, c_r, c_s = c or (torch.zeros_like(s),) * 3
    z = [torch.sigmoid(W_z[k] @ y + b_z[k] + U_z[k] @ s + c_z[k]) for k in range(n)]
    r = torch.stack([torch.sigmoid(W_r[k] @ y + b_r[k] + U_r[k] @ s + c_r[k]) for k in range(n)])
    candidate = [torch.tanh(W[k] @ y + b[k] + cell.candidate.weight[k] @ (r * s) + c_s[k]) for k in range(n)]
    return torch.stack([(1 - z[k]) * s[k] + z[k] * candidate[k] for k in range(n)])


@torch.no_grad()
def test_bahdanau_is_the_paper_written_out() -> None:
    model, (source, target) = cast(Bahdanau, build("bahdanau")), source_and_target()
    output = model(source, target, return_weights=True)
    for i, sentence in enumerate(SENTENCES):
        words = [model.table("source").weight[token] for token in [*sentence, 2]]
        forwards, backwards, s = [], [], torch.zeros(32, dtype=torch.float64)
        for x in words:
            forwards.append(s := literal_gru(model.forwards, x, s))
        s = torch.zeros_like(s)
        for x in words[::-1]:
            backwards.insert(0, s := literal_gru(model.backwards, x, s))
        h = [torch.cat(both) for both in zip(forwards, backwards, strict=True)]
        s = torch.tanh(model.start_state.weight @ backwards[0] + model.start_state.bias)
        for t, token in enumerate(target[i].tolist()):
            y = model.target_embedding.weight[token]
            e = [
                model.align.v_a @ torch.tanh(model.align.query.weight @ s + model.align.key.weight @ h_j)
                for h_j in h
            ]
            a = torch.stack(e).softmax(0)
            close(output.weights["cross"][i, 0, t, : len(h)], a)
            c = sum(a_j * h_j for a_j, h_j in zip(a, h, strict=True))
            U_o, V_o, C_o = model.readout.weight.split((32, 24, 64), 1)
            pairs_ = U_o @ s + V_o @ y + C_o @ c + model.readout.bias
            t_i = torch.stack([max(pairs_[2 * j], pairs_[2 * j + 1]) for j in range(24)])
            close(output.logits[i, t], model.head.weight @ t_i)
            s = literal_gru(model.decoder, y, s, (model.context.weight @ c).split(32))


@torch.no_grad()
def test_bahdanaus_gru_is_not_torchs() -> None:
    ours, theirs = build("bahdanau").forwards, nn.GRUCell(24, 32, dtype=torch.float64)
    order = torch.cat((torch.arange(32, 64), torch.arange(32), torch.arange(64, 96)))  # theirs: r, z, n
    theirs.weight_ih.copy_(ours.input.weight[order])
    theirs.bias_ih.copy_(ours.input.bias[order])
    theirs.weight_hh.copy_(torch.cat((ours.gates.weight, ours.candidate.weight))[order])
    theirs.bias_hh.zero_()
    x, s = torch.ones(1, 24, dtype=torch.float64), torch.full((1, 32), 0.5, dtype=torch.float64)
    assert (ours(ours.input(x), s)[0] - theirs(x, s)).abs().max() > 0.01


def test_bahdanau_starts_as_the_paper_says() -> None:
    entry = MODELS["bahdanau"]
    model = cast(
        Bahdanau,
        entry.cls(
            entry.config.from_dict({**entry.presets["tiny"], "d_hidden": 96, "start": "paper"}), seeded()
        ),
    )
    for cell in (model.forwards, model.backwards, model.decoder):
        for matrix in (cell.gates.weight[:96], cell.gates.weight[96:], cell.candidate.weight):
            close(matrix @ matrix.T, torch.eye(96), torch.float32)
        assert abs(cell.input.weight.std() / 0.01 - 1) < 0.05
        assert not cell.input.bias.any()
    assert abs(model.align.query.weight.std() / 0.001 - 1) < 0.05
    assert abs(model.align.key.weight.std() / 0.001 - 1) < 0.05
    assert not model.align.v_a.any()


# Luong


def first_look(model: Luong, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return h_t after bos_id, the annotations and the weights of the first step, without feeding."""
    state = model.encode(source)
    (memory,), (*layers, _) = state.memory.layers, state.decoder.layers
    layers = model.decoder.step(
        model.decoder.project(model.target_embedding.weight[[1] * len(source)]), layers
    )
    weights = model(source, source.new_ones(len(source), 1), return_weights=True).weights["cross"][:, 0, 0]
    return layers[-1].h, memory.annotations, weights


@pytest.mark.parametrize("where", ["global", "local-m", "local-p"])
@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
@torch.no_grad()
def test_luongs_scores_and_windows(score: str, where: str) -> None:
    model = cast(Luong, build("luong", score=score, where=where, window=2, n_locations=4))
    source = rows(*SENTENCES)
    h, annotations, weights = first_look(model, source)
    for i, sentence in enumerate(SENTENCES):
        S = len(sentence) + 1
        if score == "dot":
            scores = [h[i] @ annotations[i, s] for s in range(S)]
        elif score == "general":
            scores = [h[i] @ model.align.weight @ annotations[i, s] for s in range(S)]
        elif score == "concat":
            W_a = torch.cat((model.align.query.weight, model.align.key.weight), 1)
            scores = [
                model.align.v_a @ torch.tanh(W_a @ torch.cat((h[i], annotations[i, s]))) for s in range(S)
            ]
        else:
            scores = list((model.align.weight @ h[i])[:S]) + [-torch.inf] * (S - 4)
        centre = 0.0
        if where == "local-p":
            W_p, v_p = model.centre[0].weight, model.centre[2].weight[0]
            centre = S * torch.sigmoid(v_p @ torch.tanh(W_p @ h[i]))
        inside = [where == "global" or abs(s - centre) <= 2 for s in range(S)]
        seen = [x if near else -torch.inf for x, near in zip(scores, inside, strict=True)]
        expected = torch.tensor(seen, dtype=torch.float64).softmax(0)
        if where == "local-p":
            gaussian = [math.exp(-((s - centre) ** 2) / (2 * (2 / 2) ** 2)) for s in range(S)]
            expected *= torch.tensor(gaussian, dtype=torch.float64)
        close(weights[i, :S], expected)


@torch.no_grad()
def test_luongs_concat_is_bahdanaus_score() -> None:
    luong, bahdanau = build("luong", score="concat"), AdditiveAttention(32, 32, 32).double()
    bahdanau.load_state_dict(luong.align.state_dict())
    h, annotations, weights = first_look(luong, source := rows(*SENTENCES))
    scores = bahdanau(h[:, None], bahdanau.key(annotations))[:, 0].masked_fill(source == 0, -torch.inf)
    close(weights, scores.softmax(-1))


@torch.no_grad()
def test_luong_is_the_paper_written_out() -> None:
    model, (source, target) = cast(Luong, build("luong", score="dot", n_layers=1)), source_and_target()
    logits = model(source, target).logits
    encoder = nn.LSTM(24, 32, batch_first=True, dtype=torch.float64)
    copy_lstm(model.encoder, encoder)
    decoder = nn.LSTMCell(24 + 32, 32, dtype=torch.float64)  # reads [E y; h~]
    cell = model.decoder.layers[0]
    decoder.weight_ih.copy_(torch.cat((cell.input.weight, model.feed.weight), 1))
    decoder.weight_hh.copy_(cell.recurrent.weight)
    decoder.bias_ih.copy_(cell.input.bias)
    decoder.bias_hh.zero_()
    for i, sentence in enumerate(SENTENCES):
        annotations, (h, c) = encoder(model.table("source")(rows(sentence).flip(1)))
        h, c, h_tilde = h[0], c[0], torch.zeros(1, 32, dtype=torch.float64)
        for t, token in enumerate(target[i].tolist()):
            h, c = decoder(torch.cat((model.target_embedding.weight[[token]], h_tilde), 1), (h, c))
            context = (annotations[0] @ h[0]).softmax(0) @ annotations[0]
            h_tilde = torch.tanh(model.combine.weight @ torch.cat((context, h[0])))[None]
            close(logits[i, t], model.head(h_tilde)[0])


# Transformer


def copy_attention(ours: Any, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}.in_proj_weight": ours.in_proj.weight,
        f"{prefix}.in_proj_bias": ours.in_proj.bias,
        f"{prefix}.out_proj.weight": ours.out_proj.weight,
        f"{prefix}.out_proj.bias": ours.out_proj.bias,
    }


def torchs(model: Transformer) -> nn.Transformer:
    """Make torch's Transformer of the same weights."""
    config, dtype = model.config, model.dtype
    norm_first = config.norm_first
    sizes = (config.d_model, config.n_heads, config.n_layers, config.n_layers, config.d_ff, 0.0)
    theirs = nn.Transformer(
        *sizes, norm_first=norm_first, layer_norm_eps=config.norm_eps, batch_first=True, dtype=dtype
    )
    state: dict[str, Tensor] = {}
    for stack, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        for i, layer in enumerate(layers):
            prefix = f"{stack}.layers.{i}"
            state |= copy_attention(layer.self_attn, f"{prefix}.self_attn")
            names = {"linear1": "linear1", "linear2": "linear2", "norm1": "norm1", "norm3": "norm2"}
            if stack == "decoder":
                state |= copy_attention(layer.cross_attn, f"{prefix}.multihead_attn")
                names |= {"norm2": "norm2", "norm3": "norm3"}
            for mine, other in names.items():
                module = getattr(layer, mine)
                state |= {f"{prefix}.{other}.weight": module.weight, f"{prefix}.{other}.bias": module.bias}
        if norm_first:
            norm = getattr(model, f"{stack}_norm")
            state |= {f"{stack}.norm.weight": norm.weight, f"{stack}.norm.bias": norm.bias}
    if not norm_first:  # post-norm stacks have no norm of their own in the paper
        theirs.encoder.norm = theirs.decoder.norm = None
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_a_transformer_is_torchs(norm_first: bool, mode: str, dtype: torch.dtype) -> None:
    model, (source, target) = build("transformer", norm_first=norm_first), source_and_target()
    model = cast(Transformer, model.to(dtype).train(mode == "train"))
    theirs = torchs(model).train(mode == "train")
    x, y = (
        model.target_embedding(ids) * math.sqrt(32) + sinusoids(0, ids.shape[1], 32).to(dtype)
        for ids in (source, target)
    )
    padding = source == 0  # there True is padding
    causal = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool).triu(1)
    with torch.set_grad_enabled(mode == "train"):
        hidden = theirs(x, y, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        logits = model(source, target).logits
    expected = hidden @ model.target_embedding.weight.T
    scale = expected.abs().max().item()  # wide weights make large logits
    close(logits / scale, expected / scale, dtype)
    if mode == "train":
        real = target != 0
        ours = torch.autograd.grad(logits[real].square().sum() / scale**2, model.encoder[0].linear1.weight)[0]
        other = torch.autograd.grad(
            expected[real].square().sum() / scale**2, theirs.encoder.layers[0].linear1.weight
        )[0]
        close(ours / other.abs().max(), other / other.abs().max(), dtype)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_layers_are_torchs_layers(norm_first: bool) -> None:
    model = cast(Transformer, build("transformer", norm_first=norm_first))
    theirs = torchs(model)
    x, y = (torch.empty(2, n, 32, dtype=torch.float64).normal_(generator=seeded()) for n in (6, 5))
    close(model.encoder[0](x, None), theirs.encoder.layers[0].train()(x))
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    layer = model.decoder[1]
    ours = layer(y, None, layer.cross_attn.memory(x))
    close(ours, theirs.decoder.layers[1](y, x, tgt_mask=causal))


@pytest.mark.parametrize("vocab_size", [37000, 1000])
def test_the_base_model_has_its_size(vocab_size: int) -> None:
    entry = MODELS["transformer"]
    with torch.device("meta"):
        model = entry.cls(entry.config.from_dict({**entry.presets["base"], "vocab_size": vocab_size}))
    assert model.num_parameters() == 44_138_496 + 512 * vocab_size


def test_positions_are_sines_and_cosines_side_by_side() -> None:
    table = sinusoids(3, 40, 16)
    for row, p in enumerate(range(3, 40)):
        for i in range(8):
            angle = p / 10000 ** (2 * i / 16)
            assert math.isclose(table[row, 2 * i], math.sin(angle), abs_tol=1e-12)
            assert math.isclose(table[row, 2 * i + 1], math.cos(angle), abs_tol=1e-12)
    products = sinusoids(0, 50, 16) @ sinusoids(0, 50, 16).T  # depend on the distance only
    for distance in range(5):
        diagonal = products.diagonal(distance)
        close(diagonal, diagonal[:1].expand_as(diagonal))


def test_one_matrix_serves_source_target_and_output() -> None:
    model = cast(Transformer, build("transformer"))
    assert [name for name, _ in model.named_parameters() if "embedding" in name] == [
        "target_embedding.weight"
    ]
    assert model.head is None
    assert model.table("source") is model.table("target")
    untied = cast(Transformer, build("transformer", tie_embeddings=False))
    assert untied.table("source") is not untied.table("target")
    assert untied.num_parameters() - model.num_parameters() == 2 * 13 * 32


@torch.no_grad()
def test_a_cached_step_does_not_look_at_the_room_behind_it() -> None:
    model, (source, target) = build("transformer"), source_and_target()
    state = model.start(source)
    _, state = model.step(target[:, 0], state)
    expected, _ = model.step(target[:, 1], state.clone())
    for cache in state.decoder.layers:
        assert cache.capacity > 1
        cache.k[:, 1:], cache.v[:, 1:] = torch.nan, torch.nan
    close(model.step(target[:, 1], state)[0], expected)


def test_the_transformer_starts_as_glorot_and_bengio() -> None:
    """Uniform in sqrt(6 / (fan_in + fan_out)) of each matrix, of which in_proj packs three."""
    config = {
        "vocab_size": 300,
        "d_model": 32,
        "n_layers": 1,
        "n_heads": 4,
        "d_ff": 256,
        "tie_embeddings": False,
    }
    entry = MODELS["transformer"]
    model = entry.cls(entry.config.from_dict(config), torch.Generator().manual_seed(0))
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name}
    assert len(matrices) == 2 * 3 + 1 + 2 * 2
    for name, matrix in matrices.items():
        for part in matrix.detach().chunk(3 if "in_proj" in name else 1):
            bound = (6 / sum(part.shape)) ** 0.5
            assert 0.95 * bound < float(part.abs().max()) <= bound, name
