"""Hybrids in GGUF files: there and back, what stands where, what is refused, llama.cpp's logits."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_cpp_oracle import AGREEMENT, agree
from longscan.checkpoints.gguf.model import GGUFType, save_gguf
from longscan.checkpoints.gguf.parser import check
from longscan.checkpoints.load import load
from longscan.errors import LongscanError
from longscan.models import Hybrid, HybridConfig
from longscan.models.common.quantization import dequantized, kind_of, quantize_model
from longscan.tokenizers.base import ByteTokenizer

gguf = pytest.importorskip("gguf")

SIZES = {
    **{"d_model": 32, "d_ff": 48, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 257},
    **{"d_ssm_head": 16, "d_state": 16, "n_ssm_groups": 2},
}
FALCON = {
    **{
        **SIZES,
        "family": "falcon_h1",
        "pattern": "P-P-P-",
        "d_ssm": 48,
        "d_ssm_head": 8,
        "rope_theta": 500.0,
    },
    **{"gated_norm": "none", "embedding_multiplier": 1.7, "logits_multiplier": 0.6, "key_multiplier": 0.7},
    **{"attention_in_multiplier": 1.3, "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.2},
    **{"ssm_out_multiplier": 0.9, "gate_multiplier": 0.85, "down_multiplier": 1.4},
    "ssm_multipliers": (0.5, 1.5, 0.7, 1.2, 0.9),
}
GRANITE = {
    **{**SIZES, "family": "granitemoehybrid", "pattern": "M-*-M-", "embedding_multiplier": 2.0},
    **{"residual_multiplier": 0.6, "logits_divisor": 3.0, "attention_multiplier": 0.4},
}
NEMOTRON = {
    **{**SIZES, "family": "nemotron_h", "pattern": "M-*M-", "d_head": 16, "d_ssm": 48, "d_ssm_head": 8},
    "feed_forward": "relu2",
}
EXPERTS = {"n_experts": 7, "n_active_experts": 3, "d_expert": 12, "d_shared_expert": 20, "d_ff": None}
JAMBA = {
    **{**EXPERTS, "family": "jamba", "pattern": "m-mE*-mE", "d_model": 32, "d_ff": 12, "n_heads": 4},
    **{"n_kv_heads": 2, "vocab_size": 257, "d_state": 5, "dt_rank": 3, "inner_norms": "learned"},
    **{"router": "softmax-topk", "d_shared_expert": 0, "norm_eps": 1e-6},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "jamba": JAMBA,
    "jamba dense": {**JAMBA, "pattern": "m-*-", "n_experts": None, "n_active_experts": None, "d_expert": None}
    | {"router": "topk-softmax", "dt_rank": None, "tie_embeddings": False},
    "falcon-h1": FALCON,
    "falcon-h1 norm": {
        **FALCON,
        "gated_norm": "gate-first",
        "tie_embeddings": False,
        "feed_forward_bias": True,
    },
    "granite": GRANITE,
    "granite rope": {**GRANITE, "rope_theta": 100.0, "attention_bias": True, "tie_embeddings": False},
    "granite experts": {**GRANITE, **EXPERTS, "pattern": "ME*EME"},
    "nemotron": {**NEMOTRON, "feed_forward_bias": True},
    "nemotron experts": {
        **{**NEMOTRON, **EXPERTS, "pattern": "ME*ME", "router": "sigmoid", "experts_multiplier": 2.5},
    },
    "nemotron latent": {
        **{**NEMOTRON, **EXPERTS, "pattern": "M*E", "router": "sigmoid", "normalize_experts": False},
        "d_latent": 24,
    },
}
ARCHITECTURES = {  # by the family, and whether there are experts
    ("falcon_h1", False): "falcon-h1",
    ("nemotron_h", False): "nemotron_h",
    ("nemotron_h", True): "nemotron_h_moe",
    **{("granitemoehybrid", experts): "granitehybrid" for experts in (False, True)},
    **{("jamba", experts): "jamba" for experts in (False, True)},
}
KINDS: tuple[GGUFType, ...] = ("F32", "BF16", "Q8_0", "Q4_0")
STORED = {"BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}
IDS = torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(1))


def make(variant: str, seed: int = 0, **change: Any) -> Hybrid:
    """A model with no parameter as it started."""
    draw = torch.Generator().manual_seed(seed)
    model = Hybrid(HybridConfig.from_dict({**VARIANTS[variant], **change}), draw).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=draw)
    return model


def has_experts(variant: str) -> bool:
    return "E" in VARIANTS[variant]["pattern"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path: Path, variant: str, kind: GGUFType) -> None:
    model = make(variant)
    save_gguf(model, tmp_path / "a.gguf", ByteTokenizer(), kind)
    again, tokenizer = load(tmp_path / "a.gguf", dtype=None)
    assert isinstance(tokenizer, ByteTokenizer)
    assert kind_of(again) == STORED.get(kind)
    name = check(tmp_path / "a.gguf").metadata["general.architecture"]
    assert name == ARCHITECTURES[again.config.family, "E" in again.config.pattern]
    if "falcon" not in variant:
        assert again.config == model.config
    if kind == "F32":
        assert close(logits(again), logits(model), 3e-6)
    save_gguf(again, tmp_path / "b.gguf", tokenizer, kind)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def tensors(path: Path) -> dict[str, Tensor]:
    return {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(path).tensors}


def test_the_multipliers_of_a_falcon_h1_are_in_its_weights(tmp_path: Path) -> None:
    model = make("falcon-h1 norm")
    save_gguf(model, tmp_path / "a.gguf", None)
    found, layer = tensors(tmp_path / "a.gguf"), model.backbone.layers[2].mixer
    expected = {
        "token_embd.weight": model.backbone.embedding.weight * 1.7,
        "output.weight": model.lm_head.weight * 0.6,
        "blk.1.attn_q.weight": layer.attention.q_proj.weight * 1.3,
        "blk.1.attn_k.weight": layer.attention.k_proj.weight * 1.3 * 0.7,
        "blk.1.attn_v.weight": layer.attention.v_proj.weight * 1.3,
        "blk.1.attn_output.weight": layer.attention.o_proj.weight * 0.8,
        "blk.1.ssm_out.weight": layer.mamba.out_proj.weight * 0.9,
        "blk.1.ffn_gate.weight": model.backbone.layers[3].mixer.mlp.gate_proj.weight * 0.85,
        "blk.1.ffn_gate.bias": model.backbone.layers[3].mixer.mlp.gate_proj.bias * 0.85,
        "blk.1.ffn_up.weight": model.backbone.layers[3].mixer.mlp.up_proj.weight,
        "blk.1.ffn_down.weight": model.backbone.layers[3].mixer.mlp.down_proj.weight * 1.4,
        "blk.1.attn_norm.weight": model.backbone.layers[2].norm.weight,
        "blk.1.ffn_norm": model.backbone.layers[3].norm.weight,
        "blk.1.ssm_norm.weight": layer.mamba.norm.weight.view(2, 24),
        "blk.1.ssm_a": -layer.mamba.A_log.exp()[:, None],
        "blk.1.ssm_d": layer.mamba.D[:, None],
        "blk.1.ssm_dt.bias": layer.mamba.dt_bias,
        "blk.1.ssm_conv1d.weight": layer.mamba.conv1d.weight[:, 0],
    }
    slices = zip((48, 48, 32, 32, 6), (0.5, 1.5, 0.7, 1.2, 0.9), strict=True)
    rows = torch.cat([torch.full((n, 1), 1.2 * factor) for n, factor in slices])
    expected["blk.1.ssm_in.weight"] = layer.mamba.in_proj.weight * rows
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-6, atol=1e-7)


def test_a_tied_falcon_h1_has_an_output_matrix(tmp_path: Path) -> None:
    """llama.cpp would take the embedding, with the factor of the embedding."""
    model = make("falcon-h1")
    assert model.config.tie_embeddings
    save_gguf(model, tmp_path / "a.gguf", None)
    assert "output.weight" in check(tmp_path / "a.gguf").tensors
    assert not load(tmp_path / "a.gguf")[0].config.tie_embeddings
    plain = make("falcon-h1", embedding_multiplier=0.6)
    save_gguf(plain, tmp_path / "b.gguf", None)
    assert "output.weight" not in check(tmp_path / "b.gguf").tensors
    with pytest.warns(UserWarning, match="no output matrix"):
        again, _ = load(tmp_path / "b.gguf")
    assert again.config.tie_embeddings
    assert close(logits(again), logits(plain), 3e-6)


def test_the_queries_and_keys_of_a_granite_stand_in_pairs(tmp_path: Path) -> None:
    model = make("granite rope")
    save_gguf(model, tmp_path / "a.gguf", None)
    found, attention = tensors(tmp_path / "a.gguf"), model.backbone.layers[2].mixer
    for ours, theirs, n_heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        for kind in ("weight", "bias"):
            tensor = getattr(getattr(attention, ours), kind).detach()
            heads = [tensor[8 * head : 8 * (head + 1)] for head in range(n_heads)]
            pairs = [head[[0, 4, 1, 5, 2, 6, 3, 7]] for head in heads]
            assert torch.equal(found[f"blk.1.{theirs}.{kind}"], torch.cat(pairs))
    assert torch.equal(found["blk.1.attn_v.weight"], attention.v_proj.weight.detach())


def test_experts_stand_in_one_tensor(tmp_path: Path) -> None:
    model = make("nemotron latent")
    save_gguf(model, tmp_path / "a.gguf", None)
    found, mixture = tensors(tmp_path / "a.gguf"), model.backbone.layers[2].mixer.mlp
    for ours, theirs in (("up_proj", "ffn_up_exps"), ("down_proj", "ffn_down_exps")):
        stacked = torch.stack([getattr(expert, ours).weight for expert in mixture.experts])
        assert torch.equal(found[f"blk.2.{theirs}.weight"], stacked.detach())
    assert torch.equal(found["blk.2.exp_probs_b.bias"], mixture.router.correction)
    assert torch.equal(found["blk.2.ffn_gate_inp.weight"], mixture.router.weight.detach())
    assert torch.equal(found["blk.2.ffn_latent_down.weight"], mixture.fc1_latent_proj.weight.detach())
    assert torch.equal(found["blk.2.ffn_latent_up.weight"], mixture.fc2_latent_proj.weight.detach())
    save_gguf(model, tmp_path / "q.gguf", None, "Q8_0")
    types = {name: info.type for name, info in check(tmp_path / "q.gguf").tensors.items()}
    assert types["blk.2.ffn_down_exps.weight"] == "F32"  # rows of 12 are no blocks of 32
    assert types["blk.2.ffn_gate_inp.weight"] == "F32"


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16"])
def test_quantised_hybrids_go_in_as_they_are(tmp_path: Path, kind: Any) -> None:
    model = make("granite rope")  # whose rows are in another order
    quantize_model(model, kind)
    save_gguf(model, tmp_path / "a.gguf", None)
    again, _ = load(tmp_path / "a.gguf", dtype=None)
    assert kind_of(again) == kind
    # of the weights alone: rounding activations to 16 bits makes more of a last bit
    whole, expected = (logits(dequantized(each)) for each in (again, model))
    assert close(whole, expected, 3e-3 if kind == "int8" else 1e-6)  # float16 scales


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "norm first": ("falcon-h1 norm", {"gated_norm": "norm-first"}, "gated_norm norm-first"),
    "no positions": ("falcon-h1", {"rope_theta": None}, "rope_theta None"),
    "residual": ("falcon-h1", {"residual_multiplier": 0.5}, "no falcon_h1 with residual_multiplier = 0.5"),
    "bias": ("falcon-h1", {"ssm_in_bias": True}, "ssm_in_bias = True"),
    "limit": ("granite", {"dt_limit": (0.1, 1.0)}, "dt_limit = "),
    "order": ("granite", {"pattern": "M*-"}, "M or [*] and a feed-forward layer by turns"),
    "channels": ("granite", {"d_ssm": 32}, "Mamba-2 layers of 64 channels, this one has 32"),
    "no Mamba-2": ("granite", {"pattern": "*-*-"}, "this one has none"),
    "bamba": ("granite rope", {"family": "bamba"}, "rotates other channels"),
    "own": ("granite", {"family": "own"}, "GGUF files of other models are not written"),
    "both": ("granite experts", {"pattern": "ME*-", "d_ff": 12}, "this one has both"),
    "widths": ("jamba", {"d_ff": 16}, "the widths 16 and 12"),
    "no norms": ("jamba", {"inner_norms": "plain"}, "inner_norms plain"),
    "gated": ("nemotron", {"feed_forward": "swiglu"}, "feed_forward swiglu"),
    "router": ("nemotron experts", {"router": "topk-softmax"}, "router topk-softmax"),
    "no attention": (
        "nemotron",
        {"pattern": "M-", "n_heads": None, "n_kv_heads": None, "d_head": None},
        "without attention",
    ),
}


@pytest.mark.parametrize(("variant", "change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_can_not_compute(
    tmp_path: Path, variant: str, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(LongscanError, match=words):
        save_gguf(make(variant, **change), tmp_path / "a.gguf", None)
    assert not list(tmp_path.iterdir())


def rewritten(path: Path, **changes: Any) -> Path:
    """A copy of a file with other metadata, of which None removes one; `__` is a dot."""
    reader, new = gguf.GGUFReader(path), path.with_name("new.gguf")
    name = reader.fields["general.architecture"].contents()
    writer, kinds = gguf.GGUFWriter(new, name), gguf.GGUFValueType
    known = {key: (field.contents(), field.types) for key, field in reader.fields.items()}
    types = {
        **{bool: [kinds.BOOL], int: [kinds.INT32], float: [kinds.FLOAT32], str: [kinds.STRING]},
        **{list: [kinds.ARRAY, kinds.INT32], type(None): []},
    }
    for key, value in changes.items():
        known[f"{name}.{key.replace('__', '.')}"] = value, types[type(value)]
    for key, (value, types) in known.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and value is not None:
            is_list = types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, value, types[0], types[-1] if is_list else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new


KV, HUGE = "attention__head_count_kv", 2**31 - 1
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads": ("granite", {KV: [0, 2]}, "granitehybrid.attention.head_count_kv: expected 3 whole numbers"),
    "other heads": (
        "granite",
        {KV: [2, 1, 0]},
        "expected one number for all layers that have one, got [1, 2]",
    ),
    "all attention": ("granite", {KV: [2, 2, 2]}, "the tensors are not those that the metadata describe"),
    "channels": ("granite", {"ssm__inner_size": 63}, "a multiple of granitehybrid.ssm.time_step_rank"),
    "layers": ("granite", {"block_count": 1000}, "granitehybrid.block_count is 1,000, the file has"),
    "huge": ("granite", {"attention__head_count": HUGE, "attention__key_length": HUGE}, "n_kv_heads"),
    "huge heads": ("granite", {"attention__key_length": HUGE - 1}, "of another shape"),
    "huge width": ("falcon-h1", {"ssm__inner_size": 3 * 2**29, "ssm__time_step_rank": 6}, "of another shape"),
    "experts": ("granite experts", {"expert_count": HUGE}, "granitehybrid.expert_count: expected as many"),
    "scale": ("granite", {"residual_scale": -1.0}, "residual_scale: expected a number from 0 to 1e+06"),
    "theta": ("falcon-h1", {"rope__freq_base": None}, "falcon-h1.rope.freq_base: expected a number"),
    "groups": ("nemotron experts", {"expert_group_count": 2}, "expert_group_count: expected 1"),
    "widths": ("nemotron", {"feed_forward_length": [0, 48, 0, 0, 44]}, "expected one number for all layers"),
}


@pytest.mark.parametrize(("variant", "changes", "words"), WRONG.values(), ids=WRONG)
def test_wrong_metadata(tmp_path: Path, variant: str, changes: dict[str, Any], words: str) -> None:
    save_gguf(make(variant), tmp_path / "a.gguf", None)
    with pytest.raises(LongscanError) as caught:
        load(rewritten(tmp_path / "a.gguf", **changes))
    assert words in str(caught.value)


@pytest.mark.parametrize("variant", ["falcon-h1", "nemotron latent"])
def test_no_value_of_the_metadata_is_trusted(tmp_path: Path, variant: str) -> None:
    save_gguf(make(variant), tmp_path / "a.gguf", None)
    metadata = check(tmp_path / "a.gguf").metadata
    prefix = f"{metadata['general.architecture']}."
    for key in [key.removeprefix(prefix) for key in metadata if key.startswith(prefix)]:
        for value in (HUGE, -1, "x", float("nan"), [0, -1, 2]):
            path = rewritten(tmp_path / "a.gguf", **{key.replace(".", "__"): value})
            with contextlib.suppress(LongscanError), warnings.catch_warnings(action="ignore"):
                load(path)


def test_a_file_that_does_not_say_it_rotates(tmp_path: Path) -> None:
    save_gguf(make("granite rope", rope_theta=1e4), tmp_path / "a.gguf", None)
    path = rewritten(tmp_path / "a.gguf", rope__scaling__finetuned=None, rope__freq_base=None)
    assert load(path)[0].config == load(tmp_path / "a.gguf")[0].config


def test_one_epsilon_of_a_nemotron_h_may_be_missing(tmp_path: Path) -> None:
    save_gguf(make("nemotron", norm_eps=1e-4), tmp_path / "a.gguf", None)
    path = rewritten(tmp_path / "a.gguf", attention__layer_norm_rms_epsilon=None)
    assert load(path)[0].config.norm_eps == 1e-4


def test_a_bamba_is_read(tmp_path: Path) -> None:
    """Half of each head rotates; the order of its rows in the file is that of whole heads all the same."""
    model = make("granite rope")
    save_gguf(model, tmp_path / "a.gguf", None)
    again, _ = load(rewritten(tmp_path / "a.gguf", rope__dimension_count=4))
    assert again.config == model.config.replace(family="bamba", rotary_fraction=0.5)
    expected = Hybrid(again.config).eval()
    expected.load_state_dict(model.state_dict())
    assert close(logits(again), logits(expected), 1e-6)
    assert not close(logits(again), logits(model), 1e-4)


# where activations are rounded, a token between two experts may take the other one
COMPARED = [(name, kind) for name in VARIANTS for kind in KINDS if kind == "F32" or not has_experts(name)]


@pytest.mark.parametrize(("variant", "kind"), COMPARED)
def test_llama_cpp_computes_the_same(tmp_path: Path, variant: str, kind: GGUFType) -> None:
    save_gguf(make(variant, seed=1), tmp_path / "a.gguf", ByteTokenizer(), kind)
    model, tokenizer = load(tmp_path / "a.gguf", dtype=None)
    assert tokenizer is not None
    agree(model, tokenizer, tmp_path / "a.gguf", AGREEMENT[kind])
