"""The guarantee: however a text reaches a model, logits and final states are those of one plain forward pass.

Each way of reading takes several rows of different lengths and returns, per row, the logits of its tokens and
its final state; both must equal those of the row read alone in one pass. Where a way carries gradients, those
of every parameter and of the initial state must be equal too.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from longscan.models import (
    MODELS,
    CNNConfig,
    GAUConfig,
    H3Config,
    HippoConfig,
    HybridConfig,
    HyenaConfig,
    LanguageModel,
    LanguageModelConfig,
    LinearAttentionConfig,
    LlamaConfig,
    LSSLConfig,
    LSTMConfig,
    Mamba3Config,
    MambaConfig,
    S4Config,
    S4DConfig,
    State,
    Zamba2Config,
)
from longscan.models.linear_attention import LinearAttentionState

# largest difference allowed, relative to the largest value compared
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
ROUGHER = {  # each with its reason
    # two sums over the whole text with gates between: one pass is already 1e-5 from float64
    ("hyena", torch.float32): 5e-5,
    # gradients pass through powers of A, whose P and B lie far from their start here
    ("s4", torch.float64): 5e-11,
}
# some draws are so sensitive that the gradients of one pass are further than that from float64
SENSITIVE = ("mamba3",)
THOROUGH = ("mamba", "llama", "mamba3")  # drawn more often than those whose pieces other tests try too

Rows = list[Tensor]
Reading = tuple[list[Tensor], list[State]]


def build(seed: int, dtype: torch.dtype, name: str) -> LanguageModel:
    """A small model of odd sizes, every parameter far from its start so that every one matters."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=draw))]

    model = MODELS[name].cls(CONFIGS[name](pick), draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model.to(dtype).eval()  # in training a pass from the start may return no state


def mamba_config(pick: Callable[..., Any]) -> MambaConfig:
    return MambaConfig(
        d_model=pick(3, 8),
        n_layers=2,
        vocab_size=11,
        d_state=pick(1, 5, 16),
        d_conv=pick(1, 2, 4, 5),
        expand=pick(1, 2),
        dt_rank=pick(None, 2),
        conv_bias=pick(True, False),
        bias=pick(True, False),
        tie_embeddings=pick(True, False),
        inner_norms=pick("none", "plain", "learned"),
        inner_norm_eps=0.1,  # the norm of a single number has steep gradients near zero
    )


def llama_config(pick: Callable[..., Any]) -> LlamaConfig:
    n_heads = pick(2, 4)
    return LlamaConfig(
        d_model=pick(6, 8),
        n_layers=2,
        vocab_size=11,
        n_heads=n_heads,
        n_kv_heads=pick(None, 1, 2),
        d_head=pick(2, 6),
        d_ff=pick(5, None),
        rope_theta=pick(1e4, 50.0),
        tie_embeddings=pick(True, False),
    )


def lstm_config(pick: Callable[..., Any]) -> LSTMConfig:
    return LSTMConfig(
        d_model=pick(3, 8),
        n_layers=2,
        vocab_size=11,
        d_hidden=pick(None, 1, 5),
        cell=pick("lstm", "gru"),
        tie_embeddings=pick(True, False),
    )


def cnn_config(pick: Callable[..., Any]) -> CNNConfig:
    return CNNConfig(
        d_model=pick(3, 8),
        n_layers=pick(2, 4),
        vocab_size=11,
        d_conv=pick(1, 2, 3, 5),
        d_inner=pick(None, 5),
        tie_embeddings=pick(True, False),
    )


def linear_attention_config(pick: Callable[..., Any]) -> LinearAttentionConfig:
    return LinearAttentionConfig(
        d_model=pick(4, 8),
        n_layers=2,
        vocab_size=11,
        n_heads=pick(1, 2, 4),
        d_ff=pick(None, 5),
        tie_embeddings=pick(True, False),
    )


def gau_config(pick: Callable[..., Any]) -> GAUConfig:
    return GAUConfig(
        d_model=pick(3, 8),
        n_layers=2,
        vocab_size=11,
        expand=pick(1, 2),
        d_attention=pick(3, 4),
        max_positions=300,
        tie_embeddings=pick(True, False),
    )


def h3_config(pick: Callable[..., Any]) -> H3Config:
    return H3Config(
        d_model=8,
        n_layers=2,
        vocab_size=11,
        d_state=pick(2, 6),
        d_shift=pick(1, 2, 4),
        d_head=pick(1, 2),
        d_ff=pick(None, 5),
        tie_embeddings=pick(True, False),
    )


def hyena_config(pick: Callable[..., Any]) -> HyenaConfig:
    return HyenaConfig(
        d_model=pick(3, 8),
        n_layers=2,
        vocab_size=11,
        order=pick(2, 3),
        d_conv=pick(1, 3),
        d_filter=pick(4, 7),
        n_bands=pick(1, 3),
        frequency=1.0,
        max_positions=400,
        tie_embeddings=pick(True, False),
    )


def hippo_config(pick: Callable[..., Any]) -> HippoConfig:
    return HippoConfig(
        d_model=pick(3, 8),
        n_layers=2,
        vocab_size=11,
        d_hidden=pick(None, 5),
        d_memory=pick(1, 3),
        d_state=pick(2, 6),
        measure=pick("legs", "legs", "legt", "lagt", "fourier"),
        window=pick(8.0, 20.5),
        order=pick("hidden-first", "memory-first"),
        tie_embeddings=pick(True, False),
    )


def lssl_config(pick: Callable[..., Any]) -> LSSLConfig:
    return LSSLConfig(
        d_model=pick(3, 8),
        n_layers=2,
        vocab_size=11,
        d_state=pick(1, 5, 6),
        init=pick("legs", "legt", "lagt", "random"),
        n_outputs=pick(1, 3),
        alpha=pick(0.5, 1.0),
        tie_embeddings=pick(True, False),
    )


def s4_config(pick: Callable[..., Any]) -> S4Config:
    return S4Config(
        d_model=pick(3, 8),
        n_layers=2,
        vocab_size=11,
        d_state=pick(2, 6),
        init=pick("legs", "legt", "lagt", "fourier", "random"),
        l_max=pick(None, 16),
        tie_embeddings=pick(True, False),
    )


def s4d_config(pick: Callable[..., Any]) -> S4DConfig:
    discretization = pick("zoh", "bilinear", "softmax")
    return S4DConfig(
        d_model=pick(3, 8),
        n_layers=2,
        vocab_size=11,
        d_state=pick(2, 6),
        init=pick("legs", "inv", "lin", "real"),
        discretization=discretization,
        l_max=30 if discretization == "softmax" else None,
        tie_embeddings=pick(True, False),
    )


def mamba3_config(pick: Callable[..., Any]) -> Mamba3Config:
    d_head = pick(1, 2, 4)
    return Mamba3Config(
        d_model=8,
        n_layers=2,
        vocab_size=11,
        d_state=pick(4, 5, 16),
        d_head=d_head,
        n_groups=pick(1, 2),
        expand=pick(1, 2),
        mimo_rank=pick(None, None, 1, 3),
        rope_fraction=pick(0.5, 1.0),
        A_activation=pick("heavy-tail", "heavy-tail", "softplus"),
        outproj_norm=d_head > 1 and pick(False, True),  # of one channel it leaves the sign only
        d_intermediate=pick(0, 5),
        tie_embeddings=pick(True, False),
    )


def hybrid_config(pick: Callable[..., Any]) -> HybridConfig:
    d_model, pattern = pick(6, 12), pick("M*", "P-", "EP", "-*M", "m-*E")
    return HybridConfig(
        pattern=pattern,
        vocab_size=11,
        d_model=d_model,
        n_heads=2,
        n_kv_heads=pick(None, 1),
        d_head=pick(4, 8),
        rope_theta=pick(None, 50.0),
        rotary_fraction=pick(1.0, 0.5),
        attention_conv=0 if "P" in pattern else pick(0, 3),
        d_ssm=12,
        d_ssm_head=pick(1, 3),
        n_ssm_groups=pick(1, 2),
        d_state=pick(1, 5),
        d_conv=pick(1, 2, 4),
        gated_norm=pick("gate-first", "norm-first", "none"),
        dt_limit=pick(None, (0.3, 0.9)),
        inner_norms=pick("none", "plain", "learned"),
        d_ff=5,
        feed_forward=pick("swiglu", "relu2"),
        n_experts=6,
        n_active_experts=2,
        d_expert=3,
        d_shared_expert=pick(0, 4),
        d_latent=pick(0, 5),
        router=pick("topk-softmax", "softmax-topk", "sigmoid"),
        n_expert_groups=3,
        n_active_groups=2,
        embedding_multiplier=1.5,
        residual_multiplier=0.6,
        logits_multiplier=0.8,
        attention_in_multiplier=1.2,
        attention_out_multiplier=0.7,
        key_multiplier=0.9,
        ssm_in_multiplier=1.3,
        ssm_out_multiplier=0.8,
        ssm_multipliers=(0.5, 1.5, 0.7, 1.2, 0.9),
        gate_multiplier=0.9,
        down_multiplier=1.1,
        tie_embeddings=pick(True, False),
    )


def zamba2_config(pick: Callable[..., Any]) -> Zamba2Config:
    return Zamba2Config(
        pattern=pick("ZM", "MZZ"),
        vocab_size=11,
        d_model=pick(4, 6),
        n_heads=2,
        n_kv_heads=pick(None, 1),
        rope_theta=pick(None, 50.0),
        d_ff=5,
        n_shared=1,
        adapter_rank=2,
        attention_adapters=pick(True, False),
        d_ssm=12,
        d_ssm_head=3,
        n_ssm_groups=pick(1, 2),
        d_state=pick(1, 5),
        d_conv=pick(1, 4),
        bias=pick(True, False),
        tie_embeddings=pick(True, False),
    )


CONFIGS: dict[str, Callable[..., LanguageModelConfig]] = {
    "lstm": lstm_config,
    "cnn": cnn_config,
    "linear_attention": linear_attention_config,
    "hippo": hippo_config,
    "lssl": lssl_config,
    "s4": s4_config,
    "s4d": s4d_config,
    "gau": gau_config,
    "h3": h3_config,
    "hyena": hyena_config,
    "llama": llama_config,
    "mamba": mamba_config,
    "mamba3": mamba3_config,
    "hybrid": hybrid_config,
    "zamba2": zamba2_config,
}


def draw_rows(seed: int, lengths: list[int]) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 11, (length,), generator=draw) for length in lengths]


