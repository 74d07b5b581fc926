"""Traces: what both decoders said at each token of a sequence, along the full model's own greedy output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Trace:
    """Tokens of one sequence that could exit, all but a decoder-only model's first: the shallow `confidence` float32
    [n]; whether the shallow prediction `agrees` with the deep one, bool [n]; its `nll` float32 [n], nats by the deep
    decoder; and which `token` it is, int32 [n].

    `line` is the input's line in its file, from 1.
    """

    line: int
    confidence: np.ndarray
    agrees: np.ndarray
    nll: np.ndarray
    token: np.ndarray

    @classmethod
    def of(
        cls, line: int, confidence: Sequence[float], agrees: Sequence[bool], nll: Sequence[float], token: Sequence[int]
    ) -> Trace:
        return cls(
            line,
            np.array(confidence, np.float32),
            np.array(agrees, np.bool_),
            np.array(nll, np.float32),
            np.array(token, np.int32),
        )

    def __len__(self) -> int:
        return len(self.confidence)

    def sure(self, threshold: float) -> np.ndarray:
        """Which tokens exit, bool [n]: compared as the decoder does, in double precision."""
        above: np.ndarray = self.confidence.astype(np.float64) > threshold
        return above


@dataclass(frozen=True)
class Traces:
    """Sequences, and their tokens end to end."""

    sequences: tuple[Trace, ...]

    @classmethod
    def of(cls, sequences: Sequence[Trace]) -> Traces:
        return cls(tuple(sequences))

    @property
    def tokens(self) -> int:
        return len(self.confidence)

    @property
    def mean_length(self) -> int:
        """Tokens of a sequence, its first included."""  # of an encoder-decoder one too many
        return max(2, round(self.tokens / len(self.sequences)) + 1)

    @cached_property
    def confidence(self) -> np.ndarray:
        return _joined([one.confidence for one in self.sequences], np.float32)

    @cached_property
    def agrees(self) -> np.ndarray:
        return _joined([one.agrees for one in self.sequences], np.bool_)

    @cached_property
    def nll(self) -> np.ndarray:
        return _joined([one.nll for one in self.sequences], np.float32)

    @property
    def agreement(self) -> float:
        """Share of all tokens at which both decoders agree; 0 without tokens."""
        return float(self.agrees.mean()) if self.tokens else 0.0


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
