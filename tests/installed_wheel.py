"""Installs a wheel in an empty environment and runs it there.

    python tests/installed_wheel.py dist/longscan-*.whl

The dependencies are those of the environment that runs this script; nothing is downloaded. It prints the
sizes of the wheel, and ends with an error if the wheel is not for every Python, lacks something, or does not
run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

MODEL = "longscan/assets/longscan-tiny-en/"


class WheelError(Exception):
    """What is wrong with a wheel."""


def contents(wheel: Path) -> None:
    """Check the tag and what is inside, and print sizes in bytes."""
    tags = wheel.stem.split("-")[2:]
    if tags[:2] != ["py3", "none"] or tags[2].startswith("linux_"):
        raise WheelError(
            f"expected the tag py3-none-<platform>, and manylinux on Linux; got {'-'.join(tags)}"
        )
    with zipfile.ZipFile(wheel) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
    libraries = {name: size for name, size in sizes.items() if name.startswith("longscan/_lib/")}
    model = {name: size for name, size in sizes.items() if name.startswith(MODEL)}
    wrong = [name for name in sizes if not name.startswith(("longscan/", "longscan-"))]
    if len(libraries) != 1 or not model or wrong:
        raise WheelError(
            f"expected one library and the model that ships; got {list(libraries)}, {list(model)}, {wrong}"
        )
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {sum(sizes.values()):,} unpacked")
    print(f"  kernels {sum(libraries.values()):,} · model {sum(model.values()):,}")


def run(wheel: Path, directory: Path) -> None:
    """Install the wheel in an empty environment and run `doctor` and `generate` there."""
    venv.create(directory, with_pip=False)
    binaries = directory / ("Scripts" if os.name == "nt" else "bin")
    paths = sysconfig.get_paths(vars={"base": str(directory), "platbase": str(directory)})
    target = Path(paths["purelib"])
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--target", target, wheel], check=True)
    # the dependencies, without what an editable install added to the path: hooks in these do not run
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (target / "dependencies.pth").write_text("\n".join(packages) + "\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def longscan(*argv: str) -> str:
        command = [binaries / "python", "-m", "longscan", *argv]
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, encoding="utf-8", check=False
        )
        if done.returncode:
            raise WheelError(f"longscan {' '.join(argv)} ended with code {done.returncode}: {done.stderr}")
        return done.stdout

    report = json.loads(longscan("doctor", "--json"))
    path = report["native"]["path"]
    if path is None or target.resolve() not in Path(path).resolve().parents:
        raise WheelError(f"expected kernels from {target}, got {path} ({report['native']['reason']})")
    text = longscan("generate", "It was a bright morning", "--max-new-tokens", "20", "--seed", "0")
    if len(text.split()) < 10:
        raise WheelError(f"expected a text of 20 tokens, got {text!r}")
    print(f"  installed: {report['native']['isa']}, self-check ok · generates")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected: python tests/installed_wheel.py dist/longscan-….whl")
    try:
        contents(Path(sys.argv[1]))
        with tempfile.TemporaryDirectory() as empty:
            run(Path(sys.argv[1]).resolve(), Path(empty))
    except WheelError as error:
        sys.exit(f"error: {error}")
