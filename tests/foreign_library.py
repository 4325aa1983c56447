"""The native library of another processor, in an emulator, behind the interface of ours.

`ForeignLibrary` stands in for the library that ctypes loads: it sends each call to foreign_driver.cpp, with
every tensor and struct that the call's pointers lead to, and takes back what changed. So the tests of ops
and of decoding test the kernels of another processor too. `make aarch64` uses it as a plugin of pytest:

    pytest -p foreign_library --foreign "qemu-aarch64 foreign_driver liblongscan.so" tests/ops
"""

from __future__ import annotations

import bisect
import ctypes
import shlex
import struct
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from longscan.ops import _native

DRIVER = Path(__file__).with_name("foreign_driver.cpp")
# the functions whose result is no int32
_WIDE = {
    "ls_multiply_workspace",
    "ls_scan_workspace",
    "ls_ssd_forward_workspace",
    "ls_ssd_backward_workspace",
    "ls_rotary_workspace",
    "ls_diagonal_boundaries",
    "ls_decode_workspace",
}
_INTEGER, _DOUBLE, _TEXT = 0, 1, 2


class Memory:
    """The tensors and structs whose addresses were taken, by these addresses."""

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}
        self._structs: dict[int, bytes] = {}
        self._sorted: list[int] | None = None

    def add_tensor(self, tensor: Tensor) -> None:
        """Remember the storage of a tensor, as long as that lives."""
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = weakref.ref(storage)
        self._sorted = None

    def add_struct(self, address: int, data: bytes) -> None:
        """Remember a struct for good."""
        self._structs[address] = data

    def block(self, address: int) -> tuple[int, bytes, bool] | None:
        """Return the block that holds an address: where it begins, its bytes, and whether it is a struct."""
        if address in self._structs:
            return address, self._structs[address], True
        if self._sorted is None:
            self._storages = {begin: ref for begin, ref in self._storages.items() if ref() is not None}
            self._sorted = sorted(self._storages)
        for begin in reversed(self._sorted[: bisect.bisect_right(self._sorted, address)]):
            storage = self._storages[begin]()
            if storage is not None and storage.data_ptr() == begin:
                inside = address < begin + max(1, storage.nbytes())
                return (begin, ctypes.string_at(begin, storage.nbytes()), False) if inside else None
        return None


@contextmanager
def watched() -> Iterator[Memory]:
    """Yield the memory whose addresses are taken within this context."""
    memory = Memory()
    data_ptr, address_of = Tensor.data_ptr, _native.address

    def watched_data_ptr(tensor: Tensor) -> int:
        memory.add_tensor(tensor)
        return data_ptr(tensor)

    def watched_address(data: bytes) -> int:
        address = address_of(data)
        memory.add_struct(address, data)
        return address

    patch = pytest.MonkeyPatch()
    patch.setattr(Tensor, "data_ptr", watched_data_ptr)
    patch.setattr(_native, "address", watched_address)
    try:
        yield memory
    finally:
        patch.undo()


