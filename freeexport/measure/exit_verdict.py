"""Whether an exit pays, why, and what to do next, as convert, calibrate and inspect say it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import Calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import Manifest

# Standard deviations of a 95 % interval.
Z = 1.96
# An exit that nobody trained and that agrees less often than this will write poor text.
FAIR_AGREEMENT = 0.8

Level = Literal["good", "neutral", "bad"]
# What a predicted speedup rests on: times of the engines, times taken while other work kept the machine busy, or
# nothing.
Basis = Literal["measured", "busy", "unknown"]
_BASES = {
    "measured": "by the engines' measured times",
    "busy": "by times taken on a busy machine",
    "unknown": "",
}


@dataclass(frozen=True)
class Share:
    """`value`: the share of `count` tokens, with its 95 % interval from `low` to `high`, all in [0, 1]; both None where
    nothing is known of the sequences."""

    value: float
    count: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.1%}"
        return f"{self.value:.1%} (95% interval {self.low:.1%} to {self.high:.1%})"


def share(hits: Sequence[int] | np.ndarray, counts: Sequence[int] | np.ndarray) -> Share | None:
    """The share of `hits` [n] among `counts` [n] tokens of n sequences; None without tokens.

    Wilson's interval of as many independent tokens as would vary as much as these sequences do: a sequence that is easy
    is easy at all its tokens. One sequence says nothing of others, and its tokens count as independent.
    """
    found, sizes = np.asarray(hits, np.float64), np.asarray(counts, np.float64)
    total, sequences = float(sizes.sum()), int((sizes > 0).sum())
    if not total:
        return None
    value = float(found.sum()) / total
    independent, effect = value * (1 - value) * total, 1.0
    if sequences > 1 and independent > 0:
        clustered = sequences / (sequences - 1) * float(np.square(found - value * sizes).sum())
        effect = max(1.0, clustered / independent)
    return Share(value, int(total), *_wilson(value, total / effect))


def recorded_share(found: Mapping[str, Any]) -> Share | None:
    """A share from what `asdict` gave; None where it is anything else."""
    count = found.get("count")
    shares = [one for one in map(found.get, ("value", "low", "high")) if isinstance(one, float) and 0 <= one <= 1]
    return Share(shares[0], count, *shares[1:]) if isinstance(count, int) and len(shares) == 3 else None


def _wilson(value: float, count: float) -> tuple[float, float]:
    scale = 1 + Z * Z / count
    middle = (value + Z * Z / (2 * count)) / scale
    reach = Z / scale * math.sqrt(value * (1 - value) / count + Z * Z / (4 * count * count))
    # At 0 and at 1 the formula may miss its own value by the last bit.
    return max(0.0, min(middle - reach, value)), min(1.0, max(middle + reach, value))


@dataclass(frozen=True)
class Verdict:
    """`text` is one sentence without a full stop, `next_step` another, or ""."""

    level: Level
    text: str
    next_step: str = ""

    def __str__(self) -> str:
        return f"{self.text}. Next: {self.next_step}" if self.next_step else self.text


@dataclass(frozen=True)
class ExitFacts:
    """Facts of an exit. None is not known.

    `name` is what commands call the bundle; `data` the file that was used. `trained`: whether the
    checkpoint was trained for this exit. `threshold`: as calibrated, None where it was not; 1.0 is never to exit, and
    `why_never` then says why. `agreement`: the share of tokens at which the shallow prediction is the deep one.
    `exit_rate` and `exit_agreement` (of those that exit) are those at the threshold, and so are `speedup`, predicted,
    over mode full, which rests on `basis`, and `measured`, where that was decoded. `break_even`: the exit rate from
    which on exits pay; None where they never do, or where `basis` says that nothing is known. `heavy_head`: the head
    costs more than the shallow layers.
    """

    name: str
    exit_layer: int
    layers: int
    trained: bool | None = None
    threshold: float | None = None
    why_never: str = ""
    agreement: Share | None = None
    exit_rate: Share | None = None
    exit_agreement: Share | None = None
    break_even: float | None = None
    speedup: float | None = None
    measured: float | None = None
    basis: Basis = "unknown"
    heavy_head: bool = False
    data: str = "FILE"

    @property
    def untrained(self) -> bool:
        """Nobody trained this exit, and it does not agree as if somebody had."""
        fair = self.agreement is not None and self.agreement.value >= FAIR_AGREEMENT
        return self.trained is False and not fair


def why_never(calibration: Calibration) -> str:
    """Why a calibration has no threshold below 1."""
    if calibration.method == "risk":
        return f"no threshold keeps the risk at {calibration.risk:g} with the sequences given"
    if calibration.method == "quality":
        return f"no threshold keeps {calibration.target:.1%} of the full model's quality with the sequences given"
    if calibration.agreement == 0:
        return "no token agrees"
    if calibration.method == "paper":
        return "no token is more confident than the grid's threshold"
    return f"there is no confidence from which {calibration.target:g} of the tokens agree"


def verdict(facts: ExitFacts) -> Verdict:
    """The verdict on an exit: "good" pays, "bad" does not, "neutral" cannot be said yet."""
    basis, even = _BASES[facts.basis], facts.break_even
    where = f"the exit after layer {facts.exit_layer} of {facts.layers}"
    calibrate = f"freeexport calibrate {facts.name} --data {facts.data}"
    poor = ""
    if facts.untrained:
        seen = facts.agreement
        known = f" (shallow and deep prediction agree at {seen} of the model's own tokens)" if seen is not None else ""
        poor = f"is untrained{known}"
    saves_nothing = f"saves nothing even if every token exited, {basis}"
    elsewhere = "exit after an earlier layer (--exit-layer)"

    if facts.threshold is None:
        if poor:
            return _bad(facts, f"{where} {poor}, so early tokens will be poor")
        if facts.basis == "unknown":
            return Verdict("neutral", "not calibrated, so nothing exits yet; speed not measured", calibrate)
        if even is None:
            return _bad(facts, f"{where} {saves_nothing}", elsewhere)
        pays = f"exits pay {basis} once {even:.1%} of the tokens exit"
        return Verdict("neutral", f"not calibrated, so nothing exits yet; {pays}", calibrate)
    if facts.threshold >= 1.0:
        never = f"never exits: {facts.why_never or 'no threshold meets the target'}"
        if poor:
            return _bad(facts, f"{where} {poor} and {never}")
        return _bad(facts, f"{where} {never}", "give more data", "ask for less (--agreement)")

    exits = "tokens exit" if facts.exit_rate is None else f"{facts.exit_rate} of {facts.exit_rate.count} tokens exit"
    agree = "" if facts.exit_agreement is None else f", {facts.exit_agreement} of them agree with the full model"
    rates = f"{where}: above threshold {facts.threshold:.4g} {exits}{agree}"
    predicted = None if facts.basis == "unknown" else facts.speedup
    speedup = predicted if facts.measured is None else facts.measured
    if speedup is None:
        return Verdict("neutral", f"{rates}; speed not measured", calibrate)
    if facts.measured is None:
        gain = f"{speedup:.2f}x the speed of mode full, predicted {basis}"
        if even is None:
            return _bad(facts, f"{rates}; it {saves_nothing}", elsewhere)
    else:
        also = "" if predicted is None else f" ({predicted:.2f}x predicted {basis})"
        gain = f"{speedup:.2f}x the speed of mode full, measured{also}"
    if speedup <= 1:
        needed = "" if even is None else f"; exits pay once {even:.1%} of the tokens exit"
        return _bad(facts, f"{gain}; {rates}{needed}", "ask for less (--agreement)")
    low = None if facts.exit_rate is None else facts.exit_rate.low
    if facts.measured is None and low is not None and even is not None and low < even:
        few = f"the data are too few to tell this from the {even:.1%} of exits at which exits begin to pay"
        return Verdict("neutral", f"may pay: {gain}; {rates}; {few}", "give more data")
    if facts.measured is None and facts.basis == "busy":
        return Verdict("neutral", f"may pay: {gain}; {rates}", f"{calibrate}, on an idle machine")
    return Verdict("good", f"pays: {gain}; {rates}", f"freeexport bench {facts.name} --threshold {facts.threshold:.4g}")


def _bad(facts: ExitFacts, why: str, *first: str) -> Verdict:
    """An exit that does not pay, and what to do instead."""
    steps = [*first, "train it for the exit (freeexport train CHECKPOINT OUT)"]
    if facts.heavy_head:
        steps.append("give the exit a smaller head (freeexport train --exit-vocab N), which outweighs its layers")
    steps.append("use mode lossless, whose text is the full model's")
    return Verdict("bad", f"does not pay: {why}", ", ".join(steps[:-1]) + ", or " + steps[-1])


def bundle_verdict(bundle: Bundle) -> Verdict:
    """Whether the exit pays, as far as the bundle knows from its manifest, its calibration and its verification. Shares
    have no interval, as nothing is recorded of sequences."""
    manifest, calibration = bundle.manifest, bundle.calibration
    seen = (bundle.verification or {}).get("exit")
    agreement = seen.get("agreement") if isinstance(seen, Mapping) else None
    facts = ExitFacts(
        name=str(bundle.path),
        exit_layer=manifest.exit_layer,
        layers=manifest.layers,
        trained=manifest.exit_trained,
        # As `freeexport verify` saw it on a few texts.
        agreement=recorded_share(agreement) if isinstance(agreement, Mapping) else None,
        break_even=None if manifest.costs is None else manifest.costs.break_even(manifest.max_pending),
        basis=_basis(manifest.costs),
    )
    if calibration is None:
        # Of a threshold that came without a calibration nothing is known.
        return verdict(replace(facts, threshold=manifest.threshold if manifest.threshold < 1 else None))
    return verdict(_calibrated(facts, manifest, calibration))


def _calibrated(facts: ExitFacts, manifest: Manifest, calibration: Calibration) -> ExitFacts:
    facts = replace(
        facts,
        threshold=calibration.threshold,
        why_never=why_never(calibration),
        agreement=Share(calibration.agreement, calibration.positions),
    )
    row = next((row for row in calibration.table if row.threshold == calibration.threshold), None)
    if row is None:
        return facts
    agreeing = None if row.agreement is None else Share(row.agreement, round(row.exit_rate * calibration.positions))
    rate = Share(row.exit_rate, calibration.positions)
    facts = replace(facts, exit_rate=rate, exit_agreement=agreeing, measured=row.measured_speedup)
    costs = calibration.costs or manifest.costs
    if costs is None:
        return facts
    most = calibration.max_pending or manifest.max_pending
    # Where the engines were not timed at calibration, the table goes by the sizes of layers.
    predicted = row.predicted_speedup if calibration.costs else None
    speedup = costs.speedup(row.exit_rate, most) if predicted is None else predicted
    return replace(facts, break_even=costs.break_even(most), speedup=speedup, basis=_basis(costs))


def _basis(costs: Costs | None) -> Basis:
    if costs is None:
        return "unknown"
    return "measured" if costs.trusted else "busy"
