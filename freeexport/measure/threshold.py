"""Thresholds: by the Beta mixture, by the rule of FREE's authors, or with a guarantee on risk or quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
from scipy.stats import binom

from freeexport.measure.traces import Traces
from freeexport.metrics import Metric, Reference, check_name, draws, metric_of, scores
from freeexport.system.progress import progress
from runtime import Session
from runtime.adaptation.adaptive_threshold import ZETA, Moments, paper_threshold
from runtime.bundle.beta import NEVER_EXIT, UNIFORM, BetaMixture, LogSums, most_likely, threshold_at
from runtime.bundle.calibration import Method
from runtime.errors import CalibrationError, OptionError

# The likelihood is concave, and Newton steps find its top from anywhere in a few dozen.
STEPS = 200
# A token that disagrees is expected once in three times its number at most, with 95 % probability, where none did.
RULE_OF_THREE = 3.0
# Fixed before any data is seen, from the top: finest near 1, where the confidences of a good exit crowd.
THRESHOLDS: tuple[float, ...] = (
    1.0,
    *(1 - 10**-power for power in np.linspace(6, 0, 601).tolist()),
)
# For losses that need a decoding run each.
COARSE_THRESHOLDS: tuple[float, ...] = (1.0, 0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3,
                                        0.2, 0.1, 0.0)  # fmt: skip
RESAMPLES = 2000
# So many of the exits that agree stay. Taking one back costs time only: the deep decoder chooses the same token again.
KEPT = 0.99


@dataclass(frozen=True)
class Rule:
    """How a threshold is chosen.

    bmm: P(agree | confidence) is at least `agreement` from it on. paper: the likelihood ratio of agreeing tokens is
    above `zeta`, as FREE's authors run it. risk: the mean loss of a sequence is at most `risk`, with probability
    1 - `delta`; a loss is the share of tokens that exit and disagree, or with `metric`, 1 less the score of what mode
    free writes against what the full model writes. quality: at least the share `quality` of the full model's `metric`
    ("exact" where None) is kept, with probability 1 - `delta`.
    """

    method: Method = "bmm"
    agreement: float = 0.95
    zeta: float = ZETA
    risk: float = 0.05
    delta: float = 0.05
    quality: float = 0.99
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_name(self.metric)
        for name in ("agreement", "zeta", "risk", "delta", "quality"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise OptionError(f"{name} is {value!r}; choose a number between 0 and 1")

    @property
    def needs_outputs(self) -> bool:
        """Whether texts are decoded in mode free."""
        return self.metric is not None or self.method == "quality"

    @property
    def target(self) -> float | None:
        return {"bmm": self.agreement, "paper": self.zeta, "quality": self.quality}.get(self.method)


@dataclass(frozen=True)
class Choice:
    """`mixture` is None where a class of tokens is missing. `quality` is what thresholds keep of the full model's
    metric, as decoded; `notes` are sentences that the user should read."""

    threshold: float
    mixture: BetaMixture | None
    quality: dict[float, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class DecodedOutputs:
    """Texts that a bundle writes for S prompts, int64 [n] each, with the whole model and in mode free: exits change
    what follows, so they are decoded, every threshold once. `targets` are the references of a text's quality, or None
    for the full model's own outputs."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[np.ndarray],
        targets: Sequence[Reference] | None,
        max_new_tokens: int,
    ) -> None:
        self._session, self._prompts, self._targets = session, prompts, targets
        self._most = max_new_tokens
        self._free: dict[float, list[str]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    @cached_property
    def full(self) -> list[str]:
        return self._decoded("full", mode="full")

    def free(self, threshold: float) -> list[str]:
        if threshold not in self._free:
            self._free[threshold] = self._decoded(
                f"threshold {threshold:.4g}", mode="free", threshold=threshold
            )
        return self._free[threshold]

    def kept(self, metric: str, threshold: float, part: np.ndarray) -> float:
        """The metric in mode free as a share of the full model's, over the sequences of `part`, bool [S]."""
        if not part.any():
            return 0.0
        measure, free, full, _ = self._tables(metric, threshold, part)
        whole = measure.of(full)
        return measure.of(free) / whole if whole else 0.0

    def surely_kept(self, metric: str, threshold: float, part: np.ndarray, delta: float) -> float:
        """A lower bound of that share, which holds with probability 1 - `delta`."""
        measure, free, full, references = self._tables(metric, threshold, part)
        nothing = measure.table([""] * len(references), references).mean(axis=0)
        return ratio_bound(free, full, nothing, measure.value, delta)

    def _tables(
        self, metric: str, threshold: float, part: np.ndarray
    ) -> tuple[Metric, np.ndarray, np.ndarray, list[Reference]]:
        measure, every = (
            metric_of(metric),
            self._targets or [Reference((text,)) for text in self.full],
        )
        references = list(compress(every, part))
        free, full = (
            measure.table(list(compress(texts, part)), references)
            for texts in (self.free(threshold), self.full)
        )
        return measure, free, full, references

    def _decoded(self, title: str, **options: Any) -> list[str]:
        texts = []
        with progress(f"decoding, {title}", len(self)) as advance:
            for prompt in self._prompts:
                texts.append(
                    self._session.generate(prompt, max_new_tokens=self._most, **options).text
                )
                advance()
        return texts


def choose(traces: Traces, rule: Rule, outputs: DecodedOutputs | None = None) -> Choice:
    """A threshold that some token of the traces exceeds, or NEVER_EXIT.

    Raises CalibrationError for too few sequences and for confidences that are no shares; OptionError where a metric
    lacks its `outputs`.
    """
    if rule.needs_outputs and outputs is None:
        raise OptionError(
            "a metric compares what mode free writes, which needs a bundle; convert, calibrate that"
        )
    fitted = fit(traces.confidence, traces.agrees, rule.agreement)
    if rule.method == "quality" and outputs is not None:
        choice = _by_quality(fitted.mixture, rule, outputs)
    elif rule.method == "risk":
        choice = _by_risk(traces, fitted.mixture, rule, outputs)
    else:
        choice = fitted
        if rule.method == "paper":
            parts = (_able(traces.confidence[traces.agrees == agrees]) for agrees in (True, False))
            agreeing, others = map(Moments.of, parts)
            choice = Choice(paper_threshold(agreeing, others, rule.zeta), fitted.mixture)
        if rule.metric is not None and outputs is not None and choice.threshold < NEVER_EXIT:
            kept = outputs.kept(rule.metric, choice.threshold, np.ones(len(outputs), np.bool_))
            choice = replace(choice, quality={choice.threshold: kept})
    # Above the surest token nothing was seen: what a fit or a bound says there is said of no data.
    beyond = choice.threshold >= float(np.max(traces.confidence, initial=0.0))
    return replace(choice, threshold=NEVER_EXIT) if beyond else choice


def fit(confidence: np.ndarray, agrees: np.ndarray, target: float) -> Choice:
    """The Beta mixture of greatest likelihood of tokens [n], and the threshold from which P(agree | confidence) is at
    least `target`, in (0, 1). Raises CalibrationError for confidences that are not in [0, 1]."""
    check_confidences(confidence)
    agreeing, disagreeing = _able(confidence[agrees]), _able(confidence[~agrees])
    count = len(agreeing) + len(disagreeing)
    if not len(agreeing):
        note = f"none of the {count} tokens agrees: the exit cannot be used"
        return Choice(NEVER_EXIT, None, notes=(note,))
    if not len(disagreeing):
        if RULE_OF_THREE / count > 1 - target:
            needed = math.ceil(RULE_OF_THREE / (1 - target))
            note = f"all {count} tokens agree, which are too few to trust; give {needed} or more"
            return Choice(NEVER_EXIT, None, notes=(note,))
        # Below the smallest confidence nothing is known.
        lowest = max(0.0, math.nextafter(float(np.min(confidence)), 0.0))
        note = f"all {count} tokens agree, so the threshold is the smallest confidence among them, not a fit"
        return Choice(lowest, None, notes=(note,))
    agree, disagree = (
        most_likely(LogSums.of(one), UNIFORM, STEPS) for one in (agreeing, disagreeing)
    )
    mixture = BetaMixture(agree, disagree, len(agreeing) / count)
    few = min(len(agreeing), len(disagreeing))
    which = "agreeing" if len(agreeing) <= len(disagreeing) else "disagreeing"
    notes = (
        (f"only {few} {which} tokens: their distribution is rough; give more samples",)
        if few < 30
        else ()
    )
    return Choice(threshold_at(mixture, target), mixture, notes=notes)


def _able(confidence: np.ndarray) -> np.ndarray:
    """The confidences above 0: at 0, as where a class of unknown tokens is best, nothing exits at any threshold, and a
    Beta that must explain it has too much weight near 1. All of them where none is above."""
    above = confidence[confidence > 0]
    return above if len(above) else confidence


def check_confidences(confidence: np.ndarray) -> None:
    """Raises CalibrationError."""
    wrong = int(np.sum(~((confidence >= 0) & (confidence <= 1))))  # NaN too
    if wrong:
        raise CalibrationError(
            f"{wrong} of {len(confidence)} confidences are not numbers from 0 to 1: the model computes NaN or "
            "infinity; check it with freeexport verify"
        )


# A guarantee: Learn then Test with fixed-sequence testing (Angelopoulos et al. 2021; Schuster et al. 2022 for early
# exit). The unit is the sequence, whose tokens depend on each other; sequences are drawn independently.


def first_failing(passes: Callable[[float], bool], thresholds: Sequence[float]) -> float:
    """The last of `thresholds`, descending from 1.0, before the first that does not pass its test.

    With tests of level delta, the chosen one violates what is tested with probability delta at most: the first true
    violation in the sequence is passed so often, whatever comes after it.
    """
    passing = NEVER_EXIT
    for threshold in thresholds:
        if threshold >= NEVER_EXIT:
            continue  # nothing exits: nothing is lost
        if not passes(threshold):
            break
        passing = threshold
    return passing


def _by_risk(
    traces: Traces, mixture: BetaMixture | None, rule: Rule, outputs: DecodedOutputs | None
) -> Choice:
    quality: dict[float, float] = {}

    def losses(threshold: float) -> np.ndarray:
        if rule.metric is None or outputs is None:
            return token_losses(traces, threshold)
        score = scores(
            rule.metric, outputs.free(threshold), [Reference((text,)) for text in outputs.full]
        )
        quality[threshold] = float(np.mean(score))
        return ~score if score.dtype == np.bool_ else 1 - score

    thresholds = THRESHOLDS if rule.metric is None else COARSE_THRESHOLDS
    found = first_failing(lambda value: p_value(losses(value), rule.risk) <= rule.delta, thresholds)
    return Choice(found, mixture, quality)


def _by_quality(mixture: BetaMixture | None, rule: Rule, outputs: DecodedOutputs) -> Choice:
    """Two thirds of the sequences choose, by a lower bound at each threshold; the others only report."""
    metric, held_out = rule.metric or "exact", held_out_of(len(outputs))

    def passes(threshold: float) -> bool:
        return outputs.surely_kept(metric, threshold, ~held_out, rule.delta) >= rule.quality

    threshold = first_failing(passes, COARSE_THRESHOLDS)
    if threshold >= NEVER_EXIT:
        return Choice(threshold, mixture)
    kept = outputs.kept(metric, threshold, held_out)
    seen = f"{kept:.2%} of the full model's {metric} is kept on {int(held_out.sum())} sequences that did not choose"
    if kept < rule.quality:
        seen += f", less than the {rule.quality:.4g} asked for: chance, or data that change along the file"
    return Choice(threshold, mixture, {threshold: kept}, (seen,))


def held_out_of(count: int) -> np.ndarray:
    """Mask of the sequences that the choice does not see, bool [count]: every third, whatever order the data have."""
    return np.arange(count) % 3 == 2


def token_losses(traces: Traces, threshold: float) -> np.ndarray:
    """The share of each sequence's tokens that exit and disagree, float64 [S]."""
    wrong = traces.above(threshold) & ~traces.agrees
    return np.bincount(traces.sequence, wrong, len(traces.length)) / np.maximum(1, traces.length)


def p_value(losses: np.ndarray, risk: float) -> float:
    """The p-value of "the mean loss is above `risk`"; exact where all losses can only be 0 or 1."""
    if losses.dtype == np.bool_:
        return float(binom.cdf(int(np.sum(losses)), len(losses), risk))
    return hoeffding_bentkus(losses, risk)


def hoeffding_bentkus(losses: np.ndarray, risk: float) -> float:
    """For independent losses [n] in [0, 1] (Bates et al. 2021)."""
    count, mean = len(losses), float(np.mean(losses))
    # Rounding must not push a sum of k over to k + 1: that would only be careful, but k errors are k errors.
    bentkus = math.e * float(binom.cdf(math.ceil(count * mean - 1e-9), count, risk))
    low = min(mean, risk)
    entropy = low * math.log(low / risk) if low > 0 else 0.0
    entropy += (1 - low) * math.log((1 - low) / (1 - risk)) if low < 1 else 0.0
    return min(1.0, bentkus, math.exp(-count * entropy))


def sequences_needed(risk: float, delta: float) -> int:
    """The fewest sequences with which any threshold below 1 can pass, if none of them has a loss."""
    return math.ceil(math.log(delta) / math.log1p(-risk))


def ratio_bound(
    free: np.ndarray,
    full: np.ndarray,
    lost: np.ndarray,
    value: Callable[[np.ndarray], float],
    delta: float,
) -> float:
    """A lower bound, with probability 1 - `delta`, of the ratio of a metric's values in mode free and in mode full.

    `free` and `full` are statistics [n, k] of the same sequences, and `value` that of their sum [k]. By a paired
    bootstrap of which one more sequence is part: an average one that mode free loses, whose statistics are `lost` [k],
    as what is rare may not have been drawn. 0 where the full model's value is 0.
    """
    counts = draws(len(free), RESAMPLES)
    ratios = []
    for ours, whole in zip(counts @ free + lost, counts @ full + full.mean(axis=0), strict=True):
        best = value(whole)
        ratios.append(value(ours) / best if best > 0 else 0.0)
    return float(np.quantile(ratios, delta))


def rollback_limit(traces: Traces, threshold: float) -> tuple[float | None, float | None]:
    """Nats, the 99 % quantile among exited tokens that agree, and the share of those that disagree which it takes back;
    each None where there are no such tokens."""
    exits = traces.above(threshold)
    agreeing, wrong = traces.nll[exits & traces.agrees], traces.nll[exits & ~traces.agrees]
    if not len(agreeing):
        return None, None
    limit = float(np.quantile(agreeing, KEPT))
    return limit, float(np.mean(wrong > limit)) if len(wrong) else None
