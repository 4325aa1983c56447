"""The native library: located, checked and loaded here, and nowhere else.

The library has a C interface of raw pointers and depends on neither torch nor Python. Threads are torch's
own: the address of torch's C symbol ``torch_parallel_for`` is passed to the library once, so there is one
thread pool, and ``torch.set_num_threads`` applies to it.

``LONGSCAN_BACKEND=reference`` turns the library off; ``LONGSCAN_ISA`` selects an instruction set: baseline,
avx2, avx512 or avx512vnni; on aarch64 neon or dotprod.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longscan.ops._derivatives import composed

ABI_VERSION = 11
_HOME = Path(__file__).resolve().parent.parent / "_lib"
_FILES = {"Darwin": ("liblongscan.dylib", "libtorch_cpu.dylib"), "Windows": ("longscan.dll", "torch_cpu.dll")}
_OURS, _TORCHS = _FILES.get(platform.system(), ("liblongscan.so", "libtorch_cpu.so"))
_FLOAT_ISAS = {"baseline", "neon"}  # whose products of integers are slower than those of float32

# the library's numbers for the weight formats, by the dtypes of values and scales
_FORMATS: dict[tuple[torch.dtype, torch.dtype | None], int] = {
    (torch.float32, None): 0,
    (torch.bfloat16, None): 1,
    (torch.int8, torch.float32): 2,
    (torch.int8, torch.float16): 3,
    (torch.uint8, torch.float16): 4,
}


@dataclass(frozen=True)
class NativeInfo:
    """The status of the native library.

    Attributes:
        path: the library in use, or None.
        isa: the instruction set chosen at load ("avx512vnni", "avx512", "avx2" or "baseline"; "dotprod" or
            "neon" on aarch64), or None.
        reason: why there is no library, or None when there is one.
    """

    path: Path | None
    isa: str | None
    reason: str | None


def _load() -> tuple[ctypes.CDLL | None, NativeInfo]:
    if os.environ.get("LONGSCAN_BACKEND", "native") == "reference":
        return None, NativeInfo(None, None, "LONGSCAN_BACKEND=reference is set")
    path = _HOME / _OURS
    if not path.exists():
        reason = "it was not built: install a C++ compiler and run pip install again"
        return None, NativeInfo(None, None, reason)
    try:
        library = ctypes.CDLL(str(path))
        abi = library.ls_abi_version()
    except (OSError, AttributeError) as error:
        return None, NativeInfo(None, None, f"{path.name} does not load: {error}")
    if abi != ABI_VERSION:
        return None, NativeInfo(
            None, None, f"{path.name} is of another version: expected ABI {ABI_VERSION}, got {abi}"
        )
    library.ls_isa.restype = ctypes.c_char_p
    library.ls_probe_exp_fma.restype = ctypes.c_double
    library.ls_probe_exp_fma.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.ls_probe_read.restype = ctypes.c_double
    library.ls_probe_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.ls_probe_multiply.restype = ctypes.c_double
    library.ls_probe_multiply.argtypes = [ctypes.c_int64] * 3
    library.ls_multiply.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ls_multiply_workspace.restype = ctypes.c_int64
    library.ls_multiply_workspace.argtypes = [ctypes.c_int64] * 2
    library.ls_quant_gemm.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ls_dequantize.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.ls_decode_workspace.restype = ctypes.c_int64
    library.ls_scan_workspace.restype = ctypes.c_int64
    library.ls_scan_workspace.argtypes = [ctypes.c_int64] * 5
    library.ls_ssd_forward_workspace.restype = ctypes.c_int64
    library.ls_ssd_backward_workspace.restype = ctypes.c_int64
    library.ls_set_parallel_for.argtypes = [ctypes.c_void_p]
    library.ls_set_parallel_for(_torch_parallel_for())
    isa = os.environ.get("LONGSCAN_ISA", "")
    if library.ls_choose_isa(isa.encode()):
        return None, NativeInfo(None, None, f"LONGSCAN_ISA={isa} is not available on this processor")
    return library, NativeInfo(path, library.ls_isa().decode(), None)


def _torch_parallel_for() -> int | None:
    """Return the address of torch's thread pool entry, or None: then the library runs on one thread."""
    try:
        symbol = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _TORCHS)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(symbol, ctypes.c_void_p).value


