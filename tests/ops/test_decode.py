"""The native decoder against the model's own step, op by op, and its promises: bits, staleness, errors."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longscan.models import Mamba, MambaConfig
from longscan.models.common.layers import PlainRMSNorm, RMSNorm
from longscan.models.common.quantization import KINDS, quantize_model
from longscan.ops import _native

PRECISIONS = ("float32", *KINDS)
# relative to the largest logit: float32 rounding, or activations in 16 bits
TOLERANCE = {"float32": 3e-6, "bf16": 3e-6, "int8": 3e-4, "int4": 3e-4}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"d_model": 64, "n_layers": 2, "vocab_size": 100},
    "odd": {
        **{"d_model": 40, "n_layers": 3, "vocab_size": 37, "d_state": 5, "d_conv": 3, "dt_rank": 7},
        **{"bias": True, "tie_embeddings": False},
    },
    "wide-state": {"d_model": 96, "n_layers": 1, "vocab_size": 50, "d_state": 33, "conv_bias": False},
    "plain-norms": {
        **{"d_model": 48, "n_layers": 2, "vocab_size": 37, "d_state": 6, "dt_rank": 5},
        **{"inner_norms": "plain", "inner_norm_eps": 1e-3, "norm_eps": 1e-4},
    },
    "learned-norms": {
        **{"d_model": 64, "n_layers": 2, "vocab_size": 37, "d_state": 19, "dt_rank": 35},
        **{"inner_norms": "learned", "bias": True, "tie_embeddings": False},
    },
    "one-tap": {"d_model": 33, "n_layers": 1, "vocab_size": 9, "d_conv": 1, "expand": 1},
}
pytestmark = pytest.mark.skipif(_native._library is None, reason="no native library")


def build(shape: str = "plain", precision: str = "float32") -> Mamba:
    model = Mamba(MambaConfig(**SHAPES[shape]), torch.Generator().manual_seed(0)).eval()
    for mixer in (layer.mixer for layer in model.backbone.layers):
        for number, norm in enumerate(mixer.inner_norms()):
            if isinstance(norm, RMSNorm):
                norm.weight.data += torch.linspace(-0.7, 0.5 + number, len(norm.weight))
    if precision != "float32":
        quantize_model(model, precision)  # type: ignore[arg-type]
    return model


def tokens(model: Mamba, *size: int) -> Tensor:
    return torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(1))


def largest(difference: Tensor, scale: Tensor) -> float:
    return float(difference.detach().abs().max() / scale.detach().abs().max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_forward_pass_and_itself_cut_anyhow(isa: str, shape: str, precision: str) -> None:
    model = build(shape, precision)
    ids = tokens(model, 7, 12)
    with torch.no_grad():
        expected = model(ids)
    one_by_one, steps = model.init_state(7), []
    for column in ids.unbind(1):
        steps.append(model.step(column, one_by_one)[0])
    logits = torch.stack(steps, 1)
    assert model._decoder is not None, "the native decoder was not used"
    assert largest(logits - expected.logits, expected.logits) < TOLERANCE[precision]
    for ours, theirs in zip(one_by_one.layers, expected.state.layers, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.numel() == 0 or largest(a - b, b) < TOLERANCE[precision]

    together = model.init_state(7)
    pieces = [model.advance(ids[:, cut], together)[0] for cut in (slice(5), slice(5, 6), slice(6, None))]
    assert torch.equal(torch.cat(pieces, 1), logits)
    alone = model.init_state(1)
    assert torch.equal(model.advance(ids[4:5], alone)[0][0], logits[4])
    for whole, cut in ((one_by_one, together), (one_by_one.select([4]), alone)):
        for ours, theirs in zip(whole.layers, cut.layers, strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", ["odd", "learned-norms"])
def test_threads_change_no_bit(shape: str, precision: str) -> None:
    model, before = build(shape, precision), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            state = model.init_state(3)
            found.append(model.advance(tokens(model, 3, 9), state)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("shape", ["plain", "plain-norms", "learned-norms"])
def test_reference_and_decoder_agree(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    model = build(shape)
    ids = tokens(model, 2, 6)
    native = model.advance(ids, model.init_state(2))[0]
    monkeypatch.setattr(_native, "_library", None)
    model._decoder = None
    reference = model.advance(ids, model.init_state(2))[0]
    assert model._decoder is None
    assert 0 < largest(native - reference, reference) < TOLERANCE["float32"]


def test_changed_weights_are_noticed() -> None:
    model = build().requires_grad_(False)
    ids, fresh = tokens(model, 1, 4), lambda: build_like(model)
    changes = {
        "in place, of a copy": lambda: model.backbone.layers[0].mixer.A_log.add_(0.5),  # type: ignore[union-attr, operator]
        "in place": lambda: model.backbone.norm_f.weight.mul_(2),
        "replaced": lambda: setattr(
            model.backbone.layers[1].norm, "weight", torch.nn.Parameter(torch.full((64,), 0.5))
        ),
        "other memory": lambda: setattr(
            model.backbone.layers[0].mixer.out_proj.weight, "data", torch.ones(64, 128)
        ),
        "loaded": lambda: model.load_state_dict(build("plain").state_dict()),
    }
    before = model.advance(ids, model.init_state(1))[0]
    for name, change in changes.items():
        change()
        after = model.advance(ids, model.init_state(1))[0]
        assert torch.equal(after, fresh().advance(ids, model.init_state(1))[0]), name
        assert not torch.equal(after, before), name
        before = after


class Adapter(nn.Module):
    """A module that an adapter stands around, with the weights of both."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.extra = base, nn.Linear(base.in_features, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + self.extra(x)


