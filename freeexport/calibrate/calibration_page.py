"""Tables of a calibration for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from freeexport.costs.verdict import basis_of, break_even_text
from freeexport.system.page import filled, pairs
from freeexport.system.sheet import Sheet, terminal
from runtime.bundle.beta import NEVER_EXIT

if TYPE_CHECKING:
    from rich.table import Table

    from freeexport.calibrate.calibrate import Calibrated
    from runtime.bundle.calibration import Calibration

_COLUMNS = ("threshold#", "exits#", "agree#", "quality#", "predicted#", "measured#", "")


def tables(result: Calibrated) -> list[Table]:
    """Return the tables of a new calibration, without its verdict."""
    return [terminal(threshold_table(result.calibration)), pairs("Calibration", found(result))]


def calibration_tables(calibration: Calibration) -> list[Table]:
    """Return the tables of a recorded calibration."""
    return [pairs("Calibration", recorded(calibration)), terminal(threshold_table(calibration))]


def threshold_table(calibration: Calibration) -> Sheet:
    """Return a row per threshold. Unknown values are empty."""
    rows = [
        (
            "never" if row.threshold >= NEVER_EXIT else f"{row.threshold:.4g}",
            f"{row.exit_rate:.1%}",
            "" if row.agreement is None else f"{row.agreement:.1%}",
            "" if row.quality is None else f"{row.quality:.2%}",
            *(
                "" if value is None else f"{value:.2f}x"
                for value in (row.predicted_speedup, row.measured_speedup)
            ),
            "chosen" if row.threshold == calibration.threshold else "",
        )
        for row in calibration.table
    ]
    columns, filled_rows = filled(_COLUMNS, rows)
    return Sheet("Thresholds", tuple(columns), tuple(map(tuple, filled_rows)))


def recorded(calibration: Calibration) -> list[tuple[str, str]]:
    """Return names and values of the facts that a calibration records."""
    limit = calibration.rollback_threshold
    mixture = calibration.mixture
    rows = [
        (
            "data",
            f"{calibration.sequences} sequences, {calibration.positions} tokens that may exit",
        ),
        ("agreement of all tokens", f"{calibration.agreement:.1%}"),
        ("rule", promise(calibration)),
        ("confidence", calibration.confidence),
    ]
    if mixture is not None:
        agree = mixture.agree
        disagree = mixture.disagree
        rows.append(
            ("agreeing tokens", f"{mixture.weight_agree:.1%}, Beta({agree.a:.3g}, {agree.b:.3g})")
        )
        rows.append(("disagreeing tokens", f"Beta({disagree.a:.3g}, {disagree.b:.3g})"))
    return [*rows, ("rollback threshold", "none" if limit is None else f"{limit:.3g} nats")]


def promise(calibration: Calibration) -> str:
    """Describe what the rule promises for the threshold."""
    probability = f"with probability {1 - (calibration.delta or 0):.4g}"
    if calibration.method == "risk":
        return f"risk: loss of a sequence at most {calibration.risk:g} on average, {probability}"
    if calibration.method == "quality":
        certain = "" if calibration.delta is None else f", {probability}"
        return f"quality: at least {calibration.target:.1%} of the full model's{certain}"
    if calibration.method == "paper":
        return (
            "paper: the likelihood ratio of agreeing tokens is above "
            f"{calibration.target:g}, without their share"
        )
    if calibration.threshold >= NEVER_EXIT:
        return f"bmm: P(agree | confidence) reaches {calibration.target:g} nowhere"
    return f"bmm: P(agree | confidence) is at least {calibration.target:g} from the threshold on"


def found(result: Calibrated) -> list[tuple[str, str]]:
    """Return names and values of the facts of a new calibration."""
    caught = result.caught
    return [
        *recorded(result.calibration),
        *(
            []
            if caught is None
            else [("rollback rejects", f"{caught:.0%} of the exits that disagree")]
        ),
        ("break-even", f"the exit {break_even_text(result.break_even, basis_of(result.costs))}"),
        *(("note", note) for note in result.notes),
    ]
