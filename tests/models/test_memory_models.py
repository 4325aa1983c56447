"""The models between the LSTM and Mamba: what holds for all of them, and the verbs that take each one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.bench.contenders import longscan as ours
from longscan.errors import LongscanError
from longscan.models import (
    MODELS,
    LanguageModel,
    State,
)
from longscan.models.common.mixer import Mixer
from longscan.models.common.quantization import quantize_model
from memory_models import TOLERANCE, close, draw, seeded, stirred, tiny

LANGUAGE = [name for name, entry in MODELS.items() if entry.kind == "language"]

each = pytest.mark.parametrize("name", LANGUAGE)


def mixer_of(model: LanguageModel) -> Any:
    return model.backbone.layers[0].mixer


# every model of the line


@each
def test_no_output_depends_on_what_comes_later(name: str) -> None:
    """By gradient, at every pair of places."""
    model = stirred(tiny(name))
    x = draw(1, 7, model.config.d_model).requires_grad_()
    hidden, _ = model.backbone.mix(x)
    for t in range(7):
        [gradient] = torch.autograd.grad(hidden[0, t].sum(), x, retain_graph=True)
        assert gradient[0, : t + 1].any(1).all()  # two layers, three taps: everything before is seen
        assert (gradient[0, t + 1 :].abs() <= 1e-13 * gradient.abs().max()).all()  # Fourier rounds


@each
def test_training_and_reading_agree(name: str) -> None:
    """Some models train by another path, without a final state: values and gradients are the same."""
    model, ids = stirred(tiny(name)), torch.randint(0, 13, (2, 40), generator=seeded(2))
    losses = [model.train(mode)(ids, labels=ids).loss for mode in (False, True)]
    close(*losses)
    reading, training = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for got, expected in zip(training, reading, strict=True):
        close(got, expected)


@each
def test_fewer_bits(name: str) -> None:
    """A bfloat16 model says much the same, and its states keep their types along the way."""
    model, ids = tiny(name), torch.randint(0, 13, (2, 12), generator=seeded(2))
    expected = model(ids).logits
    narrow = tiny(name).bfloat16()
    with torch.no_grad():
        output = narrow(ids)
    kinds = [tensor.dtype for _, tensor in narrow.init_state(2).named_tensors()]
    assert [tensor.dtype for _, tensor in output.state.named_tensors()] == kinds
    assert (output.logits - expected).abs().max() < TOLERANCE[torch.bfloat16] * expected.abs().max()
    state = narrow.init_state(2)
    for t in range(12):
        logits, _ = narrow.step(ids[:, t], state)
    assert [tensor.dtype for _, tensor in state.named_tensors()] == kinds
    assert (logits - expected[:, -1]).abs().max() < TOLERANCE[torch.bfloat16] * expected.abs().max()
    for layer in narrow.backbone.layers:
        assert all(layer.mixer.get_parameter(p).dtype == torch.float32 for p in layer.mixer.recurrence)


@each
def test_stored_weights(name: str) -> None:
    model, ids = tiny(name), torch.randint(0, 13, (2, 12), generator=seeded(2))
    with torch.no_grad():
        expected = model(ids).logits
        quantize_model(model, "int8")
        got = model(ids).logits
        logits, _ = model.step(ids[:, 0], model.init_state(2))
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    assert (logits - expected[:, 0]).abs().max() < 0.1 * expected.abs().max()


@each
def test_a_state_goes_through_a_file_and_back(name: str, tmp_path: Path) -> None:
    model, ids = tiny(name), torch.randint(0, 13, (1, 9), generator=seeded(2))
    _, state = model.prefill(ids)
    state.save(tmp_path / "state", position=9)
    loaded = State.load(tmp_path / "state", model).state
    expected, _ = model.step(ids[:, 0], state)
    assert torch.equal(model.step(ids[:, 0], loaded)[0], expected)


@each
def test_rows_are_copied_rewound_and_restarted(name: str) -> None:
    model, ids = tiny(name), torch.randint(0, 13, (3, 9), generator=seeded(2))
    _, state = model.prefill(ids)
    other = model.init_state(2)
    other.copy_row_(1, state, 2)
    expected, _ = model.step(torch.tensor([4]), state.select([2]))
    state.reserve(5)
    mark = state.mark()
    for token in (5, 6, 7):
        model.step(torch.full((3,), token), state)
    state.rewind(mark)
    fresh, _ = model.step(torch.tensor([4]), model.init_state(1))
    restarted = state.restarted(torch.tensor([False, True, False]), model.init_state(3))
    logits, _ = model.step(torch.tensor([4, 4, 4]), restarted)
    torch.testing.assert_close(logits[2:], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1:2], fresh, rtol=1e-4, atol=1e-5)
    logits, _ = model.step(torch.tensor([4, 4]), other)
    torch.testing.assert_close(logits[1:], expected, rtol=1e-4, atol=1e-5)


@each
def test_train_generate_and_evaluate(name: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    text = tmp_path / "poem.txt"
    text.write_text("round and round the ragged rock\n" * 40)
    sizes = ("--preset", "tiny", "--tokenizer", "bytes", "--seq-len", 24, "--batch-size", 2, "--steps", 2)
    done = cli("train", text, "--out", tmp_path / "run", "--model", name, *sizes)
    assert done.code == 0, done.err
    directory = tmp_path / "run/model"
    said = cli("generate", "round", "--model", directory, "--max-new-tokens", 5, "--seed", 0)
    assert said.code == 0, said.err
    weighed = cli("evaluate", directory, text)
    assert weighed.code == 0, weighed.err


@each
def test_bench_takes_it(name: str) -> None:
    model = {"model": name, **MODELS[name].presets["tiny"]}
    ours.train(model, batch=2, seq_len=8)()
    ours.prefill(model, seq_len=8)()
    ours.generate(model, prompt=4, n_tokens=2)()


def test_a_paper_before_the_archive_has_no_number(cli: Callable[..., Any]) -> None:
    page = cli("models", "lstm").out
    assert "Long Short-Term Memory\n" in page
    assert "arXiv" not in page


@each
def test_a_preset_to_train_is_as_large_as_others(name: str) -> None:
    entry = MODELS[name]
    with torch.device("meta"):
        model = entry.cls(entry.config.from_dict(entry.presets["tiny-lm"]))
    assert 3.4e6 < model.num_parameters() < 4.7e6


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lstm", {"d_hidden": 0}),
        ("lstm", {"cell": "elman"}),
        ("cnn", {"d_conv": 0}),
        ("cnn", {"d_inner": 0}),
        ("linear_attention", {"n_heads": 3}),
        ("linear_attention", {"d_ff": 0}),
        ("gau", {"d_attention": 0}),
        ("gau", {"max_positions": 0}),
        ("h3", {"d_shift": 0}),
        ("h3", {"d_head": 3}),
        ("h3", {"d_ff": 0}),
        ("hyena", {"order": 1}),
        ("hyena", {"frequency": 0.0}),
        ("mamba3", {"mimo_rank": 0}),
        ("mamba3", {"rope_fraction": 0.25}),
        ("mamba3", {"d_state": 3}),
        ("mamba3", {"d_head": 24}),
        ("mamba3", {"n_groups": 3}),
        ("mamba3", {"A_floor": -1.0}),
        ("mamba3", {"A_activation": "relu"}),
        ("mamba3", {"d_intermediate": -1}),
        ("mamba3", {"dt_min": 0.0}),
        ("hyena", {"n_bands": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_impossible_fields_are_named(name: str, change: dict[str, Any]) -> None:
    entry = MODELS[name]
    with pytest.raises(LongscanError, match=next(iter(change))):
        entry.config.from_dict({**entry.presets["tiny"], **change})


def test_kept_filters_follow_the_weights() -> None:
    model, ids = tiny("hyena"), torch.randint(0, 13, (1, 9), generator=seeded(2))
    for _ in range(2):
        state = model.init_state(1)
        for t in range(9):
            logits, _ = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, model(ids).logits[:, -1], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            mixer_of(model).filter_out.mul_(-3)


@each
def test_a_fused_optimizer_is_noticed(name: str) -> None:
    model, ids = tiny(name), torch.randint(0, 13, (2, 70), generator=seeded(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = None
    for _ in range(2):
        with torch.no_grad():
            logits, state = model.prefill(ids[:, :-1])
            found = torch.stack([logits, model.step(ids[:, -1], state)[0]])
            copy = tiny(name)
            copy.load_state_dict(model.state_dict())
            logits, state = copy.prefill(ids[:, :-1])
            expected = torch.stack([logits, copy.step(ids[:, -1], state)[0]])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert before is None or not torch.allclose(found, before, atol=1e-2)
        before = found
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["gau", "hyena"])
def test_texts_longer_than_it_was_made_for(name: str) -> None:
    model, ids = tiny(name, max_positions=8), torch.zeros(1, 9, dtype=torch.long)
    assert model.max_positions == 8
    with pytest.warns(UserWarning, match="longer than the 8 positions"):
        model(ids)
    _, state = model.prefill(ids[:, :8])
    with pytest.warns(UserWarning, match="longer than the 8 positions"):
        model.step(ids[:, 0], state)
    model(ids, seq_idx=torch.tensor([[0] * 5 + [1] * 4]))  # two short ones


@each
def test_a_state_of_other_rows_is_refused(name: str) -> None:
    model = tiny(name)
    with pytest.raises(ValueError, match=r"state: expected .*2.* got .*3"):
        model(torch.zeros(2, 3, dtype=torch.long), state=model.init_state(3))


@each
def test_what_sets_time_scales_does_not_decay(name: str) -> None:
    model = tiny(name)
    still = {id(parameter) for parameter in model.param_groups(0.1)[1]["params"]}
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    assert all(id(m.get_parameter(p)) in still for m in mixers for p in m.recurrence)
