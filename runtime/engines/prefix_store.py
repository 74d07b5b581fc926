"""Store of keys and values of prompts, for requests that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from runtime.bundle.manifest import Manifest
from runtime.engines.kernels import prompt_differs_from
from runtime.engines.runner import Runner

# Tokens per block. Smaller blocks leave fewer tokens to compute, but need more copies.
BLOCK = 16
# Default memory limit in MB (1e6 bytes): 2,800 tokens of SmolLM2-135M.
DEFAULT_MB = 64


def hashes(tokens: np.ndarray, block: int, salt: str | None, own: bool = False) -> list[bytes]:
    """Return a hash for each whole block of tokens int64 [n]. It covers all tokens up to its end.

    The hashes form a chain. They differ by `salt`, and between the model's layers and an exit's
    `own`.
    """
    key = sha256(
        bytes((own, salt is not None)) + (salt or "").encode("utf-8", "surrogatepass")
    ).digest()
    chain = []
    for end in range(block, len(tokens) + 1, block):
        key = sha256(key + tokens[end - block : end].tobytes()).digest()
        chain.append(key)
    return chain


def default_limit_mb(manifest: Manifest) -> int:
    """Return the memory limit of a session's prefix cache, in MB, unless its options give one.

    0 for an encoder-decoder, which reuses only identical prompts, for ONNX Runtime's kernels, whose
    results depend on what was cached, for GPUs, and for an exit whose layers every row of a cached
    prefix must have read (SessionState.chooses_exit).
    """
    plain = not manifest.encoder_decoder and manifest.target == "cpu"
    own_layers = bool(manifest.exit_layers) and not manifest.exit_engine
    return DEFAULT_MB if plain and manifest.kernels is not None and not own_layers else 0


def generated_limit(manifest: Manifest) -> int:
    """Return the number of leading positions at which generated tokens are stored, too.

    A decoding step must write the same bits to the caches there as reading the token in a prompt.
    Our own operators do so without quantized weights. Otherwise they do up to
    `prompt_differs_from`, except those of earlier bundles, whose caches are float32. Later tokens
    of an answer are computed again in the next turn of a chat.
    """
    if manifest.kernels is None:
        return 0
    if manifest.quantization is None:
        return manifest.capacity
    if manifest.kv_cache is None:
        return 0
    differs_from = prompt_differs_from()
    return manifest.capacity if differs_from is None else differs_from


class PrefixStore:
    """Entries by the hashes of chains, with a memory limit. Not thread-safe.

    The beginning of a stored chain is always stored, too. If the limit is reached, the least
    recently used entry is dropped, starting at the end of its chain.

    Args:
        limit: Maximum total size of the entries, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        # The least recently used first.
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, chain: Sequence[bytes]) -> list[Any]:
        """Return the entries of the longest stored beginning of a chain."""
        count = next(
            (number for number, key in enumerate(chain) if key not in self._entries), len(chain)
        )
        self._use(chain[:count])
        return [self._entries[key][0] for key in chain[:count]]

    def keep(self, chain: Sequence[bytes], make: Callable[[int], Any], size: int) -> None:
        """Store the missing entries of a chain.

        Drops entries of other chains to make room. If that is not enough, the end of the chain is
        not stored.

        Args:
            chain: Hashes.
            make: Creates the entry of a number in the chain.
            size: Bytes per entry.
        """
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
        """Mark a chain as used, its beginning last, so that no entry outlives its beginning."""
        for key in reversed(chain):
            if key in self._entries:
                self._entries.move_to_end(key)


class Prefix:
    """The stored prefix of one prompt.

    Requests with the same salt share the keys and values of the model's layers, whatever their
    mode. Requests that run an exit's own layers also share those, in a separate chain. Stored
    values equal those computed from the prompt bit for bit, so results do not depend on reuse.

    Args:
        store: The store.
        tokens: The prompt, int64 [n].
        salt: Isolates requests of different users.
        exits: The request runs the exit's own layers.
    """

    def __init__(
        self, store: PrefixStore, tokens: np.ndarray, salt: str | None, exits: bool
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._salt = salt
        self._kinds = (False, True) if exits else (False,)  # the model's layers, the exit's own
        self._chains = [hashes(tokens, BLOCK, salt, own) for own in self._kinds]

    def restore(self, runners: Sequence[Runner], slot: int, start: int) -> int:
        """Copy stored positions after the first `start` positions into a slot.

        Returns the number of positions that the slot then holds. The last position is never
        restored, because it must be computed for its prediction.
        """
        whole = (len(self._tokens) - 1) // BLOCK
        found = [self._store.find(chain[:whole]) for chain in self._chains]
        end = min(map(len, found))
        for own, entries in zip(self._kinds, found, strict=True):
            for number in range(start // BLOCK, end):
                for runner, rows in zip(_holding(runners, own), entries[number], strict=True):
                    runner.cache.write(slot, number * BLOCK, rows, own)
        return max(start, end * BLOCK)

    def keep(self, runners: Sequence[Runner], slot: int, generated: Sequence[int] = ()) -> None:
        """Store the positions that all caches hold of a prompt and of tokens `generated` after it.

        Generated tokens must have the same bits as in a prompt.
        """
        chains = self._chains
        if len(generated):
            tokens = np.concatenate([self._tokens, np.array(generated, np.int64)])
            chains = [hashes(tokens, BLOCK, self._salt, own) for own in self._kinds]
        # Stacked rows are not in the deep cache, and drafts that were not verified come after all
        # tokens.
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
    """Return the runners whose caches have the model's layers, or with `own` the exit's own ones.

    The first two runners have the model's layers. Any may have the exit's own.
    """
    return runners if own else runners[:2]
