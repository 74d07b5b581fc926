"""Renders docs/results/results.jsonl: tables of the README and of the pages in docs/results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from freeexport.system.sheet import markdown, plus_minus, sheet
from freeexport.task_metrics import metric_of
from tools.results.published import RESULTS, USES, Line, changed_since, read_lines
from tools.results.rows import ROWS

README = re.compile(
    r"(<!-- results, by python -m tools.results pages -->\n).*?(?=\n<!-- end of results -->)", re.S
)
# Tables of a page in docs/results. The mark names their results.
TABLES = re.compile(
    r"(<!-- results: ([\w. -]+), by tools.results -->\n).*?(?=<!-- end of results -->)", re.S
)
# Methods whose output may differ from that of full.
FREE = ("free", "published")
# Columns of speeds, by method.
NAMES = {
    "lookup": "text drafts",
    "phrases": "text and phrases",
    "rollback": "`rollback`",
    "lossless": "`lossless`",
    "free": "`free`",
    "published": "`free`, as published",
}
INDEX = """# Results

Made from [results.jsonl](results.jsonl) by `python -m tools.results pages`; do not edit.

Speeds are those of whole requests, as multiples of mode `full` of the same bundle. ± is half a
95 % interval of a paired bootstrap over lines. "Text drafts" are drafts from the prompt and the
output alone. `free` has the threshold of `calibrate`, and its quality is relative to that of
`full`.
"""
MEASUREMENTS = """
## Measurements

A line of [results.jsonl](results.jsonl) has the command of a result, its test lines, commit,
processor, hashes of data and bundle, and more figures. `git show REPORT` prints the full report
that its `report` names. "-dirty" means that tracked files had changes. Older results did not record
their commit, and have that which added them.
"""
TEST_SETS = """
## Uses of test sets

