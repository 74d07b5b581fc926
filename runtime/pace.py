"""How long lossless drafts should be: the length that measured acceptance and costs make fastest, often none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

# A draft must promise this much over mode full, so that an error of the estimates does not cost speed.
MARGIN = 1.03
# What asking the shallow head while nothing is drafted may cost, as a share of a token in mode full.
PROBE_SHARE = 0.005
# Rows asked before the first decision, and between decisions.
FIRST_ROWS, REVIEW_ROWS = 8, 8
# Where a bundle records no costs: a deep row beside the first costs this much of it, the head this much of a step.
ROW_SHARE, HEAD_SHARE = 0.1, 0.2


K = TypeVar("K", str, int)


class Verdict(NamedTuple):
    """A row that the shallow head was asked at: `sure`, above the threshold; `kept`, the deep decoder chose the same.
    `kept` counts only where sure."""

    sure: bool
    kept: bool


class Pace:
    """Shared by requests that draft alike; nothing it says changes a token, so a lost update does no harm.

    `recorded` are a manifest's costs (`shallow_ms`, `shallow_without_head_ms`, `deep_{k}_ms`): they give the shape
    until this machine has shown its own.
    """

    def __init__(self, max_pending: int, recorded: Mapping[str, float]) -> None:
        self._costs = _Costs(max_pending, recorded)
        self._sure, self._kept = _Share(), _Share()
        self._length = 0
        self._rows_to_review, self._tokens_to_probe = FIRST_ROWS, 0

    @property
    def acceptance(self) -> float:
        """The chance that a draft is kept where those before it were, by what was seen lately."""
        return self._kept.value

    def plan(self, most: int) -> tuple[int, bool]:
        """The length of the next draft, up to `most`, and whether to ask the shallow head at the row after it too."""
        if self._rows_to_review <= 0:
            self._length = self._best_length(most)
            self._rows_to_review = REVIEW_ROWS
        if self._length > 0 or most == 0:
            return min(self._length, most), False
        self._tokens_to_probe -= 1
        if self._tokens_to_probe > 0:
            return 0, False
        # Before the first decision every second row is asked, to see both costs; later so few that it does not show.
        learned = self._sure.count >= FIRST_ROWS
        self._tokens_to_probe = int(self._costs.head / (PROBE_SHARE * self._costs.full)) if learned else 2
        return 0, True

    def observe_costs(self, asked: int, rows: int, shallow: float, deep: float) -> None:
        """Seconds of `rows` shallow steps, `asked` of them with the head, and of the deep pass over them."""
        self._costs.observe(asked, rows, shallow, deep)

    def observe_drafts(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            self._sure.observe(verdict.sure)
            if verdict.sure:
                self._kept.observe(verdict.kept)
            self._rows_to_review -= 1

    def speedups(self, most: int) -> Iterator[float]:
        """Predicted speed with drafts of up to 0, 1, ... `most` tokens, as multiples of mode full."""
        sure, kept, costs = self._sure.value, self._kept.value, self._costs
        tokens, reached, drafted, stopped, both = 1.0, 1.0, 0.0, 0.0, 1.0
        for length in range(most + 1):
            # `reached`: the chance that the draft gets so long; `stopped`: deep passes of drafts that ended before.
            seconds = costs["asked"] * drafted + costs["bare"] * reached + stopped + costs[length + 1] * reached
            yield tokens * costs.full / seconds
            drafted += reached
            stopped += costs[length + 1] * reached * (1 - sure)
            reached *= sure
            both *= sure * kept
            tokens += both

    def _best_length(self, most: int) -> int:
        speed, length = max((speed, length) for length, speed in enumerate(self.speedups(most)))
        return length if speed > MARGIN else 0


class _Share:
    """A share of late: what lies 32 observations back counts a third. It begins as one half, twice seen."""

    def __init__(self) -> None:
        self.value, self.count = 0.5, 0

    def observe(self, holds: bool) -> None:
        self.count += 1
        self.value += (holds - self.value) / min(self.count + 2, 32)


class _Costs:
    """Seconds of a shallow step ("asked" or "bare") and of deep passes by rows: measured, else scaled from recorded."""

    def __init__(self, max_pending: int, recorded: Mapping[str, float]) -> None:
        bare = recorded.get("shallow_without_head_ms", 1.0)
        asked = recorded.get("shallow_ms", bare / (1 - HEAD_SHARE))
        self._shallow = _Table({"asked": asked, "bare": bare})
        self._deep = _Table(_deep_passes(max_pending, recorded, bare))

    def __getitem__(self, what: str | int) -> float:
        return self._deep[what] if isinstance(what, int) else self._shallow[what]

    @property
    def full(self) -> float:
        return self["bare"] + self[1]

    @property
    def head(self) -> float:
        return max(0.0, self["asked"] - self["bare"])

    def observe(self, asked: int, rows: int, shallow: float, deep: float) -> None:
        self._deep.observe(rows, deep)
        if asked:
            self._shallow.observe("asked", (shallow - (rows - asked) * self["bare"]) / asked)
        else:
            self._shallow.observe("bare", shallow / rows)


class _Table(Generic[K]):
    """Costs by key. What was not measured is `recorded`, scaled as the measured ones are."""

    def __init__(self, recorded: Mapping[K, float]) -> None:
        self._recorded: Mapping[K, float] = recorded
        self._measured: dict[K, tuple[float, int]] = {}
        self._scale, self._samples = 1.0, 0

    def __getitem__(self, key: K) -> float:
        return self._measured[key][0] if key in self._measured else self._recorded[key] * self._scale

    def observe(self, key: K, seconds: float) -> None:
        mean, count = self._measured.get(key, (0.0, 0))
        # A hiccup of the machine is one sample of many, and must not pass for a cost.
        sample = max(0.0, min(seconds, 2 * self[key]) if self._samples else seconds)
        self._measured[key] = mean + (sample - mean) / min(count + 1, 16), count + 1
        self._samples += 1
        self._scale += (sample / self._recorded[key] - self._scale) / min(self._samples, 16)


def _deep_passes(max_pending: int, recorded: Mapping[str, float], bare: float) -> dict[int, float]:
    """Cost of 1 to `max_pending` rows, between the recorded sizes by interpolation."""
    sizes = [size for size in range(1, max_pending + 1) if f"deep_{size}_ms" in recorded]
    if not sizes:
        return {rows: bare * (1 + ROW_SHARE * (rows - 1)) for rows in range(1, max_pending + 1)}
    table: dict[int, float] = {}
    for rows in range(1, max_pending + 1):
        below = max((size for size in sizes if size <= rows), default=sizes[0])
        above = min((size for size in sizes if size >= rows), default=sizes[-1])
        low, high = recorded[f"deep_{below}_ms"], recorded[f"deep_{above}_ms"]
        table[rows] = low + (high - low) * (rows - below) / max(1, above - below)
    return table
