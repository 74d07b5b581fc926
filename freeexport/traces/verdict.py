"""Whether an exit pays, why, and what to do next: the one voice of convert, calibrate, evaluate-exits and inspect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from freeexport.traces.share import Share
from runtime.bundle.calibration import Calibration

Level = Literal["good", "neutral", "bad"]
# What a predicted speedup rests on: engine times of this or the bundle's machine, the sizes of layers and head, times
# taken beside other work, or nothing.
Basis = Literal["measured", "sizes", "busy", "unknown"]
# An exit that nobody trained and that agrees less often than this will write poor text.
FAIR_AGREEMENT = 0.8

MACHINE_BUSY = "not measured: machine busy"


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
    """What is known of an exit. None is not known.

    `name` is what commands call the bundle, or the `checkpoint`. `trained`: whether that was trained for this exit.
    `threshold`: as calibrated, None where it was not; 1.0 is never to exit, `why_never` then says why. `agreement`: of
    the tokens at which the shallow prediction is the deep one. `exit_rate` and `exit_agreement` (of those that exit)
    are those at the threshold, and so are `speedup`, predicted, over mode full, which rests on `basis`, and `measured`,
    where that was decoded. `break_even`: the exit rate from which on exits pay; None where they never do, or where
    `basis` says that nothing is known.
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
    checkpoint: bool = False

    @property
    def timed(self) -> bool:
        return self.basis in ("measured", "sizes")

    @property
    def untrained(self) -> bool:
        """Nobody trained this exit, and it does not agree as if somebody had."""
        fair = self.agreement is not None and self.agreement.value >= FAIR_AGREEMENT
        return self.trained is False and not fair

    @property
    def where(self) -> str:
        return f"the exit after layer {self.exit_layer} of {self.layers}"


def why_never(calibration: Calibration) -> str:
    """Why a calibration has no threshold below 1."""
    if calibration.method == "risk":
        return f"no threshold keeps the risk at {calibration.risk:g} with the sequences given"
    if calibration.method == "quality":
        return f"no threshold keeps {calibration.target:.1%} of the full model's quality"
    if calibration.agreement == 0:
        return "no token agrees"
    return f"there is no confidence from which {calibration.target:g} of the tokens agree"


def verdict(facts: ExitFacts) -> Verdict:
    """The verdict on an exit: "good" pays, "bad" does not, "neutral" cannot be said yet."""
    if facts.threshold is None:
        return _uncalibrated(facts)
    if facts.threshold >= 1.0:
        return _never(facts)
    speedup = facts.speedup if facts.measured is None and facts.timed else facts.measured
    if speedup is None:
        return Verdict("neutral", f"{_rates(facts)}; speed {_no_speed(facts)}", _measure_again(facts))
    return _calibrated(facts, speedup)


def _uncalibrated(facts: ExitFacts) -> Verdict:
    if facts.untrained:
        return Verdict(
            "bad",
            f"does not pay: {facts.where} is untrained{_agreeing(facts)}, so early tokens will be poor",
            _train_or_lossless(),
        )
    calibrate = f"freeexport calibrate {facts.name} --data FILE"
    if facts.timed and facts.break_even is None:
        return Verdict(
            "bad",
            f"does not pay: {facts.where} {_saves_nothing(facts)}",
            "compare layers (freeexport evaluate-exits), convert with another --exit-layer",
        )
    if facts.timed:
        even = f"exits pay {_by(facts)} once {facts.break_even:.1%} of the tokens exit"
        return Verdict("neutral", f"not calibrated, so nothing exits yet; {even}", calibrate)
    idle = ", on an idle machine" if facts.basis == "busy" else ""
    return Verdict("neutral", f"not calibrated, so nothing exits yet; speed {_no_speed(facts)}", calibrate + idle)


def _never(facts: ExitFacts) -> Verdict:
    why = facts.why_never or "no threshold meets the target"
    if facts.untrained:
        untrained = f"does not pay: {facts.where} is untrained{_agreeing(facts)} and never exits: {why}"
        return Verdict("bad", untrained, _train_or_lossless())
    next_step = "give more data, ask for less (--agreement), train the exit (freeexport train), or use mode lossless"
    return Verdict("bad", f"does not pay: {facts.where} never exits: {why}", next_step)


def _calibrated(facts: ExitFacts, speedup: float) -> Verdict:
    rates, gain, even = _rates(facts), _gain(facts), facts.break_even
    if facts.measured is None and even is None:
        next_step = "exit after another layer (freeexport evaluate-exits), or use mode full"
        return Verdict("bad", f"does not pay: {rates}; it {_saves_nothing(facts)}", next_step)
    if speedup <= 1:
        needed = "" if even is None else f"; exits pay once {even:.1%} of the tokens exit"
        next_step = "train the exit (freeexport train), ask for less (--agreement), or use mode full"
        return Verdict("bad", f"does not pay: {gain}; {rates}{needed}", next_step)
    low = None if facts.exit_rate is None else facts.exit_rate.low
    if facts.measured is None and low is not None and even is not None and low < even:
        few = f"the data are too few to tell this from the {even:.1%} of exits at which exits begin to pay"
        return Verdict("neutral", f"may pay: {gain}; {rates}; {few}", "give more data")
    if facts.checkpoint:
        convert = f"freeexport convert {facts.name} OUT --exit-layer {facts.exit_layer}, then calibrate the bundle"
        return Verdict("good", f"pays: {gain}; {rates}", convert)
    return Verdict("good", f"pays: {gain}; {rates}", f"freeexport bench {facts.name} --threshold {facts.threshold:.4g}")


def _gain(facts: ExitFacts) -> str:
    predicted = None if facts.speedup is None or not facts.timed else f"{facts.speedup:.2f}x"
    if facts.measured is None:
        return f"{predicted} the speed of mode full, predicted {_by(facts)}"
    also = "" if predicted is None else f" ({predicted} predicted {_by(facts)})"
    return f"{facts.measured:.2f}x the speed of mode full, measured{also}"


def _agreeing(facts: ExitFacts) -> str:
    if facts.agreement is None:
        return ""
    return f" (shallow and deep prediction agree at {facts.agreement} of the model's own tokens)"


def _rates(facts: ExitFacts) -> str:
    """What exits at the threshold."""
    above = f"above threshold {facts.threshold:.4g}" if facts.threshold is not None else "at its threshold"
    exits = "tokens exit" if facts.exit_rate is None else f"{facts.exit_rate} of {facts.exit_rate.count} tokens exit"
    agree = "" if facts.exit_agreement is None else f", {facts.exit_agreement} of them agree with the full model"
    return f"{facts.where}: {above} {exits}{agree}"


def _saves_nothing(facts: ExitFacts) -> str:
    return f"saves nothing even if every token exited, {_by(facts)}"


def _by(facts: ExitFacts) -> str:
    return "by the sizes of layers and head" if facts.basis == "sizes" else "by the engines' measured times"


def _no_speed(facts: ExitFacts) -> str:
    return MACHINE_BUSY if facts.basis == "busy" else "not measured"


def _measure_again(facts: ExitFacts) -> str:
    return f"freeexport calibrate {facts.name} --data FILE, on an idle machine"


def _train_or_lossless() -> str:
    return "train it (freeexport train), or use mode lossless, whose text is the full model's"
