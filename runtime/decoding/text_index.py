"""Index of n-grams for drafts: the token that mostly followed each n-gram of a text.

A request indexes its own text. A session remembers recent outputs in indexes of the same kind, one
set for each user (`cache_salt`), so drafts depend only on texts of the same user.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from sys import getsizeof
from threading import Lock
from typing import Literal, NamedTuple

# Sizes of the indexed n-grams, in tokens.
ORDERS = (1, 2, 4)
LONGEST = ORDERS[-1]
# Levels of evidence for each order: eighths of the share of occurrences that a token followed.
LEVELS = 8
# Maximum number of tokens of an output that are remembered, the newest.
MAX_TOKENS = 2048

# Types of encoded tokens, by their bytes.
CODES: dict[int, Literal["H", "I"]] = {2: "H", 4: "I"}
# An entry packs the token that follows, and how often it did and another one did, in a byte each.
_HIT = 1 << 8
_MAX_COUNT = 255
# Upper bounds of memory, in bytes, on a 64-bit machine. An entry beside its key: its number, and
# its share of a dict that has just grown, in which a sixth of the places are used. A place takes 4
# bytes in the hash table and two thirds of 24 among the entries.
_ENTRY = 32 + 120
_INDEX = 1024
# Share of the memory after which a user's next output starts a new index. The oldest index is
# dropped as a whole.
_GENERATION = 0.25


class Expectation(NamedTuple):
    """The likeliest next token, and the evidence for it.

    Attributes:
        level: LEVELS levels for each order: by the share of occurrences that the token followed.
    """

    token: int
    level: int


class TextIndex:
    """The token that mostly followed each n-gram of ORDERS tokens.

    Attributes:
        used: Upper bound of its memory, in bytes.
    """

    def __init__(self, vocab_size: int) -> None:
        self.used = 0
        self._width = width_of(vocab_size)
        self._code = CODES[self._width]
        self._entries: dict[bytes, int] = {}
        # Bytes of the longest key and its lowest level, and so on.
        self._sizes = [
            (order * self._width, number * LEVELS)
            for number, order in reversed([*enumerate(ORDERS)])
        ]
        self._tail = b""  # the newest LONGEST tokens

    def encode(self, tokens: Sequence[int]) -> bytes:
        """Return tokens as bytes, as in the keys of an index."""
        return array(self._code, tokens).tobytes()

    def expected(self, newest: bytes) -> Expectation | None:
        """Return the likeliest token after the longest n-gram that ends the encoded tokens."""
        entries = self._entries
        for size, level in self._sizes:
            entry = entries.get(newest[-size:]) if size <= len(newest) else None
            if entry is not None:
                hits = entry >> 8 & _MAX_COUNT
                seen = hits + (entry & _MAX_COUNT)
                return Expectation(entry >> 16, level + LEVELS * hits // (seen + 1))
        return None

    def start(self, before: Sequence[int] = ()) -> None:
        """Start another text, after the tokens `before`, which are not indexed."""
        self._tail = self.encode(before[-LONGEST:])

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        width = self._width
        before = self._tail
        encoded = before + self.encode(tokens)
        entries = self._entries
        sizes = self._sizes
        place = len(before)
        for token in tokens:
            for size, _ in sizes:
                if size > place:
                    continue
                key = encoded[place - size : place]
                entry = entries.get(key)
                if entry is None:
                    entries[key] = token << 16 | _HIT
                    self.used += getsizeof(key) + _ENTRY
                else:
                    entries[key] = _counted(entry, token)
            place += width
        self._tail = encoded[-LONGEST * width :]


def _counted(entry: int, token: int) -> int:
    """Return an entry after one more occurrence, followed by `token`."""
    hits = entry >> 8 & _MAX_COUNT
    misses = entry & _MAX_COUNT
    if hits == _MAX_COUNT or misses == _MAX_COUNT:
        hits //= 2
        misses //= 2
    if entry >> 16 == token:
        hits += 1
    else:
        misses += 1
        # The newer token takes over unless the older one followed more often. Counts start again.
        # Otherwise, every other token would take over from then on.
        if misses >= hits:
            hits = misses = 1
        else:
            token = entry >> 16
    return token << 16 | hits << 8 | misses


def width_of(vocab_size: int) -> int:
    """Return the bytes of an encoded token."""
    return 2 if vocab_size <= 1 << 16 else 4


class TextMemory:
    """Indexes of recent outputs by user, with a common memory limit.

    If the limit is reached, the oldest index is dropped. `keep` and `forget` may be called by
    different threads.

    Attributes:
        used: Upper bound of the memory used, in bytes.
    """

    def __init__(self, vocab_size: int, limit: int) -> None:
        self.limit = limit
        self._vocab_size = vocab_size
        self._lock = Lock()
        # Upper bound of the memory of one more token.
        largest = LONGEST * width_of(vocab_size)
        self._token_bytes = len(ORDERS) * (getsizeof(bytes(largest)) + _ENTRY)
        self.forget()

    def forget(self) -> None:
        """Drop all outputs."""
        with self._lock:
            self.used = 0
            self._by_user: dict[str | None, list[TextIndex]] = {}
            self._oldest_first = deque[tuple[str | None, TextIndex]]()

    def keep(self, salt: str | None, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Remember the newest tokens of an output, at most MAX_TOKENS.

        Drops older outputs to make room.
        """
        of_salt = 4 * len(salt or "")
        generation = int(_GENERATION * self.limit) - _INDEX - of_salt
        count = min(len(output), MAX_TOKENS, generation // self._token_bytes)
        if count <= 0:
            return
        text = [*prompt, *output]
        before = text[max(0, len(text) - count - LONGEST) : len(text) - count]
        with self._lock:
            indexes = self._by_user.setdefault(salt, [])
            if not indexes or indexes[-1].used > generation:
                indexes.append(TextIndex(self._vocab_size))
                self._oldest_first.append((salt, indexes[-1]))
                self.used += _INDEX + of_salt
            index = indexes[-1]
            self.used -= index.used
            index.start(before)
            index.add(text[len(text) - count :])
            self.used += index.used
            while self.used > self.limit:
                self._drop_oldest()

    def expected(self, salt: str | None, newest: bytes) -> Expectation | None:
        """Return the likeliest token after the encoded tokens `newest` of this user."""
        best: Expectation | None = None
        for index in reversed(self._by_user.get(salt, ())):
            found = index.expected(newest)
            if found is not None and (best is None or found.level > best.level):
                best = found
        return best

    def _drop_oldest(self) -> None:
        salt, index = self._oldest_first.popleft()
        self.used -= _INDEX + index.used + 4 * len(salt or "")
        indexes = self._by_user[salt]
        # A new list, because a request may be reading this one.
        self._by_user[salt] = indexes[1:]
        if len(indexes) == 1:
            del self._by_user[salt]
