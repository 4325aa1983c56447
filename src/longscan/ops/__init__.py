"""The ops: one file each, with a reference, gradients and a native kernel."""

from longscan.ops._legs_hold import legendre
from longscan.ops._native import (
    NativeInfo,
    backend,
    keep_memory,
    native_multiply_probe,
    native_probe,
    native_read_probe,
    release_memory,
)
from longscan.ops.attention import attention, attention_ref, masked_softmax
from longscan.ops.cauchy import cauchy, cauchy_ref
from longscan.ops.conv import causal_conv1d, causal_conv1d_ref, causal_conv1d_step
from longscan.ops.cross_scan import (
    ScanMode,
    ScanPattern,
    cross_merge,
    cross_merge_ref,
    cross_scan,
    cross_scan_ref,
    scan_pattern,
)
from longscan.ops.decode import Stack, Sublayer, Weights, decodes
from longscan.ops.decode_mixers import Mamba2Weights, Mamba3Weights, MambaWeights
from longscan.ops.decode_weights import (
    MAX_ADAPTER,
    Adapter,
    AttentionWeights,
    ExpertsWeights,
    Matrix,
    MLPWeights,
    Router,
)
from longscan.ops.diagonal import diagonal_ssm, diagonal_ssm_ref, diagonal_ssm_step
from longscan.ops.dropout import dropout
from longscan.ops.legs import LegsMethod, legs_matrices, legs_scan, legs_scan_ref
from longscan.ops.linear import linear, linear_ref, multiplication, multiply
from longscan.ops.long_conv import long_conv, long_conv_ref
from longscan.ops.path_scan import path_scan, path_scan_ref
from longscan.ops.quant import (
    Kind,
    dequantize,
    dequantize_ref,
    pack_int4,
    quant_linear,
    quant_linear_ref,
    quantize,
    unpack_int4,
)
from longscan.ops.rms_norm import rms_norm, rms_norm_ref
from longscan.ops.rotary import rotary, rotary_ref
from longscan.ops.scan import selective_scan, selective_scan_ref, selective_scan_step
from longscan.ops.ssd import ssd, ssd_ref, ssd_step
from longscan.ops.vandermonde import vandermonde, vandermonde_ref

__all__ = [
    "MAX_ADAPTER",
    "Adapter",
    "AttentionWeights",
    "ExpertsWeights",
    "Kind",
    "LegsMethod",
    "MLPWeights",
    "Mamba2Weights",
    "Mamba3Weights",
    "MambaWeights",
    "Matrix",
    "NativeInfo",
    "Router",
    "ScanMode",
    "ScanPattern",
    "Stack",
    "Sublayer",
    "Weights",
    "attention",
    "attention_ref",
    "backend",
    "cauchy",
    "cauchy_ref",
    "causal_conv1d",
    "causal_conv1d_ref",
    "causal_conv1d_step",
    "cross_merge",
    "cross_merge_ref",
    "cross_scan",
    "cross_scan_ref",
    "decodes",
    "dequantize",
    "dequantize_ref",
    "diagonal_ssm",
    "diagonal_ssm_ref",
    "diagonal_ssm_step",
    "dropout",
    "keep_memory",
    "legendre",
    "legs_matrices",
    "legs_scan",
    "legs_scan_ref",
    "linear",
    "linear_ref",
    "long_conv",
    "long_conv_ref",
    "masked_softmax",
    "multiplication",
    "multiply",
    "native_info",
    "native_multiply_probe",
    "native_probe",
    "native_read_probe",
    "pack_int4",
    "path_scan",
    "path_scan_ref",
    "quant_linear",
    "quant_linear_ref",
    "quantize",
    "release_memory",
    "rms_norm",
    "rms_norm_ref",
    "rotary",
    "rotary_ref",
    "scan_pattern",
    "selective_scan",
    "selective_scan_ref",
    "selective_scan_step",
    "ssd",
    "ssd_ref",
    "ssd_step",
    "unpack_int4",
    "vandermonde",
    "vandermonde_ref",
]


def native_info() -> NativeInfo:
    """Return the path and instruction set of the native library, or the reason why it is not in use."""
    from longscan.ops._native import info

    return info
