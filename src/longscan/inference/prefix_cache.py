"""A cache of states by what was read: who begins like somebody before reads only the rest.

A cache holds the states after some of the multiples of CHUNK tokens. That is where `reading.read` cuts, hence
what is computed from a cached state is bit for bit what is computed without the cache. A recurrent state has
one size whatever the prefix; keys and values grow with it, so of them fewer are kept.
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
SHARE = 2  # one text takes at most this part of the cache, so that it does not push all others out


class PrefixCache:
    """Remembers states by the tokens that led to them; what was not used for longest goes first.

    Keys are SHA-256 of all tokens of the prefix, so two texts never share a state by accident.

    Args:
        model: whose states these are. After a change of its weights call `clear`.
        max_bytes: of all states together.
        every: tokens between the states that are kept, a multiple of CHUNK.

    Raises:
        UsageError: a number makes no sense.
    """

    def __init__(self, model: LanguageModel, max_bytes: int = MAX_BYTES, every: int = CHUNK) -> None:
        check_whole("every", every, 0)
        check_whole("max_bytes", max_bytes, 0)  # 0 keeps nothing
        if every < CHUNK or every % CHUNK:
            raise UsageError(f"every: expected a multiple of {CHUNK}, got {every}.")
        self.model, self.max_bytes, self.every = model, max_bytes, every
        self.nbytes = 0  # of all states together
        self.hits = self.hit_tokens = self.lookups = 0
        empty = model.init_state(1)
        self._row_bytes, self._growth = max(1, empty.nbytes), empty.growth
        self._states: OrderedDict[bytes, State] = OrderedDict()  # used last at the end

    @property
    def count(self) -> int:
        """How many states are kept."""
        return len(self._states)

    def find(self, ids: Ids) -> tuple[int, State | None]:
        """Look for the longest stored prefix that leaves at least one token to read.

        Args:
            ids: (seq_len,) the text.

        Returns:
            n: how many tokens the prefix has; 0 if none is stored.
            state: a copy of the state after them, or None.
        """
        n, state = self._find(list(self._keys(ids)), len(ids))
        return n, None if state is None else state.clone()

    def store(self, ids: Ids, state: State) -> None:
        """Keep a copy of a state.

        Args:
            ids: (seq_len,) all tokens that it has read, from the start of the text; a multiple of `every`.
            state: of one row, as `reading.read` made it: one that was led there by steps is not exactly
                what reading gives.

        Raises:
            LongscanError: the number of tokens is no multiple of `every`.
        """
        if not len(ids) or len(ids) % self.every:
            raise LongscanError(
                f"a prefix of {len(ids):,} tokens: expected a multiple of {self.every}, where reading cuts."
            )
        *_, key = self._keys(ids)
        self._store(key, state)

    def read(self, ids: Ids, progress: Progress | None = None) -> tuple[Tensor, State]:
        """Read a text from its longest stored prefix on, and keep states on the way.

        Args:
            ids: (seq_len,) the text.
            progress: called after each chunk with the tokens that are known, stored ones included.

        Returns:
            logits: (padded_vocab_size,) after the last token, bit for bit those of `reading.read`.
            state: after it.

        Raises:
            LongscanError: as `reading.read`.
        """
        n, state, keep = self.begin(ids)
        total = len(ids)

        def shifted(done: int, _: int) -> None:
            assert progress is not None
            progress(n + done, total)

        return read(self.model, ids[n:], state, n, progress=shifted if progress else None, boundary=keep)

    def begin(self, ids: Ids) -> tuple[int, State | None, Callable[[int, State], None]]:
        """Prepare reading a text with `reading.read`, perhaps in several calls.

        Args:
            ids: (seq_len,) the text.

        Returns:
            n: how many tokens its longest stored prefix has; 0 if none is stored.
            state: after them, or None; it is the cache's own and must not be changed.
            keep: what `reading.read` takes as its `boundary` to keep states on the way.
        """
        keys = list(self._keys(ids))
        n, state = self._find(keys, len(ids))
        stride = self._stride(n // self.every, len(keys))

        def keep(position: int, reached: State) -> None:
            block, rest = divmod(position, self.every)
            if not rest and (block % stride == 0 or block == len(keys)):
                self._store(keys[block - 1], reached)

        return n, state, keep

    def clear(self) -> None:
        """Forget everything."""
        self._states.clear()
        self.nbytes = 0

    def _find(self, keys: list[bytes], total: int) -> tuple[int, State | None]:
        """Return the longest stored prefix shorter than the text, the cache's own state; count the look."""
        self.lookups += 1
        for block in range(min(len(keys), (total - 1) // self.every), 0, -1):
            state = self._states.get(keys[block - 1])
            if state is not None:
                self._states.move_to_end(keys[block - 1])
                self.hits, self.hit_tokens = self.hits + 1, self.hit_tokens + block * self.every
                return block * self.every, state
        return 0, None

    def _store(self, key: bytes, state: State) -> None:
        """Keep a copy under a key and drop what is too much."""
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
        """Say how many blocks lie between kept states, so that those of a text take only its share."""
        mean = self._row_bytes + self._growth * self.every * (begin + end) // 2
        room = self.max_bytes // (SHARE * mean)
        return max(1, -(-(end - begin) // max(1, room)))

    def _keys(self, ids: Ids) -> Iterator[bytes]:
        """Yield the key of each prefix of a multiple of `every` tokens, the shortest first."""
        digest = hashlib.sha256()
        for end in range(self.every, len(ids) + 1, self.every):
            digest.update(as_tensor(ids[end - self.every : end]).numpy().tobytes())
            yield digest.digest()
