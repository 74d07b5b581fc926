"""Rules of choosing a threshold: fits of known mixtures, and guarantees on populations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom
from traces import correlated, mixed, trace

from freeexport.calibrate.threshold import (
    COARSE_THRESHOLDS,
    THRESHOLDS,
    Choice,
    DecodedOutputs,
    Rule,
    choose,
    first_failing,
    fit_mixture,
    held_out_of,
    hoeffding_bentkus,
    p_value,
    ratio_bound,
    sequences_needed,
    token_losses,
)
from freeexport.calibrate.traces import Traces
from runtime.bundle.beta import Beta, BetaMixture
from runtime.errors import CalibrationError, OptionError

AGREE = [(8.0, 1.0), (20.0, 2.0), (2.0, 0.5), (5.0, 0.3)]
DISAGREE = [(1.0, 2.0), (2.0, 5.0), (0.7, 1.0)]


def drawn(mixture: BetaMixture, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    agrees = random.random(count) < mixture.weight_agree
    ours, others = mixture.agree, mixture.disagree
    confidence = np.where(agrees, random.beta(ours.a, ours.b, count), random.beta(others.a, others.b, count))
    return confidence, agrees


# Relative error of shapes, and error of P(agree) at the threshold found, by tokens of the smaller class (about).
TOLERANCES = {300: (0.35, 0.06), 3000: (0.10, 0.02), 30000: (0.04, 0.008)}


@pytest.mark.parametrize("agree", AGREE[::2])
@pytest.mark.parametrize("disagree", DISAGREE)
@pytest.mark.parametrize("smaller", TOLERANCES)
@pytest.mark.parametrize("weight", [0.7, 0.9])
def test_known_mixture_is_recovered(
    agree: tuple[float, float], disagree: tuple[float, float], smaller: int, weight: float
) -> None:
    true = BetaMixture(Beta(*agree), Beta(*disagree), weight)
    found = fit_mixture(*drawn(true, int(smaller / (1 - weight)), seed=int(smaller + 10 * weight)), target=0.95)
    shapes, chance = TOLERANCES[smaller]
    assert found.mixture is not None
    for ours, theirs in ((found.mixture.agree, true.agree), (found.mixture.disagree, true.disagree)):
        assert ours.a == pytest.approx(theirs.a, rel=shapes)
        assert ours.b == pytest.approx(theirs.b, rel=shapes)
    assert found.mixture.weight_agree == pytest.approx(weight, abs=0.05)
    if 0 < found.threshold < 1:
        assert float(true.posterior(found.threshold)) == pytest.approx(0.95, abs=chance)


@pytest.mark.parametrize("shapes", [(0.05, 3.0), (1.0, 1.0), (40.0, 0.5), (300.0, 200.0)])
def test_fit_maximizes_the_likelihood(shapes: tuple[float, float]) -> None:
    values = np.random.default_rng(3).beta(*shapes, 500)
    found = fit_mixture(np.append(values, 0.5), np.append(np.ones(500, np.bool_), False), 0.95)
    assert found.mixture is not None
    best = found.mixture.agree

    def likelihood(beta: Beta) -> float:
        return float(np.sum(beta.log_density(values)))

    for a, b in ((1.01, 1.0), (0.99, 1.0), (1.0, 1.01), (1.0, 0.99)):
        assert likelihood(best) >= likelihood(Beta(best.a * a, best.b * b)) - 1e-6


def test_extreme_and_equal_confidences_give_finite_fits() -> None:
    agrees = np.array([True] * 20 + [False] * 20)
    found = fit_mixture(np.where(agrees, 1.0, 0.0), agrees, 0.95)
    assert found.mixture is not None
    assert 0 < found.threshold < 1
    equal = fit_mixture(np.full(40, 0.7), agrees, 0.95)
    assert equal.mixture is not None
    assert equal.threshold == 1  # they say nothing


ASCENDING = np.linspace(0.2, 1, 100)


@pytest.mark.parametrize(
    ("confidence", "agrees", "threshold", "said"),
    [
        (ASCENDING, ASCENDING > 0.23, None, "only 4 disagreeing tokens"),
        (ASCENDING, ASCENDING < 0, 1.0, "none of the 100 tokens agrees"),
        (ASCENDING, ASCENDING > 0, np.nextafter(0.2, 0), "all 100 tokens agree, so the threshold is the smallest"),
        (ASCENDING[:59], ASCENDING[:59] > 0, 1.0, "all 59 tokens agree, which are too few to trust; give 60 or more"),
    ],
)
def test_missing_and_small_classes_are_reported(
    confidence: np.ndarray, agrees: np.ndarray, threshold: float | None, said: str
) -> None:
    found = fit_mixture(confidence, agrees, 0.95)
    assert said in found.notes[0]
    if threshold is not None:
        assert (found.threshold, found.mixture) == (threshold, None)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.5])
def test_confidences_outside_0_to_1_are_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="1 of 3 confidences are not numbers from 0 to 1"):
        fit_mixture(np.array([0.5, bad, 0.7]), np.array([True, False, True]), 0.95)


RISK, DELTA, SETS, SEQUENCES = 0.05, 0.1, 400, 150
STEPS = (1.0, *np.linspace(0.995, 0.0, 80).tolist())


def test_exact_binomial_bound_is_used_only_for_losses_of_0_and_1() -> None:
    losses = np.array([True] * 2 + [False] * 98)
    exact = sum(math.comb(100, k) * 0.05**k * 0.95 ** (100 - k) for k in range(3))
    assert p_value(losses, 0.05) == pytest.approx(exact)
    assert p_value(losses.astype(float), 0.05) == hoeffding_bentkus(losses.astype(float), 0.05) > exact
    assert hoeffding_bentkus(np.full(50, 0.2), 0.1) == 1  # the mean loss is above the risk


@pytest.mark.parametrize(("risk", "delta"), [(0.05, 0.05), (0.3, 0.01)])
def test_required_sequences_are_the_fewest_that_can_pass_without_a_loss(risk: float, delta: float) -> None:
    needed = sequences_needed(risk, delta)
    assert hoeffding_bentkus(np.zeros(needed), risk) <= delta
    assert hoeffding_bentkus(np.zeros(needed - 1), risk) > delta


def test_threshold_search_stops_at_the_first_failure() -> None:
    asked: list[float] = []

    def passes(threshold: float) -> bool:
        asked.append(threshold)
        return threshold != 0.5

    assert first_failing(passes, (1.0, 0.9, 0.7, 0.5, 0.3)) == 0.7
    assert asked == [0.9, 0.7, 0.5]
    for thresholds in (THRESHOLDS, COARSE_THRESHOLDS):  # from never to always
        assert list(thresholds) == sorted(set(thresholds), reverse=True)
        assert (thresholds[0], thresholds[-1]) == (1, 0)


def test_risk_guarantee_holds_for_dependent_tokens() -> None:
    """A large set is the population: its mean losses are the true risks, and calibration sets are drawn from it."""
    population = correlated(6000, seed=5)
    assert _correlation(population) >= 0.3
    losses = np.stack([token_losses(population, threshold) for threshold in STEPS], axis=1)
    true = losses.mean(axis=0)
    assert true[-1] > 2 * RISK > true[1]  # there is something to get wrong
    random = np.random.default_rng(11)
    broken = naive = of_tokens = exits = 0
    for _ in range(SETS):
        drawn = random.integers(0, len(losses), SEQUENCES)
        sample, count = losses[drawn], population.length[drawn]

        def passes(threshold: float, sample: np.ndarray = sample) -> bool:
            return p_value(sample[:, STEPS.index(threshold)], RISK) <= DELTA

        chosen = STEPS.index(first_failing(passes, STEPS))
        broken += true[chosen] > RISK
        exits += chosen > 0
        naive += true[np.flatnonzero(sample.mean(axis=0) <= RISK)[-1]] > RISK
        # The exact test of tokens in place of sequences: the last threshold before the first that fails.
        fails = binom.cdf(np.rint(sample.T @ count), count.sum(), RISK) > DELTA
        of_tokens += true[np.argmax(fails[1:])] > RISK
    assert broken <= DELTA * SETS
    assert exits > 0.9 * SETS  # it is not kept by never exiting
    # The observed risk alone breaks it, and so do tokens counted as if they were independent.
    assert naive > 2 * DELTA * SETS
    assert of_tokens > DELTA * SETS


def _correlation(traces: Traces) -> float:
    """Intra-class correlation of disagreement, by one-way analysis of variance."""
    groups = np.split(1.0 - traces.agrees, np.cumsum(traces.length)[:-1])
    sizes, overall = traces.length, np.mean(1.0 - traces.agrees)
    between = sum(len(group) * (group.mean() - overall) ** 2 for group in groups) / (len(groups) - 1)
    within = sum(((group - group.mean()) ** 2).sum() for group in groups) / (sizes.sum() - len(groups))
    size = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / (len(groups) - 1)
    return float((between - within) / (between + (size - 1) * within))


COUNT = 300
TRACES = mixed(COUNT, 12)


class Decoded(DecodedOutputs):
    """Outputs as given: which of them are wrong at each threshold."""

    def __init__(self, wrong: dict[float, np.ndarray]) -> None:
        self._wrong, self._targets = wrong, None
        self.full = ["right"] * COUNT
        self.asked: list[float] = []

    def __len__(self) -> int:
        return COUNT

    def free(self, threshold: float) -> list[str]:
        self.asked.append(threshold)
        return ["wrong" if wrong else "right" for wrong in self._wrong.get(threshold, np.zeros(COUNT, np.bool_))]


def wrong_at(part: np.ndarray, share: float) -> np.ndarray:
    """This share of the sequences of a part, the first of them."""
    places = np.flatnonzero(part)
    wrong = np.zeros(COUNT, np.bool_)
    wrong[places[: int(np.ceil(share * len(places)))]] = True
    return wrong


def test_threshold_above_every_confidence_becomes_1() -> None:
    random = np.random.default_rng(128)
    # 26 tokens as an untrained exit has them: few agree, and none is sure. The fit reaches the target only far beyond.
    agrees = np.arange(26) < 9
    confidence = np.where(agrees, random.beta(4, 2, 26), random.beta(2, 4, 26))
    few = trace(confidence.tolist(), agrees.tolist())
    fitted = fit_mixture(few.confidence, few.agrees, 0.99)
    assert confidence.max() < 0.92 < 0.9999 < fitted.threshold < 1
    assert choose(few, Rule(agreement=0.99)).threshold == 1.0
    assert 0 < choose(TRACES, Rule()).threshold < float(TRACES.confidence.max())


def quality(outputs: DecodedOutputs, delta: float = 0.05) -> Choice:
    return choose(TRACES, Rule("quality", quality=0.95, delta=delta), outputs)


def test_thresholds_are_lowered_until_too_much_quality_may_be_lost() -> None:
    chooses = ~held_out_of(COUNT)
    outputs = Decoded({0.7: wrong_at(chooses, 0.01), 0.6: wrong_at(chooses, 0.045), 0.5: wrong_at(chooses, 0.0)})
    choice = quality(outputs)
    # 4.5 % are wrong at 0.6, which does not show that fewer than 5 % are; what passes below it does not count.
    assert choice.threshold == 0.7
    assert choice.quality == {0.7: 1.0}
    assert 0.5 not in outputs.asked
    assert choice.notes[0].startswith("100.00% of the full model's exact is kept on 100 sequences")


def test_held_out_sequences_are_reported_and_never_used_to_choose() -> None:
    chooses, unseen = ~held_out_of(COUNT), held_out_of(COUNT)
    outputs = Decoded({0.7: wrong_at(unseen, 0.2), 0.8: wrong_at(unseen, 0.02), 0.6: wrong_at(chooses, 0.5)})
    choice = quality(outputs)
    assert choice.threshold == 0.7
    assert choice.quality == {0.7: pytest.approx(0.8)}
    assert "less than the 0.95 asked for" in choice.notes[0]


def test_requested_quality_is_kept_as_often_as_guaranteed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Populations of scores in mode full and, by threshold, in mode free: calibration sets are drawn from them."""
    monkeypatch.setattr("freeexport.calibrate.threshold.RESAMPLES", 300)
    random, size, delta, target = np.random.default_rng(3), 20_000, 0.1, 0.97
    full = random.beta(4, 2, size)
    hard = random.random(size)
    free = []
    for number in range(12):  # ever more outputs change, most of them little, some altogether
        changed = hard < 0.03 * number
        other = np.where(random.random(size) < 0.4, 0.0, full * random.beta(20, 1, size))
        free.append(np.where(changed, other, full))
    kept = np.array([one.mean() / full.mean() for one in free])
    assert kept[-1] < target < kept[1]
    broken = naive = exits = 0
    for _ in range(200):
        drawn = random.integers(0, size, 200)
        ones = np.ones(len(drawn))
        tables = [np.stack([one[drawn], ones], axis=1) for one in free]
        bounds = (ratio_bound(one, tables[0], np.array([0.0, 1.0]), lambda sums: sums[0] / sums[1], delta)
                  for one in tables)  # fmt: skip
        chosen = -1
        for number, bound in enumerate(bounds):
            if bound < target:
                break
            chosen = number
        broken += chosen >= 0 and kept[chosen] < target
        exits += chosen > 0
        seen = [one[drawn].mean() / full[drawn].mean() for one in free]
        naive += kept[next((n - 1 for n, one in enumerate(seen) if one < target), len(seen) - 1)] < target
    assert broken <= delta * 200
    assert exits > 0.6 * 200  # it is not kept by never exiting
    assert naive > 2 * delta * 200  # what was observed alone breaks it


def test_risk_of_a_metric_is_that_of_the_outputs() -> None:
    options = Rule(method="risk", metric="exact", risk=0.1, delta=0.05)
    outputs = Decoded({0.5: wrong_at(np.ones(COUNT, np.bool_), 0.05), 0.4: wrong_at(np.ones(COUNT, np.bool_), 0.09)})
    choice = choose(TRACES, options, outputs)
    assert choice.threshold == 0.5
    assert choice.quality[0.5] == pytest.approx(0.95)
    assert choice.quality[0.4] == pytest.approx(0.91)  # tried: 9 % of 300 do not show that fewer than 10 % are wrong


@pytest.mark.parametrize("wrong", [{"quality": 0.0}, {"agreement": 1.0}, {"delta": math.nan}])
def test_out_of_range_shares_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="choose a number between 0 and 1"):
        Rule(**wrong)  # type: ignore[arg-type]
