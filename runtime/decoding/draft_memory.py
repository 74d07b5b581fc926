"""A memory of recent outputs for drafts: counts of the tokens after each n-gram.

Each user (`cache_salt`) has an index of its own, so drafts depend only on texts of the same user.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from sys import getsizeof
from threading import Lock
from typing import Literal, NamedTuple

# Sizes of the indexed n-grams, in tokens. Fewer sizes take less memory. With 3, 5 and 8 tokens in
# addition, the next token was known 1 % more often, in twice the memory.
ORDERS = (1, 2, 4)
LONGEST = ORDERS[-1]
# Levels of evidence for each order: eighths of the share of occurrences that a token followed.
LEVELS = 8
# Maximum number of tokens of a text that are remembered, the newest. Bounds the time after a
# request to about 10 ms.
MOST_TOKENS = 2048

# Types of encoded tokens, by their bytes.
CODES: dict[int, Literal["H", "I"]] = {2: "H", 4: "I"}
# Upper bounds of memory, in bytes, on a 64-bit machine. An entry beside its key: a token, and its
# share of a dict that has just grown, in which a sixth of the places are used. A place takes 4
# bytes in the hash table and two thirds of 24 among the entries.
ENTRY = 32 + 120
# A `Followers` with five tokens or less, and each token in it.
FOLLOWERS = 272
FOLLOWER = 96
# A text, beside its tokens, and an index.
TEXT = 512
INDEX = 1024
# A dict is built again when so small a share of its largest number of entries is left, because
# dicts do not shrink.
SPARSE = 0.5
# Of one more token, at most: entries of every order become followers.
MOST_BYTES = 40 + len(ORDERS) * (FOLLOWERS + 2 * FOLLOWER)


class Expectation(NamedTuple):
    """The likeliest next token, and the evidence for it.

    Attributes:
        level: LEVELS levels for each order: by the share of occurrences that the token followed.
    """

    token: int
    level: int


class Followers:
    """Counts of the tokens that followed an n-gram. `best` is the latest of the most frequent."""

    __slots__ = ("best", "counts", "total")

    def __init__(self, token: int) -> None:
        self.best = token
        self.total = 1
        self.counts = {token: 1}

    def add(self, token: int) -> None:
        """Count a token."""
        counts = self.counts
        count = counts.get(token, 0) + 1
        counts[token] = count
        self.total += 1
        if count >= counts[self.best]:
            self.best = token

    def remove(self, token: int) -> None:
        """Discount a token."""
        counts = self.counts
        self.total -= 1
        counts[token] -= 1
        if not counts[token]:
            del counts[token]
        if token == self.best and counts:
            self.best = max(counts, key=counts.__getitem__)


class TextIndex:
    """Counts of the tokens after each n-gram of ORDERS tokens, in the texts of one user.

    Attributes:
        used: Upper bound of its memory, in bytes.
    """

    def __init__(self, width: int) -> None:
        self.used = 0
        self.texts = 0
        self._width = width
        self._largest = 0  # largest number of entries since the dict was built
        # A token that followed once, or counts. Keys are the encoded tokens.
        self._entries: dict[bytes, int | Followers] = {}
        # Bytes of the longest key and its lowest level, and so on.
        self._sizes = [
            (order * width, number * LEVELS) for number, order in reversed([*enumerate(ORDERS)])
        ]
        self._entry_bytes = [getsizeof(bytes(order * width)) + ENTRY for order in ORDERS]

    def expected(self, newest: bytes) -> Expectation | None:
        """Return the likeliest token after the longest n-gram that ends the encoded tokens."""
        entries = self._entries
        for size, level in self._sizes:
            entry = entries.get(newest[-size:]) if size <= len(newest) else None
            if entry is None:
                continue
            if isinstance(entry, int):
                return Expectation(entry, level + LEVELS // 2)
            best = entry.best
            return Expectation(best, level + LEVELS * entry.counts[best] // (entry.total + 1))
        return None

    def add(self, encoded: bytes, start: int) -> None:
        """Count the tokens of a text from place `start` on."""
        self.texts += 1
        entries = self._entries
        for key, token, size in self._followed(encoded, start):
            entry = entries.get(key)
            if entry is None:
                entries[key] = token
                self.used += size
                continue
            if isinstance(entry, int):
                entry = entries[key] = Followers(entry)
                self.used += FOLLOWERS + FOLLOWER
            before = len(entry.counts)
            entry.add(token)
            self.used += FOLLOWER * (len(entry.counts) - before)
        self._largest = max(self._largest, len(entries))

    def remove(self, encoded: bytes, start: int) -> None:
        """Discount the tokens of a text that was added."""
        self.texts -= 1
        entries = self._entries
        for key, token, size in self._followed(encoded, start):
            entry = entries[key]
            if isinstance(entry, Followers):
                before = len(entry.counts)
                entry.remove(token)
                self.used -= FOLLOWER * (before - len(entry.counts))
                if entry.total:
                    continue
                self.used -= FOLLOWERS
            del entries[key]
            self.used -= size
        if len(entries) < SPARSE * self._largest:
            self._entries = dict(entries.items())
            self._largest = len(entries)

    def _followed(self, encoded: bytes, start: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield the n-grams before each token of a text, the token, and the bytes of an entry."""
        width = self._width
        tokens = memoryview(encoded).cast(CODES[width])
        for place in range(start, len(tokens)):
            token = tokens[place]
            end = place * width
            for order, size in zip(ORDERS, self._entry_bytes, strict=True):
                if order > place:
                    break
                yield encoded[end - order * width : end], token, size