_library, info = _load()
_PREFERS_ONEDNN = (
    _library is not None
    and bool(_library.ls_is_amd())
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
)


def available(*tensors: Tensor | None) -> bool:
    """Return whether the native kernels support these tensors: all float32 on the CPU, nothing `composed`."""
    if _library is None or composed():
        return False
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)


def quantized(q: Tensor, scale: Tensor | None) -> bool:
    """Return whether the native kernels support this matrix: a format of quant.py, contiguous, on the CPU."""
    tensors = [tensor for tensor in (q, scale) if tensor is not None]
    known = (q.dtype, None if scale is None else scale.dtype) in _FORMATS and q.dtype != torch.float32
    return (
        _library is not None
        and known
        and not composed()
        and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    )


def plain(tensor: Tensor) -> bool:
    """Return whether a kernel may use this tensor in place: float32, contiguous, on the CPU."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def direct(tensor: Tensor) -> bool:
    """Return whether a kernel may bypass torch's dispatcher and write into this tensor, as decoding does.

    The dispatcher costs more than a small kernel. It may be bypassed where no gradient is recorded and
    nothing is traced.
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_contiguous()
    return plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not composed()


def pointer(tensor: Tensor | None) -> int:
    """Return the address of the tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dense(tensor: Tensor | None) -> Tensor | None:
    """Return an optional tensor, contiguous; the caller keeps it alive during the call."""
    return None if tensor is None else tensor.contiguous()


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor if its last axis is contiguous (other strides are free), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def row_fields(tensor: Tensor | None) -> tuple[int, int, int]:
    """Return the C struct ``ls_rows`` of a (batch, time, ...) tensor: address, batch and time stride."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def scan_workspace(*sizes: int) -> int:
    """Return the scan backward's workspace in floats, for (batch, seq_len, d_inner, d_state, n_groups)."""
    assert _library is not None
    return int(_library.ls_scan_workspace(*sizes))


def workspace(function: str, arguments: Sequence[int]) -> int:
    """Return the floats of workspace that a kernel needs, from its C struct as in `call`."""
    assert _library is not None
    return int(getattr(_library, function)(struct.pack(f"{len(arguments)}q", *arguments)))


def call(function: str, arguments: Sequence[int]) -> None:
    """Call a kernel with a C struct of 8-byte fields, given here as integers in the same order."""
    assert _library is not None
    packed = struct.pack(f"{len(arguments)}q", *arguments)
    code = getattr(_library, function)(packed)
    if code:
        raise RuntimeError(
            f"{function} refused its arguments (code {code}); this is a defect in longscan, please report it"
        )


def prefers_onednn() -> bool:
    """Return whether oneDNN multiplies float32 faster than MKL: on AMD processors with AVX-512."""
    return _PREFERS_ONEDNN


