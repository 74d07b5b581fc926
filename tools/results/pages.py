"""Generates the README's table and docs/results/index.md from docs/results/*.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from freeexport.system.sheet import plus_minus
from freeexport.task_metrics import metric_of
from tools.results.measure import LOOKS, result_file
from tools.results.rows import ROWS, ResultRow

BEGIN = "<!-- results, by python -m tools.results pages -->"
END = "<!-- end of results -->"
# Commits of results whose JSON does not record one.
OLDER = "older-commits.json"
SHOWN = ("free", "rollback", "lookup", "phrases", "lossless")
NAMES = {"lookup": "text drafts alone", "phrases": "text drafts and phrases"}
INDEX = """# Results

Made from docs/results/*.json by `python -m tools.results pages`; do not edit.

Speeds are multiples of mode `full` of the same bundle: of time per token after the first, and of \
whole requests; ± is
half a 95 % interval of a paired bootstrap over lines. "Byte model" is the speed per token that \
the bytes read predict.
FREE rows have the threshold of `calibrate`. "Same" is the share of lines whose tokens equal \
those of `full`.
"""
Evaluation = Mapping[str, Any]


def results(directory: Path) -> Iterator[tuple[str, Evaluation]]:
    """Yield names and reports of the committed evaluations, README rows first."""
    paths = sorted(
        directory.glob("*.json"), key=lambda path: (not path.name.startswith("readme-"), path.name)
    )
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        report = content.get("evaluation", content)
        if isinstance(report.get("rows"), list) and "verdicts" in report:
            yield path.name, report


def index(directory: Path) -> str:
    """Return the page of all results."""
    older: dict[str, str] = json.loads((directory / OLDER).read_text(encoding="utf-8"))
    columns = (
        "result",
        "n, rounds",
        "mode",
        "per token",
        "byte model",
        "per request",
        "tokens/s",
        "quality, of full",
    )
    lines = [INDEX, _table_head((*columns, "same", "processor, kernels", "date, commit"))]
    for name, report in results(directory):
        lines += _rows_of(name, report, older.get(name))
    return "\n".join([*lines, "", *_ledger(directory), ""])


def _rows_of(name: str, report: Evaluation, commit: str | None) -> list[str]:
    made = report["made"][:10]
    machine = report["machine"]
    commit = (report.get("commit") or commit or "unknown")[:7]
    kernels = machine.get("kernels") or ", ".join(machine["features"][:3])
    shown = [
        row
        for row in report["rows"]
        if row["method"] in SHOWN and (row["method"] != "free" or row["calibrated"])
    ]
    lines = []
    for number, row in enumerate(shown):
        first = (f"[{name.removesuffix('.json')}]({name})", f"{row['lines']}, {report['rounds']}")
        where = (f"{machine['processor']}, {kernels}", f"{made}, {commit}")
        bundle = f", {row['bundle']}" if len(report["bundles"]) > 1 else ""
        mode = f"{NAMES.get(row['method'], row['setting'])}, {row['precision']}{bundle}"
        cells = [
            *(first if number == 0 else ("", "")),
            mode,
            _times(row, "token"),
            "" if row.get("predicted") is None else f"{row['predicted']:.2f}x",
            _times(row, "request"),
            f"{row['tokens_per_second']:.0f}",
            _quality(row, next(iter(report["metrics"]))),
            f"{row['same']:.0%}",
            *(where if number == 0 else ("", "")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(row: Mapping[str, Any], of: str) -> str:
    low = row.get(f"{of}_low")
    high = row.get(f"{of}_high")
    half = "" if low is None or high is None else f" ±{(high - low) / 2:.2f}"
    return f"{row[f'{of}_speed']:.2f}x{half}"


def _quality(row: Mapping[str, Any], metric: str) -> str:
    score = row["scores"][metric]
    if row["method"] in ("lossless", "lookup", "phrases", "rollback") and row["same"] == 1:
        return "every token equal"
    share, low, high = (score[name] for name in ("relative", "low", "high"))
    if share is None:
        return ""
    bounds = (None, None) if low is None else (100 * low, 100 * high)
    return f"{plus_minus(100 * share, *bounds)} % of {metric_of(metric).shown}"


def _ledger(directory: Path) -> list[str]:
    """Return the table of measurements on test lines, newest first."""
    text = (directory / LOOKS).read_text(encoding="utf-8")
    looks = [json.loads(line) for line in text.splitlines()]
    words = {None: "not recorded", True: "yes", False: "no"}
    rows = [
        f"| {look['date']} | {(look['commit'] or 'unknown')[:7]} | {look['split']} | "
        f"{look['lines']} | {look['result']} | {words[look['trained_after']]} |"
        for look in sorted(looks, key=lambda look: look["date"], reverse=True)
    ]
    return [
        "## Looks at test lines\n",
        f"Every measurement on test lines is a line of [{LOOKS}]({LOOKS}). "
        "Where something was trained\n"
        "after a look, the next figure for it needs a [new version of the\n"
        "split](../data.md#versions-of-a-test-split). "
        "The commit of older looks is the one that recorded\n"
        "their result.\n",
        _table_head(("date", "commit", "split", "lines", "result", "trained after")),
        *rows,
    ]


def _table_head(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|"


def readme(root: Path, directory: Path) -> str:
    """Return the README with the table of results between its two marks."""
    text = (root / "README.md").read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise click.ClickException(f"README.md has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{readme_table(directory)}\n{END}{after}"


def readme_table(directory: Path) -> str:
    """Return the table of the README, with the conditions and the smallest gains below it."""
    found = {
        row.name: json.loads(result_file(row, directory).read_text(encoding="utf-8"))["evaluation"]
        for row in ROWS.values()
        if result_file(row, directory).is_file()
    }
    if not found:
        return "Not measured yet on fresh test lines. [Earlier results](docs/results/index.md)."
    tasks: dict[str, list[ResultRow]] = {}
    for row in ROWS.values():
        if row.name in found:
            tasks.setdefault(row.task, []).append(row)
    lines = [
        _table_head(
            ("task", "`lossless` (drafts from the text alone)", "FREE, calibrated", "quality")
        )
    ]
    for task, rows in tasks.items():
        columns = zip(*(_readme_cells(row, found[row.name]) for row in rows), strict=True)
        lines.append(
            f"| {task} | "
            + " | ".join("<br>".join(filter(None, column)) for column in columns)
            + " |"
        )
    machines = {
        (report["machine"]["processor"], report["machine"].get("kernels"))
        for report in found.values()
    }
    hardware = "; ".join(
        f"{processor} ({kernels} kernels)" for processor, kernels in sorted(machines)
    )
    threads = sorted({report["threads"] for report in found.values()})
    counts = sorted({report["lines"] for report in found.values()})
    machine_and_lines = (
        f"{hardware}, {' or '.join(map(str, threads))} threads, "
        f"{', '.join(map(str, counts))} test lines per row."
    )
    return "\n".join([*lines, "", machine_and_lines, *_slowest(found)])


def _readme_cells(row: ResultRow, report: Evaluation) -> tuple[str, str, str]:
    by_method = {one["method"]: one for one in report["rows"]}
    lossless, free, lookup = (by_method.get(name) for name in ("lossless", "free", "lookup"))
    assert lossless is not None
    precision = row.engines.precision
    alone = "" if lookup is None else f" ({lookup['request_speed']:.2f}x)"
    first = (
        f"{precision} **{_times(lossless, 'request')}**{alone}, "
        f"{lossless['tokens_per_second']:.0f} tokens/s"
    )
    second = (
        ""
        if free is None
        else f"{precision} {_times(free, 'request')}, {free['tokens_per_second']:.0f} tokens/s"
    )
    if row.calibrated and free is None:
        second = f"{precision}: no threshold keeps the risk"
    parts = [
        "every token equal" if lossless["same"] == 1 else f"{lossless['same']:.1%} of lines equal"
    ]
    parts += [] if free is None else [f"FREE {_quality(free, row.quality)}"]
    return first, second, f"{precision}: {'; '.join(parts)}"


def _slowest(found: Mapping[str, Evaluation]) -> list[str]:
    """Name the settings that are slower than full, or else the slowest setting."""
    listed = [
        (round(one["request_speed"], 2), f"{NAMES.get(one['method'], one['method'])} on {name}")
        for name, report in found.items()
        for one in report["rows"]
        if one["method"] in SHOWN
    ]
    losing = sorted(item for item in listed if item[0] < 1) or sorted(listed)[:1]
    title = "Slower than `full`" if losing[0][0] < 1 else "The least gain"
    return [f"{title}: " + ", ".join(f"{name} ({speed:.2f}x)" for speed, name in losing) + "."]
