"""Model directories: every way in and out gives the same model; whatever is wrong with one is said."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from longscan.checkpoints.formats import read_config
from longscan.checkpoints.load import load, load_translator
from longscan.checkpoints.save import Layout, convert, quantize, save
from longscan.core.files import read_json, write_json
from longscan.errors import LongscanError, UsageError
from longscan.models import MODELS, Llama, LlamaConfig, Mamba, MambaConfig
from longscan.models.common.quantization import quantize_model
from longscan.models.sequence_classifier import SequenceConfig, SequenceModel
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.bpe import train_bpe
from model_directories import EMBEDDING, IDS, assert_same, edit, make, refusal, rewrite

# ---- there and back


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "odd": {"vocab_size": 301, "pad_vocab_size_multiple": 16, "d_conv": 3, "expand": 3, "dt_rank": 5},
    "biased": {"bias": True, "conv_bias": False, "residual_in_fp32": False, "dt_init": "constant"},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("layout", ["hf", "official"])
def test_round_trip(fields: dict[str, Any], layout: Layout, tmp_path: Path) -> None:
    model = make(**fields)
    save(model, tmp_path / "a", ByteTokenizer())
    convert(tmp_path / "a", tmp_path / "b", layout=layout)
    convert(tmp_path / "b", tmp_path / "c")
    for name in "abc":
        again, tokenizer = load(tmp_path / name)
        assert_same(again, model)
        assert isinstance(tokenizer, ByteTokenizer)
        assert not again.training
        assert all(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_norm_eps_has_no_place_in_the_official_layout(tmp_path: Path) -> None:
    save(make(norm_eps=1e-6), tmp_path / "a")
    assert load(tmp_path / "a")[0].config.norm_eps == 1e-6
    with pytest.raises(LongscanError, match="no field for norm_eps"):
        convert(tmp_path / "a", tmp_path / "b", layout="official")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("norms", "model_type"), [("plain", "falcon_mamba"), ("learned", "longscan_mamba")])
def test_inner_norms(norms: str, model_type: str, tmp_path: Path) -> None:
    model = make(inner_norms=norms, inner_norm_eps=1e-4, expand=3, vocab_size=301)
    save(model, tmp_path / "a", ByteTokenizer())
    raw = read_json(tmp_path / "a" / "config.json")
    assert raw["model_type"] == model_type
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (256, 256)
    assert_same(load(tmp_path / "a")[0], model)
    quantize(tmp_path / "a", tmp_path / "q", "int8")
    quantised = load(tmp_path / "q")[0]
    quantize_model(model, "int8")
    assert_same(quantised, model)
    assert torch.equal(quantised(IDS).logits, model(IDS).logits)
    with pytest.raises(LongscanError, match=f"no field for inner_norms = {norms}"):
        convert(tmp_path / "a", tmp_path / "b", layout="official")
    edit(tmp_path / "a", inner_norm_epsilon=1e-3)
    assert "inner_norm_epsilon" in refusal(tmp_path / "a")


FALCON_MAMBA_7B: dict[str, Any] = {
    **{"architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "eos_token_id": 11},
    **{"expand": 16, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1},
    **{"intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "model_type": "falcon_mamba"},
    **{"num_hidden_layers": 64, "pad_token_id": 11, "rescale_prenorm_residual": False},
    **{"residual_in_fp32": True, "state_size": 16, "tie_word_embeddings": False, "time_step_floor": 0.0001},
    **{"time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001},
    **{"time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype": "bfloat16", "use_bias": False},
    **{"use_cache": True, "use_conv_bias": True, "use_falcon_mambapy": False, "vocab_size": 65024},
}


def test_the_published_falcon_mamba() -> None:
    name, config = read_config(FALCON_MAMBA_7B)
    assert name == "mamba"
    preset = MambaConfig.from_dict(MODELS["mamba"].presets["falcon-mamba-7b"])
    assert config == preset.replace(pad_vocab_size_multiple=config.pad_vocab_size_multiple)
    assert config.inner_norm_eps == 1e-6  # transformers', for files from before the field
    assert read_config({**FALCON_MAMBA_7B, "mixer_rms_eps": 1e-5})[1].inner_norm_eps == 1e-5
    with pytest.raises(LongscanError, match=r"intermediate_size: expected a multiple of hidden_size = 4096"):
        read_config({**FALCON_MAMBA_7B, "intermediate_size": 8193})
    with pytest.raises(LongscanError, match=r"mixer_rms_eps: expected 0 or more, got -1"):
        read_config({**FALCON_MAMBA_7B, "mixer_rms_eps": -1.0})
    with pytest.raises(LongscanError, match=r"unknown field 'mixer_eps'"):
        read_config({**FALCON_MAMBA_7B, "mixer_eps": 1e-5})
    with pytest.raises(LongscanError, match=r"unknown field 'use_falcon_mambapy', 'mixer_rms_eps'"):
        read_config({**FALCON_MAMBA_7B, "mixer_rms_eps": 1e-5, "model_type": "mamba"})
    with pytest.raises(LongscanError, match="longscan: expected version 1 of the layout of a mamba"):
        read_config({**FALCON_MAMBA_7B, "model_type": "longscan_mamba"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_precision(model: Mamba, dtype: torch.dtype, tmp_path: Path) -> None:
    save(model, tmp_path / "a", dtype=dtype)
    assert model.backbone.embedding.weight.dtype is torch.float32
    stored = load_file(tmp_path / "a" / "model.safetensors")
    wide = torch.promote_types(dtype, torch.float32)
    for name, tensor in stored.items():
        recurrence = name.endswith(("A_log", "D", "dt_proj.bias"))
        assert tensor.dtype == (wide if recurrence else dtype), name
    kept, _ = load(tmp_path / "a", dtype=None)
    assert kept.backbone.embedding.weight.dtype is dtype
    again, _ = load(tmp_path / "a")
    for name, parameter in again.named_parameters():
        assert parameter.dtype is torch.float32
        recurrence = name.endswith(("A_log", "D", "dt_proj.bias"))
        original = model.get_parameter(name)
        assert torch.equal(parameter, original if recurrence else original.to(dtype).float()), name


def test_model_does_not_depend_on_the_file(model: Mamba, saved: Path) -> None:
    again, _ = load(saved)
    file = saved / "model.safetensors"
    with open(file, "r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert_same(again, model)


def test_shards(model: Mamba, tmp_path: Path) -> None:
    save(model, tmp_path / "a", max_shard_size="8KB")
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 2
    assert_same(load(tmp_path / "a")[0], model)
    (tmp_path / "a" / shards[1]).unlink()
    assert f"1 of {len(shards)} shards missing: {shards[1]}" in refusal(tmp_path / "a")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "..", "model.bin", ""])
def test_index_cannot_leave_the_directory(saved: Path, name: str) -> None:
    shutil.move(saved / "model.safetensors", saved.parent / "model.safetensors")
    write_json(saved / "model.safetensors.index.json", {"weight_map": {EMBEDDING: name}})
    assert "plain names of .safetensors files" in refusal(saved)


def test_shards_may_not_overlap(saved: Path) -> None:
    shutil.copy(saved / "model.safetensors", saved / "copy.safetensors")
    shutil.move(saved / "model.safetensors", saved / "first.safetensors")
    write_json(
        saved / "model.safetensors.index.json",
        {"weight_map": {"a": "copy.safetensors", "b": "first.safetensors"}},
    )
    assert "in another shard too" in refusal(saved)
    write_json(saved / "model.safetensors.index.json", {"weight_map": []})
    assert "weight_map" in refusal(saved)


def test_head_beside_tied_embeddings(model: Mamba, saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert_same(load(saved)[0], model)
    rewrite(saved, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "another lm_head.weight" in refusal(saved)
    edit(saved, tie_word_embeddings=False)
    untied, _ = load(saved)
    assert torch.equal(untied.get_parameter("lm_head.weight"), model.backbone.embedding.weight + 1)


def test_fingerprint_tells_models_apart(model: Mamba) -> None:
    assert re.fullmatch("[0-9a-f]{16}", model.fingerprint())
    before = model.fingerprint()
    with torch.no_grad():
        model.backbone.norm_f.weight[0] += 1
    assert model.fingerprint() != before
    assert make().fingerprint() == before


# ---- files of others


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_transformers_reads_ours(transformers: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    model = make(**fields)
    save(model, tmp_path / "a", ByteTokenizer())
    theirs, report = transformers.MambaForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(IDS, use_cache=False).logits, model(IDS).logits, rtol=1e-5, atol=1e-5
        )
    assert theirs.generation_config.eos_token_id == ByteTokenizer.eos_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer("añ").input_ids == ByteTokenizer().encode("añ")
    theirs.save_pretrained(tmp_path / "b", max_shard_size="10KB")  # keeps unpadded_vocab_size
    assert_same(load(tmp_path / "b")[0], model)
    save(model, tmp_path / "c", dtype=torch.bfloat16)
    assert transformers.MambaForCausalLM.from_pretrained(tmp_path / "c").dtype is torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_ours_reads_transformers(transformers: Any, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=264, hidden_size=16, num_hidden_layers=2, state_size=4, tie_word_embeddings=tied
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert model.config.vocab_size == 264
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS).logits, theirs(IDS, use_cache=False).logits, rtol=1e-5, atol=1e-5
        )


def test_tokenizer_tells_the_unpadded_vocabulary(saved: Path) -> None:
    edit(saved, unpadded_vocab_size=..., pad_vocab_size_multiple=...)
    config = load(saved)[0].config
    assert (config.vocab_size, config.padded_vocab_size) == (257, 264)
    (saved / "tokenizer.json").unlink()
    config = load(saved)[0].config
    assert (config.vocab_size, config.padded_vocab_size) == (264, 264)
    train_bpe(["the cat sat on the mat, " * 9], 262).save(saved)
    (saved / "tokenizer_config.json").unlink()
    assert load(saved)[0].config.vocab_size == 262
    edit(saved, unpadded_vocab_size=260)
    assert "the tokenizer has 262 ids, the model 260" in refusal(saved)


def test_published_official_layout(model: Mamba, tmp_path: Path) -> None:
    old = {"d_model": 16, "n_layer": 2, "vocab_size": 257, "ssm_cfg": {"d_state": 4}}
    flags = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    write_json(tmp_path / "config.json", old | flags)
    tensors = dict(model.state_dict())
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path)[0], model)
    new = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True}
    write_json(tmp_path / "config.json", old | flags | new | {"ssm_cfg": {"layer": "Mamba1", "d_state": 4}})
    assert_same(load(tmp_path)[0], model)
    convert(tmp_path, tmp_path / "official", layout="official")
    written = torch.load(tmp_path / "official" / "pytorch_model.bin", weights_only=True)
    assert list(written) == list(tensors)
    assert written["lm_head.weight"].data_ptr() == written["backbone.embedding.weight"].data_ptr()
    assert read_json(tmp_path / "official" / "config.json") == old | flags | {"tie_embeddings": True}


def test_hugging_face_copies_of_official_fields(model: Mamba, saved: Path) -> None:
    edit(
        saved,
        d_model=16,
        n_layer=2,
        d_inner=32,
        ssm_cfg={},
        rms_norm=True,
        fused_add_norm=True,
        torch_dtype="float32",
    )
    assert_same(load(saved)[0], model)
    edit(saved, n_layer=3)
    assert "n_layer: expected 2, as the other fields say, got 3" in refusal(saved)


# ---- writing


def test_failed_save_leaves_the_old_model(saved: Path, model: Mamba, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, directory: Path, **_: Any) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", fail)
    with pytest.raises(KeyboardInterrupt):
        save(make(n_layers=1), saved)
    assert_same(load(saved)[0], model)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_save_replaces_models_only(saved: Path, tmp_path: Path) -> None:
    other = make(n_layers=1)
    save(other, saved)
    assert_same(load(saved)[0], other)
    assert not (saved / "tokenizer.json").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(LongscanError, match="photos exists and was not written by longscan"):
        save(other, tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("layout", "writer", "error"),
    [
        ("hf", "huggingface_hub.save_torch_state_dict", SafetensorError),
        ("official", "torch.save", RuntimeError),
    ],
    ids=["hf", "official"],
)
def test_full_disk(
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    writer: str,
    error: type[Exception],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("No space left on device")

    monkeypatch.setattr(writer, fail)
    with pytest.raises(OSError, match="No space left on device; free some space") as caught:
        convert(saved, saved.parent / "new", layout=layout)
    assert caught.value.filename == str(saved.parent / "new")
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


# ---- the command


def test_convert_command(cli: Any, saved: Path, tmp_path: Path, model: Mamba) -> None:
    done = cli("convert", saved, tmp_path / "official", "--to", "official", "--dtype", "bfloat16")
    assert (done.code, done.err) == (0, "")
    for word in ("official layout", f"{model.num_parameters():,} parameters", "bfloat16", "with tokenizer"):
        assert word in done.out
    assert load(tmp_path / "official", dtype=None)[0].backbone.embedding.weight.dtype is torch.bfloat16
    done = cli("convert", tmp_path / "official", tmp_path / "hf")
    assert done.code == 0
    assert "hf layout" in done.out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_convert_command_errors(cli: Any, saved: Path, tmp_path: Path) -> None:
    before = sorted((path.name, path.read_bytes()) for path in saved.iterdir())
    done = cli("convert", saved, saved)
    assert done.code == 1
    assert done.err.startswith(f"error: {saved} exists and is not an empty directory")
    assert sorted((path.name, path.read_bytes()) for path in saved.iterdir()) == before
    assert cli("convert", tmp_path / "nowhere", tmp_path / "b").code == 1
    assert cli("convert", saved, tmp_path / "b", "--to", "gguf").code == 2
    assert cli("convert", saved, tmp_path / "b", "--dtype", "int3").code == 2
    (tmp_path / "file").touch()
    assert cli("convert", saved, tmp_path / "file" / "b").code == 1
    os.truncate(saved / "model.safetensors", 5000)
    done = cli("convert", saved, tmp_path / "b")
    assert done.code == 1
    assert "shorter than its header says" in done.err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["directory", "model.gguf"])
@pytest.mark.parametrize(
    "write", [convert, lambda *paths: quantize(*paths, "int8")], ids=["convert", "quantize"]
)
def test_a_second_writer_replaces_nothing(
    write: Callable[[Path, Path], object],
    name: str,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another program writes the target while the first one is flushing its own version to the disk."""
    target, flush = tmp_path / name, os.fsync

    def interfere(descriptor: int) -> None:
        if not target.exists():
            target.mkdir()
            (target / "config.json").write_text("theirs")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", interfere)
    with pytest.raises(LongscanError, match=f"{name} exists"):
        write(saved, target)
    assert [path.read_text() for path in target.iterdir()] == ["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "saved"])


# ---- models of other kinds


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.kind == "translation"])
def test_a_translator_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """In our own layout; the loader of language models says what it found."""
    entry = MODELS[name]
    fields = {**entry.presets["tiny"], "vocab_size": 257}
    model = entry.cls(entry.config.from_dict(fields), generator=torch.Generator().manual_seed(0))
    save(model, tmp_path / "model", ByteTokenizer())
    raw = read_json(tmp_path / "model" / "config.json")
    assert (raw["model_type"], raw["longscan"]) == (name, 1)
    again, tokenizer = load_translator(tmp_path / "model")
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    assert tokenizer.vocab_size == 257
    assert f"is a {name}, a translation model; expected a language model" in refusal(tmp_path / "model")
    edit(tmp_path / "model", longscan=2)
    with pytest.raises(LongscanError, match="longscan: expected version 1 of the layout"):
        load_translator(tmp_path / "model")
    edit(tmp_path / "model", longscan=1, surprise=3)
    with pytest.raises(LongscanError, match="has no field 'surprise'"):
        load_translator(tmp_path / "model")


