"""What decoding costs a token: engine calls and what is outside them, for prompts and lengths like those given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from freeexport.cost import Costs, measure
from freeexport.exit_replay import StepOverhead
from runtime import Session
from runtime.options import Mode

# Prompts decoded to see what a token spends outside the engines.
PROMPTS = 8


@dataclass(frozen=True)
class DecodeCosts:
    """In seconds where `measured`, on this machine; else in bytes of weights."""

    costs: Costs
    overhead: StepOverhead = field(default_factory=StepOverhead)
    measured: bool = True

    def as_dict(self, max_pending: int) -> dict[str, float]:
        """Milliseconds and predictions, as a manifest has them; empty where not measured."""
        if not self.measured:
            return {}
        outside = {"outside_full_ms": 1e3 * self.overhead.full, "outside_free_ms": 1e3 * self.overhead.free}
        return {**self.costs.as_manifest(max_pending), **outside}


def measured_costs(session: Session, prompts: Sequence[np.ndarray], tokens: int) -> DecodeCosts:
    """Time a session that nothing else uses, at the middle of sequences of `tokens` after the median prompt."""
    typical = sorted(prompts, key=len)[len(prompts) // 2]
    read = 1 if session.manifest.encoder_decoder else len(typical)
    costs = measure(session, context=read + tokens // 2, prompt=typical)
    few = prompts[:PROMPTS]
    overhead = StepOverhead(_outside(session, few, tokens, "full", 1.0), _outside(session, few, tokens, "free", 0.5))
    return DecodeCosts(costs, overhead)


def _outside(session: Session, prompts: Sequence[np.ndarray], tokens: int, mode: Mode, threshold: float) -> float:
    """Seconds a token outside the engines, the median over prompts."""
    spent = []
    for prompt in prompts:
        stats = session.generate(
            prompt, mode=mode, threshold=threshold, max_new_tokens=max(2, tokens), ignore_eos=True
        ).stats
        spent.append(max(0.0, stats.overhead_seconds) / stats.tokens)
    return median(spent)
