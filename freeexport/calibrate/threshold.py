"""Choice of a threshold: by a Beta mixture, or with a guarantee."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import betaln, digamma
from scipy.stats import binom

from freeexport.calibrate.traces import Traces
from freeexport.system.progress import progress
from freeexport.task_metrics import Metric, Reference, check_name, draws, metric_of, scores
from runtime import Session
from runtime.bundle.beta import (
    MAX_CONCENTRATION,
    MIN_SHAPE,
    NEVER_EXIT,
    Beta,
    BetaMixture,
    clipped,
    threshold_at,
)
from runtime.errors import CalibrationError, OptionError

# Most steps of a fit. The likelihood is concave, and a few dozen steps find its maximum.
STEPS = 500
# If none of n tokens disagrees, at most 3 / n do, with 95 % probability.
RULE_OF_THREE = 3.0
# Descending and independent of the data. Finest near 1, where a good exit has most confidences.
THRESHOLDS: tuple[float, ...] = (
    1.0,
    *(1 - 10**-power for power in np.linspace(6, 0, 601).tolist()),
)
# Thresholds for losses that require decoding at each of them.
COARSE_THRESHOLDS: tuple[float, ...] = (
    1.0, 0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0,
)  # fmt: skip
RESAMPLES = 2000
# Share of agreeing exits that mode rollback keeps. Rejecting one costs only time, because the deep
# decoder chooses the same token again.
KEPT = 0.99

RuleName = Literal["bmm", "risk", "quality"]


@dataclass(frozen=True)
class Rule:
    """How a threshold is chosen.

    Attributes:
        method: "bmm": P(agree | confidence) is at least `agreement` above the threshold. "risk":
            the mean loss per sequence is at most `risk`, with probability 1 - `delta`. "quality":
            mode free keeps at least the share `quality` of the full model's `metric`, with
            probability 1 - `delta`.
        agreement: For bmm, in (0, 1).
        risk: For risk, in (0, 1). The loss of a sequence is its share of tokens that exit and
            disagree. With `metric`, it is 1 minus the score of mode free against the full model.
        delta: For risk and quality, in (0, 1).
        quality: For quality, in (0, 1).
        metric: Name of a metric. Default for quality: "exact".

    Raises:
        OptionError: If a number is out of range.
    """

    method: RuleName = "bmm"
    agreement: float = 0.95
    risk: float = 0.05
    delta: float = 0.05
    quality: float = 0.99
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_name(self.metric)
        for name in ("agreement", "risk", "delta", "quality"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise OptionError(f"{name} is {value!r}; choose a number between 0 and 1")

    @property
    def needs_outputs(self) -> bool:
        """True if the rule compares texts decoded in mode free."""
        return self.metric is not None or self.method == "quality"

    @property
    def target(self) -> float | None:
        """Target value of the method. None for risk."""
        return {"bmm": self.agreement, "quality": self.quality}.get(self.method)


@dataclass(frozen=True)
class Choice:
    """A chosen threshold.

    Attributes:
        threshold: The threshold. NEVER_EXIT if none is good enough.
        mixture: Mixture of agreeing and disagreeing tokens. None if either is missing.
        quality: Measured share of the full model's metric that is kept, by threshold.
        notes: Sentences for the user.
    """

    threshold: float
    mixture: BetaMixture | None
    quality: dict[float, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class DecodedOutputs:
    """Outputs of a bundle for S prompts, of the full model and of mode free.

    Exits change the tokens after them, so every threshold is decoded, once.

    Args:
        prompts: Token ids int64 [n] each.
        targets: References of each prompt. Default: the full model's outputs.
        max_new_tokens: Most tokens per output.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[np.ndarray],
        targets: Sequence[Reference] | None,
        max_new_tokens: int,
    ) -> None:
        self._session = session
        self._prompts = prompts
        self._targets = targets
        self._max_new_tokens = max_new_tokens
        self._free: dict[float, list[str]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    @cached_property
    def full(self) -> list[str]:
        """Outputs of the full model."""
        return self._decoded("full", mode="full")

    def free(self, threshold: float) -> list[str]:
        """Return the outputs of mode free at a threshold."""
        if threshold not in self._free:
            self._free[threshold] = self._decoded(
                f"threshold {threshold:.4g}", mode="free", threshold=threshold
            )
        return self._free[threshold]

    def kept(self, metric: str, threshold: float, part: np.ndarray) -> float:
        """Return the metric of mode free as a share of the full model's, for a mask bool [S]."""
        if not part.any():
            return 0.0
        measure, free, full, _ = self._tables(metric, threshold, part)
        whole = measure.of(full)
        return measure.of(free) / whole if whole else 0.0

    def surely_kept(self, metric: str, threshold: float, part: np.ndarray, delta: float) -> float:
        """Return a lower bound of the share of `kept`, which holds with probability 1 - `delta`."""
        measure, free, full, references = self._tables(metric, threshold, part)
        nothing = measure.table([""] * len(references), references).mean(axis=0)
        return ratio_bound(free, full, nothing, value=measure.value, delta=delta)

    def _tables(
        self, metric: str, threshold: float, part: np.ndarray
    ) -> tuple[Metric, np.ndarray, np.ndarray, list[Reference]]:
        measure = metric_of(metric)
        every = self._targets or [Reference((text,)) for text in self.full]
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
                    self._session.generate(
                        prompt, max_new_tokens=self._max_new_tokens, **options
                    ).text
                )
                advance()
        return texts


