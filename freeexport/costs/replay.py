"""Sessions that replay scripted exits, to time decoding at a known exit rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime import Session
from runtime.decoding.calls import Prediction
from runtime.decoding.decoder import Decoder
from runtime.decoding.feature_decoder import FeatureDecoder
from runtime.engines.runner import Runner

# Replayed decisions have confidence 0 or 1. Any threshold between them works.
THRESHOLD = 0.5
_DRAWN = 4096


def drawn(rate: float, seed: int) -> list[bool]:
    """Draw independent exits at `rate`."""
    return list(map(bool, np.random.default_rng(seed).random(_DRAWN) < rate))


@dataclass
class Script:
    """Exits to replay, repeated cyclically. Without a trace, predictions are the model's own."""

    trace: Sequence[bool] | None = None


class ReplayDecoder(Decoder):
    """Decoder that replays a script.

    All engines run as usual, so timings are those of such exits.
    """

    def __init__(self, script: Script, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._script = script
        self._decided = 0

    def on_prefill_done(self) -> None:
        self._decided = 0

    def prediction(self) -> Prediction:
        shallow = super().prediction()
        trace = self._script.trace
        if trace is None:
            return shallow
        self._decided += 1
        return shallow._replace(confidence=float(trace[(self._decided - 1) % len(trace)]))


class ReplayFeatureDecoder(ReplayDecoder, FeatureDecoder):
    """Decoder with a separate exit engine that replays a script."""


def _replaying(
    script: Script, *arguments: Any, exit: Runner | None = None, **others: Any
) -> ReplayDecoder:
    if exit is None:
        return ReplayDecoder(script, *arguments, **others)
    return ReplayFeatureDecoder(script, *arguments, exit=exit, **others)


class ReplaySession(Session):
    """Session that replays the exits of `script` in mode free, unless the stack is full.

    It has one slot, no overlap and no prefix cache. Replays work with any threshold in (0, 1).
    """

    def __init__(self, bundle: Path | str, **options: Any) -> None:
        self.script = Script()
        self._decoder_type = partial(_replaying, self.script)
        fixed = {"overlap": False, "slots": 1, "prefix_cache_mb": 0}
        super().__init__(bundle, **{**options, **fixed})

    def __enter__(self) -> ReplaySession:
        return self
