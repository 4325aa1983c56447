"""`longscan doctor`: what is installed, which kernels run, and whether they match their references."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import typer

import longscan
from longscan import ops
from longscan.checkpoints.hub import shipped
from longscan.commands._options import Json
from longscan.core.optional import EXTRAS
from longscan.ops.self_check import TOLERANCE, relative_error, run_checks

__all__ = ["command", "examine"]


_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "huggingface-hub", "typer", "rich")

_OPTIONAL = tuple(EXTRAS)

_CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "asimd", "asimddp", "sve")


def command(
    as_json: Json = False,
) -> None:
    """Show what is installed, which kernels run and why, and check them against the reference.

    Raises:
        typer.Exit: with code 1 when a kernel deviates from its reference.
    """
    report = examine()
    typer.echo(json.dumps(report, indent=2) if as_json else _text(report))
    if not report["self_check"]["ok"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Return a report on this installation.

    Returns:
        JSON values: versions, native (path, isa, reason, cpu), self_check (ok, failed, errors),
        multiplication, threads, accelerator, hub_models, shipped.
    """
    info = ops.native_info()
    errors = {name: relative_error(got, expected) for name, got, expected in run_checks()}
    failed = [name for name, error in errors.items() if not error <= TOLERANCE]  # not <=: a NaN fails too
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "python": platform.python_version(),
        "longscan": longscan.__version__,
        "packages": {name: _version(name) for name in (*_PACKAGES, *_OPTIONAL)},
        "native": {
            "path": str(info.path) if info.path else None,
            "isa": info.isa,
            "reason": info.reason,
            "cpu": _cpu_features(),
        },
        "self_check": {"ok": not failed, "failed": failed, "errors": errors},
        "multiplication": ops.multiplication(),
        "threads": torch.get_num_threads(),
        "accelerator": str(accelerator) if accelerator else None,
        "hub_models": len(list(_hub_cache().glob("models--*"))),
        "shipped": shipped(),
    }


def _text(report: dict[str, Any]) -> str:
    """Return the report as text, one subject per line."""
    packages = {name: version for name, version in report["packages"].items() if version}
    native, check = report["native"], report["self_check"]
    kernels = f"yes, {native['isa']}" if native["path"] else f"no: {native['reason']}"
    if native["cpu"]:
        kernels += f" (cpu has {' '.join(native['cpu'])})"
    worst = max(check["errors"].values())
    verdict = f"{len(check['errors'])} ops ok (max error {worst:.0e})"
    if not check["ok"]:
        details = ", ".join(f"{name} (error {check['errors'][name]:.0e})" for name in check["failed"])
        verdict = f"FAILED: {details}. Set LONGSCAN_BACKEND=reference to run without native kernels."
    needed = [f"{name} {packages.get(name, 'missing')}" for name in _PACKAGES[1:]]
    extras = [f"{name} {packages.get(name, 'not installed')}" for name in _OPTIONAL]
    names = ", ".join(report["shipped"]) or "none"
    return "\n".join(
        [
            f"python {report['python']} · torch {packages['torch']} · longscan {report['longscan']}",
            f"packages         {' · '.join(needed)}",
            f"extras           {' · '.join(extras)}",
            f"native kernels   {kernels}",
            f"self-check       {verdict}",
            f"matrix products  {report['multiplication']}",
            f"threads          {report['threads']} (torch) · accelerator {report['accelerator'] or 'none'}",
            f"caches           hub {report['hub_models']} models · shipped {names}",
        ]
    )


def _version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_features() -> list[str]:
    """Return the CPU's instruction sets that matter here, as /proc/cpuinfo lists them."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [feature for feature in _CPU_FEATURES if feature in flags]


def _hub_cache() -> Path:
    """Return the directory of the hub's downloaded models."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
