"""Texts that a bundle writes, with the whole model and in mode free: exits change what follows, so they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from freeexport.metrics import Reference, metric_of, scores
from freeexport.system.progress import Advance, progress
from runtime import Session


class Outputs:
    """Of prompts int64 [n] each; every threshold is decoded once. `targets` are the references of a text's quality, or
    None for the full model's own outputs."""

    def __init__(
        self, session: Session, prompts: Sequence[np.ndarray], targets: Sequence[Reference] | None, max_new_tokens: int
    ) -> None:
        self._session, self._prompts, self._targets = session, list(prompts), targets
        self._most = max_new_tokens
        self._free: dict[tuple[float, int | None], list[str]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    @cached_property
    def full(self) -> list[str]:
        with progress("decoding, full", len(self)) as advance:
            return [self._text(prompt, advance, mode="full") for prompt in self._prompts]

    @property
    def _own(self) -> list[Reference]:
        return [Reference((text,)) for text in self.full]

    def free(self, threshold: float, max_pending: int | None = None) -> list[str]:
        """With sync passes over at most `max_pending` rows, by default as the bundle says."""
        key = threshold, max_pending
        if key not in self._free:
            options = {"mode": "free", "threshold": threshold, "max_pending": max_pending}
            with progress(f"decoding, threshold {threshold:.4g}", len(self)) as advance:
                self._free[key] = [self._text(prompt, advance, **options) for prompt in self._prompts]
        return self._free[key]

    def against_full(self, metric: str, threshold: float) -> np.ndarray:
        """Scores [n] of outputs in mode free, against those of the full model."""
        return scores(metric, self.free(threshold), self._own)

    def kept(
        self, metric: str, threshold: float, part: np.ndarray | None = None, max_pending: int | None = None
    ) -> float:
        """The metric in mode free as a share of the full model's, over the sequences where `part`, bool [n], is true,
        or all; 0 where the full model scores 0, or there are none."""
        references = self._own if self._targets is None else self._targets
        chosen = np.ones(len(self), np.bool_) if part is None else part
        if not chosen.any():
            return 0.0
        measure = metric_of(metric)
        whole = measure.of(measure.table(self.full, references)[chosen])
        free = measure.of(measure.table(self.free(threshold, max_pending), references)[chosen])
        return free / whole if whole else 0.0

    def _text(self, prompt: np.ndarray, advance: Advance, **options: Any) -> str:
        text = self._session.generate(prompt, max_new_tokens=self._most, **options).text
        advance()
        return text
