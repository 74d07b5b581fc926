"""The report of `tools.gpu.prove`, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from freeexport.system.sheet import Sheet, markdown

CPU_NOTE = (
    "**These steps ran on the CPU: the same code and graphs, but no CUDA. Not yet run on a GPU.**"
)
BAD = ("failed", "error", "timed out", "not run")


def report_text(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown, with all values as JSON at its end."""
    steps = report["steps"]
    counts = {state: sum(step["state"] == state for step in steps) for state in _states(steps)}
    counted = ", ".join(f"{count} {state}" for state, count in counts.items())
    whole = "" if report["complete"] else " The run has not finished."
    parts = [f"# Proof on {report['device']}", f"{counted or 'No step has ended yet'}.{whole}"]
    parts.append(
        f"{report['made']}, commit {report['commit']}, {report['model']}, "
        f"{report['tokens']} tokens, {report['rounds']} round(s), {report['machine']['processor']}"
    )
    if report["device"] == "cpu":
        parts.append(CPU_NOTE)
    parts += list(_problems(steps))
    columns = ("precision", "step", "state", "seconds#", "outcome")
    rows = tuple(
        (
            step["precision"],
            step["step"],
            step["state"],
            f"{step['seconds']:.0f}",
            _cell(step["line"]),
        )
        for step in steps
    )
    parts += ["## Steps", markdown(Sheet("Steps", columns, rows))]
    for step in steps:
        if step["rows"]:
            parts.append(f"## {_title(step)}")
            cells = tuple(tuple(_cell(cell) for cell in row) for row in step["rows"])
            parts.append(markdown(Sheet("", tuple(step["columns"]), cells)))
    parts += ["## Values", f"```json\n{json.dumps(report, separators=(',', ':'))}\n```"]
    return "\n\n".join(parts) + "\n"


def _problems(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    bad = [step for step in steps if step["state"] in BAD]
    if bad:
        yield "## What did not pass"
    for step in bad:
        yield f"**{_title(step)}**, {step['state']}: {step['line']}"
        if step["last_lines"]:
            yield "```\n" + "\n".join(step["last_lines"]) + "\n```"


def _states(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(step["state"] for step in steps))


def _title(step: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (step["step"], step["precision"])))


def _cell(value: Any) -> str:
    return str(value).replace("\n", " ")