class _Text(NamedTuple):
    """A remembered text: its user, its encoded tokens, and the place of the first counted one.

    `size` is its memory without that of the index.
    """

    salt: str | None
    encoded: bytes
    start: int
    size: int


class TextMemory:
    """Indexes of recent texts by user, with a common memory limit.

    If the limit is reached, the oldest texts are dropped, each as a whole. `keep` and `forget` may
    be called by different threads.

    Attributes:
        used: Upper bound of the memory used, in bytes.
    """

    def __init__(self, vocab_size: int, limit: int) -> None:
        self.limit = limit
        self._lock = Lock()
        self._width = 2 if vocab_size <= 1 << 16 else 4
        self.forget()

    def forget(self) -> None:
        """Drop all texts."""
        with self._lock:
            self._texts = deque[_Text]()
            self._indexes: dict[str | None, TextIndex] = {}
            self.used = 0

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._texts)

    def keep(self, salt: str | None, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Remember the newest tokens of an output, at most MOST_TOKENS.

        Drops older texts to make room.
        """
        size = TEXT + 4 * len(salt or "")
        free = self.limit - INDEX - size
        count = min(len(output), MOST_TOKENS, free // MOST_BYTES)
        if count <= 0:
            return
        text = [*prompt[-LONGEST:], *output][-(count + LONGEST) :]
        encoded = self._encoded(text)
        start = len(text) - count
        with self._lock:
            while self._texts and self.used + INDEX + size + count * MOST_BYTES > self.limit:
                self._drop_oldest()
            index = self._indexes.get(salt)
            if index is None:
                index = self._indexes[salt] = TextIndex(self._width)
                self.used += INDEX
            before = index.used
            index.add(encoded, start)
            size += len(encoded)
            self.used += index.used - before + size
            self._texts.append(_Text(salt, encoded, start, size))

    def expected(self, salt: str | None, newest: Sequence[int]) -> Expectation | None:
        """Return the likeliest token after the tokens `newest` of this user."""
        index = self._indexes.get(salt)
        return None if index is None else index.expected(self._encoded(newest[-LONGEST:]))

    def _encoded(self, tokens: Sequence[int]) -> bytes:
        """Return tokens as bytes, as in the keys of an index."""
        return array(CODES[self._width], tokens).tobytes()

    def _drop_oldest(self) -> None:
        salt, encoded, start, size = self._texts.popleft()
        index = self._indexes[salt]
        before = index.used
        index.remove(encoded, start)
        self.used -= before - index.used + size
        if not index.texts:
            del self._indexes[salt]
            self.used -= INDEX
