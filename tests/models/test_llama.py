"""Llama: the numbers of transformers, its files both ways, rotations, the cache, what is refused."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import longscan
import tokenizers
from longscan.checkpoints.formats import FORMATS
from longscan.errors import LongscanError
from longscan.inference.generate import generate, generate_ids
from longscan.inference.sampling import SamplingConfig
from longscan.models import Llama, LlamaConfig, Mamba, MambaConfig
from longscan.models.common.growable import KV
from longscan.models.common.quantization import dequantized, quantize_model
from longscan.models.llama import PRESETS, rotate
from longscan.models.mamba import PRESETS as MAMBA_PRESETS
from longscan.tokenizers.base import ByteTokenizer
from tokenizers import processors

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the largest value compared

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "grouped": {"n_kv_heads": 2, "tie_embeddings": False},
    "one-key-head": {"n_kv_heads": 1, "d_ff": 50, "rope_theta": 500_000.0},
    "wide-heads": {"d_head": 20, "n_kv_heads": 2, "norm_eps": 1e-6},
}


def make(dtype: torch.dtype = torch.float32, **fields: Any) -> Llama:
    """A small model, every parameter far from its start."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 3, "vocab_size": 261, "n_heads": 4, "max_positions": 512}
    model = Llama(LlamaConfig.from_dict(sizes | fields), draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.to(dtype).eval()


def draw_ids(batch: int = 2, seq_len: int = 57) -> Tensor:
    return torch.randint(0, 261, (batch, seq_len), generator=torch.Generator().manual_seed(1))


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


# the same numbers as transformers, through the files


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "f64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_our_directory_and_computes_the_same(
    shape: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    model, ids = make(dtype, **SHAPES[shape]), draw_ids()
    longscan.save(model, tmp_path / "model", ByteTokenizer())
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    assert type(peer) is transformers.LlamaForCausalLM
    if dtype == torch.float64:  # its norm goes through float32
        norm = transformers.models.llama.modeling_llama.LlamaRMSNorm
        monkeypatch.setattr(
            norm, "forward", lambda m, x: F.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
        )
    expected = peer(ids).logits
    output = model(ids, labels=ids)
    assert_close(output.logits, expected, TOLERANCE[dtype])
    loss = F.cross_entropy(expected[:, :-1, :261].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, loss, rtol=TOLERANCE[dtype], atol=0)
    loss.backward()
    output.loss.backward()
    gradients = FORMATS["llama"].rename({name: parameter.grad for name, parameter in peer.named_parameters()})
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("old", [False, True], ids=["config-5", "config-4"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_we_read_a_directory_of_transformers(tied: bool, old: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=99,
            hidden_size=48,
            intermediate_size=70,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        )
    ).eval()
    peer.save_pretrained(tmp_path)
    if old:  # as it was written before version 5
        config = json.loads((tmp_path / "config.json").read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config |= {"rope_scaling": None, "pretraining_tp": 1, "torch_dtype": config.pop("dtype")}
        (tmp_path / "config.json").write_text(json.dumps(config))
    model, tokenizer = longscan.load(tmp_path)
    assert isinstance(model, Llama)
    assert tokenizer is None
    assert model.config == LlamaConfig(
        **{"d_model": 48, "n_layers": 2, "vocab_size": 99, "n_heads": 6, "n_kv_heads": 3, "d_ff": 70},
        **{"norm_eps": 1e-6, "rope_theta": 777.0, "tie_embeddings": tied, "pad_vocab_size_multiple": 1},
    )
    ids = draw_ids(seq_len=30) % 99
    assert_close(model(ids).logits, peer(ids).logits, TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_directory_comes_back_as_it_was(shape: str, tmp_path: Path) -> None:
    model = make(**SHAPES[shape])
    longscan.save(model, tmp_path / "model", ByteTokenizer())
    again, tokenizer = longscan.load(tmp_path / "model")
    assert again.config == model.config
    assert tokenizer is not None
    assert again.fingerprint() == model.fingerprint()


def test_names_there_and_back() -> None:
    ours = make(tie_embeddings=False).state_dict()
    theirs = {FORMATS["llama"].theirs(name): tensor for name, tensor in ours.items()}
    assert "model.layers.2.self_attn.q_proj.weight" in theirs
    assert "model.layers.0.post_attention_layernorm.weight" in theirs
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.empty(4)  # of old files
    assert list(FORMATS["llama"].rename(theirs)) == list(ours)


# files that mean another model


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling: type: expected 'default', got 'linear'",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type: expected 'default'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "unknown field 'factor'"),
        ({"rope_theta": 5.0}, "rope_theta: expected 10000.0, as the other fields say, got 5.0"),
        ({"attention_bias": True}, "attention_bias: expected False, got True: that is another model"),
        ({"mlp_bias": True}, "mlp_bias: expected False"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4 heads, got 3"),
        ({"head_dim": 7}, "head_dim: expected an even width"),
        ({"hidden_size": 33}, "of another shape"),
        ({"intermediate_size": 10}, "of another shape"),
        ({"tie_word_embeddings": False}, "1 missing: lm_head.weight"),
        ({"sliding_window": 128}, "unknown field 'sliding_window' = 128"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling: rope_type: expected",
        ),
        ({"rope_scaling": [2]}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: unknown field 'factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "unknown field 'partial_rotary_factor'"),
        ({"partial_rotary_factor": 0.5}, "unknown field 'partial_rotary_factor' = 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "'layer_types'"),
        ({"pruned_heads": {"0": [1]}}, "unknown field 'pruned_heads'"),
        ({"hidden_act": ["silu"]}, "hidden_act: expected 'silu'"),
        ({"model_type": "mamba2"}, "'mamba2' is another model"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value)),
)
def test_another_model_is_refused(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    longscan.save(make(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LongscanError) as refusal:
        longscan.load(tmp_path / "model")
    assert word in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": None, "partial_rotary_factor": 1.0, "pruned_heads": {}, "rope_scaling": None},
        {"layer_types": ["full_attention"] * 3, "attention_bias": False, "use_sliding_window": False},
        {"rope_scaling": {"rope_type": "default", "factor": 1.0}},
    ],
    ids=["off", "full-attention", "plain-rotations"],
)
def test_fields_that_are_off_change_nothing(change: dict[str, Any], tmp_path: Path) -> None:
    longscan.save(make(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert longscan.load(tmp_path / "model")[0].config == make().config


def test_missing_fields_mean_what_transformers_takes_them_for(tmp_path: Path) -> None:
    longscan.save(make(d_ff=11008, tie_embeddings=False, n_layers=1), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())
    for name in ("intermediate_size", "rms_norm_eps", "tie_word_embeddings", "head_dim", "rope_parameters"):
        del raw[name]
    path.write_text(json.dumps(raw))
    config = longscan.load(tmp_path / "model")[0].config
    assert (config.ff_width, config.norm_eps, config.tie_embeddings) == (11008, 1e-6, False)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_heads": 0}, "n_heads"),
        ({"n_heads": 5}, "n_heads: expected a divisor of d_model"),
        ({"n_kv_heads": 3}, "n_kv_heads: expected a divisor of 4 heads"),
        ({"d_head": 3}, "d_head: expected an even width"),
        ({"d_model": 4}, "d_head: expected an even width"),
        ({"d_ff": 0}, "d_ff"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"max_positions": 0}, "max_positions"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.items())),
)
def test_impossible_sizes_are_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(LongscanError, match=word):
        make(**change)


def test_presets_are_about_as_large_as_those_of_mamba() -> None:
    with torch.device("meta"):
        for name in ("tiny-lm", "130m"):
            mine = Llama(LlamaConfig(**PRESETS[name])).num_parameters()
            others = Mamba(MambaConfig(**MAMBA_PRESETS[name])).num_parameters()
            assert abs(mine / others - 1) < 0.05
        # 12 (4 d^2 + 3 d d_ff + 2 d) + d + padded V d
        assert mine == 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768 + 50280 * 768


def test_how_it_starts() -> None:
    model = Llama(
        LlamaConfig(d_model=256, n_layers=8, vocab_size=1000, n_heads=4), torch.Generator().manual_seed(0)
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            wanted = (
                0.005 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            )  # 0.02 / sqrt(16)
            assert abs(parameter.std().item() / wanted - 1) < 0.02


# rotations


def test_rotations_are_products_of_complex_numbers() -> None:
    """And only the distance of two positions matters to a query and a key."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=draw)
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)

    def turned(x: Tensor, position: int) -> Tensor:
        angles = position * frequencies
        return rotate(x, angles.cos(), angles.sin())

    pairs = torch.complex(q[:4], q[4:]) * torch.exp(1j * 13 * frequencies)
    torch.testing.assert_close(turned(q, 13), torch.cat([pairs.real, pairs.imag]))
    torch.testing.assert_close(turned(q, 105) @ turned(k, 100), turned(q, 5) @ k)


def test_a_model_without_positions_would_not_see_the_order() -> None:
    """The first of two tokens is seen by the second at a distance, so swapping what is before changes it."""
    model = make(torch.float64)
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.allclose(model(ids).logits[:, -1], model(ids[:, [1, 0, 2]]).logits[:, -1], atol=1e-6)


# the cache


def test_the_cache_grows_seldom_and_by_doubling() -> None:
    model, ids = make(n_kv_heads=2), draw_ids(1, 100)
    state, rooms = model.init_state(1), []
    assert (state.nbytes, state.growth) == (
        3 * 8,
        3 * 2 * 4 * 2 * 8,
    )  # a length; layers, k and v, bytes, heads
    for column in ids.unbind(1):
        model.step(column, state)
        rooms.append(state.layers[0].capacity)
    assert sorted(set(rooms)) == [16, 32, 64, 128]
    assert state.clone().layers[0].capacity == 100
    assert state.clone().nbytes == 3 * 8 + 100 * state.growth


def test_reading_does_not_touch_the_state_it_is_given() -> None:
    model, ids = make(), draw_ids(1)
    _, state = model.prefill(ids)
    before = state.map(torch.clone)
    model.prefill(ids, state)
    state.reserve(10)
    model(ids, state=state)
    for layer, old in zip(state.used().layers, before.layers, strict=True):
        assert all(map(torch.equal, layer, old))


def test_steps_go_on_where_reading_ended() -> None:
    model, ids = make(torch.float64), draw_ids(2, 40)
    _, state = model.prefill(ids[:, :30], chunk_size=13)
    expected = model(ids).logits
    for t in range(30, 40):
        logits, state = model.step(ids[:, t], state)
        assert_close(logits, expected[:, t], 1e-12)
    assert [layer.length.tolist() for layer in state.layers] == 3 * [[40, 40]]


def test_a_marked_state_goes_back() -> None:
    model, ids = make(), draw_ids(2)
    _, state = model.prefill(ids)
    other = state.clone()
    mark = state.mark()
    for token in (3, 4, 5):
        model.step(torch.tensor([token, token]), state)
    state.rewind(mark)
    got, expected = (model.step(torch.tensor([7, 8]), s)[0] for s in (state, other))
    assert torch.equal(got, expected)


def test_rows_of_different_lengths_step_together() -> None:
    model = make(torch.float64)
    ids = draw_ids(3, 20)
    lengths = (20, 1, 9)
    together = model.init_state(3)
    for i, length in enumerate(lengths):
        together.copy_row_(i, model.prefill(ids[i : i + 1, :length])[1], 0)
    got, _ = model.step(torch.tensor([1, 2, 3]), together)
    for i, length in enumerate(lengths):
        row = torch.cat([ids[i, :length], torch.tensor([i + 1])])[None]
        assert_close(got[i], model(row).logits[0, -1], 1e-12)


def test_a_narrow_model_keeps_narrow_keys() -> None:
    model, ids = make(torch.bfloat16), draw_ids()
    output = model(ids)
    assert output.state.layers[0].k.dtype == torch.bfloat16
    expected = make()(ids).logits
    assert (output.logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_quantised_weights(kind: Any, tmp_path: Path) -> None:
    """Through the files and step by step; the cache is as wide as the activations."""
    model, ids = make(d_model=64), draw_ids(1, 20)
    quantize_model(model, kind)
    longscan.save(model, tmp_path / "model")
    again, _ = longscan.load(tmp_path / "model")
    output = again(ids)
    assert_close(output.logits, dequantized(again)(ids).logits, 1e-5)
    assert output.state.layers[0].k.dtype == torch.float32
    state = again.init_state(1)
    for column in ids.unbind(1):
        logits, _ = again.step(column, state)
    assert_close(logits, output.logits[:, -1], 1e-4)


def test_more_positions_than_it_was_made_for_are_read_with_a_warning() -> None:
    model, ids = make(max_positions=8), draw_ids(1, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = model.prefill(ids[:, :8])
    with pytest.warns(UserWarning, match="longer than the 8 positions"):
        model.step(ids[:, 8], state)
    with pytest.warns(UserWarning, match="longer than the 8 positions"):
        logits = model(ids).logits
    assert logits.isfinite().all()
    assert math.isclose(0.0, (logits - make(max_positions=9)(ids).logits).abs().max().item())


# files of states


def test_a_state_in_a_file(tmp_path: Path) -> None:
    model, ids = make(), draw_ids(1)
    _, state = model.prefill(ids)
    model.step(ids[:, 0], state)
    state.save(tmp_path / "state", position=58, pending=[5])
    saved = longscan.State.load(tmp_path / "state", model)
    assert (saved.position, saved.pending) == (58, [5])
    for layer, old in zip(saved.state.layers, state.used().layers, strict=True):
        assert isinstance(layer, KV)
        assert all(map(torch.equal, layer, old))
    assert (tmp_path / "state").stat().st_size < 58 * state.growth + 3000  # no room in the file


def test_a_state_of_another_model_or_with_impossible_lengths(tmp_path: Path) -> None:
    model = make()
    _, state = model.prefill(draw_ids(2, 5))
    state.save(tmp_path / "state")
    with pytest.raises(LongscanError, match=r"of other weights|of another model"):
        longscan.State.load(tmp_path / "state", make(n_kv_heads=2))
    mamba = Mamba(MambaConfig(d_model=32, n_layers=3, vocab_size=261))
    with pytest.raises(LongscanError, match="expected Mamba of 3 layers, got 'Llama'"):
        longscan.State.load(tmp_path / "state", mamba)
    state.layers[1].length[0] = 77
    state.layers[1].length[1] = -1
    with pytest.raises(LongscanError, match="impossible lengths"):
        saved_as_is(state, tmp_path / "wrong", model)


def saved_as_is(state: Any, path: Path, model: Llama) -> None:
    """Write a state whatever it says, and read it."""
    from longscan.models.common import state_file
    from longscan.models.common.state import _identity

    owner = _identity(model)
    state_file.write(path, owner, dict(state.named_tensors()), 5, torch.empty(0, dtype=torch.int64))
    longscan.State.load(path, model)


# the verbs


def test_the_command_writes_drafts_and_goes_on(cli: Any, tmp_path: Path) -> None:
    longscan.save(make(), tmp_path / "model", ByteTokenizer())
    asked = ("generate", "--model", tmp_path / "model", "--temperature", 0, "--quiet")
    whole = cli(*asked, "Call me", "--max-new-tokens", 30)
    assert whole.code == 0, whole.err
    assert cli(*asked, "Call me", "--max-new-tokens", 30, "--speculate").out == whole.out
    state = tmp_path / "state"
    first = cli(*asked, "Call me", "--max-new-tokens", 12, "--save-state", state)
    assert whole.out.startswith(first.out.rstrip("\n\ufffd"))
    assert cli(*asked, "--load-state", state, "--max-new-tokens", 5).code == 0
    refused = cli("generate", "--model", "longscan-tiny-en", "--load-state", state)
    assert refused.code == 1
    assert "expected Mamba of 8 layers, got 'Llama' of '3'" in refused.err


def test_models_says_that_its_memory_grows(cli: Any) -> None:
    page = cli("models", "llama")
    assert page.code == 0
    assert "8.19 kB/token" in page.out
    found = json.loads(cli("models", "llama", "--json").out)
    assert found["presets"]["130m"]["state_bytes_per_token"] == 12 * 2 * 768 * 4


# special tokens


@pytest.fixture
def with_bos(tmp_path: Path) -> Path:
    """A directory whose tokenizer begins texts with <s>, and whose texts end with any of three ids."""
    library = tokenizers.Tokenizer.from_str(bytes_as_bpe(tmp_path))
    library.add_special_tokens(["<s>", "</s>", "<unk>", "<|eot|>"])  # 257 to 260
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    model = make(vocab_size=264)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    longscan.save(model, tmp_path / "model")
    library.save(str(tmp_path / "model" / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(names))
    ids = {"bos_token_id": 257, "eos_token_id": [258, 259, 260]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(ids))
    return tmp_path / "model"


def bytes_as_bpe(folder: Path) -> str:
    ByteTokenizer().save(folder / "bytes")
    return (folder / "bytes" / "tokenizer.json").read_text()


def test_text_and_perplexity_are_those_of_transformers(with_bos: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = longscan.load(with_bos)
    assert tokenizer is not None
    reference = transformers.AutoModelForCausalLM.from_pretrained(with_bos).eval()
    ids = transformers.AutoTokenizer.from_pretrained(with_bos)("a text", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(ids, labels=ids).loss.item()
    result = longscan.evaluate(model, tokenizer, ["a text"])
    assert result.tokens == 6
    assert result.nats / result.tokens == pytest.approx(expected, abs=1e-4)
    text = "".join(generate(model, tokenizer, "a text", max_new_tokens=8, temperature=0))
    written = reference.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert text == tokenizer.decode(written.tolist())


def test_each_of_several_ids_ends_a_text(with_bos: Path) -> None:
    model, _ = longscan.load(with_bos)
    greedy = SamplingConfig(temperature=0, max_new_tokens=8)
    tokens = [event.token for event in generate_ids(model, [[257]], greedy, eos_id=None)]
    third = tokens.index(tokens[2])
    events = list(generate_ids(model, [[257]], greedy, eos_id=(263, tokens[2])))
    assert [event.token for event in events] == tokens[: third + 1]
    assert events[-1].finish == "eos"


def test_convert_keeps_the_special_tokens(with_bos: Path, tmp_path: Path) -> None:
    longscan.convert(with_bos, tmp_path / "again")
    raw = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (257, [258, 259, 260])
    names = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert [names[role] for role in ("bos_token", "eos_token", "unk_token")] == ["<s>", "</s>", "<unk>"]
    again = longscan.load(tmp_path / "again")[1]
    assert again is not None
    assert (again.prefix, again.eos_ids) == ((257,), (258, 259, 260))
