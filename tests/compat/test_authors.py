"""The authors' own files of VMamba, Vim and VideoMamba, unmodified, through the drop-in, against our models.

    LONGSCAN_CLONES=DIR make test ARGS=tests/compat/test_authors.py
    LONGSCAN_CLONES=DIR .venv/bin/python tests/compat/test_authors.py  # times, at 224 pixels

DIR holds clones of MzeroMiko/VMamba, hustvl/Vim and OpenGVLab/VideoMamba; timm and einops have to be
installed. Without DIR these tests are skipped.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import longscan
import longscan.compat
from longscan.compat import mamba
from longscan.models.common.vision import VisionModel

CLONES = os.environ.get("LONGSCAN_CLONES")
pytestmark = pytest.mark.skipif(CLONES is None, reason="LONGSCAN_CLONES is not set")
TOLERANCE = 1e-5  # of the largest logit, and of the largest gradient of a tensor
IMAGE_FILE, VIDEO_FILE = "Vim/vim/models_mamba.py", "VideoMamba/videomamba/video_sm/models/videomamba.py"
INTERFACE = "Vim/mamba-1p1p1/mamba_ssm/ops/selective_scan_interface.py"
# what these files import and the models never call
NAMED = ("torchvision", "timm.data", "fvcore")
AUTHORS = ("authors_vim", "authors_videomamba", "authors_interface")  # their files, as modules
Way: TypeAlias = Literal["drop-in", "torch loop"]

VIM = {
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "final_pool_type": "mean",
    "if_abs_pos_embed": True,
    "bimamba_type": "v2",
    "if_cls_token": True,
    "if_divide_out": True,
    "use_middle_cls_token": True,
}
VIDEO = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
VMAMBA = {
    "ssm_d_state": 1,
    "ssm_ratio": 1.0,
    "ssm_conv_bias": False,
    "forward_type": "v05_noz",
    "downsample_version": "v3",
    "patchembed_version": "v2",
    "norm_layer": "ln2d",
}
# name: (model, size of the input, arguments of the authors' class); sizes that leave odd maps among them
SMALL: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "vim": (
        "vim",
        (2, 3, 32, 32),
        {**VIM, "img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 48, "depth": 3},
    ),
    "vim odd": (
        "vim",
        (1, 3, 24, 24),
        {**VIM, "img_size": 24, "patch_size": 8, "stride": 8, "embed_dim": 36, "depth": 3},
    ),
    "videomamba": (
        "videomamba",
        (2, 3, 4, 32, 32),
        {**VIDEO, "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_frames": 4},
    ),
    "videomamba odd": (
        "videomamba",
        (1, 3, 3, 40, 40),
        {**VIDEO, "img_size": 40, "patch_size": 8, "embed_dim": 36, "depth": 3, "num_frames": 3},
    ),
    "vmamba": ("vmamba", (2, 3, 64, 64), {**VMAMBA, "depths": [1, 2, 1, 1], "dims": 16}),
    "vmamba odd": ("vmamba", (1, 3, 57, 83), {**VMAMBA, "depths": [1, 2, 1, 1], "dims": 24}),
    "vmamba v0": (
        "vmamba",
        (2, 3, 50, 70),
        {
            **VMAMBA,
            **{"depths": [1, 1, 1, 1], "dims": 16, "ssm_d_state": 16, "ssm_ratio": 2.0, "mlp_ratio": 0.0},
            **{"forward_type": "v0", "downsample_version": "v1", "patchembed_version": "v1"},
            **{"norm_layer": "ln", "ssm_conv_bias": True},
        },
    ),
}
PUBLISHED: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "Vim-S": ("vim", (1, 3, 224, 224), {**VIM, "embed_dim": 384, "depth": 24}),
    "VMamba-T": ("vmamba", (1, 3, 224, 224), {**VMAMBA, "depths": [2, 2, 8, 2], "dims": 96}),
    "VideoMamba-Ti": (
        "videomamba",
        (1, 3, 8, 224, 224),
        {**VIDEO, "embed_dim": 192, "depth": 24, "num_frames": 8},
    ),
}


class Named(MetaPathFinder, Loader):
    """Finds packages that are imported and never called: any module in them, any name in these."""

    def __init__(self, packages: Iterable[str]) -> None:
        self.packages = tuple(packages)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        named = any(f"{name}.".startswith(f"{package}.") for package in self.packages)
        return ModuleSpec(name, self, is_package=True) if named else None

    def exec_module(self, module: types.ModuleType) -> None:
        def anything(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = anything  # type: ignore[method-assign]


@contextlib.contextmanager
def drop_in() -> Iterator[None]:
    """Install the drop-in, and empty modules in place of what the authors' files only import."""
    finder = Named(NAMED)
    before = dict(sys.modules)
    sys.meta_path.insert(0, finder)
    longscan.compat.install()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of timm's old names, and of Triton's absence
            yield
    finally:
        longscan.compat.uninstall()
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("torchvision", "fvcore", "timm", "rope", "models", *AUTHORS):
                del sys.modules[name]


