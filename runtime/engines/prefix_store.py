"""Keys and values of prompts that were read, for requests that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from runtime.engines.runner import Runner

# Tokens of a block. A smaller one leaves less to read of a prompt, and takes more copies.
BLOCK = 16


def hashes(tokens: np.ndarray, block: int, salt: str | None, exits: bool = False) -> list[bytes]:
    """For each whole block of tokens int64 [n] a hash of all tokens up to its end: the keys of a chain. Those of other
    salts differ, and where the exit's own layers are run (`exits`) or not."""
    key = sha256(bytes((exits, salt is not None)) + (salt or "").encode("utf-8", "surrogatepass")).digest()
    chain = []
    for end in range(block, len(tokens) + 1, block):
        key = sha256(key + tokens[end - block : end].tobytes()).digest()
        chain.append(key)
    return chain


class PrefixStore:
    """Entries by the keys of chains, of which the beginning is always stored, too. They have at most `limit` bytes;
    where another finds no room, the least recently used goes, of a chain its end first. For one thread at a time."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, chain: Sequence[bytes]) -> list[Any]:
        """The entries of the longest beginning of a chain that is stored."""
        count = next((number for number, key in enumerate(chain) if key not in self._entries), len(chain))
        self._use(chain[:count])
        return [self._entries[key][0] for key in chain[:count]]

    def keep(self, chain: Sequence[bytes], make: Callable[[int], Any], size: int) -> None:
        """Store what is missing of a chain: `make` gives the entry of a number, of `size` bytes. The end is left out
        where it finds no room beside the beginning."""
        self._use(chain)
        own = frozenset(chain)
        for number, key in enumerate(chain):
            if key in self._entries:
                continue
            while self.used + size > self.limit:
                oldest = next(iter(self._entries), None)
                if oldest is None or oldest in own:
                    self._use(chain)
                    return
                self.used -= self._entries.pop(oldest)[1]
            self._entries[key] = make(number), size
            self.used += size
        self._use(chain)

    def _use(self, chain: Sequence[bytes]) -> None:
        """The beginning becomes the most recently used, so that nothing is ever stored without it."""
        for key in reversed(chain):
            if key in self._entries:
                self._entries.move_to_end(key)


class Prefix:
    """`tokens` int64 [n] is the prompt. `exits`: an exit's own layers are run and reused, too. Requests share only with
    those of an equal `salt` and `exits`."""

    def __init__(self, store: PrefixStore, tokens: np.ndarray, salt: str | None, exits: bool) -> None:
        self._store, self._tokens, self._salt, self._exits = store, tokens, salt, exits
        self._chain = hashes(tokens, BLOCK, salt, exits)

    def restore(self, runners: Sequence[Runner], slot: int, start: int) -> int:
        """A slot holds the first `start` positions of the prompt: copy there what is stored of those that follow.
        Returns how many it holds now; the last is left, as only reading it says what comes next."""
        found = self._store.find(self._chain[: (len(self._tokens) - 1) // BLOCK])
        for number in range(start // BLOCK, len(found)):
            for runner, rows in zip(runners, found[number], strict=True):
                runner.cache.write(slot, number * BLOCK, rows)
        return max(start, len(found) * BLOCK)

    def keep(self, runners: Sequence[Runner], slot: int, generated: Sequence[int] = ()) -> None:
        """Store what both caches of a slot hold of the prompt and the tokens that were `generated` after it."""
        chain = self._chain
        if len(generated):
            tokens = np.concatenate([self._tokens, np.array(generated, np.int64)])
            chain = hashes(tokens, BLOCK, self._salt, self._exits)
        # What is still stacked is not in the deep cache; a draft that was not verified stands behind all tokens.
        complete = min(int(runner.cache.lengths[slot]) for runner in runners)

        def copied(number: int) -> list[np.ndarray]:
            return [runner.cache.read(slot, number * BLOCK, BLOCK, self._exits) for runner in runners]

        size = BLOCK * sum(runner.cache.row_bytes(self._exits) for runner in runners)
        self._store.keep(chain[: complete // BLOCK], copied, size)