def draw_state(model: LanguageModel, rows: int) -> State:
    """Some state; where it grows with the text the rows are of different lengths, with room behind them."""
    draw = torch.Generator().manual_seed(7)
    state = model.init_state(rows)
    state.reserve(5)
    state = state.map(lambda t: torch.randn(t.shape, generator=draw).to(t.dtype))
    lengths = torch.randint(0, 6, (rows,), generator=draw)
    for i, layer in enumerate(state.layers):
        if "length" in layer._fields:
            layer = layer._replace(length=lengths.clone())
        if isinstance(layer, LinearAttentionState):  # a sum of positive features, which is divided by
            layer = layer._replace(kv=layer.kv.abs())
        state.layers[i] = layer
    return state


def alone(model: LanguageModel, rows: Rows, start: State, seed: int) -> Reading:
    """What all others must equal."""
    outputs = [model(row[None], state=start.select([i])) for i, row in enumerate(rows)]
    return [output.logits[0] for output in outputs], [output.state for output in outputs]


def in_chunks(model: LanguageModel, rows: Rows, start: State, seed: int) -> Reading:
    """Each row cut at random places, the state carried along."""
    draw = torch.Generator().manual_seed(seed)
    logits, states = [], []
    for i, row in enumerate(rows):
        state, pieces = start.select([i]), []
        cuts = torch.rand(len(row) - 1, generator=draw) < 0.3
        sizes = torch.diff(torch.cat([torch.tensor([0]), cuts.nonzero()[:, 0] + 1, torch.tensor([len(row)])]))
        for piece in row.split(sizes.tolist()):
            output = model(piece[None], state=state)
            state = output.state
            pieces.append(output.logits[0])
        logits.append(torch.cat(pieces))
        states.append(state)
    return logits, states


