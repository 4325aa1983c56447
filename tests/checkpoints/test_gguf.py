"""GGUF files: what was written is read, bit for bit where the format is exact; llama.cpp agrees."""

from __future__ import annotations

import json
import math
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

import gguf_bytes as raw
import tokenizers
from llama_cpp_oracle import AGREEMENT, TEXTS, agree
from longscan import ops
from longscan.checkpoints.gguf.model import ARCHITECTURES, GGUFType, save_gguf
from longscan.checkpoints.gguf.parser import check
from longscan.checkpoints.gguf.tensors import PLAIN, is_matrix
from longscan.checkpoints.gguf.tokenizer import describe_tokenizer, read_tokenizer
from longscan.checkpoints.load import load
from longscan.checkpoints.save import convert, save
from longscan.errors import LongscanError
from longscan.models import LanguageModel, Mamba, MambaConfig
from longscan.models.common.quantization import dequantized, kind_of, quantize_model
from longscan.tokenizers.base import ByteTokenizer, Tokenizer
from longscan.tokenizers.bpe import BPETokenizer, train_bpe

gguf = pytest.importorskip("gguf")

KINDS: tuple[GGUFType, ...] = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "blocked-dt": {"d_model": 64, "dt_rank": 32},  # a matrix of one block a row
    "odd": {"vocab_size": 301, "pad_vocab_size_multiple": 8, "d_conv": 3, "dt_rank": 5, "d_state": 3},
    "eps": {"norm_eps": 1e-6, "n_layers": 1},
    "inner-norms": {"inner_norms": "plain", "inner_norm_eps": 1e-5, "dt_rank": 3},
}


