"""The authors' functions of Mamba-2 and Mamba-3, from a clone of state-spaces/mamba, and how to compare.

In LONGSCAN_CLONES=DIR, DIR/mamba is the clone (e9594ce ran); triton (3.8.0 ran) and einops have to be
installed. No GPU is needed: the kernels run in Triton's interpreter, in float32. It needs changes to a
temporary copy of the authors' files, which `PATCHES` lists, and stand-ins for a GPU, in `on_cpu`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import re
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

CLONE = Path(os.environ.get("LONGSCAN_CLONES", ""), "mamba")
CLONED = "LONGSCAN_CLONES" in os.environ and CLONE.is_dir()
needs_clone = pytest.mark.skipif(not CLONED, reason="LONGSCAN_CLONES is not set, or has no mamba")
if CLONED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

Tensors: TypeAlias = dict[str, Tensor]
Far: TypeAlias = dict[str, float]
# of the largest number of a tensor; float32 is that of the kernels too, which sum in another order
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
SISO, MIMO = "tests/ops/triton/test_mamba3_siso.py", "tests/ops/tilelang/test_mamba3_mimo.py"
KERNELS = "mamba_ssm/ops/triton/mamba3/*.py"
# files, a pattern in them, what replaces it
PATCHES = (
    ("mamba_ssm/__init__.py", r"(?s)\A.*\Z", ""),  # it imports models, and they transformers
    # the interpreter multiplies bfloat16 as integers
    (KERNELS, r"bfloat16", "float32"),
    # what only a GPU has
    (KERNELS, r'device="cuda"', 'device="cpu"'),
    (KERNELS, r"assert .*is_cuda.*", "pass"),
    (KERNELS, r'(?s)tl\.inline_asm_elementwise\(\s*"(cos|sin)\.approx.*?pack=1,\s*\)', r"tl.\1(x)"),
    (
        KERNELS,
        r'(?s)tl\.inline_asm_elementwise\(\s*"tanh\.approx.*?pack=1,\s*\)',
        "2 * tl.sigmoid(2 * x) - 1",
    ),
    # references compute in float64 what they are given in it
    ("mamba_ssm/ops/triton/ssd_combined.py", r"dt\.float\(\)", "dt"),
    *((file, r"torch\.float32", "torch.float64") for file in (SISO, MIMO)),
    *((file, r"\.float\(\)", ".double()") for file in (SISO, MIMO)),
)
MODULES = (
    "ops.triton.ssd_combined",
    "ops.triton.selective_state_update",
    "modules.ssd_minimal",
    "modules.mamba3",
)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Take the first configuration of each kernel, and stand in for what the authors' files ask of a GPU."""
    triton = importlib.import_module("triton")
    autotune, gpu = triton.autotune, types.SimpleNamespace(multi_processor_count=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "autotune", lambda configs, key, **_: autotune(configs[:1], key))
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        yield


@contextlib.contextmanager
def authors_files() -> Iterator[types.SimpleNamespace]:
    """Import the authors' modules from a patched copy, by the last part of their names."""
    with tempfile.TemporaryDirectory() as folder, on_cpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = Path(folder)
        shutil.copytree(CLONE / "mamba_ssm", home / "mamba_ssm")
        for file in (SISO, MIMO):
            (home / file).parent.mkdir(parents=True)
            shutil.copy(CLONE / file, home / file)
        for files, pattern, replacement in PATCHES:
            changed = 0
            for path in home.glob(files):
                text, n = re.subn(pattern, replacement, path.read_text())
                path.write_text(text)
                changed += n
            assert changed, f"{files} has no {pattern}: another version than the patches are for?"
        sys.path.insert(0, folder)
        try:
            found = {name.split(".")[-1]: importlib.import_module(f"mamba_ssm.{name}") for name in MODULES}
            yield types.SimpleNamespace(**found, siso=load_file(home / SISO), mimo=load_file(home / MIMO))
        finally:
            sys.path.remove(folder)
            for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
                del sys.modules[name]


def load_file(path: Path) -> types.ModuleType:
    """Import a file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draws(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a function that draws normal numbers of a shape, the same in both dtypes but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def results(function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
    """Return the outputs, and the gradients of a sum over them with fixed random weights."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    outputs = function(leaves)
    draw = draws(1, torch.float64)
    loss = torch.stack([(y * draw(*y.shape).to(y.dtype)).sum() for _, y in sorted(outputs.items())]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {name: y.detach() for name, y in outputs.items()}
    return found | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def distances(ours: Tensors, theirs: Tensors) -> Far:
    """Return the largest differences, each relative to the largest number of its tensor."""
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}
    return {k: float((ours[k] - x).abs().max() / x.abs().max()) for k, x in theirs.items()}


def check(far: Far, dtype: torch.dtype) -> None:
    """Assert that nothing is farther than `TOLERANCE`."""
    assert far
    assert all(x <= TOLERANCE[dtype] for x in far.values()), far  # NaN is not


def print_largest(name: str, far: Far) -> None:
    """Print the largest difference of the outputs and states, and of the gradients."""
    outputs = {k: x for k, x in far.items() if not k.startswith("d")}
    gradients = {k: x for k, x in far.items() if k.startswith("d")}
    parts = []
    for group in filter(None, (outputs, gradients)):
        worst = max(group, key=lambda k: math.inf if math.isnan(group[k]) else group[k])
        parts.append(f"{worst:16} {group[worst]:8.1e}")
    print(f"{name:44}", *parts, flush=True)