Every measurement on test lines is a line of [test_set_uses.jsonl](test_set_uses.jsonl), with hashes
of the shipped files behind it. The last column names those that changed since the last use: an
exit, the phrases, or constants of the draft rule. The next figure then needs a [new version of the
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
    names = dict.fromkeys(line["result"] for line in lines if "page" not in line)
    parts = [INDEX, figures(lines, names), MEASUREMENTS, _measurements(lines)]
    return "\n".join([*parts, TEST_SETS, _test_sets(uses), ""])


def figures(lines: Sequence[Line], names: Iterable[str]) -> str:
    """Return the table of results' speeds, without thresholds that were not calibrated."""
    rows: list[tuple[str, dict[str, Line]]] = []
    for name in names:
        bundles: dict[str, dict[str, Line]] = {}
        for line in _shown(lines, name):
            bundles.setdefault(line.get("bundle", ""), {})[line["method"]] = line
        rows += [(f"{name} {bundle}".strip(), found) for bundle, found in bundles.items()]

    def speed(method: str) -> Callable[[tuple[str, dict[str, Line]]], str]:
        return lambda row: _times(row[1][method]["per_request"]) if method in row[1] else ""

    def quality(row: tuple[str, dict[str, Line]]) -> str:
        return next((_quality(row[1][method]) for method in FREE if method in row[1]), "")

    def full(row: tuple[str, dict[str, Line]]) -> str:
        return f"{row[1]['full']['tokens_per_second']:.0f}" if "full" in row[1] else ""

    columns: dict[str, Callable[[tuple[str, dict[str, Line]]], str]] = {
        "result": lambda row: row[0],
        "`full`, tokens/s#": full,
        **{f"{name}#": speed(method) for method, name in NAMES.items()},
        "quality of `free`": quality,
    }
    every = {name.rstrip("#") for name in columns}
    shown = [line for _, found in rows for line in found.values()]
    return f"{markdown(sheet('', columns, rows, keep=every))}\n\n{_equality(shown)}"


def _shown(lines: Iterable[Line], name: str) -> list[Line]:
    some = [
        line for line in lines if line["result"] == name and line.get("method") in ("full", *NAMES)
    ]
    return [line for line in some if line["method"] not in FREE or "calibrated" in line["setting"]]


def _equality(lines: Sequence[Line]) -> str:
    """Return a sentence about the tokens of modes that promise those of `full`."""
    others = (
        "In all modes but `free`, every"
        if any(line["method"] in FREE for line in lines)
        else "Every"
    )
    differing = [line for line in lines if line["method"] not in FREE and line["same"] < 1]
    if not differing:
        return f"{others} token equals that of `full`."
    listed = ", ".join(
        f"{line['result']}, {NAMES[line['method']]} ({line['same']:.1%} of lines)"
        for line in differing
    )
    return f"Tokens of `full` in fewer than all lines: {listed}."


def _measurements(lines: Iterable[Line]) -> str:
    """Return the table of how results were measured, and links to those of other pages."""
    rows = {}
    others = {}
    for line in lines:
        name = line["result"]
        if "page" in line:
            others[name] = f"[{name}](../{line['page'].removeprefix('docs/')})"
            continue
        rounds = f", {line['rounds']} rounds" if line["rounds"] > 1 else ""
        rows[name] = (
            name,
            f"{line['test_lines']}, n = {line['n']}{rounds}",
            line.get("kernels") or line["processor"],
            line["date"],
            line["commit"] or line["added_in"],
        )
    table = _table("result | test lines | kernels | date | commit", rows.values())
    if not others:
        return table
    return f"{table}\n\nFigures of these results are on other pages:\n" + ",\n".join(
        others.values()
    )


def _test_sets(uses: Iterable[Line]) -> str:
    by_lines: dict[str, list[Line]] = {}
    for use in sorted(uses, key=lambda use: use["date"]):
        by_lines.setdefault(use["test_lines"], []).append(use)
    rows = [
        (
            *(name, str(len(found)), found[-1]["date"]),
            ", ".join(changed_since(found[-1])) or "nothing",
        )
        for name, found in sorted(by_lines.items())
    ]
    return _table("test lines | uses | last | changed since", rows)


def _times(speed: Sequence[float | None]) -> str:
    mean, low, high = speed
    half = "" if low is None or high is None else f" ±{(high - low) / 2:.2f}"
    return f"{mean:.2f}x{half}"


def _quality(line: Line) -> str:
    metric, (_, share, low, high) = next(iter(line["scores"].items()))
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
        names = [name for name in found if ROWS[name].task == task]
        by_column = zip(
            *(_readme_cells(ROWS[name].precision, found[name]) for name in names), strict=True
        )
        cells.append((task, *("<br>".join(filter(None, column)) for column in by_column)))
    columns = "task | `lossless` (text drafts) | `free` (as published) | quality of `free`"
    every = [line for shown in found.values() for line in shown]
    measured = [line for line in every if line["method"] != "full"]
    machines = sorted({f"{line['processor']} ({line['kernels']} kernels)" for line in every})
    threads = " or ".join(sorted({str(line["threads"]) for line in every}))
    numbers = sorted({line["n"] for line in every})
    counts = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
    bounds = [line["per_request"] for line in measured]
    half = max((high - low) / 2 for _, low, high in bounds)
    speeds = sorted(
        (
            round(line["per_request"][0], 2),
            f"{NAMES[line['method']]} on {line['result']}",
        )
        for line in measured
    )
    losing = [pair for pair in speeds if pair[0] < 1] or speeds[:1]
    title = "Slower than `full`" if losing[0][0] < 1 else "The least gain"
    return (
        f"{_table(columns, cells)}\n\n"
        f"{'; '.join(machines)}, {threads} threads, {counts} test lines per "
        f"row. Half a 95 % interval is at most ±{half:.2f}.\n"
        f"{_equality(every)}\n"
        f"{title}: {', '.join(f'{name} ({speed:.2f}x)' for speed, name in losing)}."
    )


def _readme_cells(precision: str, lines: Sequence[Line]) -> tuple[str, str, str]:
    by_method = {line["method"]: line for line in lines}

    def speed(method: str) -> str:
        return f"{by_method[method]['per_request'][0]:.2f}x"

    first = f"{precision} **{speed('lossless')}** ({speed('lookup')})"
    shown = [f"**{speed('free')}**"] if "free" in by_method else []
    shown += [f"({speed('published')})"] if "published" in by_method else []
    if not shown:
        return first, "", ""
    quality = _quality(by_method["free" if "free" in by_method else "published"])
    return first, " ".join([precision, *shown]), f"{precision} {quality}"