def padded(model: LanguageModel, rows: Rows, start: State, seed: int, side: str) -> Reading:
    """All rows in one batch, with padding before, behind or anywhere among the tokens."""
    draw = torch.Generator().manual_seed(seed)
    ids, seq_idx = lay_out(rows, draw, side)
    output = model(ids, state=start, seq_idx=seq_idx)
    return (
        [row[idx >= 0] for row, idx in zip(output.logits, seq_idx, strict=True)],
        [output.state.select([i]) for i in range(len(rows))],
    )


def lay_out(rows: Rows, draw: torch.Generator, side: str) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows) + int(torch.randint(3, (), generator=draw))
    ids = torch.randint(0, 11, (len(rows), width), generator=draw)  # padding holds arbitrary tokens
    seq_idx = torch.full((len(rows), width), -1)
    for i, row in enumerate(rows):
        places = {
            "left": torch.arange(width - len(row), width),
            "right": torch.arange(len(row)),
            "scattered": torch.randperm(width, generator=draw)[: len(row)].sort().values,
        }[side]
        ids[i, places] = row
        seq_idx[i, places] = i
    return ids, seq_idx


def left_padded(model: LanguageModel, rows: Rows, start: State, seed: int) -> Reading:
    return padded(model, rows, start, seed, "left")


def right_padded(model: LanguageModel, rows: Rows, start: State, seed: int) -> Reading:
    return padded(model, rows, start, seed, "right")


