"""Adapter files: round trips, PEFT itself on transformers' models, and files that are damaged or foreign."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longscan.checkpoints.adapter import CONFIG, WEIGHTS, apply_adapter, save_adapter
from longscan.checkpoints.load import load
from longscan.checkpoints.save import save
from longscan.errors import LongscanError
from longscan.models import MODELS, LanguageModel
from longscan.models.common.lora import LoraLayer, adaptable, adapted, attach
from longscan.models.common.quantization import quantize_model

LANGUAGE = [name for name, entry in MODELS.items() if entry.kind == "language" and name != "cnn"]


def build(name: str, seed: int = 0, **fields: Any) -> LanguageModel:
    entry = MODELS[name]
    settings = {**entry.presets["tiny"], **fields}
    model = entry.cls(entry.config.from_dict(settings), torch.Generator().manual_seed(seed)).eval()
    assert isinstance(model, LanguageModel)
    return model


def ids() -> Tensor:
    return torch.randint(0, 100, (2, 19), generator=torch.Generator().manual_seed(1))


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids()).logits
    return found


def trained(model: LanguageModel, names: list[str] | None = None) -> LanguageModel:
    """Give a model adapters, as training might leave them."""
    draw = torch.Generator().manual_seed(2)
    attach(model, dict.fromkeys(names or adaptable(model), LoraLayer(3, 1.5)), generator=draw)
    for _, module in adapted(model):
        torch.nn.init.normal_(module.lora_B, std=0.05, generator=draw)
    return model


def written(model: LanguageModel, directory: Path, names: list[str] | None = None) -> Tensor:
    """Save an adapter of a model and return its logits."""
    fingerprint = model.fingerprint()
    trained(model, names)
    save_adapter(model, directory, base="some/model", fingerprint=fingerprint)
    return logits(model)


@pytest.mark.parametrize("name", LANGUAGE)
def test_round_trip(name: str, tmp_path: Path) -> None:
    expected = written(build(name), tmp_path / "adapter")
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_adapter(model, tmp_path / "adapter")
    assert not list(adapted(model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    other = build(name, seed=5)
    with pytest.warns(UserWarning, match="other weights"):
        apply_adapter(other, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of transformers
@pytest.mark.parametrize(
    ("name", "targets"), [("mamba", ["in_proj", "x_proj"]), ("llama", ["q_proj", "o_proj", "down_proj"])]
)
def test_peft_reads_what_is_written_and_writes_what_is_read(
    name: str, targets: list[str], tmp_path: Path
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = build(name)
    save(model, tmp_path / "base")
    names = [one for one in adaptable(model) if one.rpartition(".")[2] in targets]
    expected = written(model, tmp_path / "ours", names)
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["target_modules"] == sorted(targets)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        both = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    assert not [w for w in said if "adapter keys" in str(w.message) or "Unexpected" in str(w.message)]
    with torch.no_grad():
        found = both(ids()).logits
    torch.testing.assert_close(found, expected[..., : found.shape[-1]], rtol=1e-3, atol=1e-4)

    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        use_rslora=True,
    )
    made = peft.get_peft_model(fresh, settings).eval()
    made.save_pretrained(tmp_path / "theirs")
    read, _ = load(tmp_path / "base", adapter=tmp_path / "theirs")
    with torch.no_grad():
        expected = made(ids()).logits
    torch.testing.assert_close(logits(read)[..., : expected.shape[-1]], expected, rtol=1e-3, atol=1e-4)


def test_quantised_models_have_it_beside_their_weights(tmp_path: Path) -> None:
    written(build("mamba", d_model=64), tmp_path / "adapter")
    stored, merged = build("mamba", d_model=64), build("mamba", d_model=64)
    quantize_model(stored, "int8")
    apply_adapter(stored, tmp_path / "adapter")
    assert list(adapted(stored))
    apply_adapter(merged, tmp_path / "adapter")
    torch.testing.assert_close(logits(stored), logits(merged), rtol=0.05, atol=0.05)


def test_load_merges_before_it_quantises(tmp_path: Path) -> None:
    model = build("mamba", d_model=64)
    save(model, tmp_path / "base")
    written(model, tmp_path / "run" / "adapter")
    plain, _ = load(tmp_path / "base", adapter=tmp_path / "run")  # the directory of a run is one too
    quantize_model(plain, "int8")
    stored, _ = load(tmp_path / "base", adapter=tmp_path / "run" / "adapter", precision="int8")
    assert stored.fingerprint() == plain.fingerprint()
    half, _ = load(tmp_path / "base", adapter=tmp_path / "run", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_patterns_of_alpha_and_the_root_of_rank(tmp_path: Path) -> None:
    written(build("mamba"), tmp_path / "a")
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    fields |= {
        "alpha_pattern": {"in_proj": 9.0, "layers.1.mixer.x_proj": 7},
        "lora_alpha": 4,
        "use_rslora": True,
    }
    (tmp_path / "a" / CONFIG).write_text(json.dumps(fields))
    model = build("mamba")
    quantize_model(model, "bf16")  # so that the adapters stay
    apply_adapter(model, tmp_path / "a")
    for name, module in adapted(model):
        alpha = 9.0 if name.endswith("in_proj") else 7 if name.endswith("1.mixer.x_proj") else 4
        assert module.s == pytest.approx(alpha / 3**0.5)


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        fields = json.loads((directory / CONFIG).read_text())
        change(fields)
        (directory / CONFIG).write_text(json.dumps(fields))

    return apply


def reshape(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return apply


A = "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "found adapter_config.json"),
    "pickled": (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), "may hold code"),
    "no config": (lambda d: (d / CONFIG).unlink(), "expected an adapter"),
    "cut": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-40]), WEIGHTS),
    "not JSON": (lambda d: (d / CONFIG).write_text("{"), CONFIG),
    "dora": (edit(lambda f: f.update(use_dora=True)), "use_dora"),
    "biases": (edit(lambda f: f.update(bias="all")), "bias"),
    "another kind": (edit(lambda f: f.update(peft_type="IA3")), "peft_type"),
    "saved modules": (edit(lambda f: f.update(modules_to_save=["lm_head"])), "modules_to_save"),
    "alpha": (edit(lambda f: f.update(lora_alpha="much")), "lora_alpha"),
    "infinite alpha": (edit(lambda f: f.update(lora_alpha=1e999)), "lora_alpha"),
    "huge alpha": (edit(lambda f: f.update(lora_alpha=10**400)), "lora_alpha"),
    "large alpha": (edit(lambda f: f.update(lora_alpha=1e40)), "lora_alpha"),
    "no patterns": (edit(lambda f: f.update(alpha_pattern=["x"])), "alpha_pattern an object"),
    "rslora": (edit(lambda f: f.update(use_rslora="yes")), "use_rslora"),
    "another r": (edit(lambda f: f.update(r=10**9)), "r: expected 3, the rank"),
    "no rank": (reshape(lambda t: t.update({A: t[A][:0], B: t[B][:, :0].contiguous()})), "of another model"),
    "8 bits": (reshape(lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)})), "16 bits or more"),
    "too large": (reshape(lambda t: t.update({A: t[A].double() * 1e60})), "finite"),
    "twice": (
        reshape(lambda t: t.update({A.replace("model.backbone", "model.network.backbone"): t[A].clone()})),
        "two adapters",
    ),
    "a regular expression": (edit(lambda f: f.update(alpha_pattern={"(a+)+$": 1})), "alpha_pattern"),
    "one without the other": (reshape(lambda t: t.pop(A)), "expected lora_A"),
    "a layer too many": (reshape(lambda t: t.update({A.replace("0", "7"): t[A].clone()})), "no such matrix"),
    "another width": (reshape(lambda t: t.update({A: t[A][:, :-1].contiguous()})), "of another model"),
    "another rank": (reshape(lambda t: t.update({A: t[A][:-1].contiguous()})), "of another model"),
    "no number": (reshape(lambda t: t[A].__setitem__((0, 0), float("nan"))), "finite"),
    "an unknown name": (reshape(lambda t: t.update({"x.lora_A.weight": t[A].clone()})), "x.lora_A.weight"),
    "nothing": (reshape(lambda t: t.clear()), "got none"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_foreign_adapter_is_refused(fault: str, tmp_path: Path) -> None:
    written(build("mamba"), tmp_path / "a")
    damage, message = FAULTS[fault]
    damage(tmp_path / "a")
    model = build("mamba")
    before = logits(model)
    with pytest.raises(LongscanError, match=message):
        apply_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), before)
    assert not list(adapted(model))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    written(build("llama"), tmp_path / "a")
    with pytest.raises(LongscanError, match="no such matrix"):
        apply_adapter(build("mamba"), tmp_path / "a")
    written(build("mamba", d_model=48), tmp_path / "b")
    with pytest.raises(LongscanError, match="of another model"):
        apply_adapter(build("mamba"), tmp_path / "b")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    with pytest.raises(LongscanError):
        written(build("mamba"), tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.txt"]
