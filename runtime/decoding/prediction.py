"""What a decoder predicts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Prediction(NamedTuple):
    """For the token after a row: the arg max; `confidence` of the shallow decoder in [0, 1], None where its
    head did not run; `nll` in nats of the token that was drafted there, of the deep decoder; `logits` float32 [V] where
    they were asked for: a view, valid until the same engine's next call."""

    token: int
    confidence: float | None = None
    nll: float | None = None
    logits: np.ndarray | None = None


# Of a row at which the head did not run.
NOTHING = Prediction(-1)
