"""A fixed table of the likeliest token after each n-gram of some texts, for drafts.

Built from the texts of a corpus (option `draft_corpus`), or from a model's own outputs, and then
part of a bundle. A look-up costs no engine call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np

from runtime.decoding.text_index import LEVELS, ORDERS, Expectation

# File of a bundle's table.
PHRASES = "phrases.npy"
# An n-gram by its hash, the token that followed it most often, and the level of an Expectation.
ENTRY = np.dtype([("ngram", "<u8"), ("token", "<u4"), ("level", "u1")])
MAX_ENTRIES = 4_000_000  # of a file, which is untrusted
# Multiplier of the hash. Two n-grams with one hash only cause a wrong draft.
_FACTOR = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_BUCKET_BITS = 15
_BUCKET_SHIFT = 64 - _BUCKET_BITS
_LONGEST_FIRST = ORDERS[::-1]


class PhraseTable:
    """The likeliest token after an n-gram of ORDERS tokens.

    Args:
        entries: ENTRY [n], ascending by `ngram`.
    """

    def __init__(self, entries: np.ndarray) -> None:
        # Python searches a view in a tenth of numpy's time for one n-gram.
        ngrams = entries["ngram"].copy()
        self._ngrams = ngrams.data
        # Place of the first n-gram for each value of the highest bits of a hash.
        firsts = np.arange(1 << _BUCKET_BITS, dtype=np.uint64) << np.uint64(64 - _BUCKET_BITS)
        self._firsts = np.append(ngrams.searchsorted(firsts), len(ngrams)).data
        self._tokens = entries["token"].copy().data
        self._levels = entries["level"].copy().data

    @classmethod
    def build(cls, texts: Iterable[Sequence[int]], max_entries: int | None = None) -> PhraseTable:
        """Count what followed each n-gram in texts of token ids.

        Args:
            max_entries: Number of entries that are kept, those that are right most often where the
                n-gram of the next smaller size is wrong. Default: all.
        """
        parts = [np.asarray(text, np.uint64) for text in texts]
        tokens = np.concatenate(parts) if parts else np.empty(0, np.uint64)
        # The number of tokens before each in its text.
        places = np.concatenate([np.arange(len(part)) for part in parts]) if parts else tokens
        counted: list[tuple[np.ndarray, np.ndarray]] = []
        for number, order in enumerate(ORDERS):
            shorter = (ORDERS[number - 1], counted[-1][0]) if counted else None
            counted.append(_count(tokens, places, order, number * LEVELS, shorter))
        entries = np.concatenate([found for found, _ in counted])
        if max_entries is not None and len(entries) > max_entries:
            gains = np.concatenate([gained for _, gained in counted])
            entries = entries[np.argsort(-gains, kind="stable")[:max_entries]]
        return cls(np.sort(entries, order="ngram"))

    @property
    def entries(self) -> np.ndarray:
        """A new array of the entries, ENTRY [n]."""
        entries = np.empty(len(self._ngrams), ENTRY)
        entries["ngram"] = self._ngrams
        entries["token"] = self._tokens
        entries["level"] = self._levels
        return entries

    @property
    def nbytes(self) -> int:
        columns = (self._ngrams, self._firsts, self._tokens, self._levels)
        return sum(column.nbytes for column in columns)

    def expected(self, newest: Sequence[int]) -> Expectation | None:
        """Return the likeliest token after the longest known n-gram at the end of `newest`."""
        ngrams = self._ngrams
        for order in _LONGEST_FIRST:
            if order > len(newest):
                continue
            wanted = order
            for token in newest[-order:]:
                wanted = (wanted * _FACTOR + token + 1) & _MASK
            bucket = wanted >> _BUCKET_SHIFT
            end = self._firsts[bucket + 1]
            row = bisect_left(ngrams, wanted, self._firsts[bucket], end)
            if row < end and ngrams[row] == wanted:
                return Expectation(self._tokens[row], self._levels[row])
        return None


def misfit(entries: np.ndarray, vocab_size: int) -> str | None:
    """Return why an array is not the entries of a table, or None."""
    if not isinstance(entries, np.ndarray) or entries.dtype != ENTRY or entries.ndim != 1:
        return "it is no table of phrases"
    if len(entries) > MAX_ENTRIES:
        return f"it has {len(entries):,} phrases, at most {MAX_ENTRIES:,} are read"
    if len(entries) and int(entries["token"].max()) >= vocab_size:
        return f"it has token {entries['token'].max()}, outside of 0 to {vocab_size - 1}"
    if len(entries) and int(entries["level"].max()) >= LEVELS * len(ORDERS):
        return f"it has level {entries['level'].max()}, outside of 0 to {LEVELS * len(ORDERS) - 1}"
    if not (entries["ngram"][:-1] < entries["ngram"][1:]).all():
        return "its phrases are not in order"
    return None


def _ngrams(tokens: np.ndarray, ends: np.ndarray, order: int) -> np.ndarray:
    """Return the hashes of the `order` tokens before each place of `ends`, uint64 [n].

    `PhraseTable.expected` computes the same for one place.
    """
    ngrams = np.full(len(ends), order, np.uint64)
    for back in range(order, 0, -1):
        ngrams = ngrams * np.uint64(_FACTOR) + tokens[ends - back] + np.uint64(1)
    return ngrams


def _count(
    tokens: np.ndarray,
    places: np.ndarray,
    order: int,
    level: int,
    shorter: tuple[int, np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of the n-grams of one size, and how many tokens each gains.

    Args:
        shorter: The next smaller size and its entries. A look-up returns those without this one.
    """
    ends = np.flatnonzero(places >= order)
    ngrams = _ngrams(tokens, ends, order)
    following = tokens[ends]
    ranked = np.lexsort((following, ngrams))
    ends = ends[ranked]
    ngrams = ngrams[ranked]
    following = following[ranked]
    starts = np.flatnonzero(_changes(ngrams) | _changes(following))  # of each n-gram and token
    counts = np.diff(starts, append=len(ngrams))
    ngrams = ngrams[starts]
    following = following[starts]
    firsts = np.flatnonzero(_changes(ngrams))
    totals = np.add.reduceat(counts, firsts) if len(firsts) else counts
    # The most frequent token of each n-gram: the first one after sorting.
    ranked = np.lexsort((-counts, ngrams))
    best = counts[ranked][firsts]
    entries = np.empty(len(firsts), ENTRY)
    entries["ngram"] = ngrams[firsts]
    entries["token"] = following[ranked][firsts]
    entries["level"] = level + LEVELS * best // (totals + 1)
    if shorter is None:
        return entries, best
    order, others = shorter
    found = others["ngram"].searchsorted(_ngrams(tokens, ends[starts[firsts]], order))
    number = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(starts)))
    same = following == others["token"][found][number]
    gains = best.copy()
    gains[number[same]] -= counts[same]
    return entries, gains


def _changes(values: np.ndarray) -> np.ndarray:
    """Return where a value differs from the one before it, bool [n]. True at the first."""
    return np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]])