def choose(traces: Traces, rule: Rule, outputs: DecodedOutputs | None = None) -> Choice:
    """Choose a threshold by a rule.

    The result is NEVER_EXIT if no token of the traces exceeds the threshold.

    Args:
        rule: How to choose.
        outputs: Outputs of the bundle. Required by rules with a metric.

    Raises:
        CalibrationError: If confidences are not in [0, 1].
        OptionError: If `outputs` is missing.
    """
    if rule.needs_outputs and outputs is None:
        raise OptionError(
            "a metric compares what mode free writes, which needs a bundle; convert, calibrate that"
        )
    fitted = fit_mixture(traces.confidence, traces.agrees, rule.agreement)
    if rule.method == "quality" and outputs is not None:
        choice = _by_quality(fitted.mixture, rule, outputs)
    elif rule.method == "risk":
        choice = _by_risk(traces, fitted.mixture, rule, outputs)
    else:
        choice = fitted
        if rule.metric is not None and outputs is not None and choice.threshold < NEVER_EXIT:
            kept = outputs.kept(rule.metric, choice.threshold, np.ones(len(outputs), np.bool_))
            choice = replace(choice, quality={choice.threshold: kept})
    # No data support a threshold above the largest confidence.
    beyond = choice.threshold >= float(np.max(traces.confidence, initial=0.0))
    return replace(choice, threshold=NEVER_EXIT) if beyond else choice


