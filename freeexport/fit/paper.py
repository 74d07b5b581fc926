"""Compare trainings for `freeexport fit --paper`.

It covers the losses of FREE, static exits and no exit, with three seeds each. One table shows the
results with their significance. All trainings start from the same model and take the same time.
The quality and speed of a setting cover all seeds: a line's statistics and seconds are added over
seeds, and lines are resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from freeexport.costs.intervals import RESAMPLES, speed_interval
from freeexport.evaluate.evaluate import Evaluation
from freeexport.evaluate.scores import Row
from freeexport.evaluate.settings import Method
from freeexport.system.sheet import Sheet, markdown, plus_minus
from freeexport.task_metrics import Metric, bounded, draws
from freeexport.training.options import BuiltInLoss

SEEDS = (0, 1, 2)
# For each training, its loss and the methods that decode its bundle. The first has no exit, and all
# others are compared with it. "exit" is what `fit` trains by default: an exit with own layers,
# trained jointly and then alone.
COMPARED: dict[str, tuple[BuiltInLoss, tuple[Method, ...]]] = {
    "plain": ("deep-ce", ("full", "lookup")),
    "exit": ("logit-kd", ("full", "static", "free", "lossless")),
    "free": ("kd-dyn", ("full", "static", "free")),
    "static": ("ce", ("full", "static")),
}
SIGNIFICANT = 0.05
Name = tuple[str, str, str]  # training, method, threshold
_LATEX = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "±": r"$\pm$", "<": "$<$", "#": r"\#"})


def repeated() -> dict[str, int]:
    """Return how often each step of a plan runs."""
    every = len(COMPARED) * len(SEEDS)
    calibrated = sum("free" in methods for _, methods in COMPARED.values())
    counts = {"trained": every, "calibrate": calibrated * len(SEEDS), "evaluate": len(SEEDS)}
    return {**counts, "joint": every, "exit": len(SEEDS)}


@dataclass(frozen=True)
class SettingResult:
    """Results of one setting over all seeds.

    Attributes:
        tables: Metric statistics [n, k] of each seed.
        seconds: Request times [n], added over seeds.
        exits: Mean share of tokens that exit.
    """

    tables: list[np.ndarray]
    seconds: np.ndarray
    exits: float

    @classmethod
    def of(cls, name: Name, found: Sequence[Evaluation]) -> SettingResult:
        tables = []
        seconds = []
        exits = []
        for one in found:
            row = _rows(one)[name]
            lines = one.records[row["bundle"], row["setting"]]
            texts = [turns[0].text for turns in lines.values()]
            known = [one.references[line] for line in lines]
            tables.append(found[0].metrics[0].table(texts, known))
            seconds.append(
                [np.median([turn.seconds for turn in turns]) for turns in lines.values()]
            )
            exits.append(row["exit_rate"])
        return cls(tables, np.sum(seconds, axis=0), float(np.mean(exits)))


def _rows(found: Evaluation) -> dict[Name, Row]:
    """Index rows by training, method and threshold.

    A calibrated threshold is called "calibrated", whatever its value.
    """
    named = {}
    for row in found.rows:
        at = (
            "calibrated"
            if row["calibrated"]
            else ""
            if row["threshold"] is None
            else f"{row['threshold']:g}"
        )
        named[row["bundle"].rpartition("-")[0], row["method"], at] = row
    return named


def comparison(found: Sequence[Evaluation]) -> Sheet:
    """Tabulate evaluations that differ only in the seed of their trainings.

    Speed and significance are relative to the full model of the first training. p is two-sided,
    from a paired bootstrap over lines.
    """
    metric = found[0].metrics[0]
    every = [_rows(one) for one in found]
    settings = {
        name: SettingResult.of(name, found)
        for name in every[0]
        if all(name in rows for rows in every)
    }
    whole = next(iter(settings.values()))
    rows = []
    for (name, method, at), one in settings.items():
        values = 100 * np.array([metric.of(table) for table in one.tables])
        values = 100 - values if metric.error else values
        low = None
        high = None
        p = ""
        mark = ""
        if one is not whole:
            low, high = speed_interval(one.seconds, whole.seconds)
            value = difference_p_value(
                metric, np.sum(one.tables, axis=0), np.sum(whole.tables, axis=0)
            )
            p = f"{value:.3f}"
            mark = "*" if value < SIGNIFICANT else ""
        speed = plus_minus(float(np.sum(whole.seconds)) / float(np.sum(one.seconds)), low, high, 2)
        quality = f"{values.mean():.2f} ± {values.std(ddof=1):.2f}{mark}"
        rows.append(
            (
                name,
                COMPARED[name][0],
                f"{method} {at}".strip(),
                quality,
                p,
                f"{one.exits:.0%}",
                f"{speed}x",
            )
        )
    columns = ("training", "loss", "method", f"{metric.shown}, %#", "p#", "exits#", "speed#")
    facts = (
        (
            f"{metric.shown}, %",
            f"mean and deviation of {len(found)} seeds; *: differs from plain full, p < 0.05",
        ),
        (
            "p",
            "of that difference, two-sided: paired bootstrap over lines, their statistics added "
            "over seeds",
        ),
        (
            "speed",
            "of whole requests, as a multiple of plain full's; ± is half a 95 % interval over "
            "lines",
        ),
    )
    return Sheet(f"Trainings compared, {len(whole.seconds)} lines", columns, tuple(rows), facts)


def difference_p_value(metric: Metric, ours: np.ndarray, others: np.ndarray) -> float:
    """Return the two-sided p-value of the difference between tables [n, k] of the same lines."""
    if np.array_equal(ours, others):
        return 1.0
    resamples = draws(len(ours), RESAMPLES)
    pairs = zip(resamples @ ours, resamples @ others, strict=True)
    differences = np.array(
        [bounded(metric.value(one)) - bounded(metric.value(other)) for one, other in pairs]
    )
    tail = min((differences <= 0).mean(), (differences >= 0).mean())
    return float(min(1.0, 2 * max(tail, 1 / (2 * RESAMPLES))))


def written(sheet: Sheet) -> dict[str, str]:
    """Return the files of a comparison by name: Markdown, and LaTeX for the package booktabs."""
    notes = "\n".join(f"- {name}: {text}" for name, text in sheet.facts)
    form = "".join("r" if name.endswith("#") else "l" for name in sheet.columns)
    lines = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in sheet.rows]
    names = " & ".join(name.rstrip("#").translate(_LATEX) for name in sheet.columns) + r" \\"
    caption = f"{sheet.title}. " + "; ".join(f"{name}: {text}" for name, text in sheet.facts[1:])
    latex = [
        r"\begin{table}\centering",
        rf"\begin{{tabular}}{{{form}}}",
        r"\toprule",
        names,
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{caption.translate(_LATEX)}.}}",
        r"\end{table}",
        "",
    ]
    return {
        "table.md": f"# {sheet.title}\n\n{markdown(sheet)}\n\n{notes}\n",
        "table.tex": "\n".join(latex),
    }