class _Request:
    """The blocks of memory that a call refers to, and the pointers among them."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._index: dict[int, int] = {}
        self.blocks: list[bytes] = []
        self.addresses: list[int] = []  # of tensors; 0 of structs, which nothing may write to
        self.pointers: list[tuple[int, int, int, int]] = []

    def add_struct(self, data: bytes, address: int = 0) -> int:
        """Add a struct and what it points to; return its index."""
        index = len(self.blocks)
        self.blocks.append(data)
        self.addresses.append(0)
        if address:
            self._index[address] = index
        for at in range(0, len(data) // 8 * 8, 8):
            self.follow(index, at, struct.unpack_from("q", data, at)[0])
        return index

    def follow(self, holder: int, at: int, value: int) -> None:
        """Note a pointer, if this value is one."""
        found = self._memory.block(value) if value > 0 else None
        if found is None:
            return
        begin, data, is_struct = found
        if begin not in self._index:
            if is_struct:
                self.add_struct(data, begin)
            else:
                self._index[begin] = len(self.blocks)
                self.blocks.append(data)
                self.addresses.append(begin)
        self.pointers.append((holder, at, self._index[begin], value - begin))


class ForeignLibrary:
    """The functions of a native library that another process runs.

    Args:
        argv: the command of the driver, with the library's path.
        memory: see `watched`.
        damage: changes the bytes of a tensor that come back from a function.
    """

    def __init__(
        self, argv: Sequence[str], memory: Memory, damage: Callable[[str, bytes], bytes] | None = None
    ) -> None:
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._memory, self._damage = memory, damage
        self._lock = threading.Lock()  # gradients are computed in another thread
        self.calls: dict[str, int] = {}

    def close(self) -> None:
        """End the driver."""
        self._process.communicate(timeout=60)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a function of the library."""
        if not name.startswith("ls_"):
            raise AttributeError(name)
        return lambda *arguments: self._call(name, arguments)

    def _call(self, name: str, arguments: tuple[bytes | int, ...]) -> Any:
        kind = _TEXT if name == "ls_isa" else _DOUBLE if name.startswith("ls_probe") else _INTEGER
        with self._lock:
            request = _Request(self._memory)
            for index, argument in enumerate(arguments):
                if isinstance(argument, bytes):
                    text = argument + b"\0" if name == "ls_choose_isa" else argument
                    request.pointers.append((-1, 8 * index, request.add_struct(text), 0))
                else:
                    request.follow(-1, 8 * index, argument)
            self._send(name, arguments, request, kind)
            result = self._receive(8)
            if kind == _TEXT:
                result = self._receive(*struct.unpack("q", result))
            for data, address in zip(request.blocks, request.addresses, strict=True):
                if struct.unpack("q", self._receive(8))[0]:
                    changed = self._receive(len(data))
                    assert address, f"{name} wrote into a struct"
                    if self._damage:
                        changed = self._damage(name, changed)
                    ctypes.memmove(address, changed, len(changed))
            self.calls[name] = self.calls.get(name, 0) + 1
        if kind == _TEXT:
            return result
        return struct.unpack("d" if kind == _DOUBLE else "q" if name in _WIDE else "i4x", result)[0]

    def _send(self, name: str, arguments: Sequence[bytes | int], request: _Request, kind: int) -> None:
        values = [0 if isinstance(argument, bytes) else argument for argument in arguments]
        sizes = (len(name), len(values), len(request.blocks), len(request.pointers), kind)
        parts = [struct.pack("5q", *sizes), name.encode(), struct.pack(f"{len(values)}q", *values)]
        for data in request.blocks:
            parts += [struct.pack("q", len(data)), data]
        parts += [struct.pack("4q", *pointer) for pointer in request.pointers]
        assert self._process.stdin
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()

    def _receive(self, n: int) -> bytes:
        assert self._process.stdout
        data = self._process.stdout.read(n)
        if len(data) < n:
            raise RuntimeError(f"the driver ended with code {self._process.wait()}")
        return data


@contextmanager
def foreign(
    argv: Sequence[str], damage: Callable[[str, bytes], bytes] | None = None
) -> Iterator[ForeignLibrary]:
    """Run the native kernels of another library within this context."""
    patch = pytest.MonkeyPatch()
    with watched() as memory:
        library = ForeignLibrary(argv, memory, damage)
        try:
            assert library.ls_abi_version() == _native.ABI_VERSION
            assert library.ls_choose_isa(b"") == 0
            patch.setattr(_native, "_library", library)
            patch.setattr(
                _native, "info", _native.NativeInfo(Path(argv[-1]), library.ls_isa().decode(), None)
            )
            yield library
        finally:
            patch.undo()
            library.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    """As a plugin, take the command of the driver."""
    parser.addoption("--foreign", help="run the kernels of another library, by this command")


_session: list[Any] = []


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """As a plugin, replace the library before anything of the tests is imported."""
    _session.append(foreign(shlex.split(early_config.known_args_namespace.foreign)))
    library = _session[0].__enter__()
    _session.append(library)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how often each function ran."""
    calls = sorted(_session[1].calls.items())
    terminalreporter.write_line("calls: " + " ".join(f"{name}={n:,}" for name, n in calls))


def pytest_unconfigure() -> None:
    """Bring our own library back."""
    _session[0].__exit__(None, None, None)
