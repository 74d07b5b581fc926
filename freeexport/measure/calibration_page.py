"""A calibration for people: on a terminal, and as a page whose first picture is what exits keep against their speed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from freeexport.system.machine import Machine, detect_machine
from freeexport.system.output import output_directory
from freeexport.system.page import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    filled,
    legend_beside,
    new_figure,
    pairs,
    save_figure,
    table,
)
from runtime.bundle.beta import NEVER_EXIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from freeexport.measure.calibrate import Calibrated, Comparison
    from freeexport.measure.exit_verdict import Level, Verdict
    from runtime.bundle.calibration import Calibration, TableRow

INDEX, DATA, TRADE, MIXTURE = "index.html", "calibration.json", "speed.png", "mixture.png"
_COLUMNS = ("threshold#", "exits#", "agree#", "quality#", "predicted#", "measured#", "")
_EDGES = 41
_STYLE = (
    "body{font-family:sans-serif;max-width:56em;margin:2em auto;padding:0 1em;color:#222}"
    "h1{margin-bottom:.2em}.about{color:#555;margin-top:0}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    ".numbers td,.numbers th{text-align:right}.numbers td:last-child{text-align:left}"
    "figure{margin:1.5em 0}figcaption{color:#555}img{max-width:100%}.chosen{background:#e8f0ff;font-weight:bold}"
    ".verdict{font-size:1.2em;padding:.6em .9em;border-left:.4em solid;border-radius:.2em}.verdict p{margin:.2em 0}"
    ".good{background:#e3f4ec;border-color:#009e73}.neutral{background:#fdf3d8;border-color:#e69f00}"
    ".bad{background:#fbe6dc;border-color:#d55e00}"
)
# Beside the colour, for who does not see it.
_SIGNS: dict[Level, str] = {"good": "&#10003;", "neutral": "?", "bad": "&#10007;"}
_EXPLAINED = {
    TRADE: "Each point is a threshold: the share of tokens, or of the full model's quality, that it keeps, and its "
    "speed as a multiple of mode full. Exits pay to the right of 1.0.",
    MIXTURE: "Above: the confidences of tokens at which both decoders agree, and of those at which they do not, with "
    "the fitted densities. Below: the chance that a token agrees, by its confidence, as fitted and as seen.",
}


def tables(result: Calibrated) -> list[Table]:
    """Thresholds, and what the chosen one rests on; the verdict is not among them."""
    return [threshold_table(result.calibration), pairs("Calibration", found(result))]


def calibration_tables(calibration: Calibration) -> list[Table]:
    """The calibration that a file or a bundle records."""
    return [pairs("Calibration", recorded(calibration)), threshold_table(calibration)]


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


def threshold_table(calibration: Calibration) -> Table:
    return table("Thresholds", _COLUMNS, [_cells_of(calibration, row) for row in calibration.table])


def _cells_of(calibration: Calibration, row: TableRow) -> tuple[str, ...]:
    """The cells that _COLUMNS name; what is not known is empty."""
    return (
        "never" if row.threshold >= NEVER_EXIT else f"{row.threshold:.4g}",
        f"{row.exit_rate:.1%}",
        "" if row.agreement is None else f"{row.agreement:.1%}",
        "" if row.quality is None else f"{row.quality:.2%}",
        *("" if value is None else f"{value:.2f}x" for value in (row.predicted_speedup, row.measured_speedup)),
        "chosen" if row.threshold == calibration.threshold else "",
    )


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


class _Checked(Exception):
    pass


def check(directory: Path) -> None:
    """Raise, before any long work, what would keep `write` from writing: no matplotlib, or something in the way."""
    import matplotlib  # noqa: F401

    # An error leaves what was there.
    with suppress(_Checked), output_directory(directory, INDEX, overwrite=True):
        raise _Checked


def write(result: Calibrated, directory: Path) -> None:
    """Replace a report that stands there, whole or not at all."""
    with output_directory(directory, INDEX, overwrite=True) as partial:
        for name, draw in ((TRADE, trade_figure), (MIXTURE, mixture_figure)):
            save_figure(draw(result), partial / name)
        (partial / DATA).write_text(result.calibration.to_json(), encoding="utf-8")
        text = page(result, detect_machine(), datetime.now().astimezone())
        (partial / INDEX).write_text(text, encoding="utf-8")


def page(result: Calibrated, machine: Machine, made: datetime) -> str:
    """The page as HTML; `machine` is where it was made, and when."""
    counts = ((machine.cores, "cores"), (machine.threads, "threads"))
    named = ", ".join([machine.cpu, *(f"{count} {name}" for count, name in counts if count is not None)])
    title = f"Calibration of {result.facts.path}"
    about = f"exit after layer {result.calibration.exit_layer} of {result.facts.layers}, {made:%Y-%m-%d}, {named}"
    figures = "".join(
        f'<figure><img src="{name}" alt="{escape(text)}"><figcaption>{escape(text)}</figcaption></figure>'
        for name, text in _EXPLAINED.items()
    )
    marked = [_cells_of(result.calibration, row) for row in result.calibration.table]
    columns, rows = filled([name.rstrip("#") for name in _COLUMNS], marked)
    lines = "".join(
        f"<tr{' class=chosen' if cells[-1] == 'chosen' else ''}>{_cells('td', cells)}</tr>" for cells in rows
    )
    facts = "".join(f"<tr>{_cells('td', pair)}</tr>" for pair in found(result))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(f"{title}: {about}")}</title>'
        f"<style>{_STYLE}</style>"
        f'<h1>{escape(title)}</h1><p class="about">{escape(about)}</p>{_shown(result.verdict)}{figures}'
        f'<h2>Thresholds</h2><table class="numbers"><tr>{_cells("th", columns)}</tr>{lines}</table>'
        "<p>Exits and agreement follow the full model's own output. Speedups are of decoding, over mode full.</p>"
        f"<h2>How it was found</h2><table>{facts}</table></html>\n"
    )


def _shown(verdict: Verdict) -> str:
    text = verdict.text[:1].upper() + verdict.text[1:]
    following = f"<p>Next: {escape(verdict.next_step)}.</p>" if verdict.next_step else ""
    return (
        f'<div class="verdict {verdict.level}"><p>{_SIGNS[verdict.level]} <b>{escape(text)}.</b></p>{following}</div>'
    )


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def trade_figure(result: Calibrated) -> Figure:
    """Tokens that are the full model's, and the quality kept where it was decoded, against speed over mode full."""
    rows, chosen = result.calibration.table, result.calibration.threshold
    figure = new_figure(9, 4.6)
    axes = figure.subplots()
    kept = [1 - row.exit_rate * (1 - (1 if row.agreement is None else row.agreement)) for row in rows]
    predicted = [row.predicted_speedup or 1.0 for row in rows]
    axes.plot(predicted, kept, "o-", color=BLUE, markersize=4, label="tokens kept, speed predicted")
    measured = [(row.measured_speedup, same) for row, same in zip(rows, kept, strict=True) if row.measured_speedup]
    if measured:
        axes.plot(*zip(*measured, strict=True), "D", color="black", label="tokens kept, speed measured")
    quality = [(row.measured_speedup or row.predicted_speedup or 1.0, row.quality) for row in rows if row.quality]
    if quality:
        axes.plot(*zip(*quality, strict=True), "s", color=GREEN, label="quality kept")
    for row, speed, same in zip(rows, predicted, kept, strict=True):
        if row.threshold == chosen:
            name = "never" if chosen >= NEVER_EXIT else f"{chosen:.4g}"
            axes.plot([speed], [same], "o", color=ORANGE, markersize=11, fillstyle="none", label=f"chosen: {name}")
    axes.axvline(1, color="black", linewidth=0.9, label="1.0x: mode full")
    axes.set(xlabel="speed over mode full", ylabel="kept of the full model's output")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2f}x")
    axes.yaxis.set_major_formatter(_percent)
    legend_beside(axes)
    return figure