def halve(*names: str) -> Callable[[Mamba], None]:
    def change(model: Mamba) -> None:
        for name in names:
            model.get_parameter(name).data.mul_(0.5)

    return change


def own(name: str, method: str) -> Callable[[Mamba], None]:
    def change(model: Mamba) -> None:
        module = model.get_submodule(name)
        before = getattr(module, method)
        setattr(module, method, lambda *args: before(*args) * 2)

    return change


def replace(name: str, make: Callable[[Any], nn.Module]) -> Callable[[Mamba], None]:
    def change(model: Mamba) -> None:
        model.set_submodule(name, make(model.get_submodule(name)))

    return change


def other_eps(model: Mamba) -> None:
    model.backbone.norm_f.eps = 0.5


MIXER = "backbone.layers.1.mixer"
CHANGES: dict[str, Callable[[Mamba], None]] = {
    "A_log through data": halve(f"{MIXER}.A_log"),
    "the convolution through data": halve(f"{MIXER}.conv1d.weight"),
    "all through data": lambda model: [p.data.mul_(0.9) for p in model.parameters()] and None,
    "the forward of a Linear": own(f"{MIXER}.out_proj", "forward"),
    "the forward of a norm": own("backbone.norm_f", "forward"),
    "an adapter": replace(f"{MIXER}.in_proj", Adapter),
    "another Linear": replace(
        f"{MIXER}.x_proj", lambda old: copy.deepcopy(old).requires_grad_(False).double().float()
    ),
    "another layer": lambda model: model.backbone.layers.__setitem__(0, Mamba.block(model.config)),
    "eps": other_eps,
}
INNER_CHANGES: dict[str, Callable[[Mamba], None]] = {
    "one inner eps": lambda model: setattr(model.get_submodule(f"{MIXER}.b_layernorm"), "eps", 0.5),
    "an inner weight": halve(f"{MIXER}.c_layernorm.weight"),
    "the forward of an inner norm": own(f"{MIXER}.dt_layernorm", "forward"),
    "no weight": replace(f"{MIXER}.c_layernorm", lambda old: PlainRMSNorm(old.eps)),
    "a LayerNorm": replace(f"{MIXER}.dt_layernorm", lambda old: nn.LayerNorm(len(old.weight))),
}


