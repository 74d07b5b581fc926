"""The prompt of one request in the store of prefixes: blocks of keys and values, copied from the caches and to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.engines.prefix_store import PrefixStore, hashes
from runtime.engines.runner import Runner

# Tokens of a block. A smaller one leaves less to read of a prompt, and takes more copies.
BLOCK = 16
# Of each engine: [arrays, kv_heads, BLOCK, head_dim].
Block = list[np.ndarray]


class Prefix:
    """`tokens` int64 [n] is the prompt. `exits`: an exit's own layers are run and reused, too. Requests share only with
    those of an equal `salt` and `exits`."""

    def __init__(self, store: PrefixStore[Block], tokens: np.ndarray, salt: str | None, exits: bool) -> None:
        self._store, self._tokens, self._salt, self._exits = store, tokens, salt, exits
        self._chain = hashes(tokens, BLOCK, salt, exits)

    def restore(self, lanes: Sequence[Runner], slot: int, start: int) -> int:
        """A slot holds the first `start` positions of the prompt: copy there what is stored of those that follow. How
        many it holds now; the last is left, as only reading it says what comes next."""
        found = self._store.find(self._chain[: (len(self._tokens) - 1) // BLOCK])
        for number in range(start // BLOCK, len(found)):
            for lane, rows in zip(lanes, found[number], strict=True):
                lane.cache.write(slot, number * BLOCK, rows)
        return max(start, len(found) * BLOCK)

    def keep(self, lanes: Sequence[Runner], slot: int, generated: Sequence[int] = ()) -> None:
        """Store what both caches of a slot hold of the prompt and the tokens that were `generated` after it."""
        chain = self._chain
        if len(generated):
            chain = hashes(
                np.concatenate([self._tokens, np.array(generated, np.int64)]), BLOCK, self._salt, self._exits
            )
        # What is still stacked is not in the deep cache; a draft that was not verified stands behind all tokens.
        complete = min(int(lane.cache.lengths[slot]) for lane in lanes)

        def copied(number: int) -> Block:
            return [lane.cache.read(slot, number * BLOCK, BLOCK, self._exits) for lane in lanes]

        size = BLOCK * sum(lane.cache.row_bytes(self._exits) for lane in lanes)
        self._store.keep(chain[: complete // BLOCK], copied, size)
