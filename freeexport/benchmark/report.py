"""A benchmark's figures, as a table, and as what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from freeexport import __version__
from freeexport.benchmark.options import BenchOptions
from freeexport.benchmark.rows import Row
from freeexport.system.machine import detect_machine
from freeexport.system.page import human_bytes
from runtime.bundle.bundle import Bundle

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """`failed`: why contenders could not run, by name. `bandwidth`: bytes a second that as many threads can read."""

    settings: dict[str, Any]
    rows: list[Row]
    failed: dict[str, str]
    bandwidth: float


def settings(bundle: Bundle, options: BenchOptions, prompts: int, idle: bool, truth: str | None) -> dict[str, Any]:
    """What the figures depend on. `truth`: whose tokens others were compared with."""
    manifest, machine = bundle.manifest, detect_machine()
    return {
        "freeexport": __version__,
        "model": manifest.source,
        "family": manifest.family,
        "exit_layer": f"{manifest.exit_layer} of {manifest.layers}",
        "threads": options.count,
        "device": options.device,
        "batch": 1,
        "prompts": prompts,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "decoding": "greedy, ends of sequence ignored",
        "compared_with": truth,
        "cpu": machine.cpu,
        "cpu_features": list(machine.features),
        "cores": machine.cores,
        "memory": machine.memory,
        "idle": idle,
    }


def as_dict(report: Report) -> dict[str, Any]:
    """What --json prints and --save writes: tools/benchmarks_page.py makes the documentation's page of it."""
    return {
        "schema": SCHEMA,
        "settings": report.settings,
        "bandwidth": report.bandwidth,
        "rows": [asdict(row) for row in report.rows],
        "failed": report.failed,
    }


COLUMNS = (
    *("", "precision", "tokens/s", "spread", "ratio", "first ms", "ms", "95 %"),
    *("memory", "same", "differs", "exits", "kept", "roofline"),
)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row, as `as_dict` gives it, under COLUMNS."""
    place, same = row["first_difference"], row["agreement"]
    exits = row["exit_rate"]
    return (
        row["name"],
        row["precision"],
        f"{row['tokens_per_second']:.1f}",
        f"{row['spread']:.0%}",
        _ratio(row),
        f"{row['first_token_ms']:.0f}",
        f"{row['token_ms']:.1f}",
        f"{row['token_ms_95']:.1f}",
        human_bytes(row["peak_bytes"]),
        "" if same is None else f"{same:.0%}",
        "" if same is None else "never" if place is None else f"at {place:.0f}",
        f"{exits:.0%}" if exits else "",
        f"{row['acceptance']:.0%}" if exits or row["acceptance"] < 1 else "",
        "" if row["roofline"] is None else f"{row['roofline']:.0%}",
    )


def table(report: Report) -> str:
    """For people: a row a contender, who could not run, and what it all depends on."""
    found = as_dict(report)
    lines = [COLUMNS, *map(cells, found["rows"])]
    # A column that nobody has anything to say in is left out.
    used = [number for number in range(len(COLUMNS)) if any(line[number] for line in lines[1:])]
    widths = {number: max(len(line[number]) for line in lines) for number in used}
    text = [
        "  ".join(line[n].ljust(widths[n]) if n < 2 else line[n].rjust(widths[n]) for n in used).rstrip()
        for line in lines
    ]
    text += [f"{name}: not run: {reason}" for name, reason in report.failed.items()]
    text += notes(found)
    return "\n".join(text)


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the figures of `as_dict` depend on, and what their columns mean."""
    used, rows = found["settings"], found["rows"]
    lines = [
        f"{used['model']}, exit after layer {used['exit_layer']}, {used['threads']} threads, batch {used['batch']}, "
        f"{used['prompts']} prompts, {used['tokens']} new tokens each, {used['decoding']}, "
        f"median of {used['rounds']} interleaved rounds",
        f"{used['cpu']}, {used['cores']} cores ({' '.join(used['cpu_features'])}), {human_bytes(used['memory'])}; "
        f"{used['threads']} threads read {found['bandwidth'] / 1e9:.1f} GB/s",
    ]
    if used.get("device", "cpu") != "cpu":
        lines.append(f"the bundles ran on {used['device']}, the others where they choose to")
    if rows:
        base = f"ratio: to {rows[0]['name']}"
        predicted = any(row["predicted"] for row in rows)
        lines.append(base + ("; in brackets: to mode full, as the cost model predicts" if predicted else ""))
    if used["compared_with"]:
        lines.append(
            f"same: tokens equal to those of {used['compared_with']} at the same place; differs: the first that is "
            "not, the median over prompts"
        )
    if "freeexport" in used:
        lines.append(f"freeexport {used['freeexport']}")
    for name, version in sorted({item for row in rows for item in row["versions"].items()}):
        lines.append(f"{name} {version}")
    if not used["idle"]:
        lines.append("the machine was busy with other work: these figures are not to be trusted")
    return lines


def _ratio(row: Mapping[str, Any]) -> str:
    if row["ratio"] is None:
        return "-"
    predicted = "" if row["predicted"] is None else f" ({row['predicted']:.2f})"
    return f"{row['ratio']:.2f}x{predicted}"
