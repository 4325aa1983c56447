"""transformers' Mamba models compute the same with longscan's ops, patched in or found under their names."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longscan import compat
from longscan.compat import patch
from longscan.errors import LongscanError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

COMMON: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
SHARED: dict[str, Any] = {
    **ATTENTION,
    **{"num_hidden_layers": 4, "num_key_value_heads": 4, "mamba_d_state": 8},
    "layers_block_type": ["mamba", "hybrid"] * 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8},
    "Jamba": {
        **ATTENTION,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
    },
    "Mamba2": {"state_size": 8, "head_dim": 16, "num_heads": 4, "n_groups": 2},
    "Bamba": {**ATTENTION, **HEADS, "attn_layer_indices": [1]},
    "FalconH1": {**ATTENTION, **HEADS, "mamba_d_ssm": 64},
    "GraniteMoeHybrid": {**ATTENTION, **HEADS, "layer_types": ["mamba", "attention"], "num_local_experts": 2},
    "NemotronH": {
        **ATTENTION,
        **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "head_dim": 8},
        "layers_block_type": ["mamba", "attention"],
    },
    "Zamba": {**SHARED, "n_mamba_heads": 2, "attention_hidden_size": 64, "attention_head_dim": 16},
    "Zamba2": {**SHARED, "n_mamba_heads": 4, "mamba_ngroups": 2},
}


@pytest.fixture
def patched() -> Iterator[list[str]]:
    yield compat.patch_transformers()
    compat.unpatch_transformers()


def model_of(family: str) -> Any:
    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(0)
    config = config_class(**(COMMON | IDS | FAMILIES[family]))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.generation_config.eos_token_id = None
    return model


def results(model: Any) -> dict[str, torch.Tensor]:
    """Logits, with padding on the left too, the loss, its gradients, and greedy text."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 48, (2, 37), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model.eval()
    with torch.no_grad():
        found = {"logits": model(ids).logits, "padded": model(ids, attention_mask=mask).logits[mask == 1]}
        found["text"] = model.generate(ids[:, :9], max_new_tokens=12, do_sample=False)
    model.train()
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    found["loss"] = loss.detach()
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_models_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    expected = results(model)
    module = importlib.import_module(type(model).__module__)
    calls: list[str] = []
    for name, function in patch.REPLACEMENTS.items():

        def counted(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            calls.append(_name)
            return _function(*args, **kwargs)

        counted.__signature__ = patch.inspect.signature(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(patch.REPLACEMENTS, name, counted)
    before = {name: vars(module).get(name) for name in patch.REPLACEMENTS}
    compat.patch_transformers()
    try:
        found = results(model)
    finally:
        compat.unpatch_transformers()
    assert {name: vars(module).get(name) for name in patch.REPLACEMENTS} == before
    assert set(calls) == {name for name, function in before.items() if function is not None}
    assert torch.equal(found.pop("text"), expected.pop("text"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4 * max(scale, 1e-3), msg=name)


def test_patch_names_families_and_is_idempotent(patched: list[str]) -> None:
    assert {"mamba", "falcon_mamba", "jamba", "mamba2", "bamba"} <= set(patched)
    assert compat.patch_transformers() == patched


@pytest.mark.filterwarnings("ignore")
def test_another_activation_keeps_their_path(patched: list[str]) -> None:
    from transformers.models.mamba import modeling_mamba as module

    x, weight = torch.ones(1, 3, 5), torch.ones(3, 4)
    y = module.causal_conv1d_fn(x, weight, activation="gelu")
    assert torch.allclose(y[0, 0, -1], torch.nn.functional.gelu(torch.tensor(4.0)))


def test_a_version_without_these_functions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "MODELS", ("bert",))
    with pytest.raises(LongscanError, match=r"no functions to replace; expected 5.20 or newer"):
        compat.patch_transformers()


FOUND = """
import torch, longscan.compat
longscan.compat.install()
import warnings; warnings.simplefilter("ignore")
from transformers import MambaConfig, MambaForCausalLM
torch.manual_seed(0)
config = MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, state_size=8)
model = MambaForCausalLM(config)
ids = torch.arange(3, 40)[None]
losses = []
for mode in (True, False):  # the fused function is used in training only
    losses.append(float(model.train(mode)(ids, labels=ids).loss))
print(*losses)
"""


def test_models_imported_after_install_use_it() -> None:
    run = subprocess.run([sys.executable, "-c", FOUND], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    fused, unfused = run.stdout.split()
    assert abs(float(fused) - float(unfused)) < 1e-5
    assert "falling back" not in run.stderr
