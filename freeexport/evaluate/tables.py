"""Tables of an evaluation, and the facts that explain them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from freeexport.costs.bytes import CALL_BYTES
from freeexport.evaluate.evaluate import Evaluation
from freeexport.evaluate.scores import Row
from freeexport.system.environment import about
from freeexport.system.sheet import Sheet, plus_minus, sheet
from freeexport.task_metrics import Metric

# Fewest compared drafts at a position for which acceptance is shown.
MIN_COMPARED = 20
_PREDICTED = (
    "speed a token by the byte model: weights and caches that engine calls read, "
    "{} more for each further row, and {:g} MB for a call"
)


def settings_sheet(found: Evaluation) -> Sheet:
    """Return the table of settings. Columns with one value in all rows become facts."""

    def of_first(show: Callable[[Row], str], row: Row) -> str:
        return "" if row["first_bundle"] is None else show(row["first_bundle"])

    columns: dict[str, Callable[[Row], str]] = {
        "bundle": lambda row: row["bundle"],
        "precision": lambda row: row["precision"],
        "setting": lambda row: row["setting"].replace(", calibrated", " *"),
    }
    for metric in found.metrics:
        share = "full" if len(found.metrics) == 1 else metric.shown
        columns[f"{metric.shown}#"] = partial(_value, metric)
        columns[f"% of {share}#"] = partial(relative_score, metric.name)
        columns[f"{metric.shown}, % of first#"] = partial(
            of_first, partial(relative_score, metric.name)
        )
    columns |= {
        "exits#": lambda row: f"{row['exit_rate']:.0%}",
        "speed#": lambda row: speed_interval_of(row, "request"),
        "of first#": partial(of_first, lambda row: speed_interval_of(row, "request")),
        "tokens/s#": lambda row: f"{row['tokens_per_second']:.0f}",
        "spread#": lambda row: "" if row["spread"] is None else f"{row['spread']:.0%}",
        "layers#": lambda row: f"{row['layers']:.2f}",
        "a token#": lambda row: speed_interval_of(row, "token"),
        "predicted#": lambda row: "" if row["predicted"] is None else f"{row['predicted']:.2f}x",
        "first token#": lambda row: f"{row['first_speed']:.2f}x",
        "same#": lambda row: f"{row['same']:.0%}",
    }
    title = (
        f"{Path(found.report['data']).name}, {found.report['lines']} lines, "
        f"{found.report['threads']} thread(s)"
    )
    return sheet(title, columns, found.rows, keep=("setting", "speed", "tokens/s"))


def speed_interval_of(row: Mapping[str, Any], kind: str) -> str:
    """Format the speed of a "request" or a "token" with its interval."""
    value, low, high = (row[f"{kind}_{name}"] for name in ("speed", "low", "high"))
    return f"{plus_minus(value, low, high, 2)}x"


def _value(metric: Metric, row: Row) -> str:
    value: float = row["scores"][metric.name]["value"]
    return f"{100 * (1 - value):.2f}%" if metric.error else f"{value:.4f}"


def relative_score(metric: str, row: Row) -> str:
    """Format the score relative to the full model's in percent. Empty for the full model."""
    kept, low, high = (row["scores"][metric][name] for name in ("relative", "low", "high"))
    if kept is None or row.get("method") == "full":
        return ""
    return plus_minus(100 * kept, *((None, None) if low is None else (100 * low, 100 * high)))


def curves_sheet(found: Evaluation) -> Sheet:
    """Return the table of curves."""
    columns: dict[str, Callable[[Row], str]] = {
        "bundle": lambda curve: curve["bundle"],
        "method": lambda curve: curve["method"],
        f"fastest with {100 * found.options.quality:.4g} %": lambda curve: (
            curve["fastest"] or "none"
        ),
        "speed#": lambda curve: "" if curve["speed"] is None else f"{curve['speed']:.2f}x",
        "area#": lambda curve: "" if curve["area"] is None else f"{curve['area']:.3f}",
    }
    return sheet(
        f"Quality-speed curves by {found.metrics[0].label}", columns, found.report["curves"]
    )


def facts(found: Evaluation, shown: Sheet | None = None) -> list[tuple[str, str]]:
    """Describe the conditions of an evaluation and the meaning of its columns.

    Args:
        found: The evaluation.
        shown: Table whose columns are explained. Default: the table with all columns.
    """
    options = found.options
    report = found.report
    whole = settings_sheet(found)
    hidden = set[str]() if shown is None else shown.hides(whole)
    explained = [
        *whole.facts,
        (
            "speed",
            "of whole requests, as a multiple of full's; "
            "± is half a 95 % interval of a paired bootstrap",
        ),
        *_facts_of_columns(found),
        *about(report, report["threads"]),
        (
            "decoding",
            f"{options.choice}, at most {options.max_new_tokens} tokens; "
            f"the median of {options.rounds} round(s) a line",
        ),
    ]
    explained += [
        (f"metric {metric.name}", metric.signature) for metric in found.metrics if metric.signature
    ]
    return [(name, text) for name, text in explained if name not in hidden]


def _facts_of_columns(found: Evaluation) -> list[tuple[str, str]]:
    """Explain the columns and marks that some evaluations have."""
    rows = found.rows
    explained: list[tuple[str, str]] = []
    if len(found.entries) > 1:
        explained.append(("of first", f"as a multiple of full in {found.entries[0].name}"))
    if any(row["predicted"] for row in rows):
        shares = dict.fromkeys(found.report["row_shares"].values())
        listed = ", ".join(f"{share:.0%}" for share in shares)
        explained.append(("predicted", _PREDICTED.format(listed, CALL_BYTES / 1e6)))
    spreads = [row["spread"] for row in rows if row["spread"] is not None]
    if spreads:
        differed = f"tokens/s of a setting differed by up to {max(spreads):.0%} between rounds"
        explained.append(("rounds", differed))
    explained += _facts_of_drafts(rows)
    explained += [
        (metric.shown, f"errors: less is better; shares of full's are those of {metric.label}")
        for metric in found.metrics
        if metric.error
    ]
    if any(row["calibrated"] for row in rows):
        explained.append(("*", "the calibrated threshold"))
    return explained


def _facts_of_drafts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """List the accepted share of drafts by position, where enough were compared."""
    explained = []
    for row in rows:
        for source, positions in row["drafts"].items():
            accepted = [
                f"{100 * share:.0f}" for share, compared in positions if compared >= MIN_COMPARED
            ]
            if accepted:
                listed = f"{', '.join(accepted)} % accepted at each position"
                explained.append(
                    (f"drafts of {source}", f"{row['bundle']}, {row['setting']}: {listed}")
                )
    return explained


def narrow(shown: Sheet, metrics: Sequence[Metric] = ()) -> Sheet:
    """Drop the least important columns until the table fits a terminal.

    Args:
        shown: Table of settings, with scores or of speed.
    """
    spare = ["differs", "memory", "95 %", "first ms", "roofline", "first token", "layers"]
    spare += ["precision", "ms", "kept", "exits", "same"]
    if metrics:
        others = (
            name
            for one in metrics[::-1]
            for name in (f"{one.shown}, % of first", one.shown, f"% of {one.shown}")
        )
        kept = (metrics[0].shown, f"% of {metrics[0].shown}")
        spare += ["tokens/s", "of first", *(name for name in others if name not in kept)]
    return shown.within([*spare, "a token", "predicted", "spread"])
