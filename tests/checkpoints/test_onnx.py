"""ONNX files: ONNX Runtime computes what the model does, for every batch size; what is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import longscan
from conftest import Done
from longscan import ops
from longscan.checkpoints.load import load
from longscan.checkpoints.onnx import export
from longscan.checkpoints.onnx.decompose import DECOMPOSITIONS
from longscan.errors import LongscanError
from longscan.models import MODELS, entry_of
from longscan.models.common.vision import VisionModel

Cli = Callable[..., Done]
TOLERANCE = 1e-5  # of the largest logit
IMAGES: dict[str, Any] = {"image_size": 16, "n_classes": 5}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "vmamba": (
        "vmamba",
        {"d_model": (8,), "n_blocks": (1,), "patch_size": 2, "d_state": 3, "gate": "silu"},
    ),
    "vim": ("vim", {"d_model": 16, "n_layers": 1, "patch_size": 4, "labels": tuple("猫abcd")}),
    "videomamba": (
        "videomamba",
        {"d_model": 16, "n_layers": 1, "patch_size": 8, "n_frames": 2, "scan_order": "spatiotemporal_v2"},
    ),
    "vit": ("vit", {"d_model": 16, "n_layers": 1, "n_heads": 2, "patch_size": 4}),
    "resnet": ("resnet", {"d_model": (4, 8), "n_blocks": (1, 1)}),
}


def small(case: str, **changes: Any) -> VisionModel:
    name, sizes = SIZES[case]
    entry = MODELS[name]
    model = entry.cls(entry.config(**{**IMAGES, **sizes, **changes}), torch.Generator().manual_seed(0))
    assert isinstance(model, VisionModel)
    with torch.no_grad():
        model.head_layer.weight.mul_(20)  # logits far from 0
    return model.eval()


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape))) - 0.5


# the ops, in torch's terms


def scan_inputs(*axes: int, d_inner: int = 6, d_state: int = 3) -> list[Tensor]:
    dt, B = rand(2, 9, *axes, d_inner), rand(2, 9, *axes, d_state)
    A = -rand(*axes, d_inner, d_state).abs() - 0.1
    return [rand(2, 9, *axes, d_inner), dt, A, B, B.flip(1), rand(*axes, d_inner), rand(*axes, d_inner)]


def test_linear() -> None:
    inputs = rand(2, 3, 4), rand(5, 4), rand(5)
    made = DECOMPOSITIONS[torch.ops.longscan.linear.default](*inputs)
    assert torch.allclose(made, ops.linear(*inputs), atol=1e-6)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [None, rand(6)], ids=["no bias", "bias"])
def test_convolution(bias: Tensor | None, activation: str | None) -> None:
    x, weight = rand(2, 9, 6), rand(6, 4)
    silu = activation == "silu"
    made, _ = DECOMPOSITIONS[torch.ops.longscan.causal_conv1d.default](x, weight, bias, None, None, silu)
    assert torch.allclose(made, ops.causal_conv1d(x, weight, bias, activation)[0], atol=1e-6)


@pytest.mark.parametrize("d_state", [1, 3])
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("softplus", [False, True])
def test_selective_scan(n_groups: int, softplus: bool, d_state: int) -> None:
    u, dt, A, _, _, D, bias = scan_inputs(d_state=d_state)
    B = rand(2, 9, n_groups, d_state)
    C = B.flip(1)
    dt, given = (dt, bias) if softplus else (dt.abs(), None)
    made, *_ = DECOMPOSITIONS[torch.ops.longscan.selective_scan.default](
        *(u, dt, A, B, C, D, None, given, None, None, softplus, False)
    )
    assert torch.allclose(made, ops.selective_scan(u, dt, A, B, C, D, None, given, softplus)[0], atol=1e-5)


@pytest.mark.parametrize("shared", [True, False], ids=["one input", "an input a path"])
def test_path_scan(shared: bool) -> None:
    u, dt, A, B, C, D, bias = scan_inputs(4)
    u = u[:, :, 0] if shared else u
    paths = ops.scan_pattern((3, 3)).order
    made, _ = DECOMPOSITIONS[torch.ops.longscan.path_scan.default](u, dt, A, B, C, D, bias, paths, False)
    assert torch.allclose(made, ops.path_scan(u, dt, A, B, C, D, bias, paths), atol=1e-5)


# the file


@pytest.fixture(scope="module")
def runtime() -> Any:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module", params=SIZES)
def written(
    runtime: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VisionModel, Path]:
    model, path = small(request.param).train(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    exported = export.save_onnx(model, path)
    assert model.training
    assert exported.shape == model.input_shape
    assert exported.difference < TOLERANCE
    return model.eval(), path


def agree(session: Any, model: VisionModel, batch: int) -> bool:
    images = rand(batch, *model.input_shape)
    with torch.no_grad():
        expected = model(images)
    (got,) = session.run(None, {"pixel_values": images.numpy()})
    return bool((torch.from_numpy(got) - expected).abs().max() <= TOLERANCE * expected.abs().max())


def test_onnx_runtime_computes_the_same(runtime: Any, written: tuple[VisionModel, Path]) -> None:
    model, path = written
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (entrance,), (exit_,) = session.get_inputs(), session.get_outputs()
    assert (entrance.name, entrance.shape) == ("pixel_values", ["batch", *model.input_shape])
    assert (exit_.name, exit_.shape) == ("logits", ["batch", 5])
    for batch in (1, 3, 16, 64):  # among them the number of positions, and of channels
        assert agree(session, model, batch)
    known = session.get_modelmeta().custom_metadata_map
    assert known["model"] == model.__class__.__name__.lower()
    assert json.loads(known["labels"]) == list(model.config.labels)
    assert json.loads(known["mean"]) == list(model.config.mean)
    assert json.loads(known["image_size"]) == 16


def test_what_a_file_holds(runtime: Any, written: tuple[VisionModel, Path]) -> None:
    import onnx

    model, path = written
    assert str(Path.cwd()).encode() not in path.read_bytes()  # torch notes where its code lies
    graph = onnx.load(path).graph
    weights = sum(4 * math.prod(each.dims) for each in graph.initializer)
    assert path.stat().st_size < weights + 2**16
    scans = sum(node.op_type == "Scan" for node in graph.node)
    assert (scans in (1, 2, 4)) == (entry_of(model).name not in ("vit", "resnet"))  # all paths, or one each
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}


def test_the_command_line(runtime: Any, cli: Cli, tmp_path: Path) -> None:
    longscan.save(
        small("vmamba", d_model=(8, 16), n_blocks=(1, 1), d_state=1, gate="none"), tmp_path / "model"
    )
    out = tmp_path / "new" / "model.onnx"
    done = cli("convert", tmp_path / "model", out, "--image-size", 12)
    assert done.code == 0, done.err
    assert "pixel_values (batch, 3, 12, 12)" in done.out
    assert done.err == ""
    model = load(tmp_path / "model", "image", image_size=12)
    assert agree(runtime.InferenceSession(str(out)), model, 2)
    assert [file.name for file in out.parent.iterdir()] == ["model.onnx"]
    again = cli("convert", tmp_path / "model", out)
    assert again.code == 1
    assert "exists" in again.err


# what is refused


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (("--dtype", "float16"), 2, "float32"),
        (("--to", "hf"), 2, "--to is for directories"),
        (("--tokenizer", "x"), 1, "tokenizer"),
        (("--gguf-type", "f16"), 2, "--gguf-type"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_of_other_files(
    cli: Cli, tmp_path: Path, options: tuple[str, ...], code: int, reason: str
) -> None:
    longscan.save(small("vim"), tmp_path / "model")
    done = cli("convert", tmp_path / "model", tmp_path / "model.onnx", *options)
    assert done.code == code
    assert reason in done.err
    assert not (tmp_path / "model.onnx").exists()


def test_language_models_are_refused(cli: Cli, tmp_path: Path) -> None:
    entry = MODELS["mamba"]
    model = entry.cls(entry.config(d_model=16, n_layers=1, vocab_size=32), torch.Generator().manual_seed(0))
    longscan.save(model, tmp_path / "model")
    done = cli("convert", tmp_path / "model", tmp_path / "model.onnx")
    assert done.code == 1
    assert "no image classifier" in done.err


def test_what_one_file_does_not_hold(tmp_path: Path) -> None:
    entry = MODELS["vim"]
    with torch.device("meta"):
        model = entry.cls(entry.config(d_model=4096, n_layers=8))
    assert isinstance(model, VisionModel)
    with pytest.raises(LongscanError, match=r"at most 2,130,706,432 bytes of weights.*got"):
        export.save_onnx(model, tmp_path / "model.onnx")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(export, "PACKAGES", ("onnxruntime",))
    with pytest.raises(LongscanError, match=r"ONNX files need onnxruntime: pip install 'longscan\[onnx\]'"):
        export.save_onnx(small("vim"), tmp_path / "model.onnx")


class Other:
    """What torch's exporter returns, of other weights."""

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, SimpleNamespace(metadata_props={}, opset_imports={"": 20})

    def save(self, path: str, external_data: bool) -> None:
        shutil.copy(self.path, path)


def test_a_file_that_computes_something_else_is_not_written(
    written: tuple[VisionModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = copy.deepcopy(written[0]), written[1]
    model.reset_classifier(5, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(export, "_export", lambda model, images: Other(path))
    with pytest.raises(LongscanError, match=r"differ from the model's by .* The file was not written"):
        export.save_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