def fit_mixture(confidence: np.ndarray, agrees: np.ndarray, target: float) -> Choice:
    """Fit a Beta mixture to tokens by maximum likelihood, and choose its threshold.

    Args:
        confidence: Confidences, float32 [n].
        agrees: Tokens whose shallow and deep predictions are equal, bool [n].
        target: Least P(agree | confidence) above the threshold, in (0, 1).

    Raises:
        CalibrationError: If confidences are not in [0, 1].
    """
    check_confidences(confidence)
    agreeing = able(confidence[agrees])
    disagreeing = able(confidence[~agrees])
    count = len(agreeing) + len(disagreeing)
    if not len(agreeing):
        note = f"none of the {count} tokens agrees: the exit cannot be used"
        return Choice(NEVER_EXIT, None, notes=(note,))
    if not len(disagreeing):
        if RULE_OF_THREE / count > 1 - target:
            needed = math.ceil(RULE_OF_THREE / (1 - target))
            note = f"all {count} tokens agree, which are too few to trust; give {needed} or more"
            return Choice(NEVER_EXIT, None, notes=(note,))
        # No data support a lower threshold than the smallest confidence.
        lowest = max(0.0, math.nextafter(float(np.min(confidence)), 0.0))
        note = (
            f"all {count} tokens agree, so the threshold is the smallest confidence among them, "
            "not a fit"
        )
        return Choice(lowest, None, notes=(note,))
    mixture = BetaMixture(fit_beta(agreeing), fit_beta(disagreeing), len(agreeing) / count)
    few = min(len(agreeing), len(disagreeing))
    which = "agreeing" if len(agreeing) <= len(disagreeing) else "disagreeing"
    notes = (
        (f"only {few} {which} tokens: their distribution is rough; give more samples",)
        if few < 30
        else ()
    )
    return Choice(threshold_at(mixture, target), mixture, notes=notes)


def fit_beta(confidence: np.ndarray) -> Beta:
    """Fit a Beta distribution by maximum likelihood to confidences [n] in [0, 1].

    Its shapes are from MIN_SHAPE to MAX_CONCENTRATION, because the likelihood of equal
    confidences grows without bound.
    """
    inside = clipped(confidence)
    log = float(np.log(inside).mean())
    log_rest = float(np.log1p(-inside).mean())
    mean = float(inside.mean())
    # The shapes that have the mean and the variance of the data.
    total = mean * (1 - mean) / max(float(inside.var()), 1e-9) - 1
    limits = (MIN_SHAPE, MAX_CONCENTRATION)
    start = np.clip([mean * total, (1 - mean) * total], *limits)

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the negative log-likelihood of a token, and its slopes, at logs of the shapes."""
        a, b = np.exp(logs)
        slopes = digamma([a, b]) - digamma(a + b) - (log, log_rest)
        return float(betaln(a, b) - (a - 1) * log - (b - 1) * log_rest), slopes * (a, b)

    found = minimize(
        loss,
        np.log(start),
        jac=True,
        method="L-BFGS-B",
        bounds=[tuple(map(math.log, limits))] * 2,
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": STEPS},
    )
    a, b = np.exp(found.x).tolist()
    return Beta(a, b)


def able(confidence: np.ndarray) -> np.ndarray:
    """Return the confidences above 0, or all of them if none is.

    A token with confidence 0 never exits, such as one whose best class is the unknown tokens. A
    Beta distribution that includes these has too much weight near 1.
    """
    above = confidence[confidence > 0]
    return above if len(above) else confidence


def check_confidences(confidence: np.ndarray) -> None:
    """Check that confidences are in [0, 1]."""
    wrong = int(np.sum(~((confidence >= 0) & (confidence <= 1))))  # NaN too
    if wrong:
        raise CalibrationError(
            f"{wrong} of {len(confidence)} confidences are not numbers from 0 to 1: "
            "the model computes NaN or infinity; check it with freeexport verify"
        )


# Guarantees use Learn then Test with fixed-sequence testing (Angelopoulos et al. 2021; Schuster et
# al. 2022 for early exit). The independent units are sequences, because tokens of one sequence
# depend on each other.


def first_failing(passes: Callable[[float], bool], thresholds: Sequence[float]) -> float:
    """Return the last of the descending `thresholds` before the first that fails its test.

    With tests of level delta it violates its guarantee with probability at most delta, because
    the first true violation in the sequence passes with that probability.
    """
    passing = NEVER_EXIT
    for threshold in thresholds:
        if threshold >= NEVER_EXIT:
            continue  # nothing exits, so nothing is lost
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
    """Choose by a lower bound on two thirds of the sequences. The others report the quality."""
    metric = rule.metric or "exact"
    held_out = held_out_of(len(outputs))

    def passes(threshold: float) -> bool:
        return outputs.surely_kept(metric, threshold, ~held_out, rule.delta) >= rule.quality

    threshold = first_failing(passes, COARSE_THRESHOLDS)
    if threshold >= NEVER_EXIT:
        return Choice(threshold, mixture)
    kept = outputs.kept(metric, threshold, held_out)
    seen = (
        f"{kept:.2%} of the full model's {metric} is kept "
        f"on {int(held_out.sum())} sequences that did not choose"
    )
    if kept < rule.quality:
        seen += (
            f", less than the {rule.quality:.4g} asked for: "
            "chance, or data that change along the file"
        )
    return Choice(threshold, mixture, {threshold: kept}, (seen,))


def held_out_of(count: int) -> np.ndarray:
    """Return a mask of the held-out sequences, bool [count]: every third one."""
    return np.arange(count) % 3 == 2


def token_losses(traces: Traces, threshold: float) -> np.ndarray:
    """Return each sequence's share of tokens that exit and disagree, float64 [S]."""
    wrong = traces.above(threshold) & ~traces.agrees
    return np.bincount(traces.sequence, wrong, len(traces.length)) / np.maximum(1, traces.length)


