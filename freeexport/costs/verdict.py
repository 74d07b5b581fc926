"""Verdicts on exits: how much faster they decode, why, and what to do next.

The commands train, fit, convert, calibrate and inspect print them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from freeexport.checkpoints.ready_made import recorded_results
from freeexport.costs.bytes import known_costs
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import Calibration
from runtime.bundle.costs import MAX_PENDING, Costs
from runtime.bundle.manifest import DraftGain, Manifest

# Standard deviations of a 95 % interval.
Z = 1.96
# An untrained exit whose agreement is lower generates poor text.
FAIR_AGREEMENT = 0.8
EARLIER = "exit after an earlier layer (--exit-layer)"

Level = Literal["good", "neutral", "bad"]
# Basis of a predicted speedup: timings of the engines on an idle machine, the bytes that they read,
# or none.
Basis = Literal["measured", "bytes", "unknown"]
_BASES = {
    "measured": "by the engines' measured times",
    "bytes": "by the bytes that are read",
    "unknown": "",
}
# Least speedup that is worth training an exit.
PAYS = 1.05


@dataclass(frozen=True)
class Share:
    """A share of tokens, with a 95 % confidence interval.

    Attributes:
        value: The share, in [0, 1].
        count: Number of tokens.
        low: Lower end of the interval. None if unknown.
        high: Upper end of the interval. None if unknown.
    """

    value: float
    count: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.1%}"
        return f"{self.value:.1%} (95% interval {self.low:.1%} to {self.high:.1%})"


def share(hits: Sequence[int] | np.ndarray, counts: Sequence[int] | np.ndarray) -> Share | None:
    """Return the share of `hits` [n] among `counts` [n] tokens of n sequences. None without tokens.

    The interval is Wilson's, with an effective number of tokens: tokens of one sequence are
    correlated, so the number is reduced by the design effect of the sequences. With a single
    sequence, tokens count as independent.
    """
    found = np.asarray(hits, np.float64)
    sizes = np.asarray(counts, np.float64)
    total = float(sizes.sum())
    sequences = int((sizes > 0).sum())
    if not total:
        return None
    value = float(found.sum()) / total
    independent = value * (1 - value) * total
    effect = 1.0
    if sequences > 1 and independent > 0:
        clustered = sequences / (sequences - 1) * float(np.square(found - value * sizes).sum())
        effect = max(1.0, clustered / independent)
    return Share(value, int(total), *_wilson(value, total / effect))


def recorded_share(found: Mapping[str, Any]) -> Share | None:
    """Read a Share from its `asdict` form. None for anything else."""
    count = found.get("count")
    shares = [
        one
        for one in map(found.get, ("value", "low", "high"))
        if isinstance(one, float) and 0 <= one <= 1
    ]
    return (
        Share(shares[0], count, *shares[1:])
        if isinstance(count, int) and len(shares) == 3
        else None
    )


def _wilson(value: float, count: float) -> tuple[float, float]:
    scale = 1 + Z * Z / count
    middle = (value + Z * Z / (2 * count)) / scale
    reach = Z / scale * math.sqrt(value * (1 - value) / count + Z * Z / (4 * count * count))
    # At 0 and 1, rounding may put `value` outside of the interval.
    return max(0.0, min(middle - reach, value)), min(1.0, max(middle + reach, value))


@dataclass(frozen=True)
class Verdict:
    """A verdict on an exit.

    Attributes:
        level: "good" if the exit pays, "bad" if it does not, "neutral" if unknown.
        text: One sentence without a full stop.
        next_step: A sentence on what to do next, or "".
    """

    level: Level
    text: str
    next_step: str = ""

    def __str__(self) -> str:
        return f"{self.text}. Next: {self.next_step}" if self.next_step else self.text


@dataclass(frozen=True)
class ExitFacts:
    """Facts about an exit. None stands for unknown.

    Attributes:
        name: Bundle, as given on the command line.
        trained: The checkpoint was trained for this exit.
        threshold: Calibrated threshold. 1.0 never exits. None if not calibrated.
        why_never: Reason for a threshold of 1.0.
        agreement: Share of tokens whose shallow and deep predictions are equal.
        exit_rate: Share of tokens that exit at the threshold.
        exit_agreement: Agreement of the tokens that exit at the threshold.
        break_even: Exit rate from which exits pay. None if they never do, or if `basis` is unknown.
        speedup: Predicted speedup over mode full at the threshold.
        measured: Measured speedup over mode full at the threshold.
        basis: Basis of `speedup` and `break_even`.
        ready_made: Name of the ready-made exit that the bundle was converted with, or "".
        card: What the file of that exit says about its speed, or "" if unknown.
        gain: Measured speedup of mode lossless over drafts from text alone.
        heavy_head: The head costs more than the shallow layers.
        data: Data file of the calibration.
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
    precision: str = ""
    ready_made: str = ""
    card: str = ""
    gain: DraftGain | None = None
    heavy_head: bool = False
    data: str = "FILE"

    @property
    def untrained(self) -> bool:
        """True if the exit was not trained and its agreement is below FAIR_AGREEMENT."""
        fair = self.agreement is not None and self.agreement.value >= FAIR_AGREEMENT
        return self.trained is False and not fair