def scattered(model: LanguageModel, rows: Rows, start: State, seed: int) -> Reading:
    return padded(model, rows, start, seed, "scattered")


def step_by_step(model: LanguageModel, rows: Rows, start: State, seed: int) -> Reading:
    """One token at a time; rows of a batch that are done leave it."""
    state, logits = start.clone(), [[] for _ in rows]
    active, finals = list(range(len(rows))), [None] * len(rows)
    for t in range(max(len(row) for row in rows)):
        out, same = model.step(torch.stack([rows[i][t] for i in active]), state)
        assert same is state
        for place, i in enumerate(active):
            logits[i].append(out[place])
            if t + 1 == len(rows[i]):
                finals[i] = state.select([place])
        left = [place for place, i in enumerate(active) if t + 1 < len(rows[i])]
        state, active = state.select(left), [active[place] for place in left]
    return [torch.stack(pieces) for pieces in logits], finals


names = pytest.mark.parametrize("name", CONFIGS)
DIFFERENTIABLE = [in_chunks, left_padded, right_padded, scattered]
CASES = st.tuples(st.integers(0, 999), st.lists(st.integers(1, 75), min_size=1, max_size=3))
few = settings(max_examples=3, deadline=None, derandomize=True, database=None)


def allowed(name: str, dtype: torch.dtype) -> float:
    """The largest difference for a model."""
    return ROUGHER.get((name, dtype), TOLERANCE[dtype])


def drawn(name: str, case: tuple[int, list[int]]) -> Iterator[tuple[int, list[int]]]:
    """A seed and the lengths of rows; several seeds for the models that matter most."""
    seed, lengths = case
    for more in range(4 if name in THOROUGH else 1):
        yield seed + 1000 * more, lengths


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if expected.numel():
        got, expected = got.detach(), expected.detach()
        assert (got - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)


def distance(got: Tensor, expected: Tensor) -> float:
    """How far apart two tensors are, as `assert_close` counts."""
    if not expected.numel():
        return 0.0
    return float((got - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1.0))


def assert_same(got: Reading, expected: Reading, tolerance: float) -> None:
    for a, b in zip(got[0], expected[0], strict=True):
        assert_close(a, b, tolerance)
    for a, b in zip(got[1], expected[1], strict=True):
        assert_states_close(a, b, tolerance)


def assert_states_close(got: State, expected: State, tolerance: float) -> None:
    for a, b in zip(got.used().layers, expected.used().layers, strict=True):
        for field, x, y in zip(a._fields, a, b, strict=True):
            if field == "length":
                assert torch.equal(x, y)
            else:
                assert_close(x, y, tolerance)


@names
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32"])
@pytest.mark.parametrize("way", [*DIFFERENTIABLE, step_by_step])
@few
@given(case=CASES)
def test_every_way_of_reading_is_one_forward_pass(
    way: Callable[..., Reading], dtype: torch.dtype, name: str, case
) -> None:
    for seed, lengths in drawn(name, case):
        model, rows = build(seed, dtype, name), draw_rows(seed, lengths)
        start = draw_state(model, len(rows))
        before = start.map(torch.clone)
        with torch.no_grad():
            assert_same(way(model, rows, start, seed), alone(model, rows, start, seed), allowed(name, dtype))
        for untouched, layer in zip(before.layers, start.layers, strict=True):
            assert all(map(torch.equal, untouched, layer))


@names
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32"])
@few
@given(case=CASES)
def test_packed_rows_are_separate_forward_passes(dtype: torch.dtype, name: str, case) -> None:
    """All rows behind one another in one: the first continues the state, the others start from nothing."""
    for seed, lengths in drawn(name, case):
        model, rows = build(seed, dtype, name), draw_rows(seed, lengths)
        start = draw_state(model, 1)
        numbers_of = [torch.full((len(row),), 3 * i, dtype=torch.int32) for i, row in enumerate(rows)]
        seq_idx = torch.cat(numbers_of)[None]
        output = model(torch.cat(rows)[None], state=start, seq_idx=seq_idx)
        separate = [model(row[None], state=None if i else start) for i, row in enumerate(rows)]
        expected = torch.cat([one.logits[0] for one in separate])
        assert_close(output.logits[0], expected, allowed(name, dtype))
        assert_states_close(output.state, separate[-1].state, allowed(name, dtype))
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed))
        packed_gradients, separate_gradients = (
            torch.autograd.grad((logits * weight).sum(), list(model.parameters()))
            for logits in (output.logits[0], expected)
        )
        for got, want in zip(packed_gradients, separate_gradients, strict=True):
            assert_close(got, want, allowed(name, dtype))


