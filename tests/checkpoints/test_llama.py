"""Llama's directories: transformers computes the same, and files that mean another model are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import longscan
import tokenizers
from llama_models import assert_close, draw_ids, make
from longscan.checkpoints.formats import FORMATS
from longscan.errors import LongscanError
from longscan.inference.generate import generate, generate_ids
from longscan.inference.sampling import SamplingConfig
from longscan.models import Llama, LlamaConfig
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
        ({"model_type": "llama4"}, "'llama4' is another model"),
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
