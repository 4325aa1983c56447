"""Put the drop-in modules into sys.modules, and take them out again."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["NAMES", "install", "uninstall"]

# newer than what transformers and Megatron ask for
VERSIONS = {"mamba_ssm": "2.2.4", "causal_conv1d": "1.5.0"}

SCAN = ("selective_scan", "selective_scan_fn", ("selective_scan_ref", "selective_scan_fn"))
INNER = ("inner", "mamba_inner_fn", "mamba_inner_ref", "mamba_inner_fn_no_out_proj", "bimamba_inner_fn")
CONV = ("conv", "causal_conv1d_fn", "causal_conv1d_update")
CONV_REFS = ("conv", "causal_conv1d_ref", "causal_conv1d_update_ref")
VARLEN = "causal_conv1d_varlen_states"
SSD = ("ssd", "mamba_chunk_scan_combined", "mamba_chunk_scan")
SPLIT = ("mamba_split_conv1d_scan_combined", "mamba_split_conv1d_scan_ref", "mamba_conv1d_scan_ref")
SSD_KERNELS = ("_mamba_chunk_scan_combined_fwd", "_mamba_chunk_scan_combined_bwd")
GATED = ("gated_norms", "LayerNorm", "RMSNorm", "layernorm_fn", "rmsnorm_fn", "rms_norm_ref")
STATE_UPDATE = ("state_update", "selective_state_update", "selective_state_update_ref")
NORMS = ("layer_norm_fn", "rms_norm_fn", "layer_norm_ref", "rms_norm_ref")
MODELS = ("MambaLMHeadModel", "MixerModel", "create_block", "_init_weights")
FILTERS = ("min_p", "top_k", "top_p")
GENERATION = (
    *("generation", "InferenceParams", "GenerationMixin", "decode", "sample", "update_graph_cache"),
    *(f"modify_logits_for_{name}_filtering" for name in FILTERS),
    "modify_logit_for_repetition_penalty",
)
MAMBA, MAMBA2 = ("mamba", "Mamba"), ("mamba2", "Mamba2")
BLOCK_V1 = ("block", ("Block", "BlockV1"))
FORWARD_BACKWARD = ("fwd", "bwd")

# module -> what it has: a file of this room and its names, or (theirs, ours)
CONTENTS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "mamba_ssm": (MAMBA, MAMBA2, SCAN[:2], INNER[:2], ("language_model", "MambaLMHeadModel")),
    "mamba_ssm.modules": (),
    "mamba_ssm.modules.mamba_simple": (MAMBA, BLOCK_V1),
    "mamba_ssm.modules.mamba2": (MAMBA2,),
    "mamba_ssm.modules.block": (("block", "Block"),),
    "mamba_ssm.modules.mlp": (("block", "GatedMLP"),),
    "mamba_ssm.modules.ssd_minimal": (("ssd", "ssd_minimal_discrete"),),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.selective_scan_interface": (SCAN, INNER, CONV),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.layer_norm": (("norms", "RMSNorm", *NORMS, "layer_norm_linear_fn"),),
    "mamba_ssm.ops.triton.layernorm": (("norms_v1", *NORMS), ("norms", "RMSNorm", "layer_norm_linear_fn")),
    "mamba_ssm.ops.triton.layernorm_gated": (GATED, ("fused_kernels", "_layer_norm_fwd", "_layer_norm_bwd")),
    "mamba_ssm.ops.triton.selective_state_update": (STATE_UPDATE,),
    "mamba_ssm.ops.triton.ssd_combined": (SSD, ("split_conv", *SPLIT), ("fused_kernels", *SSD_KERNELS)),
    "mamba_ssm.models": (),
    "mamba_ssm.models.config_mamba": (("language_model", "MambaConfig"),),
    "mamba_ssm.models.mixer_seq_simple": (
        ("language_model", *MODELS, "MambaConfig"),
        MAMBA,
        MAMBA2,
        ("block", "Block", "GatedMLP"),
        ("hf", "load_config_hf", "load_state_dict_hf"),
    ),
    "mamba_ssm.utils": (),
    "mamba_ssm.utils.generation": (GENERATION,),
    "mamba_ssm.utils.torch": (("autocast", "custom_fwd", "custom_bwd"),),
    "mamba_ssm.utils.hf": (("hf", "load_config_hf", "load_state_dict_hf"),),
    "mamba_ssm.distributed": (),
    "mamba_ssm.distributed.tensor_parallel": (
        ("distributed", "ColumnParallelLinear", "RowParallelLinear", "ParallelEmbeddings"),
    ),
    "mamba_ssm.distributed.distributed_utils": (
        ("distributed", "all_reduce", "reduce_scatter", "all_gather", "sync_shared_params"),
    ),
    "causal_conv1d": (CONV,),
    "causal_conv1d.causal_conv1d_interface": (CONV, CONV_REFS),
    "causal_conv1d.causal_conv1d_varlen": (("conv", VARLEN, (f"{VARLEN}_ref", VARLEN)),),
    "causal_conv1d.cpp_functions": (
        ("conv_kernels", *(f"causal_conv1d_{what}_function" for what in ("fwd", "bwd", "update"))),
    ),
    "causal_conv1d_cuda": (
        ("conv_kernels", "causal_conv1d_fwd", "causal_conv1d_bwd"),
        ("conv_kernels", ("causal_conv1d_update", "causal_conv1d_update_kernel")),
    ),
    "selective_scan": (
        ("selective_scan", ("selective_scan_fn", "selective_scan_fn_without_gate")),
        ("selective_scan", ("selective_scan_ref", "selective_scan_fn_without_gate")),
    ),
    "selective_scan_cuda": (("scan_kernels", *FORWARD_BACKWARD),),
    "selective_scan_cuda_core": (("scan_kernels", *((name, f"core_{name}") for name in FORWARD_BACKWARD)),),
    "selective_scan_cuda_oflex": (("scan_kernels", *((name, f"oflex_{name}") for name in FORWARD_BACKWARD)),),
}
USUAL = (
    "math",
    "torch",
    "torch.nn",
    "torch.nn:functional:F",
    "torch:Tensor",
    "typing:Optional",
    "functools:partial",
)
EINOPS = ("einops:rearrange", "einops:repeat")
# module -> what theirs imports and clients take from it, also by "import *": a module, or module:name[:as]
IMPORTED: dict[str, tuple[str, ...]] = {
    "mamba_ssm.modules.mamba_simple": (*USUAL, *EINOPS),
    "mamba_ssm.modules.mamba2": (*USUAL, *EINOPS),
    "mamba_ssm.modules.block": USUAL,
    "mamba_ssm.ops.selective_scan_interface": (*USUAL, *EINOPS),
    "mamba_ssm.ops.triton.ssd_combined": (*USUAL, *EINOPS),
    "mamba_ssm.models.config_mamba": ("dataclasses:dataclass", "dataclasses:field"),
    "mamba_ssm.models.mixer_seq_simple": (*USUAL, "collections:namedtuple", "copy", "json", "os"),
    "mamba_ssm.utils.generation": (
        *("dataclasses:dataclass", "dataclasses:field", "collections:namedtuple", "gc", "time"),
        *("typing:Callable", "typing:Sequence", "typing:Union", *USUAL, *EINOPS),
    ),
}
NAMES = tuple(CONTENTS)
PACKAGES = tuple(name for name in NAMES if "." not in name)


class _Finder(importlib.abc.MetaPathFinder):
    """Says which import is not covered, instead of "unknown location"."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return nothing for other packages.

        Raises:
            ModuleNotFoundError: the name belongs to a drop-in package.
        """
        if fullname.partition(".")[0] in PACKAGES:
            raise ModuleNotFoundError(_not_covered(fullname))
        return None


class _DropIn(ModuleType):
    """A module of a drop-in package."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_not_covered(f"{self.__name__}.{name}"))