@names
@pytest.mark.parametrize("side", ["left", "right", "scattered", "packed"])
@few
@given(case=CASES, chunk_size=st.integers(1, 40))
def test_prefill_is_the_end_of_a_forward_pass(side: str, name: str, case, chunk_size: int) -> None:
    """Chunks of any size, cutting anywhere: through padding, between packed sequences, inside them."""
    for seed, lengths in drawn(name, case):
        model, rows = build(seed, torch.float64, name), draw_rows(seed, lengths)
        if side == "packed":
            ids, seq_idx = lay_out([torch.cat(rows)], torch.Generator().manual_seed(seed), "scattered")
            seq_idx[seq_idx >= 0] = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
            start = draw_state(model, 1)
            expected = model(rows[-1][None], state=start if len(rows) == 1 else None)
            logits, states = expected.logits[:, -1], [expected.state]
        else:
            ids, seq_idx = lay_out(rows, torch.Generator().manual_seed(seed), side)
            start = draw_state(model, len(rows))
            separate, states = alone(model, rows, start, seed)
            logits = torch.stack([row[-1] for row in separate])
        got, state = model.prefill(ids, start, seq_idx, chunk_size)
        assert_close(got, logits, allowed(name, torch.float64))
        for i, expected_state in enumerate(states):
            assert_states_close(state.select([i]), expected_state, allowed(name, torch.float64))


@names
def test_prefill_without_seq_idx_and_without_a_state(name: str) -> None:
    model = build(3, torch.float64, name)
    ids = torch.stack(draw_rows(0, [50, 50]))
    expected = model(ids)
    for chunk_size in (1, 7, 50, 1024):
        logits, state = model.prefill(ids, chunk_size=chunk_size)
        assert_close(logits, expected.logits[:, -1], allowed(name, torch.float64))
        assert_states_close(state, expected.state, allowed(name, torch.float64))


def gradients(model: LanguageModel, rows: Rows, start: State, way: Callable[..., Reading]) -> list[Tensor]:
    """Of a loss that weighs all logits and all of the final states: to the parameters and the start."""
    draw = torch.Generator().manual_seed(5)
    start = start.map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    logits, states = way(model, rows, start, 1)
    tensors = [*logits, *(tensor for state in states for tensor in numbers(state.used()))]
    loss = sum((tensor * torch.randn(tensor.shape, generator=draw)).sum() for tensor in tensors)
    inputs = [tensor for tensor in (*model.parameters(), *numbers(start)) if tensor.numel()]
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def numbers(state: State) -> list[Tensor]:
    """All of a state but its counts."""
    return [tensor for layer in state.layers for tensor in layer if tensor.is_floating_point()]


@names
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32"])
@pytest.mark.parametrize("way", DIFFERENTIABLE)
@settings(few, max_examples=2)
@given(case=CASES)
def test_gradients_do_not_depend_on_the_way_either(
    way: Callable[..., Reading], dtype: torch.dtype, name: str, case
) -> None:
    """Chunks with a carried state are no truncation: gradients run through the states to the first token."""
    for seed, lengths in drawn(name, case):
        model, rows = build(seed, dtype, name), draw_rows(seed, lengths)
        start = draw_state(model, len(rows))
        expected = gradients(model, rows, start, alone)
        tolerances = [allowed(name, dtype)] * len(expected)
        got = gradients(model, rows, start, way)
        if name in SENSITIVE and dtype == torch.float32:
            wide = start.map(lambda tensor: tensor.double())
            exact = gradients(copy.deepcopy(model).double(), rows, wide, alone)
            tolerances = [max(*pair) for pair in zip(tolerances, map(distance, expected, exact), strict=True)]
            # two ways may err in opposite directions: then this one has to be as near to float64 as one pass
            expected = [
                min(pair, key=lambda one, ours=ours: distance(ours, one))
                for ours, *pair in zip(got, expected, exact, strict=True)
            ]
            got, expected = ([tensor.double() for tensor in some] for some in (got, expected))
        for ours, theirs, tolerance in zip(got, expected, tolerances, strict=True):
            assert_close(ours, theirs, tolerance)


@names
def test_a_forked_state_goes_two_ways(name: str) -> None:
    model = build(1, torch.float64, name)
    [row] = draw_rows(2, [20])
    _, state = model.prefill(row[None])
    fork = state.select([0, 0, 0])
    model.step(torch.tensor([1, 2, 3]), fork)
    for i, token in enumerate((1, 2, 3)):
        expected = model(torch.cat([row, torch.tensor([token])])[None]).state
        assert_states_close(fork.select([i]), expected, allowed(name, torch.float64))
