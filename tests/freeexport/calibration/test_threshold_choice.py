from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from traces import mixed, trace

from freeexport.calibration.beta_fit import fit
from freeexport.calibration.choose import choose, held_out_of
from freeexport.calibration.options import CalibrateOptions
from freeexport.calibration.outputs import Outputs
from freeexport.calibration.risk_control import COARSE_THRESHOLDS
from freeexport.traces.trace import Traces
from runtime.errors import OptionError

COUNT = 300
TRACES = mixed(COUNT, 12)


class Decoded(Outputs):
    """Outputs as given: which of them are wrong at each threshold."""

    def __init__(self, wrong: dict[float, np.ndarray]) -> None:
        self._wrong, self._targets = wrong, None
        self.full = ["right"] * COUNT
        self.asked: list[float] = []

    def __len__(self) -> int:
        return COUNT

    def free(self, threshold: float, max_pending: int | None = None) -> list[str]:
        self.asked.append(threshold)
        return ["wrong" if wrong else "right" for wrong in self._wrong.get(threshold, np.zeros(COUNT, np.bool_))]


def wrong_at(part: np.ndarray, share: float) -> np.ndarray:
    """This share of the sequences of a part, the first of them."""
    places = np.flatnonzero(part)
    wrong = np.zeros(COUNT, np.bool_)
    wrong[places[: int(np.ceil(share * len(places)))]] = True
    return wrong


def test_a_threshold_that_no_token_exceeds_is_never() -> None:
    random = np.random.default_rng(128)
    # 26 tokens as an untrained exit has them: few agree, and none is sure. The fit reaches the target only far beyond.
    agrees = np.arange(26) < 9
    confidence = np.where(agrees, random.beta(4, 2, 26), random.beta(2, 4, 26))
    few = Traces.of([trace(confidence.tolist(), agrees.tolist())])
    fitted = fit(few.confidence, few.agrees, 0.99)
    assert confidence.max() < 0.92 < 0.9999 < fitted.threshold < 1
    assert choose(few, CalibrateOptions(target=0.99), None).threshold == 1.0


def test_a_bound_beyond_all_tokens_is_never() -> None:
    # Nothing exits above 0.2 or so, where half of the exits are wrong: the bound holds where there is nothing to lose.
    wrong = Traces.of([trace([0.1, 0.2], [False, False], line) for line in range(1, 101)])
    assert choose(wrong, CalibrateOptions(method="risk"), None).threshold == 1.0


def test_a_threshold_within_the_data_stays() -> None:
    choice = choose(TRACES, CalibrateOptions(target=0.95), None)
    assert 0 < choice.threshold < float(TRACES.confidence.max())


def quality(outputs: Outputs | None, **options: Any) -> Any:
    return choose(TRACES, CalibrateOptions(method="quality", quality=0.95, **options), outputs)


def test_the_quality_goes_down_until_too_much_is_lost() -> None:
    fitted = ~held_out_of(COUNT)
    outputs = Decoded({0.7: wrong_at(fitted, 0.04), 0.6: wrong_at(fitted, 0.06)})
    choice = quality(outputs)
    assert choice.threshold == 0.7
    assert choice.quality == {0.7: 1.0}
    assert 0.5 not in outputs.asked
    assert "100 sequences not used for the choice" in choice.notes[0]


def test_what_fails_on_unseen_sequences_is_given_up_for_the_next_that_does_not() -> None:
    fitted, unseen = ~held_out_of(COUNT), held_out_of(COUNT)
    outputs = Decoded({0.7: wrong_at(unseen, 0.2), 0.8: wrong_at(unseen, 0.02), 0.6: wrong_at(fitted, 0.5)})
    choice = quality(outputs)
    assert choice.threshold == 0.8
    assert choice.quality == {0.7: pytest.approx(0.8), 0.8: pytest.approx(0.98)}


def test_where_nothing_keeps_the_quality_nothing_exits() -> None:
    everything = dict.fromkeys(COARSE_THRESHOLDS[1:], np.ones(COUNT, np.bool_))
    assert quality(Decoded(everything)).threshold == 1.0


def test_the_risk_of_a_metric_is_that_of_the_outputs() -> None:
    options = CalibrateOptions(method="risk", metric="exact", risk=0.1, delta=0.05)
    outputs = Decoded({0.5: wrong_at(np.ones(COUNT, np.bool_), 0.05), 0.4: wrong_at(np.ones(COUNT, np.bool_), 0.09)})
    choice = choose(TRACES, options, outputs)
    assert choice.threshold == 0.5
    assert choice.quality[0.5] == pytest.approx(0.95)
    assert choice.quality[0.4] == pytest.approx(0.91)  # tried: 9 % of 300 do not show that fewer than 10 % are wrong


def test_a_metric_without_engines_is_refused() -> None:
    with pytest.raises(OptionError, match="needs a bundle"):
        quality(None)


def test_every_third_sequence_is_held_out() -> None:
    assert held_out_of(7).tolist() == [False, False, True, False, False, True, False]
