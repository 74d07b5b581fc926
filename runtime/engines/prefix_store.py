"""Keys and values of prompts that were read, for requests that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from runtime.bundle.manifest import Manifest
from runtime.engines.runner import Runner
from runtime.kernels import prompt_differs

# Tokens of a block. A smaller one leaves less to read of a prompt, and takes more copies.
BLOCK = 16


def hashes(tokens: np.ndarray, block: int, salt: str | None, own: bool = False) -> list[bytes]:
    """For each whole block of tokens int64 [n] a hash of all tokens up to its end: the keys of a chain. Those of other
    salts differ, and those of the model's layers and of an exit's `own`."""
    key = sha256(
        bytes((own, salt is not None)) + (salt or "").encode("utf-8", "surrogatepass")
    ).digest()
    chain = []
    for end in range(block, len(tokens) + 1, block):
        key = sha256(key + tokens[end - block : end].tobytes()).digest()
        chain.append(key)
    return chain


def keeps_generated(manifest: Manifest) -> bool:
    """Whether generated tokens are stored, too: where a step leaves the bits in the caches that reading the same token
    as part of a prompt leaves there. Our own products and attention (whose caches are float16) do, but for those that
    read prompts in tiles. Elsewhere the next turn of a chat reads the last answer again."""
    return manifest.kernels is not None and manifest.cache_type == "fp16" and not prompt_differs()


class PrefixStore:
    """Entries by the keys of chains, of which the beginning is always stored, too. They have at most `limit` bytes;
    where another finds no room, the least recently used goes, of a chain its end first. For one thread at a time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._entries: OrderedDict[bytes, tuple[Any, int]] = (
            OrderedDict()
        )  # the least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, chain: Sequence[bytes]) -> list[Any]:
        """The entries of the longest beginning of a chain that is stored."""
        count = next(
            (number for number, key in enumerate(chain) if key not in self._entries), len(chain)
        )
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
    """`tokens` int64 [n] is the prompt. Requests of an equal `salt` share what the model's layers hold, whatever their
    mode; those that run an exit's own layers (`exits`) share what these hold, too, in a chain of its own.

    An entry is what reading its tokens as a prompt gives, bit for bit, so that no request can tell who read them.
    """

    def __init__(
        self, store: PrefixStore, tokens: np.ndarray, salt: str | None, exits: bool
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._salt = salt
        self._kinds = (False, True) if exits else (False,)  # of layers: the model's, the exit's own
        self._chains = [hashes(tokens, BLOCK, salt, own) for own in self._kinds]

    def restore(self, runners: Sequence[Runner], slot: int, start: int) -> int:
        """A slot holds the first `start` positions of the prompt: copy there what is stored of those that follow.
        Returns how many it holds now; the last is left, as only reading it says what comes next."""
        whole = (len(self._tokens) - 1) // BLOCK
        found = [self._store.find(chain[:whole]) for chain in self._chains]
        end = min(map(len, found))
        for own, entries in zip(self._kinds, found, strict=True):
            for number in range(start // BLOCK, end):
                for runner, rows in zip(_holding(runners, own), entries[number], strict=True):
                    runner.cache.write(slot, number * BLOCK, rows, own)
        return max(start, end * BLOCK)

    def keep(self, runners: Sequence[Runner], slot: int, generated: Sequence[int] = ()) -> None:
        """Store what all caches of a slot hold of the prompt and the tokens that were `generated` after it. These must
        have the bits that a prompt's would have."""
        chains = self._chains
        if len(generated):
            tokens = np.concatenate([self._tokens, np.array(generated, np.int64)])
            chains = [hashes(tokens, BLOCK, self._salt, own) for own in self._kinds]
        # What is still stacked is not in the deep cache; a draft that was not verified stands behind all tokens.
        complete = min(int(runner.cache.lengths[slot]) for runner in runners)
        for own, chain in zip(self._kinds, chains, strict=True):

            def copied(number: int, own: bool = own) -> list[np.ndarray]:
                return [
                    runner.cache.read(slot, number * BLOCK, BLOCK, own)
                    for runner in _holding(runners, own)
                ]

            size = BLOCK * sum(runner.cache.row_bytes(own) for runner in _holding(runners, own))
            self._store.keep(chain[: complete // BLOCK], copied, size)


def _holding(runners: Sequence[Runner], own: bool) -> Sequence[Runner]:
    """Those whose caches have layers of a kind: the model's are in the first two, an exit's own in any."""
    return runners if own else runners[:2]
