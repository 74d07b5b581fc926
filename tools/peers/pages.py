"""Generates docs/benchmarks.md, docs/results/peers.md and the README's table of other decoders.

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
from freeexport.system.sheet import markdown, sheet

SCHEMA = 3
BENCHMARKS = """# Benchmarks

Generated from docs/benchmarks/*.json by `python -m tools.peers pages`; do not edit. Tokens that \
freeexport and
other decoders generate, in mode `full`. [How they are measured, and what the columns \
mean](benchmarking.md).
[Prompts and encoder-decoders](results/peers.md) are on a page of their own.
"""
PEERS = """# Other decoders: prompts and encoder-decoders

Generated from docs/benchmarks/*.json by `python -m tools.peers pages`; do not edit. [How they \
are measured, and what
the columns mean](../benchmarking.md). [Benchmarks](../benchmarks.md) compares the generation of \
tokens.

Prompts are random tokens, so no figure depends on a test split. Models of Marian's and \
NLLB-600M's sizes have random
weights, which cost as much as the published ones.
"""
PAGES = {
    "docs/benchmarks.md": ("benchmarks", BENCHMARKS),
    "docs/results/peers.md": ("peers", PEERS),
}
BEGIN = "<!-- other decoders, by python -m tools.peers pages -->"
END = "<!-- end of other decoders -->"
# Columns of the README's table: libraries and the beginning of their rows' names.
LIBRARIES = {
    "CTranslate2": "ctranslate2",
    "llama.cpp": "llama-cpp",
    "OpenVINO GenAI": "openvino",
    "ONNX Runtime GenAI": "genai",
    "freeexport": "freeexport",
}
# Instructions that name a processor.
FEATURES = {"amx_int8": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "neon": "NEON"}
README_STEPS = {
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
        for path, steps in runs.items():
            shown = [step for step in steps.values() if step["page"] == page]
            if shown:
                parts.append(f"## {path.stem.partition('-')[2].replace('-', ' ')}\n")
                parts += ["\n".join(section(step, steps.values())) for step in shown]
        found[root / name] = "\n".join(parts)
    readme = root / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise click.ClickException(f"{readme} lacks {BEGIN} or {END}")
    found[readme] = before + "\n".join([begin, *_readme(runs), end]) + after
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


def _shares(step: Row, steps: Iterable[Row]) -> dict[str, float]:
    """Return the shares of tokens that equal fp32's, by decoder, for a step of whole requests."""
    if (step["kind"], step["figure"]) != ("requests", "request"):
        return {}
    return {
        row["name"]: row["same"]
        for one in steps
        if one["kind"] == "fidelity" and one["model"] == step["model"]
        for row in one["rows"]
    }


def section(step: Row, steps: Iterable[Row]) -> list[str]:
    """Return the lines of a step of a report: its heading, table and conditions."""
    shown = _table(step, _shares(step, steps))
    lines = [f"{name}: {value}" for name, value in shown.facts]
    lines += [f"{peer}: not run: {reason}" for peer, reason in step["failed"].items()]
    lines += _conditions(step)
    filled = (
        textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_on_hyphens=False)
        for text in lines
    )
    return [f"### {step['title']}", "", markdown(shown), "", *filled, ""]


def _table(step: Row, shares: Mapping[str, float]) -> Any:
    figure = step["figure"]

    def speed(row: Row) -> str:
        tokens = {"first": row.get("read", 0), "token": row.get("rows", 0)}
        count = tokens.get(figure, row.get("written", 0) * row.get("rows", 0))
        return f"{count / row[figure]['seconds']:,.1f}" if count else ""

    def differing(name: str) -> Callable[[Row], str]:
        return lambda row: (
            f"{row[name]['differing_outputs']} of {row[name]['outputs']}" if name in row else ""
        )

    def number(name: str) -> Callable[[Row], str]:
        plain = {row.get(name, 0) for row in step["rows"]} <= {0, 1}
        return lambda row: "" if plain else f"{row[name]:,}"

    def memory(name: str) -> Callable[[Row], str]:
        return lambda row: human_bytes(row[name]) if row.get(name) else ""

    def same(row: Row) -> str:
        if step["kind"] != "fidelity":
            return f"{shares[row['name']]:.0%}" if row["name"] in shares else ""
        return f"{row['same']:.0%} ({100 * row['same_low']:.0f} to {100 * row['same_high']:.0f})"

    def share(name: str) -> Callable[[Row], str]:
        return lambda row: "" if row.get(name) is None else f"{row[name]:.0%}"

    def milliseconds(name: str) -> Callable[[Row], str]:
        return lambda row: f"{1e3 * row[name]['seconds']:,.1f}" if row.get(name) else ""

    columns: dict[str, Callable[[Row], str]] = {
        "read#": number("read"),
        "written#": number("written"),
        "beams#": number("beams"),
        "rows#": number("rows"),
        "decoder": lambda row: row["name"],
        "precision": lambda row: row["precision"],
        "tokens/s#": speed,
        "ms#": milliseconds(figure),
        "spread#": lambda row: share("spread")(row.get(figure, {})),
        "freeexport#": lambda row: _ratio(row.get(figure)),
        "first ms#": milliseconds("first") if figure != "first" else lambda row: "",
        "token ms#": milliseconds("token") if figure != "token" else lambda row: "",
        "peak memory#": memory("peak_bytes"),
        "memory#": memory("resident_bytes"),
        "own#": memory("own_bytes"),
        "peak after#": memory("peak_bytes_after"),
        "memory after#": memory("resident_bytes_after"),
        "own after#": memory("own_bytes_after"),
        "same#": same,
        "next#": lambda row: f"{row['next']:.1%}" if "next" in row else "",
        "differs#": _differs,
        "equal#": lambda row: (
            f"{row['equal_outputs']} of {row['outputs']}" if "equal_outputs" in row else ""
        ),
        "bandwidth#": share("bandwidth"),
        "valid#": share("valid"),
        "forced#": share("forced"),
        "grammar#": share("grammar"),
        "differ again#": differing("greedy_again"),
        "with drafts#": differing("with_drafts"),
    }
    keep = ("decoder", "precision", "tokens/s", "ms", "spread", "freeexport", "same")
    return sheet("", columns, step["rows"], keep=keep)


def _ratio(figure: Row | None) -> str:
    if figure is None:
        return ""
    if figure.get("ratio_low") is None:
        return f"{figure['ratio']:.2f}x"
    if figure["ratio_low"] == figure["ratio_high"] == 1:
        return ""
    return f"{figure['ratio']:.2f}x ({figure['ratio_low']:.2f} to {figure['ratio_high']:.2f})"


def _differs(row: Row) -> str:
    if "next" not in row:
        return ""
    return "never" if row.get("differs") is None else f"at {row['differs']:.0f}"


def _conditions(step: Row) -> list[str]:
    """Return sentences about the machine, the rounds and the versions of a step."""
    machine = step["machine"]
    reads = f", which reads {step['bandwidth'] / 1e9:.1f} GB/s" if step.get("bandwidth") else ""
    listed = ", ".join(f"{name} {version}" for name, version in sorted(step["versions"].items()))
    rounds = f", medians of {step['rounds']} interleaved rounds" if step["rounds"] > 1 else ""
    threads = "thread" if step["threads"] == 1 else "threads"
    commit = step["commit"] or "not recorded"
    lines = [
        f"{step['model']}, {step['threads']} {threads}{rounds}; {machine['processor']}, "
        f"{machine['cores']} cores ({' '.join(machine['features'])}){reads}",
        f"{step['made'][:10]}, commit {commit}; {listed}",
    ]
    lines += [f"{name}: {text}" for name, text in step["flags"].items()]
    return [*lines, *filter(None, [step.get("note"), load_note(step["busy"])])]


def _readme(runs: Mapping[Path, Mapping[str, Row]]) -> list[str]:
    """Return the README's table: the newest run of each precision on each kind of processor."""
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
    for name, title in README_STEPS.items():
        for kind in FEATURES.values():
            if (name, kind) not in newest:
                continue
            step = newest[name, kind]
            rows = step["rows"]
            shown = [
                next((row for row in rows if row["name"].startswith(start)), None)
                for start in LIBRARIES.values()
            ]
            best = min(row["request"]["seconds"] for row in shown if row)
            shares = _shares(step, [one for (_, its), one in newest.items() if its == kind])
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
