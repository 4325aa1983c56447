"""The kernels of a library in another process, and the test of that test. `make aarch64` does the rest."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from foreign_library import DRIVER, ForeignLibrary, Memory, foreign
from longscan import ops
from longscan.ops import _native
from longscan.ops.self_check import TOLERANCE, relative_error, run_checks

AARCH64 = Path(__file__).parents[2] / "build" / "aarch64"
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
here = pytest.mark.skipif(
    _native.info.path is None or not shutil.which("c++"), reason="needs the native library and a C++ compiler"
)


def compiled(source: Path, result: Path, *flags: str) -> Path:
    argv = ["c++", "-std=c++17", "-O1", *flags, "-o", str(result), str(source), "-pthread", "-ldl"]
    subprocess.run(argv, check=True)
    return result


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compiled(DRIVER, tmp_path_factory.mktemp("driver") / "driver"))


def failed() -> list[str]:
    return [name for name, got, expected in run_checks() if not relative_error(got, expected) <= TOLERANCE]


@here
@pytest.mark.parametrize("threads", ["1", "3"])
def test_our_own_library_in_another_process(driver: str, threads: str) -> None:
    with foreign([driver, str(_native.info.path), threads]) as library:
        assert failed() == []
        q, scale = ops.quantize(torch.linspace(-1, 1, 320).view(5, 64), "int4")
        x = torch.linspace(-1, 1, 64)[None]
        with torch.no_grad():
            y = ops.quant_linear(x, q, scale)
    assert library.calls["ls_scan_backward"] == 2
    assert library.calls["ls_multiply"] == 1
    with torch.no_grad():
        assert torch.equal(y, ops.quant_linear(x, q, scale))


def with_one_number_changed(function: str) -> Callable[[str, bytes], bytes]:
    def damage(name: str, data: bytes) -> bytes:
        if name != function:
            return data
        first = struct.unpack_from("f", data)[0]
        return struct.pack("f", first + 0.01 + abs(first)) + data[4:]

    return damage


@here
@pytest.mark.parametrize(
    ("function", "check"),
    [
        ("ls_scan_forward", "selective_scan"),
        ("ls_conv_backward", "causal_conv1d backward"),
        ("ls_ssd_step", "ssd_step"),
    ],
)
def test_one_wrong_number_fails_the_check(driver: str, function: str, check: str) -> None:
    with foreign([driver, str(_native.info.path)], with_one_number_changed(function)):
        assert check in failed()


@here
def test_a_kernel_that_writes_beside_a_buffer_ends_the_driver(
    driver: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "beside.cpp"
    source.write_text(
        'extern "C" void ls_set_parallel_for(void *) {}\n'
        'extern "C" int ls_write(float *to, long n) { return to[n] = 1.0f, 0; }\n'
    )
    memory, buffer = Memory(), torch.zeros(5)
    memory.add_tensor(buffer)
    library = ForeignLibrary(
        [driver, str(compiled(source, tmp_path / "beside.so", "-shared", "-fPIC"))], memory
    )
    assert library.ls_write(buffer.data_ptr(), 4) == 0
    assert buffer.tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(RuntimeError, match="code 1"):
        library.ls_write(buffer.data_ptr(), 5)
    library.close()
    assert "ls_write" in capfd.readouterr().err


@pytest.mark.skipif(
    QEMU is None or not (AARCH64 / "foreign_driver").exists(),
    reason="no qemu or no library; see make aarch64",
)
@pytest.mark.parametrize(("cpu", "isa"), [("cortex-a72", "neon"), ("max", "dotprod")])
def test_aarch64_in_an_emulator(cpu: str, isa: str) -> None:
    argv = [str(QEMU), "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", str(AARCH64 / "foreign_driver")]
    with foreign([*argv, str(AARCH64 / "liblongscan.so")]):
        assert ops.native_info().isa == isa
        assert failed() == []