def load_file(file: str, name: str) -> Any:
    """Import a file of the clones, its folder on the path."""
    path = Path(CLONES or "", file)
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def authors_class(model: str) -> Callable[..., nn.Module]:
    """Return the class of the authors' file."""
    if model == "vmamba":
        home = str(Path(CLONES or "", "VMamba/classification"))
        sys.path.insert(0, home)
        try:
            return importlib.import_module("models.vmamba").VSSM  # type: ignore[no-any-return]
        finally:
            sys.path.remove(home)
    file = IMAGE_FILE if model == "vim" else VIDEO_FILE
    return load_file(file, f"authors_{model}").VisionMamba  # type: ignore[no-any-return]


@contextlib.contextmanager
def run_by(way: Way) -> Iterator[None]:
    """Run the scans of the authors' models by the drop-in, or by the loops over time of their own files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.cuda, "device", lambda device: contextlib.nullcontext()
        )  # VMamba enters it for any tensor
        if way == "torch loop":
            selective_scan_ref = load_file(INTERFACE, "authors_interface").selective_scan_ref

            def inner(
                xz: Tensor,
                weight: Tensor,
                bias: Tensor | None,
                x_proj: Tensor,
                dt_proj: Tensor,
                A: Tensor,
                B: None = None,
                C: None = None,
                D: Tensor | None = None,
                delta_bias: Tensor | None = None,
                delta_softplus: bool = True,
            ) -> Tensor:
                x, z = xz.chunk(2, 1)
                padded = F.pad(x, (weight.shape[-1] - 1, 0))
                x = F.silu(F.conv1d(padded, weight, bias, groups=len(weight)))
                rank, d_state = dt_proj.shape[1], A.shape[1]
                dt, b, c = (x.mT @ x_proj.T).split([rank, d_state, d_state], 2)
                return selective_scan_ref(
                    x, (dt @ dt_proj.T).mT, A, b.mT, c.mT, D, z, delta_bias, delta_softplus
                )  # type: ignore[no-any-return]

            patch.setattr(mamba, "mamba_inner_fn_no_out_proj", inner)
            if scans := sys.modules.get("models.csms6s"):
                for flag in ("OFLEX", "CORE", "MAMBA"):
                    patch.setattr(scans, f"WITH_SELECTIVESCAN_{flag}", False)
        yield


def perturbed(net: nn.Module, seed: int = 0) -> nn.Module:
    """Move all weights, so that none stays at a value that hides a fault, such as 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            spread = 0.2 * parameter.std() if parameter.numel() > 1 else torch.tensor(0.0)
            parameter += torch.randn(parameter.shape, generator=draw) * spread.clamp(min=0.02)
    return net.eval()


def ours_of(net: nn.Module, model: str, folder: Path, pixels: tuple[int, ...]) -> VisionModel:
    """Return our model of the weights of theirs, from a file as the authors publish it."""
    file = folder / f"{model}.pth"
    torch.save({"model": net.state_dict()}, file)
    square = {"image_size": pixels[-1]} if pixels[-1] == pixels[-2] else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the image size that the file does not say
        return longscan.load(file, "image", model=model, **square)


def gradients(net: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits, and the gradients of a sum over them with fixed random weights."""
    logits = net(images)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    named = dict(net.named_parameters())
    found = torch.autograd.grad((logits * weights).sum(), list(named.values()), allow_unused=True)
    return logits.detach(), {name: g for name, g in zip(named, found, strict=True) if g is not None}


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("way", ["drop-in", "torch loop"])
@pytest.mark.parametrize("case", SMALL)
def test_our_models_are_the_authors(case: str, way: Way, tmp_path: Path) -> None:
    model, shape, arguments = SMALL[case]
    images = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)  # their initialisation draws from it
    with drop_in():
        theirs = perturbed(authors_class(model)(num_classes=7, **arguments))
        with run_by(way):
            logits, wanted = gradients(theirs, images)
        ours = ours_of(theirs, model, tmp_path, shape)
    got, found = gradients(ours, images)
    assert distance(got, logits) < TOLERANCE
    assert set(found) == set(wanted)
    far = {name: distance(found[name].reshape(g.shape), g) for name, g in wanted.items()}
    assert max(far.values()) < TOLERANCE, max(far.items(), key=lambda item: item[1])


def times(n: int = 5) -> None:
    """Print the median seconds of a forward pass: by torch's loops, by the drop-in, and of our models."""
    torch.manual_seed(0)
    print(f"seconds, {torch.get_num_threads()} threads, median of {n} in turns")
    print(f"{'':14} {'torch loop':>11} {'drop-in':>9} {'longscan':>9}")
    for name, (model, shape, arguments) in PUBLISHED.items():
        images, taken = torch.randn(shape), list[tuple[float, ...]]()
        with drop_in(), torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            theirs = authors_class(model)(num_classes=1000, **arguments).eval()
            ours = ours_of(theirs, model, Path(folder), shape)
            for _ in range(n + 1):
                with run_by("torch loop"):
                    loop = _seconds(theirs, images)
                with run_by("drop-in"):
                    taken.append((loop, _seconds(theirs, images), _seconds(ours, images)))
        medians = map(statistics.median, zip(*taken[1:], strict=True))  # the first ones warm up
        print(f"{name:14} {next(medians):11.3f} {next(medians):9.3f} {next(medians):9.3f}", flush=True)


def _seconds(net: nn.Module, images: Tensor) -> float:
    begin = time.perf_counter()
    net(images)
    return time.perf_counter() - begin


if __name__ == "__main__":
    times()
