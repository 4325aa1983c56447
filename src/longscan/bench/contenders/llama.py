"""llama.cpp as a contender, through the low-level calls of llama-cpp-python.

It loads GGUF files of the same random weights as longscan, and gets its fastest settings: every thread for
prefill and decode, its repacked layouts of quantised weights, logits of the last token alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from longscan.bench.contenders.workloads import excerpt, random_ids
from longscan.bench.worker import Run
from longscan.core.optional import require

__all__ = ["FORMATS", "PACKAGE", "decode", "export", "prefill"]

PACKAGE = "llama-cpp-python"
FORMATS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_K")  # what `export` writes; no scheme mixes in others
K_QUANT = "q4_K"  # the one that only llama.cpp can make
BATCH, MICRO = 2048, 512  # tokens of a prompt per call, and per micro-batch
ERROR = 4  # the log level that is printed


def prefill(path: str, vocab_size: int, seq_len: int) -> Run:
    """Prepare the prefill of a prompt."""
    session = _Session(path, rows=1)
    ids = random_ids(1, seq_len, vocab_size)[0].numpy()

    def run() -> None:
        session.reset()
        session.prefill(ids)

    return run


def decode(path: str, vocab_size: int, prompt: int, n_tokens: int, batch: int = 1) -> Run:
    """Prepare greedy decoding after a prompt, of `batch` sequences at once."""
    session = _Session(path, rows=batch)
    logits = session.prefill(random_ids(1, prompt, vocab_size)[0].numpy())
    details = {"weight_bytes": session.weight_bytes, "excerpt": excerpt(logits)}
    session.fork()
    first = np.full(batch, logits.argmax())

    def run() -> dict[str, Any]:
        ids = first
        for _ in range(n_tokens):
            ids = session.step(ids).argmax(1)
        return details

    return run


def export(model: dict[str, Any], directory: Path, formats: Sequence[str] = FORMATS) -> dict[str, Path]:
    """Return GGUF files of the contenders' random model, format -> file.

    Args:
        model: see `contenders.longscan.fresh`.
        directory: for the files.
        formats: of FORMATS.
    """
    from longscan.bench.contenders.longscan import ready
    from longscan.checkpoints.gguf.model import GGUFType, save_gguf

    ours = ready(model)
    paths = {name: directory / f"{name}.gguf" for name in formats}
    for name, path in paths.items():
        if name != K_QUANT:
            save_gguf(ours, path, None, cast(GGUFType, name.upper()))
    if K_QUANT in paths:
        _write_k_quant(paths.get("f32", paths[K_QUANT]), paths[K_QUANT])
    return paths


class _Session:
    """A model and a context of several sequences of the same length.

    Args:
        path: the GGUF file.
        rows: sequences.
    """

    def __init__(self, path: str, rows: int) -> None:
        self._api = api = _llama()
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = BATCH * rows, BATCH, MICRO
        settings.n_seq_max, settings.n_outputs_max = rows, rows
        settings.n_threads, settings.n_threads_batch = threads, threads
        self._context = api.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {rows} sequences")
        self._memory = api.llama_get_memory(self._context)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.rows, self.position = rows, 0
        self.weight_bytes = int(api.llama_model_size(model))
        self._batch = api.llama_batch_init(BATCH, 0, 1)
        for index in range(BATCH):
            self._batch.n_seq_id[index] = 1

    def reset(self) -> None:
        """Clear all sequences."""
        self._api.llama_memory_clear(self._memory, True)
        self.position = 0

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits (vocab_size,) after (seq_len,) more tokens of the first sequence."""
        for begin in range(0, len(ids), BATCH):
            piece = ids[begin : begin + BATCH]
            self._fill(piece, 0, self.position + np.arange(len(piece)))
            if last := begin + BATCH >= len(ids):
                self._batch.logits[len(piece) - 1] = 1
            self.position += len(piece)
            logits = self._decode(int(last))
        last_logits: np.ndarray = logits[0]
        return last_logits

    def fork(self) -> None:
        """Copy the state of the first sequence to all others."""
        for row in range(1, self.rows):
            self._api.llama_memory_seq_cp(self._memory, 0, row, -1, -1)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits (rows, vocab_size) after one more token per sequence, (rows,)."""
        self._fill(ids, np.arange(self.rows), np.full(self.rows, self.position))
        for row in range(self.rows):
            self._batch.logits[row] = 1
        self.position += 1
        return self._decode(self.rows)

    def _fill(self, ids: np.ndarray, rows: np.ndarray | int, positions: np.ndarray) -> None:
        """Put tokens into the batch, without logits for any of them."""
        batch, n = self._batch, len(ids)
        batch.n_tokens = n
        np.ctypeslib.as_array(batch.token, (n,))[:] = ids
        np.ctypeslib.as_array(batch.pos, (n,))[:] = positions
        np.ctypeslib.as_array(batch.logits, (n,))[:] = 0
        for index, row in enumerate(np.broadcast_to(rows, n).tolist()):
            batch.seq_id[index][0] = row

    def _decode(self, outputs: int) -> np.ndarray:
        """Return the logits (outputs, vocab_size) of the batch, a view."""
        if code := self._api.llama_decode(self._context, self._batch):
            raise RuntimeError(f"llama_decode failed with code {code}")
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (outputs, self._vocab_size))


def _llama() -> Any:
    """Return llama.cpp, initialised; it logs only errors, to stderr."""
    api: Any = require("llama-cpp-python", "measurements of llama.cpp", "llama_cpp.llama_cpp")

    def log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level == ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    api.longscan_log = api.llama_log_callback(log)  # stored there because C holds only its address
    api.llama_log_set(api.longscan_log, None)
    api.llama_backend_init()
    return api


def _write_k_quant(source: Path, destination: Path) -> None:
    """Let llama.cpp quantise a float32 file."""
    api = _llama()
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.pure = api.LLAMA_FTYPE_MOSTLY_Q4_K_S, True
    code = api.llama_model_quantize(bytes(source), bytes(destination), ctypes.byref(settings))
    if code:
        raise RuntimeError(f"llama_model_quantize failed with code {code}")
