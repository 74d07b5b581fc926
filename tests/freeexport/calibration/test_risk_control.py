from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from traces import correlated

from freeexport.calibration.risk_control import (
    COARSE_THRESHOLDS,
    THRESHOLDS,
    binomial,
    hoeffding_bentkus,
    lowest_passing,
    p_value,
    sequences_needed,
    token_losses,
)

RISK, DELTA, SETS, SEQUENCES = 0.05, 0.1, 600, 150
GRID = (1.0, *np.linspace(0.995, 0.0, 80).tolist())


def test_thresholds_descend_from_never_to_always() -> None:
    for thresholds in (THRESHOLDS, COARSE_THRESHOLDS):
        assert thresholds[0] == 1.0
        assert thresholds[-1] == 0.0
        assert all(a > b for a, b in pairwise(thresholds))


def test_the_exact_binomial_is_for_losses_of_0_and_1_alone() -> None:
    losses = np.array([True] * 2 + [False] * 98)
    exact = sum(math.comb(100, k) * 0.05**k * 0.95 ** (100 - k) for k in range(3))
    assert p_value(losses, 0.05) == pytest.approx(exact)
    assert p_value(losses, 0.05) == binomial(losses, 0.05)
    assert p_value(losses.astype(float), 0.05) == hoeffding_bentkus(losses.astype(float), 0.05) > exact


def test_a_p_value_is_1_where_the_mean_loss_is_above_the_risk() -> None:
    assert hoeffding_bentkus(np.full(50, 0.2), 0.1) == 1


@pytest.mark.parametrize(("risk", "delta"), [(0.05, 0.05), (0.01, 0.1), (0.3, 0.01)])
def test_as_many_sequences_are_needed_as_can_pass_without_a_loss(risk: float, delta: float) -> None:
    needed = sequences_needed(risk, delta)
    assert hoeffding_bentkus(np.zeros(needed), risk) <= delta
    assert hoeffding_bentkus(np.zeros(needed - 1), risk) > delta


def test_testing_stops_at_the_first_that_fails() -> None:
    asked = []

    def losses(threshold: float) -> np.ndarray:
        asked.append(threshold)
        return np.full(200, 0.9 if threshold == 0.5 else 0.0)

    assert lowest_passing(losses, (1.0, 0.9, 0.7, 0.5, 0.3), 0.05, 0.05) == 0.7
    assert asked == [0.9, 0.7, 0.5]


def test_the_promise_holds_for_tokens_that_depend_on_each_other() -> None:
    """A large set is the population: its mean losses are the true risks, and calibration sets are drawn from it."""
    population = correlated(6000, seed=5)
    assert _correlation(population) >= 0.3
    losses = np.stack([token_losses(population, threshold) for threshold in GRID], axis=1)
    true = losses.mean(axis=0)
    assert true[-1] > 2 * RISK > true[1]  # there is something to get wrong
    tokens = np.array([len(one) for one in population.sequences])
    random = np.random.default_rng(11)
    broken = naive = of_tokens = exits = 0
    for _ in range(SETS):
        drawn = random.integers(0, len(losses), SEQUENCES)
        sample, count = losses[drawn], tokens[drawn]

        def at(threshold: float, sample: np.ndarray = sample) -> np.ndarray:
            return np.asarray(sample[:, GRID.index(threshold)])

        chosen = GRID.index(lowest_passing(at, GRID, RISK, DELTA))
        broken += true[chosen] > RISK
        exits += chosen > 0
        naive += true[np.flatnonzero(sample.mean(axis=0) <= RISK)[-1]] > RISK
        of_tokens += true[_as_if_independent(sample, count)] > RISK
    assert broken <= DELTA * SETS
    assert exits > 0.9 * SETS  # it is not kept by never exiting
    # What the promise is worth: the observed risk alone, and tokens counted as independent, break it.
    assert naive > 2 * DELTA * SETS
    assert of_tokens > DELTA * SETS


def _as_if_independent(sample: np.ndarray, count: np.ndarray) -> int:
    """The same test on tokens instead of sequences: the last of GRID that passes."""
    wrong = np.rint(sample * count[:, None]).sum(axis=0).astype(int)
    total, passing = int(count.sum()), 0
    for index in range(1, len(GRID)):
        if binomial(np.arange(total) < wrong[index], RISK) > DELTA:
            break
        passing = index
    return passing


def _correlation(traces: object) -> float:
    """Intra-class correlation of disagreement, by one-way analysis of variance."""
    groups = [1.0 - one.agrees.astype(float) for one in traces.sequences]  # type: ignore[attr-defined]
    sizes = np.array([len(group) for group in groups])
    overall = np.concatenate(groups).mean()
    between = sum(len(group) * (group.mean() - overall) ** 2 for group in groups) / (len(groups) - 1)
    within = sum(((group - group.mean()) ** 2).sum() for group in groups) / (sizes.sum() - len(groups))
    size = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / (len(groups) - 1)
    return float((between - within) / (between + (size - 1) * within))
