"""The Beta mixture of labelled confidences by maximum likelihood, and the confidence from which it reaches a target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runtime.bundle.beta import UNIFORM, LogSums, most_likely
from runtime.bundle.beta_mixture import NEVER_EXIT, BetaMixture, threshold_at
from runtime.errors import CalibrationError

# The likelihood is concave, and Newton steps find its top from anywhere in a few dozen.
STEPS = 200
# A token that disagrees is expected once in three times its number at most, with 95 % probability, where none did.
RULE_OF_THREE = 3.0


@dataclass(frozen=True)
class Fit:
    """`mixture` is None where a class is missing; `note` says in a sentence what the user should know, or is ""."""

    threshold: float
    mixture: BetaMixture | None
    note: str = ""


def fit(confidence: np.ndarray, agrees: np.ndarray, target: float) -> Fit:
    """The threshold from which P(agree | confidence) is at least `target`, in (0, 1), on tokens [n].

    Raises CalibrationError for confidences that are not in [0, 1].
    """
    check_confidences(confidence)
    agreeing, disagreeing = confidence[agrees], confidence[~agrees]
    if not len(agreeing):
        return Fit(NEVER_EXIT, None, f"none of the {len(agrees)} tokens agrees: the exit cannot be used")
    if not len(disagreeing):
        return _without_disagreeing(confidence, target)
    agree, disagree = (most_likely(LogSums.of(one), UNIFORM, STEPS) for one in (agreeing, disagreeing))
    mixture = BetaMixture(agree, disagree, len(agreeing) / len(agrees))
    few = min(len(agreeing), len(disagreeing))
    which = "agreeing" if len(agreeing) <= len(disagreeing) else "disagreeing"
    note = f"only {few} {which} tokens: their distribution is rough; give more samples" if few < 30 else ""
    return Fit(threshold_at(mixture, target), mixture, note)


def check_confidences(confidence: np.ndarray) -> None:
    """Raises CalibrationError."""
    wrong = int(np.sum(~((confidence >= 0) & (confidence <= 1))))  # NaN too
    if wrong:
        raise CalibrationError(
            f"{wrong} of {len(confidence)} confidences are not numbers from 0 to 1: the model computes NaN or "
            "infinity; check it with freeexport verify"
        )


def _without_disagreeing(confidence: np.ndarray, target: float) -> Fit:
    count = len(confidence)
    share = RULE_OF_THREE / count
    if share > 1 - target:
        needed = math.ceil(RULE_OF_THREE / (1 - target))
        return Fit(NEVER_EXIT, None, f"all {count} tokens agree, which are too few to trust; give {needed} or more")
    # Below the smallest confidence nothing is known.
    lowest = max(0.0, math.nextafter(float(np.min(confidence)), 0.0))
    note = f"all {count} tokens agree, so the threshold is the smallest confidence among them, not a fit"
    return Fit(lowest, None, note)
