"""A calibration for people: on a terminal, and as a page whose first picture is what exits keep against their speed."""

from __future__ import annotations

from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.measure.table import Sheet, render, terminal
from freeexport.system.machine import Machine, detect_machine
from freeexport.system.output import check_output, output_directory
from freeexport.system.page import filled, pairs, table
from runtime.bundle.beta import NEVER_EXIT

if TYPE_CHECKING:
    from rich.table import Table

    from freeexport.measure.calibrate import Calibrated, Comparison
    from runtime.bundle.calibration import Calibration

INDEX, DATA, TRADE, MIXTURE = "index.html", "calibration.json", "speed.png", "mixture.png"
_COLUMNS = ("threshold#", "exits#", "agree#", "quality#", "predicted#", "measured#", "")
_EXPLAINED = {
    TRADE: "Each point is a threshold: the share of tokens, or of the full model's quality, that it keeps, and its "
    "speed as a multiple of mode full. Exits pay to the right of 1.0.",
    MIXTURE: "Above: the confidences of tokens at which both decoders agree, and of those at which they do not, with "
    "the fitted densities. Below: the chance that a token agrees, by its confidence, as fitted and as seen.",
}


def tables(result: Calibrated) -> list[Table]:
    """Thresholds, and what the chosen one rests on; the verdict is not among them."""
    return [terminal(threshold_table(result.calibration)), pairs("Calibration", found(result))]


def calibration_tables(calibration: Calibration) -> list[Table]:
    """The calibration that a file or a bundle records."""
    return [pairs("Calibration", recorded(calibration)), terminal(threshold_table(calibration))]


def comparison_tables(compared: Comparison) -> list[Table]:
    """A line a bundle, where several were compared."""
    rows = []
    for number, one in enumerate(compared.results):
        chosen = next(row for row in one.calibration.table if row.threshold == one.calibration.threshold)
        full, exits = one.speeds or (None, None)
        rows.append(
            (
                one.facts.path,
                str(one.facts.exit_layer),
                "never" if one.calibration.threshold >= NEVER_EXIT else f"{one.calibration.threshold:.4g}",
                "" if one.calibration.max_pending is None else str(one.calibration.max_pending),
                f"{one.chosen.exit_rate:.1%}",
                "" if chosen.quality is None else f"{chosen.quality:.2%}",
                "" if full is None else f"{full:.0f}",
                "" if exits is None else f"{exits:.0f}",
                "fastest" if number == compared.best else "",
            )
        )
    columns = ("bundle", "layer#", "threshold#", "rows#", "exits#", "quality#", "full tok/s#", "free tok/s#", "")
    return [table("Bundles", columns, rows)]


def threshold_table(calibration: Calibration) -> Sheet:
    """A row a threshold; what is not known is empty."""
    rows = [
        (
            "never" if row.threshold >= NEVER_EXIT else f"{row.threshold:.4g}",
            f"{row.exit_rate:.1%}",
            "" if row.agreement is None else f"{row.agreement:.1%}",
            "" if row.quality is None else f"{row.quality:.2%}",
            *("" if value is None else f"{value:.2f}x" for value in (row.predicted_speedup, row.measured_speedup)),
            "chosen" if row.threshold == calibration.threshold else "",
        )
        for row in calibration.table
    ]
    columns, filled_rows = filled(_COLUMNS, rows)
    return Sheet("Thresholds", tuple(columns), tuple(map(tuple, filled_rows)))


def recorded(calibration: Calibration) -> list[tuple[str, str]]:
    """The source of the threshold."""
    limit, mixture = calibration.rollback_threshold, calibration.mixture
    rows = [
        ("data", f"{calibration.sequences} sequences, {calibration.positions} tokens that may exit"),
        ("agreement of all tokens", f"{calibration.agreement:.1%}"),
        ("rule", promise(calibration)),
        ("confidence", calibration.confidence),
    ]
    if mixture is not None:
        agree, disagree = mixture.agree, mixture.disagree
        rows.append(("agreeing tokens", f"{mixture.weight_agree:.1%}, Beta({agree.a:.3g}, {agree.b:.3g})"))
        rows.append(("disagreeing tokens", f"Beta({disagree.a:.3g}, {disagree.b:.3g})"))
    return [*rows, ("rollback threshold", "none" if limit is None else f"{limit:.3g} nats")]


def promise(calibration: Calibration) -> str:
    """Describe the threshold by its rule."""
    probability = f"with probability {1 - (calibration.delta or 0):.4g}"
    if calibration.method == "risk":
        return f"risk: loss of a sequence at most {calibration.risk:g} on average, {probability}"
    if calibration.method == "quality":
        certain = "" if calibration.delta is None else f", {probability}"
        return f"quality: at least {calibration.target:.1%} of the full model's{certain}"
    if calibration.method == "paper":
        return f"paper: the likelihood ratio of agreeing tokens is above {calibration.target:g}, without their share"
    if calibration.threshold >= NEVER_EXIT:
        return f"bmm: P(agree | confidence) reaches {calibration.target:g} nowhere"
    return f"bmm: P(agree | confidence) is at least {calibration.target:g} from the threshold on"


def found(result: Calibrated) -> list[tuple[str, str]]:
    """The threshold and what it rests on."""
    costs = "by the sizes of layers and head, not measured"
    if result.costs.measured:
        costs = "measured here" + ("" if result.costs.trusted else f", others kept {result.costs.busy:.1f} cores busy")
    caught = result.caught
    return [
        *recorded(result.calibration),
        *([] if caught is None else [("rollback rejects", f"{caught:.0%} of the exits that disagree")]),
        ("break-even exit rate", "none" if result.break_even is None else f"{result.break_even:.1%}"),
        ("costs", costs),
        *(("note", note) for note in result.notes),
    ]


def check(directory: Path) -> None:
    """Raise, before any long work, what would keep `write` from writing: no matplotlib, or something in the way."""
    import matplotlib  # noqa: F401

    check_output(directory, INDEX, overwrite=True)


def write(result: Calibrated, directory: Path) -> None:
    """Replace a report that stands there, whole or not at all."""
    from freeexport.measure.plot import mixture_figure, trade_figure
    from freeexport.system.page import save_figure

    with output_directory(directory, INDEX, overwrite=True) as partial:
        for name, draw in ((TRADE, trade_figure), (MIXTURE, mixture_figure)):
            save_figure(draw(result), partial / name)
        (partial / DATA).write_text(result.calibration.to_json(), encoding="utf-8")
        text = page(result, detect_machine(), datetime.now().astimezone())
        (partial / INDEX).write_text(text, encoding="utf-8")


def page(result: Calibrated, machine: Machine, made: datetime) -> str:
    """The page as HTML; `machine` is where it was made, and when."""
    from markupsafe import Markup

    counts = ((machine.cores, "cores"), (machine.threads, "threads"))
    named = ", ".join([machine.cpu, *(f"{count} {name}" for count, name in counts if count is not None)])
    pictures = [(Markup(f'<img src="{name}" alt="{escape(text)}">'), text) for name, text in _EXPLAINED.items()]
    follows = "Exits and agreement follow the full model's own output. Speedups are of decoding, over mode full."
    return render(
        f"Calibration of {result.facts.path}",
        f"exit after layer {result.calibration.exit_layer} of {result.facts.layers}, {made:%Y-%m-%d}, {named}",
        verdicts=[result.verdict],
        figures=pictures,
        sheets=[threshold_table(result.calibration)],
        facts=[*found(result), ("thresholds", follows)],
    )
