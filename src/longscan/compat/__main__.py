"""`python -m longscan.compat script.py ...` or `-m module ...`: run a program with the drop-in modules."""

import runpy
import sys
from pathlib import Path

from longscan.compat.install import install

USAGE = """usage: python -m longscan.compat SCRIPT [ARGUMENTS]
       python -m longscan.compat -m MODULE [ARGUMENTS]
"""


def main(arguments: list[str]) -> None:
    """Run a script or a module as Python would, after `install`.

    Args:
        arguments: the script, or -m and a module, then its own arguments.

    Raises:
        SystemExit: there is nothing to run.
    """
    is_module = arguments[:1] == ["-m"]
    rest = arguments[1:] if is_module else arguments
    if not rest or rest[0] in ("-h", "--help"):
        sys.stderr.write(USAGE)
        raise SystemExit(0 if rest else 2)
    if not is_module and not Path(rest[0]).exists():
        sys.stderr.write(f"python -m longscan.compat: no such file: {rest[0]}\n{USAGE}")
        raise SystemExit(2)
    install()
    sys.argv = rest
    if is_module:
        sys.path[0] = ""
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(rest[0]).resolve().parent)
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
