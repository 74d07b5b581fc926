"""What requests left of the prompts they read, for requests that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Generic, TypeVar

import numpy as np

Entry = TypeVar("Entry")


def hashes(tokens: np.ndarray, block: int, salt: str | None, exits: bool = False) -> list[bytes]:
    """For each whole block of tokens int64 [n] a hash of all tokens up to its end: the keys of a chain. Those of other
    salts differ, and where the exit's own layers are run (`exits`) or not."""
    key = sha256(bytes((exits, salt is not None)) + (salt or "").encode("utf-8", "surrogatepass")).digest()
    chain = []
    for end in range(block, len(tokens) + 1, block):
        key = sha256(key + tokens[end - block : end].tobytes()).digest()
        chain.append(key)
    return chain


class PrefixStore(Generic[Entry]):
    """Entries by the keys of chains, of which the beginning is always stored, too. They have at most `limit` bytes;
    where another finds no room, the least recently used goes, of a chain its end first. For one thread at a time: the
    one that leads."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._entries: OrderedDict[bytes, tuple[Entry, int]] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, chain: Sequence[bytes]) -> list[Entry]:
        """The entries of the longest beginning of a chain that is stored."""
        found = list[Entry]()
        for key in chain:
            if key not in self._entries:
                break
            found.append(self._entries[key][0])
        self._use(chain[: len(found)])
        return found

    def keep(self, chain: Sequence[bytes], make: Callable[[int], Entry], size: int) -> None:
        """Store what is missing of a chain: `make` gives the entry of a number, of `size` bytes. The end is left out
        where it finds no room beside the beginning."""
        self._use(chain)
        own = frozenset(chain)
        for number, key in enumerate(chain):
            if key in self._entries:
                continue
            if not self._make_room(size, own):
                break
            self._entries[key] = make(number), size
            self.used += size
        self._use(chain)

    def _use(self, chain: Sequence[bytes]) -> None:
        """The beginning becomes the most recently used, so that nothing is ever stored without it."""
        for key in reversed(chain):
            if key in self._entries:
                self._entries.move_to_end(key)

    def _make_room(self, size: int, own: frozenset[bytes]) -> bool:
        while self.used + size > self.limit:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest in own:
                return False
            self.used -= self._entries.pop(oldest)[1]
        return True