@pytest.mark.parametrize("at", ["before the first step", "after it"])
@pytest.mark.parametrize("change", [*CHANGES, *INNER_CHANGES])
def test_a_step_is_the_forward_pass_whatever_was_changed(change: str, at: str) -> None:
    torch.manual_seed(5)
    model = build("learned-norms" if change in INNER_CHANGES else "plain")
    ids = tokens(model, 2, 3)
    if at == "after it":
        model.step(ids[:, 0], model.init_state(2))
    before = model(ids).logits
    (CHANGES | INNER_CHANGES)[change](model)
    state = model.init_state(2)
    stepped = torch.stack([model.step(column, state)[0] for column in ids.unbind(1)], 1)
    with torch.no_grad():
        expected = model(ids).logits
    assert largest(stepped - expected, expected) < TOLERANCE["float32"]
    assert change == "another Linear" or not torch.equal(expected, before), "nothing changed"


def test_a_replaced_step_and_hooks_of_all_modules_are_called() -> None:
    model = build()
    ids = tokens(model, 1, 2)
    plain, _ = model.step(ids[:, 0], model.init_state(1))
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    model.step(ids[:, 0], model.init_state(1))
    handle.remove()
    assert model.backbone.layers[0].mixer.in_proj in seen
    own("backbone.layers.0.mixer", "step")(model)
    doubled, _ = model.step(ids[:, 0], model.init_state(1))
    assert largest(doubled - plain, plain) > 1e-3


def test_layers_of_other_sizes_take_the_reference() -> None:
    model, config = build(), MambaConfig(**SHAPES["plain"], d_state=8)
    model.backbone.layers[1] = Mamba.block(config, torch.Generator().manual_seed(2))
    ids = tokens(model, 1, 3)
    state = model.init_state(1)
    stepped = torch.stack([model.step(column, state)[0] for column in ids.unbind(1)], 1)
    with torch.no_grad():
        expected = model(ids).logits
    assert largest(stepped - expected, expected) < TOLERANCE["float32"]


def build_like(model: Mamba) -> Mamba:
    other = Mamba(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_other_types_adapters_and_hooks_take_the_reference() -> None:
    model = build()
    ids = tokens(model, 1, 2)
    seen: list[Tensor] = []
    handle = model.backbone.layers[0].register_forward_hook(lambda *_: None)
    model.step(ids[:, 0], model.init_state(1))
    assert model._decoder is None or not model._decoder.fresh()
    handle.remove()
    handle = model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda *out: seen.append(out[2]))
    model.step(ids[:, 0], model.init_state(1))
    assert len(seen) == 1
    handle.remove()
    for other in (build().double(), build().bfloat16()):
        logits, _ = other.step(ids[:, 0], other.init_state(1))
        assert other._decoder is None
        assert logits.dtype == other.backbone.embedding.weight.dtype


def test_copies_and_pickles_decode_for_themselves() -> None:
    model = build()
    ids = tokens(model, 1, 3)
    expected = model.advance(ids, model.init_state(1))[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.advance(ids, twin.init_state(1))[0], expected)
        twin.backbone.embedding.weight.data.zero_()
        assert not torch.equal(twin.advance(ids, twin.init_state(1))[0], expected)
    assert torch.equal(model.advance(ids, model.init_state(1))[0], expected)


def test_a_state_whose_tensors_were_replaced_is_read_anew() -> None:
    model = build()
    ids = tokens(model, 1, 4)
    state = model.init_state(1)
    model.advance(ids, state)
    state.layers[0] = model.init_state(1).layers[0]
    expected = model.step(ids[:, 0], state.clone())[0]
    assert torch.equal(model.step(ids[:, 0], state)[0], expected)


def test_bad_ids_are_named() -> None:
    model = build()
    for bad in (-1, 104):
        with pytest.raises((ValueError, IndexError), match="expected 0 to 103, got"):
            model.step(torch.tensor([bad]), model.init_state(1))
    with pytest.raises(ValueError, match="non-empty"):
        model.advance(torch.empty(1, 0, dtype=torch.int64), model.init_state(1))