def p_value(losses: np.ndarray, risk: float) -> float:
    """Return the p-value of a mean loss above `risk`, for losses [n] in [0, 1]. Exact for bool."""
    if losses.dtype == np.bool_:
        return float(binom.cdf(int(np.sum(losses)), len(losses), risk))
    return hoeffding_bentkus(losses, risk)


def hoeffding_bentkus(losses: np.ndarray, risk: float) -> float:
    """Return the Hoeffding-Bentkus p-value of independent losses [n] in [0, 1].

    See Bates et al. 2021.
    """
    count = len(losses)
    mean = float(np.mean(losses))
    # Keep rounding errors from raising a sum of k to k + 1, which would be too conservative.
    bentkus = math.e * float(binom.cdf(math.ceil(count * mean - 1e-9), count, risk))
    low = min(mean, risk)
    entropy = low * math.log(low / risk) if low > 0 else 0.0
    entropy += (1 - low) * math.log((1 - low) / (1 - risk)) if low < 1 else 0.0
    return min(1.0, bentkus, math.exp(-count * entropy))


def sequences_needed(risk: float, delta: float) -> int:
    """Return the fewest sequences with which a threshold below 1 can pass without any loss."""
    return math.ceil(math.log(delta) / math.log1p(-risk))


def ratio_bound(
    free: np.ndarray,
    full: np.ndarray,
    lost: np.ndarray,
    value: Callable[[np.ndarray], float],
    delta: float,
) -> float:
    """Return a lower bound of the metric in mode free as a ratio of that in mode full.

    Computed by a paired bootstrap over statistics [n, k] of the same sequences. Each resample also
    has an average sequence that mode free loses completely, with statistics `lost` [k], because the
    data may lack rare failures. The bound does not hold with probability `delta`.
    """
    counts = draws(len(free), RESAMPLES)
    ratios = []
    for ours, whole in zip(counts @ free + lost, counts @ full + full.mean(axis=0), strict=True):
        best = value(whole)
        ratios.append(value(ours) / best if best > 0 else 0.0)
    return float(np.quantile(ratios, delta))


def rollback_limit(traces: Traces, threshold: float) -> tuple[float | None, float | None]:
    """Return the threshold of mode rollback, and the share of disagreeing exits that it rejects.

    The threshold is in nats, and is the quantile KEPT of the agreeing exits. Either is None if
    there are no such exits.
    """
    exits = traces.above(threshold)
    agreeing = traces.nll[exits & traces.agrees]
    wrong = traces.nll[exits & ~traces.agrees]
    if not len(agreeing):
        return None, None
    limit = float(np.quantile(agreeing, KEPT))
    return limit, float(np.mean(wrong > limit)) if len(wrong) else None