def make(**fields: Any) -> Mamba:
    sizes = {"d_model": 32, "n_layers": 2, "vocab_size": 257, "d_state": 4}
    return Mamba(MambaConfig.from_dict(sizes | fields), torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe(["the cat that sat there is 1234 and that's the other cat \n"] * 50, 300)


def put(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def load_gguf(path: Path, dtype: torch.dtype | None = None) -> tuple[LanguageModel, Tokenizer | None]:
    """Load a file as it is, or dequantised to a type."""
    model, tokenizer = load(path, dtype=None)
    return (dequantized(model).to(dtype) if dtype else model), tokenizer


def refusal(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(LongscanError) as caught:
        load_gguf(put(tmp_path, data))
    assert str(caught.value).startswith(str(tmp_path / "model.gguf"))
    return str(caught.value)


# ---- there and back


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path: Path, fields: dict[str, Any], kind: GGUFType) -> None:
    model = make(**fields)
    save_gguf(model, tmp_path / "a.gguf", ByteTokenizer(), kind)
    again, tokenizer = load_gguf(tmp_path / "a.gguf")
    assert isinstance(tokenizer, ByteTokenizer)
    assert again.config == model.config
    assert not again.training
    assert kind_of(again) == {"BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}.get(kind)
    assert all(p.requires_grad == (kind_of(again) is None) for p in again.parameters())
    wide, _ = load_gguf(tmp_path / "a.gguf", torch.float32)
    for name, values in dequantized(again).state_dict().items():
        assert torch.equal(values, wide.state_dict()[name]), name
        expected = model.state_dict()[name]
        if name.endswith("A_log"):
            assert torch.equal(values.double().exp().float(), expected.double().exp().float())
        elif not is_matrix(name, tuple(values.shape)) or kind == "F32":
            assert torch.equal(values, expected), name
        elif kind in PLAIN:
            assert torch.equal(values, expected.to(PLAIN[kind]).float()), name
        else:
            step = expected.abs().max() / {"Q8_0": 127, "Q4_0": 8}[kind]
            assert (values - expected).abs().max() <= 1.5 * step, (
                name
            )  # the largest of a block of 4 bits may be clipped
    save_gguf(again, tmp_path / "b.gguf", tokenizer, kind)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_q8_0_is_llama_cpps(tmp_path: Path) -> None:
    model = make()
    save_gguf(model, tmp_path / "a.gguf", None, "Q8_0")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    weight = model.get_parameter("backbone.layers.1.mixer.out_proj.weight").detach().numpy()
    assert (theirs["blk.1.ssm_out.weight"].data == gguf.quants.Q8_0.quantize(weight)).all()


def test_quantised_models_go_in_as_they_are(tmp_path: Path) -> None:
    model = make(d_model=64)
    direct, _ = tmp_path / "direct.gguf", save_gguf(model, tmp_path / "direct.gguf", None, "Q4_0")
    quantize_model(model, "int4")
    save_gguf(model, tmp_path / "a.gguf", None)
    again, _ = load_gguf(tmp_path / "a.gguf")
    assert kind_of(again) == "int4"
    ours, theirs = model.state_dict(), again.state_dict()
    for name in ("backbone.embedding", "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.out_proj"):
        assert theirs[f"{name}.weight"].dtype is torch.uint8
        assert torch.equal(theirs[f"{name}.weight"], ours[f"{name}.weight"])
        assert torch.equal(theirs[f"{name}.scale"], ours[f"{name}.scale"])
    assert check(direct).tensors["blk.0.ssm_in.weight"].type == "Q4_0"
    assert check(direct).tensors["blk.0.ssm_x.weight"].type == "Q8_0"
    save_gguf(model, tmp_path / "b.gguf", None, "Q8_0")  # four bits fit into eight
    wider, _ = load_gguf(tmp_path / "b.gguf", torch.float32)
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert torch.equal(wider.get_parameter(name), dequantized(model).get_parameter(name))


def test_rows_of_int8_keep_their_numbers(tmp_path: Path) -> None:
    model = make(d_model=64)
    quantize_model(model, "int8")
    save_gguf(model, tmp_path / "a.gguf", None)
    again, _ = load_gguf(tmp_path / "a.gguf")
    name = "backbone.layers.0.mixer.in_proj"
    assert torch.equal(again.state_dict()[f"{name}.weight"], model.state_dict()[f"{name}.weight"])
    torch.testing.assert_close(
        ops.dequantize(again.state_dict()[f"{name}.weight"], again.state_dict()[f"{name}.scale"]),
        dequantized(model).get_parameter(f"{name}.weight"),
        rtol=2**-11,
        atol=0,
    )


@pytest.mark.parametrize("matrix", [2, 8, 12, 13, 14], ids=["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_types_of_others(tmp_path: Path, matrix: int) -> None:
    path = put(tmp_path, raw.mamba(width=256, matrix=matrix))
    model, _ = load_gguf(path)
    assert kind_of(model) == {2: "int4", 8: "int8"}.get(matrix)
    wide = dequantized(model).state_dict()
    locate = ARCHITECTURES["mamba"].locate
    names = {locate(name, tuple(like.shape), model.config).name: name for name, like in wide.items()}
    for tensor in gguf.GGUFReader(path).tensors:
        name = names[tensor.name]
        if not name.endswith("A_log"):
            values = gguf.dequantize(tensor.data, tensor.tensor_type).copy()
            assert torch.equal(wide[name], torch.from_numpy(values).view(wide[name].shape)), name


def test_a_dtype_undoes_what_is_stored(tmp_path: Path) -> None:
    save_gguf(make(), tmp_path / "a.gguf", None, "Q8_0")
    model, tokenizer = load_gguf(tmp_path / "a.gguf", torch.bfloat16)
    assert (kind_of(model), tokenizer) == (None, None)
    assert model.backbone.embedding.weight.dtype is torch.bfloat16
    assert model.get_parameter("backbone.layers.0.mixer.A_log").dtype is torch.float32


def test_no_bias_of_conv1d_becomes_zeros(tmp_path: Path) -> None:
    model = make(conv_bias=False)
    save_gguf(model, tmp_path / "a.gguf", None)
    again, _ = load_gguf(tmp_path / "a.gguf")
    assert not again.get_parameter("backbone.layers.0.mixer.conv1d.bias").any()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_the_model_does_not_depend_on_the_file(tmp_path: Path) -> None:
    save_gguf(make(), tmp_path / "a.gguf", None, "BF16")
    model, _ = load_gguf(tmp_path / "a.gguf")
    before = model(torch.arange(9)[None]).logits
    size = (tmp_path / "a.gguf").stat().st_size
    with open(tmp_path / "a.gguf", "r+b") as stream:
        stream.write(bytes(size))
    assert torch.equal(model(torch.arange(9)[None]).logits, before)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_text("old")
    model = make()
    with torch.no_grad():
        model.get_parameter("backbone.layers.1.mixer.out_proj.weight")[0, 0] = torch.nan
    for kind in ("Q8_0", "Q4_0"):
        with pytest.raises(LongscanError, match=r"out_proj\.weight: .* NaN"):
            save_gguf(model, tmp_path / "a.gguf", None, kind)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LongscanError, match="pip install"):
        save_gguf(make(), tmp_path / "a.gguf", None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_text() == "old"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"expand": 3}, "expand 3"),
        ({"bias": True}, "bias true"),
        ({"inner_norms": "learned"}, "inner_norms learned"),
        ({}, "expected F32"),
    ],
    ids=["expand", "bias", "norms", "type"],
)
def test_what_llama_cpp_can_not_compute(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    kind: Any = None if fields else "Q3_K"
    with pytest.raises(LongscanError, match=words):
        save_gguf(make(**fields), tmp_path / "a.gguf", None, kind)


def test_the_epsilon_of_inner_norms(tmp_path: Path) -> None:
    """llama.cpp knows one for all norms: ours comes back, other files mean theirs."""
    model = make(inner_norms="plain", inner_norm_eps=1e-3)
    with pytest.warns(UserWarning, match=r"epsilon of the other norms, 1e-05, .* own is 0\.001"):
        save_gguf(model, tmp_path / "a.gguf", None)
    again, _ = load_gguf(tmp_path / "a.gguf")
    assert again.config == model.config
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    (tmp_path / "b.gguf").write_bytes(raw.mamba(mamba__ssm__dt_b_c_rms=raw.true()))
    config = load_gguf(tmp_path / "b.gguf")[0].config
    assert isinstance(config, MambaConfig)
    assert (config.inner_norms, config.inner_norm_eps) == ("plain", 1e-5)


# ---- metadata that do not fit


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"architecture": raw.string("llama")}, "expected mamba"),
    "nameless": ({"architecture": ...}, "expected mamba"),
    "inner-norms": ({"mamba__ssm__dt_b_c_rms": raw.u32(1)}, "ssm.dt_b_c_rms: expected true or false, got 1"),
    "inner-epsilon": (
        {"mamba__ssm__dt_b_c_rms": raw.true(), "longscan__inner_norm_epsilon": raw.f32(-1.0)},
        "longscan.inner_norm_epsilon: expected a small number",
    ),
    "half": ({"split__count": raw.u32(2)}, "one part of a model"),
    "layers": ({"block_count": raw.u32(2**31 - 1)}, "block_count is 2,147,483,647, the file has 12 tensors"),
    "no-layers": ({"block_count": ...}, "mamba.block_count: expected a whole number"),
    "layers-text": ({"block_count": raw.string("1")}, "mamba.block_count"),
    "zero": ({"state_size": raw.u32(0)}, "mamba.ssm.state_size"),
    "wide": ({"embedding_length": raw.u32(2**30), "inner_size": raw.u32(2**30)}, "impossible"),
    "narrow": ({"embedding_length": raw.u32(16), "inner_size": raw.u32(32)}, "12 of another shape"),
    "inner": ({"inner_size": raw.u32(65)}, "expected a multiple of 32"),
    "state": ({"state_size": raw.u32(3)}, "blk.0.ssm_a (64, 2) instead of (64, 3)"),
    "epsilon": ({"layer_norm_rms_epsilon": raw.f32(float("nan"))}, "expected a small number"),
    "missing": ({"drop": "blk.0.ssm_d"}, "1 missing: blk.0.ssm_d"),
    "no-embedding": ({"drop": "token_embd.weight"}, "token_embd.weight is missing"),
    "more-tokens": ({"tokens": raw.strings([*raw.TOKENS, "x"]), "token_type": ...}, "do not belong together"),
    "token-twice": ({"tokens": raw.strings(["a"] * 10)}, "a is there twice"),
    "types": ({"token_type": raw.numbers([1])}, "expected 10 whole numbers"),
    "merges": ({"merges": raw.strings(["a z"])}, "the tokenizer is damaged"),
    "no-merges": ({"merges": ...}, "tokenizer.ggml.merges"),
    "eos": ({"eos_token_id": raw.u32(8)}, "eos_token_id: expected an id below 8"),
    "other-json": ({"tokenizer__huggingface__json": raw.string("{}")}, "the tokenizer is damaged"),
    "number-json": ({"tokenizer__huggingface__json": raw.u32(1)}, "expected text"),
    "vocab-size": ({"longscan__vocab_size": raw.u32(11)}, "unpadded_vocab_size"),
    "few-ids": ({"longscan__vocab_size": raw.u32(7)}, "has 8 ids, the model 7"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_wrong_metadata(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, raw.mamba(**changes))


def test_wrong_tensors(tmp_path: Path) -> None:
    positive = raw.with_entry("blk.0.ssm_a", data=b"\0\0\x80\x3f" * 128)
    assert "blk.0.ssm_a: expected A, which is never positive" in refusal(tmp_path, positive)
    assert "1 unexpected: blk.0.ssm_e" in refusal(tmp_path, raw.with_entry("blk.0.ssm_d", name="blk.0.ssm_e"))
    integers = raw.with_entry("output_norm.weight", kind=26)
    assert "output_norm.weight I32" in refusal(tmp_path, integers)
    transposed = raw.with_entry("blk.0.ssm_in.weight", dims=(128, 32))
    assert "blk.0.ssm_in.weight (32, 128) instead of (128, 32)" in refusal(tmp_path, transposed)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert kind_of(load_gguf(put(tmp_path, raw.mamba(matrix=8)))[0]) == "int8"  # needs none
    assert "longscan[gguf]" in refusal(tmp_path, raw.mamba(width=256, matrix=14))


# ---- tokenizers


def test_a_tokenizer_comes_back(tmp_path: Path, bpe: BPETokenizer) -> None:
    save_gguf(make(vocab_size=300), tmp_path / "a.gguf", bpe)
    _, again = load_gguf(tmp_path / "a.gguf")
    assert again is not None
    assert again.fingerprint == bpe.fingerprint


@pytest.mark.parametrize("by_digit", [False, True], ids=["words", "digits"])
def test_a_tokenizer_is_built_from_the_lists(tmp_path: Path, bpe: BPETokenizer, by_digit: bool) -> None:
    if by_digit:
        bpe.save(tmp_path)
        original = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        original.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, original.pre_tokenizer])
        original.add_tokens(["  ", "<user>"])
        bpe = BPETokenizer(original, bpe.eos_id)
    entries = describe_tokenizer(bpe, 304)
    entries["tokenizer.ggml.token_type"] = array("i", entries["tokenizer.ggml.token_type"])
    assert len(entries["tokenizer.ggml.tokens"]) == 304
    del entries["tokenizer.huggingface.json"]
    again = read_tokenizer(entries)
    assert again is not None
    assert (again.vocab_size, again.eos_id) == (bpe.vocab_size, bpe.eos_id)
    for text in [*TEXTS, "a <user> that sat 12"]:
        assert again.encode(text) == bpe.encode(text)
        assert again.decode(bpe.encode(text)) == text


