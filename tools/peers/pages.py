"""Generates docs/benchmarks.md and docs/results/peers.md.

Each file of docs/benchmarks is the report of a run of `python -m tools.peers all`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from freeexport.system.load import load_note
from freeexport.system.page import human_bytes
from freeexport.system.sheet import Sheet, markdown, sheet

SCHEMA = 3
BENCHMARKS = """# Benchmarks

Generated from docs/benchmarks/*.json by `python -m tools.peers pages`; do not edit. Tokens that \
freeexport and
other decoders generate, in mode `full`. [Benchmarking](benchmarking.md#other-decoders) explains \
the steps and the
columns. [Prompts and encoder-decoders](results/peers.md) have a page of their own.

Tokens/s of requests of 64 tokens to SmolLM2-135M, from one GGUF file in 4 bits. In fp32 and 16 \
bits, the others read
widened weights, and freeexport those of the file. In brackets: the spread between rounds, and the \
share of tokens equal
to those of the fp32 model.
"""
PEERS = """# Other decoders: prompts and encoder-decoders

Generated from docs/benchmarks/*.json by `python -m tools.peers pages`; do not edit.
[Benchmarking](../benchmarking.md#other-decoders) explains the steps and the columns. \
[Benchmarks](../benchmarks.md)
compares the generation of tokens.

Prompts are random tokens. Models of Marian's and NLLB-600M's sizes have random weights, which \
cost as much as the
published ones.
"""
PAGES = {
    "docs/benchmarks.md": ("benchmarks", BENCHMARKS),
    "docs/results/peers.md": ("peers", PEERS),
}
# Columns of the overview: libraries and the beginning of their rows' names.
LIBRARIES = {
    "CTranslate2": "ctranslate2",
    "llama.cpp": "llama-cpp",
    "OpenVINO GenAI": "openvino",
    "ONNX Runtime GenAI": "genai",
    "freeexport": "freeexport",
}
# Instructions that name a processor.
FEATURES = {"amx_int8": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "neon": "NEON"}
OVERVIEW_STEPS = {
    "decode-fp32": "fp32",
    "decode-fp16": "16 bits",
    "decode-int8": "8 bits",
    "decode-int4": "4 bits",
}

Row = Mapping[str, Any]


def pages(root: Path) -> dict[Path, str]:
    """Return the text of every page.

    Raises:
        ClickException: If a file is not a report of the current schema, or a trial's.
    """
    runs = {path: _report(path) for path in sorted((root / "docs" / "benchmarks").glob("*.json"))}
    found = {}
    for name, (page, head) in PAGES.items():
        parts = [head]
        if page == "benchmarks":
            parts.append("\n".join([*_overview(runs), ""]))
        for path, steps in runs.items():
            shown = [step for step in steps.values() if step["page"] == page]
            if shown:
                parts.append(f"## {path.stem.partition('-')[2].replace('-', ' ')}\n")
                parts += ["\n".join(_table_lines(step)) for step in shown]
                parts.append("\n".join([*_listed(_conditions(shown)), ""]))
        found[root / name] = "\n".join(parts)
    return found


def report_text(steps: Mapping[str, Row]) -> str:
    """Return a report as JSON, a line a step, numbers with seven digits."""
    lines = []
    for name, step in steps.items():
        short = json.loads(json.dumps(step), parse_float=lambda text: float(f"{float(text):.7g}"))
        lines.append(f"{json.dumps(name)}: {json.dumps(short, separators=(',', ':'))}")
    return f'{{"schema": {SCHEMA}, "steps": {{\n' + ",\n".join(lines) + "\n}}\n"


def _report(path: Path) -> dict[str, Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["schema"]
        steps = content["steps"]
        trials = [name for name, step in steps.items() if step["trial"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise click.ClickException(
            f"{path} is no report of tools.peers ({type(error).__name__})"
        ) from None
    if known != SCHEMA:
        raise click.ClickException(f"{path} is of schema {known}, not {SCHEMA}; measure again")
    if trials:
        raise click.ClickException(f"{path} has trials ({', '.join(trials)}); measure without")
    found: dict[str, Row] = steps
    return found


def section(step: Row) -> list[str]:
    """Return the lines of a step of a report: its heading, table and conditions."""
    return [*_table_lines(step), *_listed(_conditions([step])), ""]


def _table_lines(step: Row) -> list[str]:
    workloads = {_workload(row) for row in step["rows"]}
    if len(workloads) > 1:
        shown, caption = _by_workload(step)
    else:
        shown, caption = _by_decoder(step), ""
    missing = [f"not run: {peer} ({reason})" for peer, reason in step["failed"].items()]
    notes = [*filter(None, [step.get("note"), load_note(step["busy"])]), *missing]
    lines = [f"### {step['title']}", "", markdown(shown), ""]
    if caption:
        lines += [caption, ""]
    for note in notes:
        sentence = f"{note[0].upper()}{note[1:]}."
        lines += [textwrap.fill(sentence, 120, break_on_hyphens=False), ""]
    return lines


def _listed(texts: Iterable[str]) -> list[str]:
    return [
        textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_on_hyphens=False)
        for text in texts
    ]


def _workload(row: Row) -> tuple[int, ...]:
    return tuple(row.get(name) or 0 for name in ("read", "written", "beams", "rows"))


def _by_workload(step: Row) -> tuple[Sheet, str]:
    """Return a table with a column per workload, and a sentence about its cells."""
    figure = step["figure"]
    workloads = list(dict.fromkeys(_workload(row) for row in step["rows"]))
    varying = [len(set(values)) > 1 for values in zip(*workloads, strict=True)]

    def heading(workload: tuple[int, ...]) -> str:
        read, written, beams, rows = workload
        words = (f"{read:,} read", f"{written} written", f"{beams} beams", f"{rows} rows")
        shown = [word for word, differs in zip(words, varying, strict=True) if differs]
        return ", ".join(shown).replace("1 beams", "1 beam").replace("1 rows", "1 row")

    rows: dict[str, dict[tuple[int, ...], Row]] = {}
    for row in step["rows"]:
        rows.setdefault(row["name"], {})[_workload(row)] = row

    def cell(workload: tuple[int, ...]) -> Callable[[str], str]:
        def text(name: str) -> str:
            row = rows[name].get(workload)
            if row is None:
                return ""
            seconds = row[figure]["seconds"]
            value = row["rows"] / seconds if figure == "token" else 1e3 * seconds
            return f"{value:,.{0 if value >= 100 else 1}f}{_spread(row[figure])}"

        return text

    columns: dict[str, Callable[[str], str]] = {"decoder": lambda name: name}
    columns |= {f"{heading(workload)}#": cell(workload) for workload in workloads}
    unit = {
        "token": "tokens/s after the first token",
        "first": "ms to the first token",
        "request": "ms of a request",
    }[figure]
    bracket = any(_spread(row[figure]) for row in step["rows"])
    spread = ", and in brackets the spread between rounds" if bracket else ""
    every = {name.rstrip("#") for name in columns}
    return sheet("", columns, rows, keep=every), f"Cells: {unit}{spread}."


def _spread(figure: Row) -> str:
    return "" if figure.get("spread") is None else f" ({figure['spread']:.0%})"


def _by_decoder(step: Row) -> Sheet:
    """Return a table with a row per decoder."""
    figure = step["figure"]

    def speed(row: Row) -> str:
        if step["kind"] not in ("requests", "schema"):
            return ""
        tokens = row["rows"] if figure == "token" else row["written"] * row["rows"]
        return f"{tokens / row[figure]['seconds']:,.1f}{_spread(row[figure])}"

    def differing(name: str) -> Callable[[Row], str]:
        return lambda row: (
            f"{row[name]['differing_outputs']} of {row[name]['outputs']}" if name in row else ""
        )

    def memory(name: str) -> Callable[[Row], str]:
        return lambda row: human_bytes(row[name]) if row.get(name) else ""

    def same(row: Row) -> str:
        if step["kind"] != "fidelity":
            return ""
        return f"{row['same']:.0%} ({100 * row['same_low']:.0f} to {100 * row['same_high']:.0f})"

    def milliseconds(row: Row) -> str:
        return f"{1e3 * row['first']['seconds']:,.1f}" if row.get("first") else ""

    columns: dict[str, Callable[[Row], str]] = {
        "decoder": lambda row: row["name"],
        "tokens/s#": speed,
        "first ms#": milliseconds,
        "freeexport#": lambda row: _ratio(row.get(figure)),
        "peak memory#": memory("peak_bytes"),
        "own#": memory("own_bytes"),
        "peak after#": memory("peak_bytes_after"),
        "own after#": memory("own_bytes_after"),
        "same#": same,
        "next#": lambda row: f"{row['next']:.1%}" if "next" in row else "",
        "valid#": lambda row: "" if row.get("valid") is None else f"{row['valid']:.0%}",
        "greedy again#": differing("greedy_again"),
        "with drafts#": differing("with_drafts"),
    }
    every = {name.rstrip("#") for name in columns}
    return sheet("", columns, step["rows"], keep=every)


def _ratio(figure: Row | None) -> str:
    if figure is None:
        return ""
    if figure.get("ratio_low") is None:
        return f"{figure['ratio']:.2f}x"
    if figure["ratio_low"] == figure["ratio_high"] == 1:
        return ""
    return f"{figure['ratio']:.2f}x ({figure['ratio_low']:.2f} to {figure['ratio_high']:.2f})"


def _conditions(steps: Iterable[Row]) -> list[str]:
    """Return sentences about machine, commits, versions and flags that steps share."""
    machines: dict[str, None] = {}
    settings: dict[str, None] = {}
    commits: dict[str, None] = {}
    versions: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    flagged = set()
    for step in steps:
        machine = step["machine"]
        features = " ".join(machine["features"])
        machines[f"{machine['processor']}, {machine['cores']} cores ({features})"] = None
        threads = "1 thread" if step["threads"] == 1 else f"{step['threads']} threads"
        rounds = f", medians of {step['rounds']} interleaved rounds" if step["rounds"] > 1 else ""
        settings[f"{step['model']}, {threads}{rounds}"] = None
        commits[f"{step['made'][:10]}, commit {step['commit'] or 'not recorded'}"] = None
        versions |= step["versions"]
        for name, text in step["flags"].items():
            if name not in flagged:
                names.setdefault(text, []).append(name)
                flagged.add(name)
    return [
        *machines,
        "; ".join(settings),
        "; ".join(commits),
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        *(f"{', '.join(listed)}: {text}" for text, listed in names.items()),
    ]


def _overview(runs: Mapping[Path, Mapping[str, Row]]) -> list[str]:
    """Return the newest whole requests of each precision on each kind of processor."""
    newest: dict[tuple[str, str], Row] = {}
    for run in runs.values():
        for name, step in run.items():
            features = step["machine"]["features"]
            key = name, next((text for one, text in FEATURES.items() if one in features), "")
            if key not in newest or step["made"] > newest[key]["made"]:
                newest[key] = step
    lines = [
        "| SmolLM2-135M | " + " | ".join(LIBRARIES) + " |",
        "|---" * (len(LIBRARIES) + 1) + "|",
    ]
    for name, title in OVERVIEW_STEPS.items():
        for kind in FEATURES.values():
            if (name, kind) not in newest:
                continue
            rows = newest[name, kind]["rows"]
            shown = [
                next((row for row in rows if row["name"].startswith(start)), None)
                for start in LIBRARIES.values()
            ]
            best = min(row["request"]["seconds"] for row in shown if row)
            fidelity = newest.get(("fidelity", kind), {"rows": ()})
            shares = {row["name"]: row["same"] for row in fidelity["rows"]}
            cells = [f"{title}, {kind}"]
            cells += [_cell(row, best, shares.get(row["name"])) if row else "" for row in shown]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(row: Row, best: float, share: float | None) -> str:
    """Return the tokens/s of whole requests, their spread, and the share of equal tokens."""
    seconds = row["request"]["seconds"]
    bold = "**" if seconds == best else ""
    same = "" if share is None else f", {share:.0%}"
    return f"{bold}{row['written'] / seconds:.1f}{bold} ({row['request']['spread']:.0%}{same})"
