"""install, uninstall and `python -m longscan.compat`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version

from longscan import compat
from longscan.compat.__main__ import main
from longscan.compat.install import CONTENTS


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", compat.NAMES)
def test_every_module_and_name_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__name__ == name
    assert importlib.util.find_spec(name) is not None
    for _, *names in CONTENTS[name]:
        for entry in names:
            theirs = entry if isinstance(entry, str) else entry[0]
            exec(f"from {name} import {theirs}", {})


@pytest.mark.usefixtures("installed")
def test_star_imports_pass_on_what_clients_use_without_importing_it() -> None:
    names: dict[str, Any] = {}
    exec("from mamba_ssm.utils.generation import *", names)
    exec("from mamba_ssm.modules.mamba_simple import *", names)
    assert names["dataclass"] is dataclasses.dataclass
    assert names["partial"] is functools.partial
    assert names["F"] is torch.nn.functional
    assert names["nn"] is torch.nn
    assert names["Mamba"] is compat.mamba.Mamba
    assert names["InferenceParams"] is compat.generation.InferenceParams


@pytest.mark.usefixtures("installed")
def test_usual_imports() -> None:
    import mamba_ssm
    import selective_scan_cuda
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm import Mamba
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mamba_simple import Block as BlockV1

    assert list(inspect.signature(Block).parameters)[2] == "mlp_cls"
    assert list(inspect.signature(BlockV1).parameters)[2] == "norm_cls"
    assert Mamba(8)(torch.zeros(1, 3, 8)).shape == (1, 3, 8)
    assert causal_conv1d_fn(torch.zeros(1, 3, 5), torch.zeros(3, 4)).shape == (1, 3, 5)
    assert callable(selective_scan_cuda.fwd)
    assert mamba_ssm.ops.triton.layer_norm.RMSNorm is not mamba_ssm.ops.triton.layernorm_gated.RMSNorm
    assert Version(mamba_ssm.__version__) >= Version("2.0.4")  # transformers asks for it


@pytest.mark.usefixtures("installed")
def test_what_is_not_covered_is_named() -> None:
    with pytest.raises(
        ImportError, match=r"mamba_ssm\.modules\.mamba3 is not covered .* mamba_ssm\.modules has"
    ):
        importlib.import_module("mamba_ssm.modules.mamba3")
    with pytest.raises(
        ImportError, match=r"mamba_ssm\.Mamba3 is not covered .* mamba_ssm has Mamba, Mamba2,"
    ):
        exec("from mamba_ssm import Mamba3", {})
    with pytest.raises(ImportError, match=r"mamba_ssm\.ops\.triton\.ssd_combined\.selective_scan_bwd"):
        exec("from mamba_ssm.ops.triton.ssd_combined import selective_scan_bwd", {})
    import mamba_ssm

    assert not hasattr(mamba_ssm, "Mamba3")
    with pytest.raises(AttributeError, match="not covered"):
        _ = mamba_ssm.Mamba3


@pytest.mark.usefixtures("installed")
def test_tensor_parallelism_is_refused_when_used() -> None:
    from mamba_ssm.distributed.distributed_utils import all_reduce
    from mamba_ssm.distributed.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    for use in (all_reduce, ColumnParallelLinear, RowParallelLinear):
        with pytest.raises(NotImplementedError, match=f"{use.__name__}: .* no tensor parallelism"):
            use(1, 2)


def test_install_hides_what_is_there_and_uninstall_restores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, part = ModuleType("mamba_ssm"), ModuleType("mamba_ssm.modules.mamba3")
    monkeypatch.setitem(sys.modules, "mamba_ssm", theirs)
    monkeypatch.setitem(sys.modules, "mamba_ssm.modules.mamba3", part)
    finders = list(sys.meta_path)
    compat.install()
    first = sys.modules["mamba_ssm"]
    compat.install()
    assert sys.modules["mamba_ssm"] is first is not theirs
    assert len(sys.meta_path) == len(finders) + 1
    assert "mamba_ssm.modules.mamba3" not in sys.modules
    compat.uninstall()
    compat.uninstall()
    assert sys.modules["mamba_ssm"] is theirs
    assert sys.modules["mamba_ssm.modules.mamba3"] is part
    assert sys.meta_path == finders
    assert not {"causal_conv1d", "selective_scan_cuda", "mamba_ssm.ops"} & set(sys.modules)


def test_the_core_does_not_need_it() -> None:
    code = "import sys, longscan, longscan.models, longscan.cli; print('longscan.compat' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compat.md").read_text(encoding="utf-8")
    first = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    names: dict[str, Any] = {}
    try:
        exec(first, names)
    finally:
        compat.uninstall()
    assert names["block"].A_log.grad.abs().max() > 0


# python -m longscan.compat

SCRIPT = """
import sys
from mamba_ssm import Mamba
import helper
print(__name__, sys.argv[1:], Mamba.__name__, helper.VALUE)
"""


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longscan.compat", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(compat.__file__).parents[2])}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_a_script_runs_as_it_would(tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("VALUE = 7")
    expected = "__main__ ['--size', '3'] Mamba 7\n"
    assert run("scripts/script.py", "--size", 3, cwd=tmp_path).stdout == expected
    assert run("-m", "script", "--size", 3, cwd=folder).stdout == expected


def test_the_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, message in (
        ([], 2, "usage:"),
        (["-m"], 2, "usage:"),
        (["--help"], 0, "usage:"),
        ([str(tmp_path / "gone.py")], 2, "no such file"),
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == code
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("installed")
def test_functions_with_a_backward_pass_of_their_own() -> None:
    from mamba_ssm.utils.torch import custom_bwd, custom_fwd

    class Double(torch.autograd.Function):
        @staticmethod
        @custom_fwd
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        @custom_bwd
        def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
            return 2 * dy

    x = torch.ones(3, requires_grad=True)
    Double.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