def test_a_language_model_is_no_translator(saved: Path) -> None:
    """Whatever may be wrong with its tokenizer, which a translator's loader would ask more of."""
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(LongscanError, match="is a mamba, a language model; expected a translation model"):
        load_translator(saved)


@pytest.mark.parametrize("kind", ["language", "translation", "masked", "classifier", "sequence"])
def test_a_kind_is_asked_for(kind: Any, saved: Path, tmp_path: Path) -> None:
    config = SequenceConfig(
        body="mamba", body_config=make().config, n_outputs=2, labels=("a", "b"), d_input=1
    )
    save(SequenceModel(config), tmp_path / "sequence")
    expected = {"language": "a language model", "translation": "a translation model", "sequence": ""}
    expected |= dict.fromkeys(("masked", "classifier"), "a masked language model such as BERT")
    if kind == "sequence":
        assert load(tmp_path / "sequence", kind).config == config
    else:
        with pytest.raises(LongscanError, match=f"predicts no tokens: expected {expected[kind]}"):
            load(tmp_path / "sequence", kind)
    if kind == "language":
        assert_same(load(saved, kind)[0], load(saved)[0])
        return
    with pytest.raises(LongscanError, match=f"is a mamba, a language model; expected {expected[kind]}"):
        load(saved, kind)
    with pytest.raises(UsageError, match=f"precision: expected kind 'language', got '{kind}'"):
        load(saved, kind, precision="int8")