def _not_covered(name: str) -> str:
    owner = name
    while owner not in CONTENTS and "." in owner:
        owner = owner.rpartition(".")[0]
    covered = [other.rpartition(".")[2] for other in NAMES if other.rpartition(".")[0] == owner]
    covered += [part if isinstance(part, str) else part[0] for entry in CONTENTS[owner] for part in entry[1:]]
    return f"{name} is not covered by longscan.compat; {owner} has {', '.join(sorted(set(covered)))}."


_finder = _Finder()
_replaced: dict[str, ModuleType] = {}
_installed: dict[str, ModuleType] = {}


def install() -> None:
    """Make `import mamba_ssm`, causal_conv1d and selective_scan import longscan's modules of these names.

    Packages that are installed under these names are hidden. A second call does nothing.
    """
    if _installed:
        return
    modules = _made()
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        _replaced[name] = sys.modules.pop(name)
    _installed.update(modules)
    sys.modules.update(modules)
    sys.meta_path.insert(0, _finder)


def _made() -> dict[str, ModuleType]:
    """Return the modules of CONTENTS."""
    modules: dict[str, ModuleType] = {}
    for name, entries in CONTENTS.items():
        module = modules[name] = _DropIn(name, "See longscan.compat.")
        # a package, so that an import from it that fails asks the finder, which says why
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        for file, *names in entries:
            ours = importlib.import_module(f"longscan.compat.{file}")
            for entry in names:
                theirs, own = (entry, entry) if isinstance(entry, str) else entry
                setattr(module, theirs, getattr(ours, own))
        if name in VERSIONS:
            module.__version__ = VERSIONS[name]  # type: ignore[attr-defined]
        parent, _, leaf = name.rpartition(".")
        if parent and not hasattr(modules[parent], leaf):
            setattr(modules[parent], leaf, module)
    for name, sources in IMPORTED.items():
        for source in sources:
            _pass_on(modules[name], source)
    return modules


def _pass_on(module: ModuleType, source: str) -> None:
    """Put a name of `IMPORTED` into a module, if its package is installed and the name is free."""
    origin, *names = source.split(":")
    with contextlib.suppress(ImportError):  # einops is optional
        value = importlib.import_module(origin)
        leaf = names[-1] if names else origin.rpartition(".")[2]
        vars(module).setdefault(leaf, getattr(value, names[0]) if names else value)


def uninstall() -> None:
    """Take the modules out again, and put back what they replaced; names already imported keep working."""
    if not _installed:
        return
    sys.meta_path.remove(_finder)
    for name, module in _installed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    sys.modules.update(_replaced)
    _installed.clear()
    _replaced.clear()
