"""Prefix caching: texts that share a prefix prefill it only once.

A cache holds states at multiples of CHUNK tokens. `prefill.read` cuts there, so results with and without the
cache are bit-exact. A recurrent state has the same size for every prefix; a KV cache grows with it, so fewer
of them are stored.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator

from torch import Tensor

from longscan.core.checks import check_whole
from longscan.errors import LongscanError, UsageError
from longscan.inference.prefill import CHUNK, Ids, Progress, as_tensor, read
from longscan.models import LanguageModel, State

__all__ = ["PrefixCache"]

MAX_BYTES = 256 << 20  # 90 states of a Mamba of 130 M parameters
SHARE = 2  # one text takes at most 1 / SHARE of the cache, so that it does not evict all others


class PrefixCache:
    """Stores states by their prefixes; the least recently used one is evicted first.

    Keys are the SHA-256 of all tokens of a prefix, so two texts never share a state by accident.

    Args:
        model: whose states these are. Call `clear` after a change of its weights.
        max_bytes: of all states together.
        every: tokens between stored states, a multiple of CHUNK.

    Raises:
        UsageError: a number is out of range.
    """

    def __init__(self, model: LanguageModel, max_bytes: int = MAX_BYTES, every: int = CHUNK) -> None:
        check_whole("every", every, 0)
        check_whole("max_bytes", max_bytes, 0)  # 0 stores nothing
        if every < CHUNK or every % CHUNK:
            raise UsageError(f"every: expected a multiple of {CHUNK}, got {every}.")
        self.model, self.max_bytes, self.every = model, max_bytes, every
        self.nbytes = 0  # of all states together
        self.hits = self.hit_tokens = self.lookups = 0
        empty = model.init_state(1)
        self._row_bytes, self._growth = max(1, empty.nbytes), empty.growth
        self._states: OrderedDict[bytes, State] = OrderedDict()  # most recently used last

    @property
    def count(self) -> int:
        """The number of stored states."""
        return len(self._states)

    def find(self, ids: Ids) -> tuple[int, State | None]:
        """Return the longest stored prefix that leaves at least one token to process.

        Args:
            ids: (seq_len,) the text.

        Returns:
            n: the length of the prefix; 0 if none is stored.
            state: a copy of the state after it, or None.
        """
        n, state = self._find(list(self._keys(ids)), len(ids))
        return n, None if state is None else state.clone()

    def store(self, ids: Ids, state: State) -> None:
        """Store a copy of a state.

        Args:
            ids: (seq_len,) all tokens that it includes, from the start of the text; a multiple of `every`.
            state: of one row, computed by `prefill.read`: one computed by steps is rounded differently.

        Raises:
            LongscanError: the number of tokens is no multiple of `every`.
        """
        if not len(ids) or len(ids) % self.every:
            raise LongscanError(
                f"a prefix of {len(ids):,} tokens: expected a multiple of {self.every}, a chunk boundary."
            )
        *_, key = self._keys(ids)
        self._store(key, state)

    def read(self, ids: Ids, progress: Progress | None = None) -> tuple[Tensor, State]:
        """Prefill a text from its longest stored prefix on, and store states along it.

        Args:
            ids: (seq_len,) the text.
            progress: called after each chunk with the tokens processed so far, those of the prefix included.

        Returns:
            logits: (padded_vocab_size,) after the last token, bit-exactly those of `prefill.read`.
            state: after it.

        Raises:
            LongscanError: as `prefill.read`.
        """
        n, state, store = self.begin(ids)
        total = len(ids)

        def shifted(done: int, _: int) -> None:
            assert progress is not None
            progress(n + done, total)

        return read(self.model, ids[n:], state, n, progress=shifted if progress else None, boundary=store)

    def begin(self, ids: Ids) -> tuple[int, State | None, Callable[[int, State], None]]:
        """Return what `prefill.read` needs to continue from a stored prefix, perhaps in several calls.

        Args:
            ids: (seq_len,) the text.

        Returns:
            n: the length of the longest stored prefix; 0 if none is stored.
            state: after it, or None; it belongs to the cache and must not be modified.
            store: the `boundary` that stores states along the text.
        """
        keys = list(self._keys(ids))
        n, state = self._find(keys, len(ids))
        stride = self._stride(n // self.every, len(keys))

        def store(position: int, reached: State) -> None:
            block, rest = divmod(position, self.every)
            if not rest and (block % stride == 0 or block == len(keys)):
                self._store(keys[block - 1], reached)

        return n, state, store

    def clear(self) -> None:
        """Remove all states."""
        self._states.clear()
        self.nbytes = 0

    def _find(self, keys: list[bytes], total: int) -> tuple[int, State | None]:
        """Return the longest stored prefix shorter than the text, with the cache's own state; count it."""
        self.lookups += 1
        for block in range(min(len(keys), (total - 1) // self.every), 0, -1):
            state = self._states.get(keys[block - 1])
            if state is not None:
                self._states.move_to_end(keys[block - 1])
                self.hits, self.hit_tokens = self.hits + 1, self.hit_tokens + block * self.every
                return block * self.every, state
        return 0, None

    def _store(self, key: bytes, state: State) -> None:
        """Store a copy under a key, and evict what exceeds the size."""
        if state.nbytes > self.max_bytes:
            return
        if key not in self._states:
            self._states[key] = state.clone()
            self.nbytes += state.nbytes
        self._states.move_to_end(key)
        while self.nbytes > self.max_bytes:
            _, oldest = self._states.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def _stride(self, begin: int, end: int) -> int:
        """Return the blocks between stored states, so that a text takes at most its share of the cache."""
        mean = self._row_bytes + self._growth * self.every * (begin + end) // 2
        capacity = self.max_bytes // (SHARE * mean)
        return max(1, -(-(end - begin) // max(1, capacity)))

    def _keys(self, ids: Ids) -> Iterator[bytes]:
        """Yield the key of each prefix of a multiple of `every` tokens, the shortest first."""
        digest = hashlib.sha256()
        for end in range(self.every, len(ids) + 1, self.every):
            digest.update(as_tensor(ids[end - self.every : end]).numpy().tobytes())
            yield digest.digest()
