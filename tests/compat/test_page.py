"""The Python blocks of docs/compat.md run, in a process of their own: they replace modules."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports(package: str) -> bool:
    done = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, check=False)
    return done.returncode == 0


def test_the_blocks_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    page = (ROOT / "docs" / "compat.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    wanted = {"timm": "import timm", "onnxruntime": "import onnxruntime", "onnxscript": "import onnxruntime"}
    for package, line in wanted.items():
        if importlib.util.find_spec(package) is None or not imports(package):
            blocks = [block for block in blocks if f"{line}\n" not in block]
    shutil.copy(ROOT / "docs" / "figures" / "house.png", tmp_path / "photo.png")
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    code = [sys.executable, "-c", path + "\n".join(blocks)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