def why_never(calibration: Calibration) -> str:
    """Explain why a calibration has no threshold below 1."""
    if calibration.method == "risk":
        return f"no threshold keeps the risk at {calibration.risk:g} with the sequences given"
    if calibration.method == "quality":
        return (
            f"no threshold keeps {calibration.target:.1%} of the full model's quality "
            "with the sequences given"
        )
    if calibration.agreement == 0:
        return "no token agrees"
    if calibration.method == "paper":
        return "no token is more confident than the grid's threshold"
    return f"there is no confidence from which {calibration.target:g} of the tokens agree"


def basis_of(costs: Costs | None) -> Basis:
    """Return the basis of predictions from these costs. Timings of a busy machine are unknown."""
    if costs is None or not costs.trusted:
        return "unknown"
    return "measured" if costs.measured else "bytes"


def break_even_text(even: float | None, basis: Basis, most: float | None = None) -> str:
    """Describe the exit rate from which exits pay, None for never, and the most they can gain."""
    reached = "" if most is None else f", {most:.2f}x if all did"
    more = reached + (f", {_BASES[basis]}" if basis != "unknown" else "")
    if even is None:
        return f"saves nothing even if every token exited{more}"
    return f"pays once {even:.1%} of the tokens exit{more}"


def prospect(costs: Costs, exit_layer: int, layers: int) -> str:
    """Describe the possible speedup of an exit before its training."""
    even = costs.break_even(MAX_PENDING)
    text = break_even_text(even, basis_of(costs), costs.speedup(1.0, MAX_PENDING))
    line = f"the exit after layer {exit_layer} of {layers} {text}"
    return f"warning: {line}; {EARLIER}" if even is None else line


def trained_verdict(costs: Costs, exit_rate: float) -> str:
    """Describe the possible speedup of a trained exit."""
    speed = costs.speedup(exit_rate, MAX_PENDING)
    even = costs.break_even(MAX_PENDING)
    text = break_even_text(even, basis_of(costs))
    if speed >= PAYS:
        return f"can pay: up to {speed:.2f}x; it {text}; calibrate to find out"
    if even is None:
        return f"cannot pay: it {text}; {EARLIER}"
    return (
        f"does not pay yet: {exit_rate:.1%} of the tokens could exit, and it {text}; "
        "train longer, choose a later --exit-layer, or decode in mode lossless"
    )


def verdict(facts: ExitFacts) -> Verdict:
    """Return the verdict on an exit."""
    basis = _BASES[facts.basis]
    even = facts.break_even
    break_even = break_even_text(even, facts.basis)
    where = f"the exit after layer {facts.exit_layer} of {facts.layers}"
    calibrate = f"freeexport calibrate {facts.name} --data {facts.data}"
    poor = ""
    if facts.untrained:
        seen = facts.agreement
        known = (
            f" (shallow and deep prediction agree at {seen} of the model's own tokens)"
            if seen is not None
            else ""
        )
        poor = f"is untrained{known}"

    if facts.threshold is None:
        if poor:
            return _bad(facts, f"{where} {poor}, so early tokens will be poor")
        uncalibrated = "not calibrated, so mode free needs a threshold"
        if facts.gain is not None:
            return _gain_verdict(facts.precision, facts.gain, where, calibrate)
        if facts.ready_made:
            return _unmeasured_verdict(facts, where)
        if facts.basis == "unknown":
            return Verdict("neutral", f"{uncalibrated}; speed not measured", calibrate)
        if even is None:
            return _bad(facts, f"{where} {break_even}", EARLIER)
        return Verdict("neutral", f"{uncalibrated}; {where} {break_even}", calibrate)
    if facts.threshold >= 1.0:
        never = f"never exits: {facts.why_never or 'no threshold meets the target'}"
        if poor:
            return _bad(facts, f"{where} {poor} and {never}")
        return _bad(facts, f"{where} {never}", "give more data", "ask for less (--agreement)")

    exits = (
        "tokens exit"
        if facts.exit_rate is None
        else f"{facts.exit_rate} of {facts.exit_rate.count} tokens exit"
    )
    agree = (
        ""
        if facts.exit_agreement is None
        else f", {facts.exit_agreement} of them agree with the full model"
    )
    rates = f"{where}: above threshold {facts.threshold:.4g} {exits}{agree}"
    predicted = None if facts.basis == "unknown" else facts.speedup
    speedup = predicted if facts.measured is None else facts.measured
    if speedup is None:
        return Verdict("neutral", f"{rates}; speed not measured", calibrate)
    if facts.measured is None:
        gain = f"{speedup:.2f}x the speed of mode full, predicted {basis}"
        if even is None:
            return _bad(facts, f"{rates}; it {break_even}", EARLIER)
    else:
        also = "" if predicted is None else f" ({predicted:.2f}x predicted {basis})"
        gain = f"{speedup:.2f}x the speed of mode full, measured{also}"
    if speedup <= 1:
        needed = "" if even is None else f"; it {break_even}"
        return _bad(facts, f"{gain}; {rates}{needed}", "ask for less (--agreement)")
    low = None if facts.exit_rate is None else facts.exit_rate.low
    if facts.measured is None and low is not None and even is not None and low < even:
        few = (
            f"the data are too few to tell this from the {even:.1%} of exits "
            "at which exits begin to pay"
        )
        return Verdict("neutral", f"may pay: {gain}; {rates}; {few}", "give more data")
    if facts.measured is None and facts.basis == "bytes":
        return Verdict("neutral", f"may pay: {gain}; {rates}", f"{calibrate}, on an idle machine")
    return Verdict("good", f"pays: {gain}; {rates}", f"freeexport evaluate {facts.name}")