def mixture_figure(result: Calibrated) -> Figure:
    """Above, the tokens by confidence with the fitted densities; below, P(agree | confidence) beside what was seen."""
    mixture, traces = result.calibration.mixture, result.traces
    figure = new_figure(9, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    edges, grid = np.linspace(0, 1, _EDGES), np.linspace(0.002, 0.998, 500)
    counts = {}
    for agrees, colour, hatch, line, name in (
        (True, BLUE, "", "-", "agree"),
        (False, ORANGE, "////", "--", "disagree"),
    ):
        values = traces.confidence[traces.agrees == agrees]
        counts[agrees] = np.histogram(values, edges)[0]
        weights = np.full(len(values), 1 / max(1, traces.tokens))
        upper.hist(values, edges.tolist(), weights=weights, histtype="stepfilled", label=f"tokens that {name}",
                   facecolor=f"{colour}40", edgecolor=colour, hatch=hatch, linewidth=0.8)  # fmt: skip
        if mixture is not None:
            share = mixture.weight_agree if agrees else 1 - mixture.weight_agree
            component = mixture.agree if agrees else mixture.disagree
            fitted = share * component.density(grid) / (_EDGES - 1)
            upper.plot(grid, fitted, color=colour, linestyle=line, label=f"fitted, {name}")
    # Few tokens decide: most are confident and agree, and on a linear scale the others could not be seen.
    upper.set(ylabel="share of all tokens (log)", yscale="log", xlim=(0, 1), ylim=(0.5 / max(1, traces.tokens), 1))
    upper.yaxis.set_major_formatter(_percent)
    _seen_chance(lower, edges, counts[True], counts[False])
    if mixture is not None:
        lower.plot(grid, mixture.posterior(grid), color="black", label="P(agree | confidence)")
    lower.set(xlabel=f"confidence ({result.calibration.confidence})", ylabel="tokens that agree", ylim=(-0.03, 1.03))
    lower.yaxis.set_major_formatter(_percent)
    for axes in (upper, lower):
        if result.calibration.threshold < NEVER_EXIT:
            axes.axvline(result.calibration.threshold, color=GREY, linestyle=":", label="threshold")
        legend_beside(axes)
    return figure


def _seen_chance(axes: Axes, edges: np.ndarray, agree: np.ndarray, disagree: np.ndarray) -> None:
    """The share that agrees of each bin's tokens."""
    tokens = agree + disagree
    some = tokens > 0
    centres = (edges[:-1] + edges[1:])[some] / 2
    sizes = 8 + 60 * np.sqrt(tokens[some] / tokens.max()) if some.any() else []
    axes.scatter(centres, agree[some] / tokens[some], s=sizes, color=GREEN, label="seen (larger: more tokens)")


def _percent(value: float, _: float) -> str:
    return f"{100 * value:.3g} %"