def test_impossible_kinds(saved: Path) -> None:
    other: Any = "vision"
    with pytest.raises(UsageError, match="kind: expected language, translation, masked, classifier, seq"):
        load(saved, other)


def test_only_mamba_goes_into_the_official_layout_and_gguf(tmp_path: Path) -> None:
    config = LlamaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=20)
    save(Llama(config, torch.Generator().manual_seed(0)), tmp_path / "model")
    with pytest.raises(LongscanError, match="the official layout is Mamba's, this is a Llama"):
        convert(tmp_path / "model", tmp_path / "other", layout="official")
    with pytest.raises(
        LongscanError, match=r"Llama: expected a Mamba, .* GGUF files of other models are not written"
    ):
        convert(tmp_path / "model", tmp_path / "other.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    narrow = convert(tmp_path / "model", tmp_path / "other", dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16


# ---- a directory without a tokenizer


def test_a_tokenizer_may_be_named(cli: Any, model: Mamba, tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "bytes")
    save(model, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "official", layout="official")
    (tmp_path / "text.txt").write_text("a text")
    without = cli("evaluate", tmp_path / "official", tmp_path / "text.txt")
    assert without.code == 1
    assert "--tokenizer" in without.err
    assert "EleutherAI/gpt-neox-20b" in without.err
    named = ("--tokenizer", tmp_path / "bytes" / "tokenizer.json", "-q")
    assert cli("generate", "a", "--model", tmp_path / "official", "--max-new-tokens", 2, *named).code == 0
    assert cli("evaluate", tmp_path / "official", tmp_path / "text.txt", *named).code == 0
    assert load(tmp_path / "official")[1] is None
    found = load(tmp_path / "official", tokenizer=tmp_path / "bytes")[1]
    assert found is not None
    assert found.vocab_size == 257
    done = cli("convert", tmp_path / "official", tmp_path / "hf", "--tokenizer", tmp_path / "bytes")
    assert "with tokenizer" in done.out
    assert load(tmp_path / "hf")[1] is not None


def test_a_named_tokenizer_must_fit(saved: Path, tmp_path: Path) -> None:
    train_bpe(["some text to learn from"] * 9, 300).save(tmp_path / "other")
    with pytest.raises(LongscanError, match="do not belong together"):
        load(saved, tokenizer=tmp_path / "other")