def _gain_verdict(precision: str, gain: DraftGain, where: str, calibrate: str) -> Verdict:
    """Return the verdict on an exit that is not calibrated, but whose gain was measured."""
    interval = f"95 %: {gain.low:.2f} to {gain.high:.2f}"
    measured = (
        f"with drafts of {where}, mode lossless is {gain.value:.2f}x ({interval}) as fast as "
        f"without, measured on {gain.prompts} sample prompts"
    )
    if gain.pays:
        return Verdict(
            "good", f"pays at {precision}: {measured}; mode free needs a threshold", calibrate
        )
    return Verdict(
        "bad",
        f"does not pay at {precision}: {measured}, so it is not used by default",
        'compare on your own prompts (drafts="exit"), or convert without the exit',
    )


def _unmeasured_verdict(facts: ExitFacts, where: str) -> Verdict:
    """Return the verdict on a ready-made exit that was not timed here: what its file says."""
    card = facts.card.rstrip(".")
    known = f"the file of exit {facts.ready_made} says: {card}" if card else "its speed is unknown"
    return Verdict(
        "neutral",
        f"not measured whether {where} makes mode lossless faster here; {known}",
        f"compare on your own prompts (freeexport evaluate {facts.name} "
        "--methods full,phrases,lossless), on an idle machine",
    )


def _bad(facts: ExitFacts, why: str, *first: str) -> Verdict:
    """Return the verdict on an exit that does not pay, with `first` before the usual steps."""
    steps = [*first, "train it for the exit (freeexport train CHECKPOINT OUT)"]
    if facts.heavy_head:
        steps.append(
            "give the exit a smaller head (freeexport train --exit-vocab N), "
            "which outweighs its layers"
        )
    steps.append("use mode lossless, whose text is the full model's")
    return Verdict("bad", f"does not pay: {why}", ", ".join(steps[:-1]) + ", or " + steps[-1])


def bundle_verdict(bundle: Bundle) -> Verdict:
    """Return the verdict from a bundle's manifest, calibration and verification.

    Shares of a calibration have no interval, because bundles do not record counts per sequence.
    """
    manifest = bundle.manifest
    calibration = bundle.calibration
    seen = (bundle.verification or {}).get("exit")
    agreement = seen.get("agreement") if isinstance(seen, Mapping) else None
    costs = known_costs(bundle, calibration.costs if calibration else None, manifest.costs)
    applied = manifest.ready_made_exit
    facts = ExitFacts(
        name=str(bundle.path),
        exit_layer=manifest.exit_layer,
        layers=manifest.layers,
        trained=manifest.exit_trained,
        # Measured on a few texts by `freeexport verify`.
        agreement=recorded_share(agreement) if isinstance(agreement, Mapping) else None,
        break_even=None if costs is None else costs.break_even(manifest.max_pending),
        basis=basis_of(costs),
        precision=manifest.precision,
    )
    if applied is not None:
        facts = replace(
            facts, ready_made=applied.name, card=recorded_results(applied), gain=applied.gain
        )
    if calibration is None:
        # A threshold below 1 without a calibration has no known rates.
        return verdict(
            replace(facts, threshold=manifest.threshold if manifest.threshold < 1 else None)
        )
    return verdict(_calibrated(facts, manifest, calibration, costs))


def _calibrated(
    facts: ExitFacts, manifest: Manifest, calibration: Calibration, costs: Costs | None
) -> ExitFacts:
    facts = replace(
        facts,
        threshold=calibration.threshold,
        why_never=why_never(calibration),
        agreement=Share(calibration.agreement, calibration.positions),
    )
    row = next((row for row in calibration.table if row.threshold == calibration.threshold), None)
    if row is None:
        return facts
    agreeing = (
        None
        if row.agreement is None
        else Share(row.agreement, round(row.exit_rate * calibration.positions))
    )
    rate = Share(row.exit_rate, calibration.positions)
    facts = replace(facts, exit_rate=rate, exit_agreement=agreeing, measured=row.measured_speedup)
    if costs is None:
        return facts
    most = calibration.max_pending or manifest.max_pending
    # The calibration's replay if it used these costs, or else an estimate from the exit rate.
    speedup = row.predicted_speedup if costs is calibration.costs else None
    speedup = costs.speedup(row.exit_rate, most) if speedup is None else speedup
    return replace(facts, break_even=costs.break_even(most), speedup=speedup)
