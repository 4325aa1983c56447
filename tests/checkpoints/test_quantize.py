"""Models in fewer bits: what is written is what is read, and what is wrong is said."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import longscan
from longscan import ops
from longscan.checkpoints.load import load
from longscan.checkpoints.save import convert, quantize, save
from longscan.core.files import read_json, write_json
from longscan.errors import LongscanError, UsageError
from longscan.models import Mamba, MambaConfig
from longscan.models.common.layers import WeightOnly
from longscan.models.common.quantization import (
    KINDS,
    dequantized,
    kind_of,
    precision,
    quantize_model,
    set_activation_bits,
)
from longscan.ops import Kind
from longscan.tokenizers.base import ByteTokenizer

BYTES = ByteTokenizer()
IDS = torch.tensor([[72, 101, 108, 108, 111], [0, 255, 256, 1, 2]])
IN_PROJ, X_PROJ = "backbone.layers.1.mixer.in_proj", "backbone.layers.1.mixer.x_proj"
TEXT = "The captain had not spoken since the morning. " * 9

# relative to the largest logit of a random model: rounding in 8 mantissa bits, 8 bits, 4 bits
COARSE = {"bf16": 0.01, "int8": 0.02, "int4": 0.3}


def make(**fields: Any) -> Mamba:
    sizes = {"d_model": 32, "n_layers": 2, "vocab_size": 257, "d_state": 4}
    return Mamba(MambaConfig.from_dict(sizes | fields), torch.Generator().manual_seed(0)).eval()


@pytest.fixture
def model() -> Mamba:
    return make()


@pytest.fixture
def plain(model: Mamba, tmp_path: Path) -> Path:
    save(model, tmp_path / "plain", BYTES)
    return tmp_path / "plain"


@pytest.fixture
def int4(plain: Path, tmp_path: Path) -> Path:
    quantize(plain, tmp_path / "int4", "int4")
    return tmp_path / "int4"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, Tensor)
    return found


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def refusal(directory: Path | str, **options: Any) -> str:
    with pytest.raises(LongscanError) as caught:
        load(directory, **options)
    return str(caught.value)


# ---- there and back


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "biased": {"bias": True, "conv_bias": False, "dt_rank": 32},
    "odd": {"d_model": 24, "vocab_size": 301, "expand": 3, "dt_rank": 5},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(fields: dict[str, Any], kind: Kind, tmp_path: Path) -> None:
    model = make(**fields)
    save(model, tmp_path / "a", BYTES)
    written = quantize(tmp_path / "a", tmp_path / "b", kind)
    convert(tmp_path / "b", tmp_path / "c")
    again, tokenizer = load(tmp_path / "c")
    assert isinstance(tokenizer, ByteTokenizer)
    assert again.fingerprint() == written.fingerprint() != model.fingerprint()
    assert again.config == model.config
    narrow = kind != "int4" or "d_model" not in fields  # 32 does not divide the widths of "odd"
    assert kind_of(again) == (kind if narrow else "int8")
    assert again.num_parameters() == model.num_parameters()
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(logits(again), logits(written))
    assert load(tmp_path / "a", precision=kind)[0].fingerprint() == written.fingerprint()
    if narrow:
        assert load(tmp_path / "b", precision=kind)[0].fingerprint() == written.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_the_documented_one(kind: Kind, plain: Path, model: Mamba, tmp_path: Path) -> None:
    quantize(plain, tmp_path / "b", kind)
    raw = read_json(tmp_path / "b" / "config.json")
    assert raw["quantization_config"] == {"quant_method": "longscan", "format": kind, "version": 1}
    del raw["quantization_config"]
    stored_type = {"bf16": "bfloat16", "int8": "int8", "int4": "uint8"}[kind]
    assert raw == read_json(plain / "config.json") | {"dtype": stored_type}
    stored, original = load_file(tmp_path / "b" / "model.safetensors"), load_file(plain / "model.safetensors")
    matrices = {name for name in original if name.endswith(("_proj.weight", "embeddings.weight"))}
    assert len(matrices) == 9
    for name in original.keys() - matrices:
        assert torch.equal(stored.pop(name), original[name]), name
    for name in matrices:
        of = "int8" if kind == "int4" and name.endswith(("x_proj.weight", "dt_proj.weight")) else kind
        q, scale = ops.quantize(original[name], of)
        assert torch.equal(stored.pop(name), q), name
        if scale is not None:
            assert torch.equal(stored.pop(name.replace(".weight", ".scale")), scale), name
    assert not stored


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_its_dequantised_weights_do(kind: Kind, plain: Path, model: Mamba) -> None:
    stored, _ = load(plain, precision=kind)
    again = dequantized(stored)
    assert (precision(stored), precision(again)) == (kind, "float32")
    assert again.training is False
    assert all(parameter.requires_grad for parameter in again.parameters())
    scale = float(logits(again).abs().max())
    torch.testing.assert_close(logits(stored), logits(again), rtol=0, atol=2e-4 * scale)
    assert 0 < float((logits(again) - logits(model)).abs().max()) < COARSE[kind] * scale
    assert dequantized(again) is again


def test_plain_weights_come_back(int4: Path, tmp_path: Path) -> None:
    stored, _ = load(int4)
    expected = dequantized(stored)
    assert load(int4, precision="float32")[0].fingerprint() == expected.fingerprint()
    convert(int4, tmp_path / "f32", dtype=torch.float32)
    assert "quantization_config" not in read_json(tmp_path / "f32" / "config.json")
    assert load(tmp_path / "f32")[0].fingerprint() == expected.fingerprint()
    convert(int4, tmp_path / "b16", layout="official", dtype=torch.bfloat16)
    narrow, _ = load(tmp_path / "b16", dtype=None)
    assert narrow.fingerprint() == expected.bfloat16().fingerprint()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_type_may_be_quantised(dtype: torch.dtype, kind: Kind, model: Mamba, tmp_path: Path) -> None:
    save(model, tmp_path / "a", dtype=dtype)
    quantize(tmp_path / "a", tmp_path / "b", kind)
    wide, _ = load(tmp_path / "a")  # float32
    quantize_model(wide, kind)
    assert load(tmp_path / "b", dtype=None)[0].fingerprint() == wide.fingerprint()


def test_files_may_mix_formats(int4: Path, plain: Path) -> None:
    """As llama.cpp's do: some matrices wider than others, int8 with a scale per 32."""
    q = torch.randint(-127, 128, (288, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    wide = load_file(plain / "model.safetensors")[f"{IN_PROJ}.weight"]

    def change(tensors: dict[str, Tensor]) -> None:
        name = f"{X_PROJ}.weight"
        rows, columns = tensors[name].shape
        tensors[name] = q.flatten()[: rows * columns].view(rows, columns)
        tensors[f"{X_PROJ}.scale"] = torch.full((rows, columns // 32), 0.25, dtype=torch.float16)
        del tensors[f"{IN_PROJ}.scale"]
        tensors[f"{IN_PROJ}.weight"] = wide
        tensors["backbone.embeddings.weight"] = wide.new_ones(264, 32)
        del tensors["backbone.embeddings.scale"]

    rewrite(int4, change)
    mixed, _ = load(int4)
    assert kind_of(mixed) == precision(mixed) == "int4"
    found = dequantized(mixed).state_dict()
    assert torch.equal(
        found[f"{X_PROJ}.weight"].flatten(), q.flatten()[: found[f"{X_PROJ}.weight"].numel()] / 4
    )
    assert torch.equal(found[f"{IN_PROJ}.weight"], wide)
    assert torch.isfinite(logits(mixed)).all()
    assert "quantised already (int4)" in refusal(int4, precision="int8")


def test_shards(plain: Path, tmp_path: Path) -> None:
    written = quantize(plain, tmp_path / "b", "int4", max_shard_size="8KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert load(tmp_path / "b")[0].fingerprint() == written.fingerprint()


def test_others_refuse_whole_numbers(plain: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    for kind in ("int8", "int4"):
        quantize(plain, tmp_path / kind, kind)
        with pytest.raises(ValueError, match="not a floating-point dtype"):
            transformers.MambaForCausalLM.from_pretrained(tmp_path / kind)
    stored = quantize(plain, tmp_path / "bf16", "bf16")
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    with torch.no_grad():
        found = theirs(IDS, use_cache=False).logits
    torch.testing.assert_close(found, logits(stored), rtol=1e-5, atol=1e-5)


def test_the_documented_reader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save(make(d_model=64), "plain")
    for kind in ("int8", "int4"):
        model = quantize("plain", kind, kind)
        names: dict[str, Any] = {}
        exec(compile(code.replace("longscan-tiny-en-int4", kind), "quantization.md", "exec"), names)
        wide = dequantized(model).state_dict()
        for name in ("backbone.embedding", IN_PROJ, X_PROJ):
            found = names["weight"](name.replace("embedding", "embeddings"))
            assert torch.equal(torch.from_numpy(found), wide[f"{name}.weight"]), name


# ---- what is refused


def test_twice(int4: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        with pytest.raises(LongscanError, match=r"int4: the model is quantised already \(int4\)"):
            quantize(int4, tmp_path / "again", kind)
        assert not (tmp_path / "again").exists()
    assert "Start from the original weights" in refusal(int4, precision="int8")


def test_formats_have_names(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format: expected bf16, int8, int4, got 'int3'"):
        quantize(plain, tmp_path / "b", "int3")  # type: ignore[arg-type]
    assert "precision: expected float32, bf16, int8, int4, w8a8, w4a8, got 'int2'" in refusal(
        plain, precision="int2"
    )


def test_activations_of_8_bits_are_another_precision(plain: Path, tmp_path: Path) -> None:
    models = {name: load(plain, precision=name)[0] for name in ("int8", "w8a8", "int4", "w4a8")}
    assert [precision(model) for model in models.values()] == list(models)
    assert len({model.fingerprint() for model in models.values()}) == 4
    quantize(plain, tmp_path / "int8", "int8")
    assert load(tmp_path / "int8", precision="w8a8")[0].fingerprint() == models["w8a8"].fingerprint()
    with pytest.raises(LongscanError, match="expected weights in int8 or int4, got float32"):
        set_activation_bits(load(plain)[0], 8)
    state = models["int8"].prefill(torch.arange(20)[None])[1]
    state.save(tmp_path / "state", position=20)
    with pytest.raises(LongscanError, match="fingerprint"):
        longscan.State.load(tmp_path / "state", models["w8a8"])


def test_weights_that_are_not_finite(plain: Path, tmp_path: Path) -> None:
    rewrite(plain, lambda tensors: tensors[f"{IN_PROJ}.weight"][0].fill_(math.nan))
    with pytest.raises(LongscanError, match=f"{IN_PROJ}.weight: expected finite numbers"):
        quantize(plain, tmp_path / "b", "int8")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["A_log", "conv1d.weight"])
def test_what_stays_float32_is_finite_too(plain: Path, tmp_path: Path, name: str) -> None:
    name = IN_PROJ.replace("in_proj", name)
    rewrite(plain, lambda tensors: tensors[name][0].fill_(math.nan))
    with pytest.raises(LongscanError, match=f"{name}: expected finite numbers"):
        quantize(plain, tmp_path / "b", "int8")


def test_numbers_beyond_float16(plain: Path, tmp_path: Path) -> None:
    rewrite(plain, lambda tensors: tensors[f"{IN_PROJ}.weight"][0].fill_(7e4))
    for act in (
        lambda: load(plain, dtype=torch.float16),
        lambda: convert(plain, tmp_path / "b", dtype=torch.float16),
        lambda: save(load(plain)[0], tmp_path / "b", dtype=torch.float16),
        lambda: convert(plain, tmp_path / "b.gguf", gguf_type="F16"),
    ):
        with pytest.raises(LongscanError, match=rf"{IN_PROJ}.weight: expected numbers up to 65,504"):
            act()
    assert convert(plain, tmp_path / "b", dtype=torch.bfloat16).num_parameters()


def test_places_without_room_for_it(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match="the official layout has no place for that"):
        convert(int4, tmp_path / "b", layout="official")
    with pytest.raises(LongscanError, match="a file of float16 has no place for that"):
        save(load(int4)[0], tmp_path / "b", dtype=torch.float16)
    with pytest.raises(LongscanError, match="int4 exists and is not an empty directory"):
        quantize(int4, int4, "int8")
    assert not (tmp_path / "b").exists()


METHODS: dict[str, tuple[Any, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quant_method 'longscan', got 'gptq'"),
    "none": ({}, "quant_method 'longscan', got None"),
    "list": ([4], "expected an object {...}, got [4]"),
    "format": ({"format": "int3"}, "expected a format among 'bf16', 'int8', 'int4', got 'int3'"),
    "no-format": ({"format": ...}, "got None"),
    "unhashable": ({"format": ["int4"]}, "got ['int4']"),
    "version": ({"version": 2}, "expected version 1, got 2"),
    "unknown": ({"group_size": 64}, "unknown field 'group_size'"),
    "other": ({"format": "int8"}, "config.json says int8, the weights are int4"),
}


@pytest.mark.parametrize(("changes", "expected"), METHODS.values(), ids=METHODS)
def test_unknown_methods(int4: Path, changes: Any, expected: str) -> None:
    raw = read_json(int4 / "config.json")
    if isinstance(changes, dict) and changes and "quant_method" not in changes:
        changes = raw["quantization_config"] | changes
        changes = {name: value for name, value in changes.items() if value is not ...}
    write_json(int4 / "config.json", raw | {"quantization_config": changes})
    assert expected in refusal(int4)
    assert str(int4) in refusal(int4)


def test_a_configuration_that_says_nothing(int4: Path, plain: Path) -> None:
    raw = read_json(int4 / "config.json")
    del raw["quantization_config"]
    write_json(int4 / "config.json", raw)
    assert "expected float32, float16 or bfloat16" in refusal(int4)
    said = {"quant_method": "longscan", "format": "int8", "version": 1}
    write_json(plain / "config.json", read_json(plain / "config.json") | {"quantization_config": said})
    assert "config.json says int8, the weights are float32" in refusal(plain)


def test_the_official_layout_knows_no_formats(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "b", layout="official")
    raw = read_json(tmp_path / "b" / "config.json")
    write_json(tmp_path / "b" / "config.json", raw | {"quantization_config": {}})
    assert "unknown field 'quantization_config'" in refusal(tmp_path / "b")


def cut(name: str, dim: int = 0) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name].narrow(dim, 0, tensors[name].shape[dim] // 2)})


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no-scale": (lambda tensors: tensors.pop(f"{IN_PROJ}.scale"), "uint8 (128, 16) with scales none"),
    "lone-scale": (
        lambda tensors: tensors.update({"backbone.norm_f.scale": torch.ones(1)}),
        "1 unexpected: backbone.norm_f.scale",
    ),
    "no-matrix": (
        lambda tensors: tensors.pop(f"{IN_PROJ}.weight"),
        f"1 missing: {IN_PROJ}.weight",
    ),
    "shape": (cut(f"{IN_PROJ}.weight"), "uint8 (64, 16) with scales float16 (128, 1) is no format of"),
    "width": (cut(f"{IN_PROJ}.weight", 1), "is no format of a weight of 128 x 32"),
    "scale-shape": (cut(f"{IN_PROJ}.scale"), "with scales float16 (64, 1)"),
    "scale-type": (cast(f"{IN_PROJ}.scale", torch.float32), "with scales float32 (128, 1)"),
    "scale-int": (cast(f"{IN_PROJ}.scale", torch.int8), "with scales int8 (128, 1)"),
    "matrix-type": (cast(f"{IN_PROJ}.weight", torch.int8), "int8 (128, 16) with scales"),
    "matrix-half": (cast(f"{IN_PROJ}.weight", torch.float16), f"{IN_PROJ}.weight float16 instead of float32"),
    "int32": (cast(f"{IN_PROJ}.weight", torch.int32), "is int32, expected float32"),
    "norm-int8": (cast("backbone.norm_f.weight", torch.int8), "norm_f.weight int8 instead of float32"),
    "norm-bf16": (cast("backbone.norm_f.weight", torch.bfloat16), "bfloat16 instead of float32"),
    "flat": (
        lambda tensors: tensors.update({f"{IN_PROJ}.weight": tensors[f"{IN_PROJ}.weight"].flatten()}),
        "uint8 (2048,) with scales",
    ),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_damage(int4: Path, damage: Callable[[dict[str, Tensor]], Any], expected: str) -> None:
    rewrite(int4, damage)
    assert expected in refusal(int4)
    assert str(int4) in refusal(int4)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_random_damage_is_never_unforeseen(int4: Path, name: str) -> None:
    file, rng = int4 / name, random.Random(0)
    data = file.read_bytes()
    for _ in range(100):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            bad[rng.randrange(min(len(bad), 2500))] = rng.randrange(256)
        file.write_bytes(bad if rng.random() < 0.8 else bad[: rng.randrange(len(bad))])
        with contextlib.suppress(LongscanError):
            load(int4)


# ---- the commands


@pytest.mark.parametrize("kind", KINDS)
def test_command(cli: Any, plain: Path, tmp_path: Path, kind: Kind) -> None:
    done = cli("quantize", plain, "--to", kind)
    out = tmp_path / f"plain-{kind}"
    assert done.code == 0, done.err
    before, after = ((path / "model.safetensors").stat().st_size for path in (plain, out))
    words = (f"{out} · {kind} · ", f"{after:,} bytes, was {before:,}", "bits per weight · with tokenizer")
    assert all(word in done.out for word in words)
    assert f"longscan generate --model {out}" in done.err
    done = cli("generate", "--model", out, "Hello", "--max-new-tokens", 3, "--seed", 0)
    assert (done.code, f"· {kind} ·" in done.err) == (0, True)
    assert precision(load(out)[0]) == kind
    done = cli("convert", out, tmp_path / "copy")
    assert (done.code, f"· {kind} ·" in done.out) == (0, True)
    done = cli("quantize", plain, "--to", kind, "--out", tmp_path / "here", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert load(tmp_path / "here")[0].fingerprint() == load(out)[0].fingerprint()


def test_command_errors(cli: Any, int4: Path, plain: Path, tmp_path: Path) -> None:
    done = cli("quantize", int4, "--to", "int8")
    assert (done.code, done.out) == (1, "")
    assert "quantised already (int4)" in done.err
    assert not (tmp_path / "int4-int8").exists()
    assert cli("quantize", plain, "--to", "int3").code == 2
    assert cli("quantize", plain).code == 2
    assert cli("quantize", tmp_path / "nowhere", "--to", "int8").code == 1
    assert cli("quantize", plain, "--to", "int8", "--out", plain).code == 1
    done = cli("convert", int4, tmp_path / "b", "--to", "official")
    assert done.code == 1
    assert "longscan convert --dtype float32" in done.err
    assert cli("convert", int4, tmp_path / "b", "--to", "official", "--dtype", "float32").code == 0


def test_a_name_for_what_has_no_place(
    cli: Any, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain)
    assert cli("quantize", ".", "--to", "int8").code == 0
    assert (tmp_path / "plain-int8" / "config.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert cli("quantize", "longscan-tiny-en", "--to", "int4").code == 0
    size = (tmp_path / "longscan-tiny-en-int4" / "model.safetensors").stat().st_size
    assert 3_000_000 < size < 3_100_000


def test_evaluate_at_a_precision(cli: Any, int4: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    found = {}
    for name, model, flags in (
        ("float32", plain, []),
        ("asked", plain, ["--precision", "int4"]),
        ("stored", int4, []),
        ("undone", int4, ["--precision", "float32"]),
    ):
        done = cli("evaluate", model, tmp_path / "a.txt", "--json", *flags)
        assert done.code == 0, done.err
        found[name] = json.loads(done.out)["bits_per_byte"]
    assert found["asked"] == found["stored"] != found["float32"]
    assert found["undone"] == pytest.approx(found["stored"], rel=1e-4)
    assert cli("evaluate", int4, tmp_path / "a.txt", "--precision", "int8").code == 1
    assert cli("evaluate", int4, tmp_path / "a.txt", "--precision", "bfloat16").code == 2


def test_stored_layers_are_not_trained(int4: Path) -> None:
    stored, _ = load(int4)
    count = sum(isinstance(module, WeightOnly) for module in stored.modules())
    assert count == 9
    assert not any("scale" in name for name, _ in stored.named_parameters())
