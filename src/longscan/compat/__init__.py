"""Other projects' import names and registries: code written for mamba_ssm runs on longscan's ops.

    import longscan.compat
    longscan.compat.install()      # before the code that imports mamba_ssm

or, for a script as it is, `python -m longscan.compat script.py ...`.

Image models appear in other libraries, which only these modules import:

    from longscan.compat.transformers import register      # in the Auto classes
    from longscan.compat.timm import register              # in timm's registry

docs/compat.md says what is covered.
"""

from longscan.compat.install import NAMES, install, uninstall
from longscan.compat.patch import patch_transformers, unpatch_transformers

__all__ = ["NAMES", "install", "patch_transformers", "uninstall", "unpatch_transformers"]
