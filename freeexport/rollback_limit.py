"""The deep cross-entropy above which mode rollback should take an exited token back."""

from __future__ import annotations

import numpy as np

from freeexport.trace import Traces

# So many of the exits that agree stay. Taking one back costs time only: the deep decoder chooses the same token again.
KEPT = 0.99


def rollback_limit(traces: Traces, threshold: float) -> float | None:
    """Nats: the 99 % quantile among exited tokens that agree; None where there is none."""
    agreeing = traces.nll[(traces.confidence.astype(np.float64) > threshold) & traces.agrees]
    return float(np.quantile(agreeing, KEPT)) if len(agreeing) else None


def caught(traces: Traces, threshold: float, limit: float) -> float | None:
    """The share of exited tokens that disagree which `limit` takes back; None where none disagrees."""
    wrong = traces.nll[(traces.confidence.astype(np.float64) > threshold) & ~traces.agrees]
    return float(np.mean(wrong > limit)) if len(wrong) else None
