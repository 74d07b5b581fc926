"""Tokens of a session's modes, alone and together, compared prompt by prompt (see tools/quality/equality.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from freeexport.system.progress import Advance
from runtime import GenerationResult, Session
from runtime.adaptation.draft_length import DraftLength

# Two logits nearer than this may change places between k rows and one, in float32.
TIE = 1e-4
# Rows of the passes that are compared with single steps.
PASSES = (2, 5, 16)
NOISE_PROMPTS = 8
# Share of prompts that may differ where weights are quantized.
ROUNDED = 0.01


@dataclass(frozen=True)
class Difference:
    """Where a prompt's tokens first differ under `setting`, and the smaller of two distances that decided there: of the
    two best logits, and, in free, of the confidence from the threshold."""

    setting: str
    prompt: int
    place: int
    distance: float


@dataclass(frozen=True)
class Setting:
    """`like`: the mode whose tokens alone these must be. `together`: many at a time."""

    mode: str
    like: str
    threshold: float
    together: bool

    @property
    def name(self) -> str:
        exits = "" if self.mode == "full" else f", threshold {self.threshold:g}"
        return f"{self.mode}{exits}, {'together' if self.together else 'alone'}"


def settings_of(thresholds: Sequence[float]) -> list[Setting]:
    exiting = [
        setting
        for value in thresholds
        for setting in (
            Setting("lossless", "full", value, False),
            Setting("lossless", "full", value, True),
            Setting("free", "free", value, True),
        )
    ]
    return [Setting("full", "full", 1.0, True), *exiting]


class Equality:
    """Of a session's `prompts`, decoded to at most `tokens` tokens, together by `batch` threads. `compared` counts
    prompts by the name of a setting, `drafts` drafted tokens."""

    def __init__(
        self, session: Session, prompts: Sequence[list[int]], tokens: int, batch: int, ignore_eos: bool = False
    ) -> None:
        self._session, self._prompts, self._ignore_eos = session, list(prompts), ignore_eos
        # Of all lengths, so that rows end at all times.
        self._lengths = np.random.default_rng(0).integers(tokens // 2 or 1, tokens + 1, len(prompts)).tolist()
        self._alone: dict[tuple[str, float], list[GenerationResult]] = {}
        self._batch = batch
        self.compared: Counter[str] = Counter()
        self.drafts = 0

    def differences(self, setting: Setting) -> list[Difference]:
        """Of all prompts, in order."""
        wanted = self._results(setting.like, setting.threshold)
        found = self._decode(setting.mode, setting.threshold, self._batch if setting.together else 1)
        self.compared[setting.name] += len(found)
        self.drafts += sum(result.stats.exits + result.stats.rejected for result in found if setting.mode == "lossless")
        return [
            Difference(setting.name, number, place, self._distance(number, place, setting))
            for number, (ours, alone) in enumerate(zip(found, wanted, strict=True))
            if (place := first_difference(ours, alone)) is not None
        ]

    def _decode(self, mode: str, threshold: float, threads: int) -> list[GenerationResult]:
        ask = partial(self._ask, mode, threshold)
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(ask, range(len(self._prompts))))

    def _ask(self, mode: str, threshold: float, number: int, **options: Any) -> GenerationResult:
        if mode != "full":
            options["threshold"] = threshold
        given = {"max_new_tokens": self._lengths[number], "ignore_eos": self._ignore_eos, "mode": mode, **options}
        return self._session.generate(self._prompts[number], **given)

    def _results(self, mode: str, threshold: float) -> list[GenerationResult]:
        key = mode, 1.0 if mode == "full" else threshold
        if key not in self._alone:
            self._alone[key] = self._decode(mode, threshold, 1)
        return self._alone[key]

    def _distance(self, number: int, place: int, setting: Setting) -> float:
        scores: list[np.ndarray] = []

        def keep(ids: np.ndarray, given: np.ndarray) -> np.ndarray:
            if ids.shape[1] - start == place:
                scores.append(given[0].copy())
            return given

        start = 1 if self._session.manifest.encoder_decoder else len(self._prompts[number])
        self._ask(setting.like, setting.threshold, number, max_new_tokens=place + 1, logits_processor=keep)
        second, best = np.partition(scores[-1], -2)[-2:]
        alone = self._results(setting.like, setting.threshold)[number]
        confidence = alone.confidence[place] if place < len(alone.confidence) else None
        sure = float("inf") if confidence is None else abs(confidence - setting.threshold)
        return min(float(best - second), sure)


def first_difference(ours: GenerationResult, alone: GenerationResult) -> int | None:
    """The first place where the tokens are not the same, None where all are."""
    pairs = zip(ours.token_ids, alone.token_ids, strict=False)
    shorter = min(len(ours.token_ids), len(alone.token_ids))
    place = next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), shorter)
    same_end = len(ours.token_ids) == len(alone.token_ids) and ours.finish_reason == alone.finish_reason
    return None if place == shorter and same_end else place


def noise(session: Session, prompts: Sequence[list[int]], tokens: int) -> float:
    """By how much logits of a sync pass over k rows differ from those of single steps, at most, along the output of
    mode full."""
    worst = 0.0
    for prompt in prompts:
        said = session.generate(prompt, mode="full", max_new_tokens=tokens, ignore_eos=True).token_ids[:-1]
        single = _logits(session, prompt, said, 1)
        worst = max(worst, *(float(np.abs(_logits(session, prompt, said, rows) - single).max()) for rows in PASSES))
    return worst


def _logits(session: Session, prompt: list[int], said: Sequence[int], rows: int) -> np.ndarray:
    """Of the deep decoder after each token, float32 [n, V], in passes over as many rows."""
    start, found = session.manifest.decoder_start_token_id, list[np.ndarray]()
    read = [int(start or 0)] if session.manifest.encoder_decoder else prompt
    with session.decoder(np.array(prompt)) as decoder:
        decoder.want_logits(True)
        decoder.prefill(np.array(read), head=False)
        for first in range(0, len(said), rows):
            part = said[first : first + rows]
            for token in part:
                decoder.step(token, head=False)
            found += [answer.logits.copy() for answer in decoder.sync(len(part)) if answer.logits is not None]
    return np.stack(found)


def unexplained(
    differences: Sequence[Difference], prompts: int, tie: float, share: float = ROUNDED
) -> list[Difference]:
    """Those that equality does not allow: whatever is no `tie`, and all of a setting in which more than a `share` of
    the prompts differs."""
    counts = Counter(difference.setting for difference in differences)
    return [one for one in differences if not one.distance < tie or counts[one.setting] > share * prompts]


def run(equality: Equality, settings: Sequence[Setting], advance: Advance | None = None) -> list[Difference]:
    """All differences. Drafts are as long as they may be, else lossless would stop drafting where it does not pay."""
    found: list[Difference] = []
    with mock.patch.object(DraftLength, "plan", lambda pace, most: (most, True)):
        for setting in settings:
            found += equality.differences(setting)
            if advance is not None:
                advance()
    return found