def address(data: bytes) -> int:
    """Return the address of bytes; the caller keeps them alive during the call."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


def matrix_fields(
    q: Tensor, scale: Tensor | None, bias: Tensor | None, adapter: bytes | None = None
) -> tuple[int, ...]:
    """Return the C struct ``ls_matrix`` of a contiguous weight, quantised or not, with an ``ls_adapter``."""
    n_out, width = q.shape
    kind = (q.dtype, None if scale is None else scale.dtype)
    n_in = 2 * width if q.dtype == torch.uint8 else width
    low = 0 if adapter is None else address(adapter)
    return (_FORMATS[kind], n_out, n_in, q.data_ptr(), pointer(scale), pointer(bias), low)


def multiply(x: Tensor, q: Tensor, scale: Tensor | None, bias: Tensor | None, rows: int) -> Tensor:
    """Return x (..., n_in), of this many rows, times a float32 or quantised weight; all are contiguous."""
    assert _library is not None
    y = x.new_empty(*x.shape[:-1], q.shape[0])
    workspace = x.new_empty(_library.ls_multiply_workspace(rows, x.shape[-1]), dtype=torch.uint8)
    matrix = struct.pack("7q", *matrix_fields(q, scale, bias))
    if _library.ls_multiply(matrix, x.data_ptr(), y.data_ptr(), rows, workspace.data_ptr()):
        raise RuntimeError(
            f"ls_multiply refused {rows} rows and {tuple(q.shape)} {q.dtype}; please report it"
        )
    return y


def multiplies_integers(activation_bits: int) -> bool:
    """Return whether products of integers are at least as fast as those of float32.

    With AVX2 and up they are; on aarch64 only those of 8 bits, if an instruction multiplies four of them.
    """
    if _library is None:
        return False
    isa = _library.ls_isa().decode()
    return isa not in _FLOAT_ISAS and (isa != "dotprod" or activation_bits == 8)


def quant_gemm(
    x: Tensor, q: Tensor, scale: Tensor | None, bias: Tensor | None, rows: int, bits: int
) -> Tensor:
    """Return `multiply` for many rows and integer weights, with activations rounded to 8 or 16 bits."""
    assert _library is not None
    y = x.new_empty(*x.shape[:-1], q.shape[0])
    workspace = x.new_empty(_library.ls_multiply_workspace(rows, x.shape[-1]), dtype=torch.uint8)
    matrix = struct.pack("7q", *matrix_fields(q, scale, bias))
    if _library.ls_quant_gemm(matrix, x.data_ptr(), y.data_ptr(), rows, bits, workspace.data_ptr()):
        raise RuntimeError(
            f"ls_quant_gemm refused {rows} rows and {tuple(q.shape)} {q.dtype}; please report it"
        )
    return y


def dequantize(q: Tensor, scale: Tensor | None, weight: Tensor) -> None:
    """Dequantise a matrix into weight (n_out, n_in) float32."""
    assert _library is not None
    if _library.ls_dequantize(struct.pack("7q", *matrix_fields(q, scale, None)), weight.data_ptr()):
        raise RuntimeError(f"ls_dequantize refused {tuple(q.shape)} {q.dtype}; please report it")


def decode(arguments: bytes) -> bool:
    """Run the decoder on the C struct ``ls_decode`` up to its workspace; return False if an id is invalid."""
    assert _library is not None
    size = _library.ls_decode_workspace(arguments + bytes(8))
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    return not _library.ls_decode_tokens(arguments + struct.pack("q", workspace.data_ptr()))


def keep_memory() -> None:
    """Make the C allocator reuse freed memory, and shrink oneDNN's caches; for processes that only compute.

    By default glibc returns large blocks to the system, and every training step page-faults them in again,
    which costs memory-bound ops much of their time. Without glibc nothing happens.

    oneDNN caches a primitive per shape, up to 1,024, and torch's layer above it as many: if every batch has
    another shape, they take gigabytes and are hardly ever reused. The limits must be set before torch's first
    matrix product.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def release_memory() -> None:
    """Return the C allocator's free memory to the system; to be called occasionally where shapes vary."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def native_probe(n_states: int) -> float | None:
    """Measure the peak rate of a scan: exp and the three multiply-adds of a state update, in registers.

    Args:
        n_states: state updates per thread.

    Returns:
        State updates per second over all of torch's threads, or None without the native library.
    """
    return None if _library is None else float(_library.ls_probe_exp_fma(n_states, torch.get_num_threads()))


def native_multiply_probe(n: int, activation_bits: int) -> float | None:
    """Return products of integers per second over torch's threads; None if no kernel multiplies them.

    Args:
        n: products of every thread.
        activation_bits: 8 or 16.
    """
    if not multiplies_integers(activation_bits):
        return None
    assert _library is not None
    return float(_library.ls_probe_multiply(n, activation_bits, torch.get_num_threads()))


def native_read_probe(n_bytes: int) -> float | None:
    """Measure the peak rate of decoding: the memory bandwidth of all threads, reading beyond the caches.

    Args:
        n_bytes: total bytes to allocate and read.

    Returns:
        Bytes per second, the best of five runs, or None without the native library.
    """
    if _library is None:
        return None
    memory, threads = torch.ones(n_bytes // 4, dtype=torch.float32, device="cpu"), torch.get_num_threads()
    return max(float(_library.ls_probe_read(memory.data_ptr(), memory.numel(), threads)) for _ in range(5))


def backend() -> str:
    """Return the kernels in use: "native:<instruction set>" or "reference"."""
    return f"native:{info.isa}" if _library is not None else "reference"
