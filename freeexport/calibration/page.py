"""A calibration on a terminal: the table of thresholds, and what it comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freeexport.system.page import pairs, table
from freeexport.traces.verdict import MACHINE_BUSY
from runtime.bundle.beta_mixture import NEVER_EXIT, BetaMixture

if TYPE_CHECKING:
    from rich.table import Table

    from freeexport.calibration.calibrate import Calibrated
    from runtime.bundle.calibration import Calibration, TableRow

COLUMNS = ("threshold", "exits", "agree", "quality", "predicted", "measured")


def tables(result: Calibrated) -> list[Table]:
    """The page: thresholds, and the summary with the advice."""
    return [threshold_table(result.calibration), pairs("Calibration", summary(result))]


def calibration_tables(calibration: Calibration) -> list[Table]:
    """What a file or a bundle records of its calibration."""
    return [pairs("Calibration", recorded(calibration)), threshold_table(calibration)]


def threshold_table(calibration: Calibration) -> Table:
    chosen = calibration.threshold
    rows = [(*row_cells(row), "chosen" if row.threshold == chosen else "") for row in calibration.table]
    # What is known of no threshold has no column.
    used = [number for number in range(len(COLUMNS) + 1) if any(row[number] for row in rows)]
    columns = (*(f"{name}#" for name in COLUMNS), "")
    return table("Thresholds", [columns[number] for number in used], [[row[n] for n in used] for row in rows])


def row_cells(row: TableRow) -> tuple[str, ...]:
    """As COLUMNS name them; what is not known is empty."""
    return (
        "never" if row.threshold >= NEVER_EXIT else f"{row.threshold:.4g}",
        f"{row.exit_rate:.1%}",
        "" if row.agreement is None else f"{row.agreement:.1%}",
        "" if row.quality is None else f"{row.quality:.2%}",
        speedup(row.predicted_speedup),
        speedup(row.measured_speedup),
    )


def speedup(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def recorded(calibration: Calibration) -> list[tuple[str, str]]:
    """Where the threshold comes from."""
    limit = calibration.rollback_threshold
    return [
        ("data", f"{calibration.sequences} sequences, {calibration.positions} tokens after the first of each"),
        ("agreement of all tokens", f"{calibration.agreement:.1%}"),
        ("method", promise(calibration)),
        ("confidence", calibration.confidence),
        *([] if calibration.mixture is None else mixture_rows(calibration.mixture)),
        ("rollback threshold", "none" if limit is None else f"{limit:.3g} nats"),
    ]


def summary(result: Calibrated) -> list[tuple[str, str]]:
    # scipy, which a page about a bundle does without.
    from freeexport.calibration.calibrate import verdict_of

    verdict = verdict_of(result)
    return [
        *found(result),
        ("verdict", verdict.text),
        *([("next step", verdict.next_step)] if verdict.next_step else []),
        *[("note", note) for note in result.notes],
    ]


def found(result: Calibrated) -> list[tuple[str, str]]:
    """The threshold and what it rests on, without the verdict."""
    even = "none: exits do not pay" if result.break_even is None else f"{result.break_even:.1%}"
    if not result.costs.trusted:
        even = MACHINE_BUSY
    taken = [] if result.caught is None else [("rollback rejects", f"{result.caught:.0%} of the exits that disagree")]
    return [
        *recorded(result.calibration),
        *taken,
        ("break-even exit rate", even),
        ("costs", _costs(result)),
    ]


def _costs(result: Calibrated) -> str:
    if not result.costs.measured:
        return "by the sizes of layers and head, not measured"
    return "measured here" if result.costs.trusted else MACHINE_BUSY


def promise(calibration: Calibration) -> str:
    """What the method says about its threshold."""
    if calibration.method == "risk":
        kept = f"with probability {1 - (calibration.delta or 0):.0%}"
        return f"risk: loss of a sequence at most {calibration.risk:g} on average, {kept}"
    if calibration.method == "quality":
        return f"quality: at least {calibration.target:.1%} of the full model's, on sequences not used for the choice"
    if calibration.threshold >= NEVER_EXIT:
        return f"bmm: P(agree | confidence) reaches {calibration.target:g} nowhere"
    return f"bmm: P(agree | confidence) is at least {calibration.target:g} from the threshold on"


def mixture_rows(mixture: BetaMixture) -> list[tuple[str, str]]:
    return [
        ("agreeing tokens", f"{mixture.weight_agree:.1%}, Beta({mixture.agree.a:.3g}, {mixture.agree.b:.3g})"),
        ("disagreeing tokens", f"Beta({mixture.disagree.a:.3g}, {mixture.disagree.b:.3g})"),
    ]