def test_small_lists(tmp_path: Path) -> None:
    _, tokenizer = load_gguf(put(tmp_path, raw.mamba()))
    assert tokenizer is not None
    assert tokenizer.encode("abcab a") == [6, 5, 7, 1]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (8, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"model": raw.string("llama")}, "kind llama"), ({"pre": raw.string("qwen2")}, "words qwen2")],
    ids=["kind", "words"],
)
def test_a_tokenizer_that_is_not_read(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        model, tokenizer = load_gguf(put(tmp_path, raw.mamba(**changes)))
    assert tokenizer is None
    assert model.config.vocab_size == 8


def test_a_tokenizer_that_has_no_place(tmp_path: Path, bpe: BPETokenizer) -> None:
    bpe.save(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    for change in ({"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}}):
        other = BPETokenizer(tokenizers.Tokenizer.from_str(json.dumps(whole | change)), 0)
        with pytest.raises(LongscanError, match="byte-level BPE that cuts words like GPT-2"):
            save_gguf(make(vocab_size=300), tmp_path / "a.gguf", other)
    with pytest.raises(LongscanError, match="284 ids, the model 257"):
        save_gguf(make(), tmp_path / "a.gguf", bpe)
    assert not (tmp_path / "a.gguf").exists()


# ---- as other commands see it


def test_commands(cli: Any, tmp_path: Path, bpe: BPETokenizer) -> None:
    save(make(vocab_size=300), tmp_path / "model", bpe)
    done = cli("convert", tmp_path / "model", tmp_path / "new" / "a.gguf", "--gguf-type", "q8_0")
    assert (done.code, done.err) == (0, "")
    assert "a.gguf · GGUF · Q8_0 · " in done.out
    gguf_file = tmp_path / "new" / "a.gguf"
    assert cli("convert", tmp_path / "model", gguf_file).code == 1  # exists
    done = cli("generate", "the", "--model", gguf_file, "--max-new-tokens", 3)
    assert done.code == 0
    assert "int8" in done.err
    for options, kind in (((), "int8"), (("--dtype", "float32"), None)):
        directory = tmp_path / f"d{len(options)}"
        assert cli("convert", gguf_file, directory, *options).code == 0
        model, tokenizer = load(directory)
        assert kind_of(model) == kind
        assert tokenizer is not None
        assert tokenizer.fingerprint == bpe.fingerprint
    assert kind_of(convert(tmp_path / "d0", tmp_path / "b.gguf")) == "int8"
    assert (tmp_path / "b.gguf").read_bytes() == gguf_file.read_bytes()
    for arguments in (("c.gguf", "--to", "hf"), ("c", "--gguf-type", "F16")):
        done = cli("convert", tmp_path / "model", tmp_path / arguments[0], *arguments[1:])
        assert done.code == 2
    assert "Name the .gguf file itself" in cli("convert", tmp_path / "new", tmp_path / "c").err
    gguf_file.write_bytes(gguf_file.read_bytes()[:-5000])
    done = cli("generate", "the", "--model", gguf_file)
    assert done.code == 1
    assert "shorter than its header says" in done.err


@pytest.mark.parametrize(("precision", "kind"), [("float32", None), ("int8", "int8"), (None, "int8")])
def test_load(tmp_path: Path, precision: Any, kind: str | None) -> None:
    save_gguf(make(), tmp_path / "a.gguf", ByteTokenizer(), "Q8_0")
    model, tokenizer = load(tmp_path / "a.gguf", precision=precision)
    assert kind_of(model) == kind
    assert isinstance(tokenizer, ByteTokenizer)


# ---- llama.cpp


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(tmp_path: Path, fields: dict[str, Any], kind: GGUFType) -> None:
    save_gguf(make(**fields), tmp_path / "a.gguf", ByteTokenizer(), kind)
    model, tokenizer = load_gguf(tmp_path / "a.gguf")
    assert tokenizer is not None
    agree(model, tokenizer, tmp_path / "a.gguf", AGREEMENT[kind])


def test_llama_cpp_and_the_shipped_model(tmp_path: Path) -> None:
    model, tokenizer = load("longscan-tiny-en")
    assert tokenizer is not None
    save_gguf(model, tmp_path / "a.gguf", tokenizer)
    agree(model, tokenizer, tmp_path / "a.gguf", AGREEMENT["F32"])


def test_special_tokens_come_back(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_special_tokens(["<s>", "</s>", "<unk>"])  # 257 to 259
    roles = {"bos_token": "<s>", "unk_token": "<unk>"}
    written = BPETokenizer(library, 258, others=[256, 259], roles=roles, adds_bos=True)
    assert written.prefix == (257,)
    save_gguf(make(vocab_size=260), tmp_path / "model.gguf", written)
    _, tokenizer = load_gguf(tmp_path / "model.gguf")
    assert tokenizer is not None
    assert (tokenizer.prefix, tokenizer.eos_ids) == ((257,), (258, 256, 259))
    assert tokenizer.special_ids["bos_token_id"] == 257
    assert tokenizer.fingerprint == written.fingerprint


def test_a_merged_file_says_that_it_has_no_parts(tmp_path: Path) -> None:
    load_gguf(put(tmp_path, raw.mamba(split__count=raw.u32(0))))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["mixer.in_proj.weight", "mixer.D", "norm.weight"])
def test_weights_that_are_not_finite(tmp_path: Path, kind: GGUFType, value: float, name: str) -> None:
    model = make()
    with torch.no_grad():
        model.get_parameter(f"backbone.layers.1.{name}").flatten()[5] = value
    with pytest.raises(LongscanError, match="expected finite numbers, got NaN or infinity"):
        save_gguf(model, tmp_path / "model.gguf", None, kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "value"), [("Q8_0", 1e7), ("Q4_0", 1e6), ("F16", 1e5)])
def test_weights_beyond_a_type(tmp_path: Path, kind: GGUFType, value: float) -> None:
    model = make()
    with torch.no_grad():
        model.get_parameter("backbone.layers.1.mixer.in_proj.weight")[3, 5] = value
    with pytest.raises(LongscanError, match=r"in_proj.weight: expected numbers up to [\d,]+"):
        save_gguf(model, tmp_path / "model.gguf", None, kind)


def test_a_recurrence_that_no_file_can_hold(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.get_parameter("backbone.layers.1.mixer.A_log")[0, 0] = 100.0  # A = -exp(100)
    with pytest.raises(LongscanError, match="A_log: expected finite numbers"):
        save_gguf(model, tmp_path / "model.gguf", None, "F32")
