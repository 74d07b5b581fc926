"""Verdicts: sentences on what pays, why, and what to do next.

The commands train, fit, convert, calibrate and inspect print those on exits. evaluate and fit
print those on settings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal

from freeexport.checkpoints.ready_made import recorded_results
from freeexport.costs.bytes import known_costs
from freeexport.costs.intervals import Share, recorded_share
from freeexport.task_metrics import Metric
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import Calibration
from runtime.bundle.costs import MAX_PENDING, Costs
from runtime.bundle.manifest import DraftGain, Manifest

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
# Fewest lines for a winner. With fewer, intervals are too wide and too uncertain themselves.
MIN_LINES = 100
# Methods that generate the full model's tokens.
LOSSLESS = ("lookup", "phrases", "exit-drafts", "lossless")
# A row of an evaluation (freeexport/evaluate/scores.py), or of a measurement of speed.
Row = dict[str, Any]


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


def break_even_text(even: float | None, basis: Basis, max_speed: float | None = None) -> str:
    """Describe the exit rate from which exits pay, None for never, and the most they can gain."""
    reached = "" if max_speed is None else f", {max_speed:.2f}x if all did"
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


def trained_verdict(costs: Costs, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Describe the possible speedup of a trained exit.

    Args:
        before: Evaluation before the training. Empty if unknown.
        after: Evaluation of the weights that are kept.
    """
    exit_rate = after["eval_oracle_exits"]
    names = ("eval_oracle_exits", "eval_agreement")
    if before and all(after[name] <= before[name] for name in names):
        return "training made no better exit; train longer, or with another --learning-rate"
    speed = costs.speedup(exit_rate, MAX_PENDING)
    even = costs.break_even(MAX_PENDING)
    text = break_even_text(even, basis_of(costs))
    if speed >= PAYS:
        return f"the exit can pay: up to {speed:.2f}x; it {text}; calibrate to find out"
    if even is None:
        return f"the exit cannot pay: it {text}; {EARLIER}"
    return (
        f"the exit does not pay yet: {exit_rate:.1%} of the tokens could exit, and it {text}; "
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
    max_pending = calibration.max_pending or manifest.max_pending
    # The calibration's replay if it used these costs, or else an estimate from the exit rate.
    speedup = row.predicted_speedup if costs is calibration.costs else None
    speedup = costs.speedup(row.exit_rate, max_pending) if speedup is None else speedup
    return replace(facts, break_even=costs.break_even(max_pending), speedup=speedup)


def too_few_lines(score: Row, lines: int, metric: Metric, quality: float) -> str:
    """Explain why a score cannot tell whether a setting keeps `quality` of it. "" if it can.

    It cannot if the full model's score rests on so few lines that one of them is worth more than
    the share that may be lost.
    """
    lost = 1 - quality
    if score["support"] * lost >= 1:
        return ""
    return (
        f"{metric.label} of the full model rests on {score['support']:.0f} of {lines} lines, too "
        f"few to see a loss of {100 * lost:.3g} %; give more lines, or another metric"
    )


def keeps(row: Row, metric: Metric, quality: float) -> bool:
    """Return True if a setting surely keeps the share `quality` of the full model's score.

    It does if it generates the full model's tokens, or if the lower bound of its relative score
    reaches `quality`.
    """
    score = row["scores"][metric.name]
    if score["low"] is None:
        return False
    if row["method"] in LOSSLESS and row["same"] == 1:
        return True
    return bool(score["low"] >= quality) and not too_few_lines(score, row["lines"], metric, quality)


def fastest(rows: Iterable[Row], metric: Metric, quality: float) -> Row | None:
    """Return the row with the highest lower bound of its speed, except full.

    It must keep `quality`. None without such a row, or with fewer than MIN_LINES lines.
    """
    enough = [row for row in rows if row["method"] != "full" and row["lines"] >= MIN_LINES]
    good = [row for row in enough if keeps(row, metric, quality)]
    return max(good, key=lambda row: row["request_low"] or 0.0, default=None)


def setting_verdicts(rows: Sequence[Row], metric: Metric, quality: float) -> list[str]:
    """Return a sentence for each bundle that recommends a setting, with its uncertainty."""
    made = []
    bundles = dict.fromkeys(row["bundle"] for row in rows)
    for bundle in bundles:
        some = [row for row in rows if row["bundle"] == bundle and row["method"] != "full"]
        if some:
            made.append(
                (f"{bundle}: " if len(bundles) > 1 else "")
                + _setting_verdict(some, metric, quality)
            )
    return made


def _setting_verdict(rows: Sequence[Row], metric: Metric, quality: float) -> str:
    lines = rows[0]["lines"]
    wanted = f"{100 * quality:.4g} % of full's {metric.label}"
    if lines < MIN_LINES:
        return (
            f"no winner: {lines} lines are too few to tell settings apart; give {MIN_LINES} or more"
        )
    too_few = too_few_lines(rows[0]["scores"][metric.name], lines, metric, quality)
    best = fastest(rows, metric, quality)
    if best is None:
        if too_few:
            return f"no verdict: {too_few}"
        return f"no setting keeps {wanted} by the lower bound of its interval: use full or lossless"
    name, speed, low, high = (
        best[field] for field in ("setting", "request_speed", "request_low", "request_high")
    )
    bounds = f"{speed:.2f}x (95 %: {low:.2f} to {high:.2f})"
    scope = "with full's tokens" if too_few else f"that keeps {wanted}"
    others = f"; no verdict on the others: {too_few}" if too_few else ""
    if low <= 1:
        return f"no setting {scope} is surely faster than full: {name} has {bounds}{others}"
    kept, low_share, high_share = (
        100 * best["scores"][metric.name][field] for field in ("relative", "low", "high")
    )
    shares = "" if too_few else f" at {kept:.1f} % ({low_share:.1f} to {high_share:.1f})"
    return f"{name} is the fastest {scope}: {bounds} the speed of full{shares}{others}"


def speed_verdict(rows: Sequence[Row], usable: Collection[str]) -> str:
    """Name the fastest of the `usable` rows that beats the first row in every round.

    Rows are ranked by their lowest ratio over rounds. "" if there is nothing to compare.
    """
    others = (row for row in rows[1:] if row["name"] in usable)
    best = max(others, key=itemgetter("ratio_low"), default=None)
    if best is None:
        return ""
    if best["ratio_low"] <= 1:
        return f"nothing is faster than {rows[0]['name']} in every round"
    by = f"{best['ratio']:.2f}x ({best['ratio_low']:.2f} to {best['ratio_high']:.2f} by round)"
    same = ""
    if best["agreement"] is not None:
        same = f"; {best['agreement']:.0%} of its tokens are the same"
    return f"{best['name']} is the fastest: {by} the speed of {rows[0]['name']}{same}"
