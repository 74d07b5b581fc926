"""Renders docs/results/results.jsonl: tables of the README and of the pages in docs/results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from freeexport.system.sheet import plus_minus
from freeexport.task_metrics import metric_of
from tools.results.published import RESULTS, USES, Line, changed_since, read_lines
from tools.results.rows import ROWS, ResultRow

README = re.compile(
    r"(<!-- results, by python -m tools.results pages -->\n).*?(?=\n<!-- end of results -->)", re.S
)
# Tables of a page in docs/results. The mark names their results.
TABLES = re.compile(
    r"(<!-- results: ([\w. -]+), by tools.results -->\n).*?(?=<!-- end of results -->)", re.S
)
# Methods whose output may differ from that of full.
FREE = ("published", "free")
SHOWN = ("full", "published", "free", "rollback", "lookup", "phrases", "lossless")
NAMES = {"lookup": "text drafts alone", "phrases": "text drafts and phrases"}
FIGURES = "result | mode | tokens/s | per token | byte model | per request | quality | same"
INDEX = """# Results

Made from [results.jsonl](results.jsonl) by `python -m tools.results pages`; do not edit.
[Measurements](#measurements) lists how each result was measured.

Speeds are multiples of mode `full` of the same bundle: of time per token after the first, and of
whole requests. ± is half a 95 % interval of a paired bootstrap over lines. "Byte model" is the
speed per token that the bytes read predict. FREE rows have the threshold of `calibrate`, and
quality is relative to that of `full`. "Same" is the share of lines whose tokens equal those of
`full`.
"""
MEASUREMENTS = """
## Measurements

The commit is the one that was measured. "-dirty" means that tracked files had changes. Older
results did not record it, so the table names the commit that added the result. Their commands are
written from the settings in their reports. The figures of a result with a link are on that page
only. `report` in results.jsonl names the full report, and
`git show REPORT` prints it.
"""
TEST_SETS = """
## Uses of test sets

Every measurement on test lines is a line of [test_set_uses.jsonl](test_set_uses.jsonl). The last
column names the shipped files behind the result that have changed since: the exit or model, the
phrases, or constants of the draft rule. The next figure then needs a [new version of the
split](../data.md#versions-of-a-test-split).
"""


def pages(root: Path) -> dict[Path, str]:
    """Return the text of every page with results."""
    lines = read_lines(root / RESULTS)
    folder = (root / RESULTS).parent
    found = {}
    for page in (root / "README.md", *sorted(folder.glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        text = README.sub(lambda mark: mark[1] + readme_table(lines), text)
        text = TABLES.sub(lambda mark: f"{mark[1]}{figures(lines, mark[2].split())}\n", text)
        found[page] = text
    found[folder / "index.md"] = index(lines, read_lines(root / USES))
    return found


def index(lines: Sequence[Line], uses: Sequence[Line]) -> str:
    """Return the page of all results."""
    names = dict.fromkeys(line["result"] for line in lines)
    rows = [
        (
            *(use["date"], _commit(use), use["test_lines"], str(use["n"]), use["result"]),
            ", ".join(changed_since(use)) or "nothing",
        )
        for use in sorted(uses, key=lambda use: use["date"], reverse=True)
    ]
    columns = "date | commit | test lines | n | result | changed since"
    parts = [INDEX, figures(lines, names), MEASUREMENTS, _measurements(lines), TEST_SETS]
    return "\n".join([*parts, _table(columns, rows), ""])


def figures(lines: Sequence[Line], names: Iterable[str]) -> str:
    """Return the table of results' figures, without thresholds that were not calibrated."""
    rows = []
    for name in names:
        for number, line in enumerate(_shown(lines, name)):
            bundle = f", {line['bundle']}" if "bundle" in line else ""
            rows.append(
                (
                    "" if number else name,
                    f"{NAMES.get(line['method'], line['setting'])}, {line['precision']}{bundle}",
                    f"{line['tokens_per_second']:.0f}",
                    _times(line["per_token"]),
                    "" if line["byte_model"] is None else f"{line['byte_model']:.2f}x",
                    _times(line["per_request"]),
                    "" if line["method"] == "full" else _quality(line),
                    f"{line['same']:.0%}",
                )
            )
    return _table(FIGURES, rows)


def _shown(lines: Iterable[Line], name: str) -> list[Line]:
    some = [line for line in lines if line["result"] == name and line.get("method") in SHOWN]
    return [line for line in some if line["method"] not in FREE or "calibrated" in line["setting"]]


def _measurements(lines: Iterable[Line]) -> str:
    """Return the table of how each result was measured, once per result and its test lines."""
    rows = {}
    for line in lines:
        name = line["result"]
        if "page" in line:
            name = f"[{name}](../{line['page'].removeprefix('docs/')})"
        rows[line["result"], line["test_lines"]] = (
            name,
            f"`{line['command']}`",
            f"{line['test_lines']}, n = {line['n']}" if line["test_lines"] else "",
            str(line.get("rounds", "")),
            ", ".join(filter(None, (line["processor"], line.get("kernels")))),
            f"{line['date']}, {_commit(line)}",
        )
    columns = "result | command | test lines | rounds | processor, kernels | date, commit"
    return _table(columns, rows.values())


def _commit(line: Line) -> str:
    return line["commit"] or f"not recorded, added in {line['added_in']}"


def _times(speed: Sequence[float | None]) -> str:
    mean, low, high = speed
    half = "" if low is None or high is None else f" ±{(high - low) / 2:.2f}"
    return f"{mean:.2f}x{half}"


def _quality(line: Line) -> str:
    metric, (_, share, low, high) = next(iter(line["scores"].items()))
    if line["method"] not in FREE:
        return "every token equal" if line["same"] == 1 else f"{line['same']:.1%} of lines equal"
    bounds = (None, None) if low is None else (100 * low, 100 * high)
    return f"{plus_minus(100 * share, *bounds)} % of {metric_of(metric).shown}"


def _table(columns: str, rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"| {columns} |", "|---" * len(columns.split(" | ")) + "|", *lines])


def readme_table(lines: Sequence[Line]) -> str:
    """Return the table of the README, with the conditions and the smallest gains below it."""
    found = {row.name: shown for row in ROWS.values() if (shown := _shown(lines, row.name))}
    cells = []
    for task in dict.fromkeys(ROWS[name].task for name in found):
        rows = [ROWS[name] for name in found if ROWS[name].task == task]
        by_column = zip(*(_readme_cells(row, found[row.name]) for row in rows), strict=True)
        cells.append((task, *("<br>".join(filter(None, column)) for column in by_column)))
    columns = "task | `lossless` (text alone) | `free` (as published) | quality"
    every = [line for shown in found.values() for line in shown]
    machines = sorted({f"{line['processor']} ({line['kernels']} kernels)" for line in every})
    threads = " or ".join(sorted({str(line["threads"]) for line in every}))
    counts = ", ".join(map(str, sorted({line["n"] for line in every})))
    speeds = sorted(
        (
            round(line["per_request"][0], 2),
            f"{NAMES.get(line['method'], line['method'])} on {line['result']}",
        )
        for line in every
        if line["method"] != "full"
    )
    losing = [pair for pair in speeds if pair[0] < 1] or speeds[:1]
    title = "Slower than `full`" if losing[0][0] < 1 else "The least gain"
    return (
        f"{_table(columns, cells)}\n\n"
        f"{'; '.join(machines)}, {threads} threads, {counts} test lines per row.\n"
        f"{title}: {', '.join(f'{name} ({speed:.2f}x)' for speed, name in losing)}."
    )


def _readme_cells(row: ResultRow, lines: Sequence[Line]) -> tuple[str, str, str]:
    by_method = {line["method"]: line for line in lines}
    lossless = by_method["lossless"]
    rate = f"{lossless['tokens_per_second']:.0f} tokens/s"
    alone = f"{by_method['lookup']['per_request'][0]:.2f}x"
    first = f"{row.precision} **{_times(lossless['per_request'])}** ({alone}), {rate}"
    quality = f"{row.precision}: {_quality(lossless)}"
    published = by_method.get("published")
    if published is None:
        second = f"{row.precision}: no threshold keeps the risk" if row.calibrated else ""
        return first, second, quality
    free = by_method.get("free", published)
    rate = f"{free['tokens_per_second']:.0f} tokens/s"
    as_published = f"{published['per_request'][0]:.2f}x"
    second = f"{row.precision} **{_times(free['per_request'])}** ({as_published}), {rate}"
    return first, second, f"{quality}; `free` {_quality(free)}"
