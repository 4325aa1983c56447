"""Every model: sizes, start, configuration, loss, parameter groups, types, devices, the state."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longscan.checkpoints.formats import FORMATS
from longscan.errors import LongscanError
from longscan.models import MODELS, LanguageModel, Mamba, MambaConfig
from longscan.models.common.losses import IGNORE, linear_loss, next_tokens
from longscan.models.common.mixer import Mixer
from longscan.models.mamba import PRESETS

VERBS = {
    "translation": {"translate"},
    "masked": {"train", "classify", "fill-mask", "embed"},
    "language": {"train", "generate", "evaluate", "classify", "remember"},
    "image": {"classify"},
}
PUBLISHED = {
    "130m": 129_135_360,
    "370m": 371_516_416,
    "790m": 793_204_224,
    "1.4b": 1_372_178_432,
    "2.8b": 2_768_345_600,
    "falcon-mamba-7b": 7_272_665_088,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**fields: Any) -> Mamba:
    return Mamba(
        MambaConfig(**{"d_model": 16, "n_layers": 2, "vocab_size": 13, "d_state": 4, **fields}), seeded()
    )


def draw_ids(batch: int = 2, seq_len: int = 20, vocab_size: int = 13) -> Tensor:
    return torch.randint(0, vocab_size, (batch, seq_len), generator=seeded(1))


# the line of models


def test_the_line_is_in_order_and_complete() -> None:
    years = [entry.year for entry in MODELS.values()]
    assert years == sorted(years)
    assert list(MODELS) == [entry.name for entry in MODELS.values()]
    for entry in MODELS.values():
        assert "tiny" in entry.presets
        assert set(entry.verbs) <= VERBS[entry.kind]


def test_the_tiny_presets_of_image_models_have_one_size() -> None:
    sizes = {
        name: entry.presets["tiny"]["image_size"] for name, entry in MODELS.items() if entry.kind == "image"
    }
    assert sizes == dict.fromkeys(("resnet", "vit", "vim", "vmamba", "videomamba"), 32)


@pytest.mark.parametrize("name", [entry.name for entry in MODELS.values() if entry.kind == "language"])
def test_every_model_reads_steps_and_learns(name: str) -> None:
    entry = MODELS[name]
    model = entry.cls(entry.config.from_dict(entry.presets["tiny"]), generator=seeded())
    assert isinstance(model, LanguageModel)
    assert model.config == entry.config.from_dict(model.config.to_dict())
    ids = draw_ids(2, 9, model.config.vocab_size)
    output = model(ids, labels=ids)
    assert output.logits.shape == (2, 9, model.config.padded_vocab_size)
    assert abs(output.loss.item() - math.log(model.config.vocab_size)) < 0.5  # it starts by guessing
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    state = model.init_state(2)
    for t in range(9):
        logits, state = model.step(ids[:, t], state)
    torch.testing.assert_close(logits, output.logits[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_sizes(preset: str) -> None:
    with torch.device("meta"):
        model = Mamba(MambaConfig(**PRESETS[preset]))
    assert model.num_parameters() == PUBLISHED[preset]
    assert model.config.padded_vocab_size == (65024 if preset == "falcon-mamba-7b" else 50280)


# how a Mamba starts


def test_it_starts_as_the_official_code_does() -> None:
    config = MambaConfig(d_model=256, n_layers=4, vocab_size=1000, bias=True)
    model = Mamba(config, seeded())
    embedding = model.backbone.embedding.weight
    assert abs(embedding.std().item() - 0.02) < 1e-3
    for layer in model.backbone.layers:
        mixer = layer.mixer
        assert torch.equal(mixer.A_log, torch.arange(1.0, 17).log().expand(512, 16))
        assert torch.equal(mixer.D, torch.ones(512))
        assert torch.equal(layer.norm.weight, torch.ones(256))
        assert not mixer.in_proj.bias.any()
        assert not mixer.out_proj.bias.any()
        assert mixer.x_proj.bias is None
        assert_uniform(mixer.in_proj.weight, 256**-0.5)
        assert_uniform(mixer.x_proj.weight, 512**-0.5)
        assert_uniform(mixer.out_proj.weight, 512**-0.5 / math.sqrt(4))
        assert_uniform(mixer.conv1d.weight, 4**-0.5)
        assert_uniform(mixer.conv1d.bias, 4**-0.5)
        assert_uniform(mixer.dt_proj.weight, 16**-0.5)
        log_dt = F.softplus(mixer.dt_proj.bias).log()
        middle, half = (math.log(0.1) + math.log(0.001)) / 2, (math.log(0.1) - math.log(0.001)) / 2
        assert_uniform(log_dt - middle, half)


def assert_uniform(values: Tensor, bound: float) -> None:
    """Whether the values fill (-bound, bound) evenly."""
    assert values.abs().max() <= bound * (1 + 1e-5)
    assert values.abs().max() > 0.95 * bound
    assert abs(values.mean()) < 0.1 * bound
    assert abs(values.std() / (bound / math.sqrt(3)) - 1) < 0.08


def test_constant_and_bounded_time_steps() -> None:
    mixer = (
        small(dt_init="constant", dt_scale=2.0, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3)
        .backbone.layers[0]
        .mixer
    )
    assert torch.equal(mixer.dt_proj.weight, torch.full((32, 1), 2.0))
    torch.testing.assert_close(F.softplus(mixer.dt_proj.bias), torch.full((32,), 1e-3), rtol=1e-3, atol=0)


def test_the_generator_alone_decides() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = small().state_dict(), small().state_dict(), Mamba(small().config, seeded(1)).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["backbone.embedding.weight"], c["backbone.embedding.weight"])
    globally = [Mamba(small().config).state_dict() for _ in range(2) if torch.manual_seed(4)]
    assert all(torch.equal(globally[0][name], globally[1][name]) for name in a)


# configuration


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"d_model": 0}, "d_model"),
        ({"n_layers": -1}, "n_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"d_state": 0}, "d_state"),
        ({"d_conv": 0}, "d_conv"),
        ({"expand": 1.5}, "expand"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"dt_min": 1.0, "dt_max": 0.5}, "dt_max"),
        ({"dt_init": "zero"}, "dt_init"),
        ({"dt_scale": 0.0}, "dt_scale"),
        ({"dt_init_floor": 0.0}, "dt_init_floor"),
        ({"inner_norms": "rms"}, "inner_norms"),
        ({"inner_norm_eps": -1.0}, "inner_norm_eps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_impossible_fields_are_named(change: dict[str, Any], word: str) -> None:
    fields = {"d_model": 16, "n_layers": 1, "vocab_size": 13, **change}
    with pytest.raises(LongscanError, match=word):
        MambaConfig(**fields)
    with pytest.raises(LongscanError, match=word):
        MambaConfig.from_dict(fields)


def test_derived_sizes() -> None:
    config = MambaConfig(d_model=100, n_layers=1, vocab_size=9, expand=3)
    assert (config.d_inner, config.rank, config.padded_vocab_size) == (300, 7, 16)
    assert config.replace(dt_rank=5, pad_vocab_size_multiple=1).rank == 5
    assert config.replace(d_model=160).rank == 10
    assert config.replace(pad_vocab_size_multiple=1).padded_vocab_size == 9


def test_rename_gives_our_names() -> None:
    one = torch.zeros(1)
    theirs = {"backbone.embeddings.weight": one, "backbone.layers.0.mixer.D": one, "lm_head.weight": one}
    ours = ["backbone.embedding.weight", "backbone.layers.0.mixer.D", "lm_head.weight"]
    assert list(FORMATS["mamba"].rename(theirs)) == ours
    assert list(FORMATS["mamba"].rename(FORMATS["mamba"].rename(theirs))) == ours


# the head and the loss


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = small(), small(tie_embeddings=False)
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.num_parameters() == tied.num_parameters() + 16 * 16
    assert sorted({*untied.state_dict()} - {*tied.state_dict()}) == ["lm_head.weight"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_loss_without_logits_is_the_loss(tied: bool) -> None:
    """Both forms, value and gradients, against one line of torch; padded rows of the head take no part."""
    model, ids = small(tie_embeddings=tied).double(), draw_ids()
    labels = ids.masked_fill(torch.rand(ids.shape, generator=seeded(2)) < 0.3, IGNORE)
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1, :13].flatten(0, 1), labels[:, 1:].flatten())
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for return_logits in (True, False):
        output = model(ids, labels=labels, return_logits=return_logits)
        assert (output.logits is not None) == return_logits
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(3 * output.loss, list(model.parameters())), [3 * g for g in wanted]
        )
    head = model.backbone.embedding.weight if tied else model.lm_head.weight
    with torch.no_grad():
        head[13:] = 1e3
        for return_logits in (True, False):  # without gradients the loss takes another path
            torch.testing.assert_close(model(ids, labels=labels, return_logits=return_logits).loss, expected)


def test_the_loss_in_several_pieces() -> None:
    draw = seeded()
    hidden = torch.randn(300, 4, generator=draw, requires_grad=True)
    weight = torch.randn(20008, 4, generator=draw, requires_grad=True)
    targets = torch.randint(0, 20000, (300,), generator=draw)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        loss = linear_loss(hidden, weight, targets, 20000)
    assert max(saved) <= weight.numel()  # nothing of the size of the logits waits for the backward pass
    expected = F.cross_entropy(F.linear(hidden, weight)[:, :20000], targets)
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(x, [hidden, weight], retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    penalties = [
        torch.autograd.grad(x, hidden, create_graph=True)[0].square().sum() for x in (loss, expected)
    ]
    got, wanted = (torch.autograd.grad(x, [hidden, weight]) for x in penalties)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-10)


def test_no_target_no_loss() -> None:
    model, ids = small(), draw_ids()
    for return_logits in (True, False):
        loss = model(ids, labels=torch.full_like(ids, IGNORE), return_logits=return_logits).loss
        assert loss.item() == 0.0
        assert not any(g.any() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_targets_stay_inside_their_sequence() -> None:
    labels = torch.arange(10, 18)[None]
    seq_idx = torch.tensor([[-1, 0, 0, 5, 5, -1, -1, 5]])
    assert next_tokens(labels).tolist() == [[11, 12, 13, 14, 15, 16, 17, IGNORE]]
    assert next_tokens(labels, seq_idx).tolist() == [[IGNORE, 12, IGNORE, 14, *[IGNORE] * 4]]


def test_the_loss_of_a_padded_and_packed_batch() -> None:
    """Mean over the tokens that have a successor in their own sequence, wherever they lie."""
    model, ids = small().double(), draw_ids(3, 12)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7, [-1] * 4 + [0] * 8, [0] * 9 + [-1] * 3])
    parts = [ids[0, :5], ids[0, 5:], ids[1, 4:], ids[2, :9]]
    losses = [model(part[None], labels=part[None]).loss * (len(part) - 1) for part in parts]
    expected = sum(losses) / sum(len(part) - 1 for part in parts)
    for return_logits in (True, False):
        loss = model(ids, labels=ids, seq_idx=seq_idx, return_logits=return_logits).loss
        torch.testing.assert_close(loss, expected)


def test_token_losses_add_up() -> None:
    model, ids = small(), draw_ids()
    hidden, _ = model.backbone(ids)
    losses = model.token_losses(hidden, next_tokens(ids))
    assert losses.shape == ids.shape
    assert not losses[:, -1].any()
    torch.testing.assert_close(losses.sum() / (2 * 19), model(ids, labels=ids).loss)


# modules, parameters and types


def test_projections_are_called_as_modules() -> None:
    """So that hooks fire and adapters may replace them, the head included when it is one."""
    model, ids = small(tie_embeddings=False), draw_ids()
    seen: set[str] = set()
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        module = model.backbone.layers[0].mixer.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    expected = model(ids, labels=ids)
    assert seen == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    seen.clear()
    model.step(ids[:, 0], model.init_state(2))
    assert seen == {"in_proj", "x_proj", "dt_proj", "out_proj"}

    class Colder(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * self.inner(x)

    model.lm_head = Colder(model.lm_head)
    colder = F.cross_entropy(0.5 * expected.logits[:, :-1, :13].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids, return_logits=False).loss, colder)


def test_what_decays() -> None:
    model = small(tie_embeddings=False, bias=True)
    model.backbone.layers[1].requires_grad_(False)
    decaying, still = model.param_groups(0.1)
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layer = "backbone.layers.0."
    assert {names[id(p)] for p in decaying["params"]} == {
        "backbone.embedding.weight",
        "lm_head.weight",
        *(f"{layer}mixer.{name}.weight" for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")),
    }
    assert {names[id(p)] for p in still["params"]} == {
        "backbone.norm_f.weight",
        layer + "norm.weight",
        *(f"{layer}mixer.{name}" for name in ("A_log", "D")),
        *(f"{layer}mixer.{name}.bias" for name in ("in_proj", "conv1d", "dt_proj", "out_proj")),
    }
    torch.optim.AdamW(model.param_groups(0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_narrow_weights_keep_what_must_stay_float32(dtype: torch.dtype) -> None:
    model, ids = small(), draw_ids()
    expected = model(ids, labels=ids)
    narrow = small().to(dtype)
    for mixer in (layer.mixer for layer in narrow.backbone.layers):
        assert isinstance(mixer, Mixer)
        assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == set(
            mixer.recurrence
        )
        assert mixer.in_proj.weight.dtype == dtype
    output = narrow(ids, labels=ids, return_hidden=True)
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.float32
    assert [hidden.dtype for hidden in output.hidden] == [torch.float32, torch.float32, dtype]
    assert all(t.dtype == torch.float32 for layer in output.state.layers for t in layer)
    assert (output.logits - expected.logits).abs().max() < 0.03 * expected.logits.abs().max()
    in_pieces = narrow(ids, labels=ids, return_logits=False).loss
    torch.testing.assert_close(in_pieces, output.loss, rtol=1e-3, atol=0)
    in_pieces.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in narrow.parameters())
    _, state = narrow.step(ids[:, 0], narrow.init_state(2))
    assert all(t.dtype == torch.float32 for layer in state.layers for t in layer)
    narrow.to(dtype)  # with gradients present
    assert narrow.backbone.layers[0].mixer.A_log.grad.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in narrow.float().parameters())


def test_the_residual_may_be_narrow_too() -> None:
    output = small(residual_in_fp32=False).bfloat16()(draw_ids(), return_hidden=True)
    assert {hidden.dtype for hidden in output.hidden} == {torch.bfloat16}


def test_hidden_states_are_the_stream_before_each_block_and_what_the_head_reads() -> None:
    model, ids = small(), draw_ids()
    output = model(ids, return_hidden=True)
    assert len(output.hidden) == 3
    assert torch.equal(output.hidden[0], model.backbone.embedding(ids))
    assert torch.equal(model.head(output.hidden[-1]), output.logits)
    assert model(ids).hidden is None


# devices and compilers


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = Mamba(MambaConfig(**PRESETS["130m"]))
        ids = torch.zeros(2, 5, dtype=torch.long)
        output = model(ids, labels=ids, seq_idx=torch.zeros_like(ids), state=model.init_state(2))
        assert output.logits.shape == (2, 5, 50280)
        output.loss.backward()
        model(ids, labels=ids, return_logits=False).loss.backward()
        logits, _ = model.step(ids[:, 0], model.init_state(2))
    assert logits.shape == (2, 50280)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_weights_assigned_to_a_model_on_the_meta_device() -> None:
    source, ids = small(), draw_ids()
    with torch.device("meta"):
        model = Mamba(source.config)
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(ids).logits, source(ids).logits)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch's own, on tracing
def test_one_graph_under_torch_compile() -> None:
    model, ids = small(n_layers=1), draw_ids()
    seq_idx = torch.tensor([[0] * 8 + [1] * 12, [-1] * 5 + [0] * 15])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(ids, seq_idx=seq_idx, state=model.init_state(2), labels=ids, return_hidden=True)
    got = compiled(ids, seq_idx=seq_idx, state=model.init_state(2), labels=ids, return_hidden=True)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.state.layers[0].ssm, expected.state.layers[0].ssm)
    in_pieces = compiled(ids, seq_idx=seq_idx, labels=ids, return_logits=False).loss
    torch.testing.assert_close(in_pieces, expected.loss)
    wanted = torch.autograd.grad(expected.loss, list(model.parameters()))
    torch.testing.assert_close(torch.autograd.grad(in_pieces, list(model.parameters())), wanted)


# the state as an object


def test_a_state_is_copied_chosen_and_weighed() -> None:
    model, ids = small(), draw_ids(3)
    state = model(ids).state
    assert state.batch_size == 3
    assert state.nbytes == 3 * 2 * 4 * (3 * 32 + 32 * 4)  # rows, layers, bytes, conv and ssm
    assert state.layers[0].ssm.requires_grad
    cut = state.detach()
    assert not cut.layers[0].ssm.requires_grad
    copy = cut.clone()
    model.step(ids[:, 0], copy)
    assert torch.equal(cut.layers[0].conv, state.layers[0].conv)
    assert not torch.equal(cut.layers[0].conv, copy.layers[0].conv)
    for rows in ([2, 0], torch.tensor([2, 0])):
        assert torch.equal(copy.select(rows).layers[1].ssm, copy.layers[1].ssm[[2, 0]])
    assert torch.equal(
        copy.select(torch.tensor([True, False, True])).layers[1].ssm, copy.layers[1].ssm[[0, 2]]
    )
    assert copy.select([]).batch_size == 0


def test_truncated_backpropagation_cuts_where_it_is_told() -> None:
    model, ids = small(), draw_ids()
    state = model(ids).state
    whole = torch.autograd.grad(model(ids, state=state, labels=ids).loss, list(model.parameters()))
    cut = torch.autograd.grad(model(ids, state=state.detach(), labels=ids).loss, list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in (*whole, *cut))
    assert any(not torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_wrong_arguments_say_what_was_expected() -> None:
    model, ids = small(), draw_ids()
    with pytest.raises(ValueError, match=r"ids: expected a non-empty \(batch, seq_len\), got \(20,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"got \(2, 0\)"):
        model.prefill(ids[:, :0])
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        model.prefill(ids, chunk_size=0)
    with pytest.raises(ValueError, match="row of only padding"):
        model.prefill(ids, seq_idx=torch.tensor([[0] * 20, [-1] * 20]))
    with pytest.raises(ValueError, match="seq_idx: expected shape"):
        model(ids, seq_idx=torch.zeros(2, 19, dtype=torch.long))
    with pytest.raises(ValueError, match="initial_state"):
        model(ids, state=model.init_state(3))
