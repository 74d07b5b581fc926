"""Speed of settings: rows, report and table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from freeexport.costs.bytes import ByteModel
from freeexport.costs.timing import spread
from freeexport.costs.verdict import speed_verdict
from freeexport.evaluate.records import Lines, Record
from freeexport.evaluate.settings import Entry
from freeexport.system.environment import environment
from freeexport.system.load import load_note
from freeexport.system.page import human_bytes
from freeexport.system.sheet import Sheet, plus_minus, sheet
from runtime.bundle.manifest import Manifest

SCHEMA = 1

SpeedRow = dict[str, Any]
# A decoded prompt of each line, in one round.
Round = Sequence[Record]


def speed_rows(
    found: Mapping[str, Lines],
    precisions: Mapping[str, str],
    reference: str | None,
) -> list[SpeedRow]:
    """Compute a row per name.

    Speeds are medians over rounds of all prompts together, from prompt to last token. Fields that
    need an explanation:

    - `spread`: Range of the speed over rounds as a share of the median.
    - `ratio`: Speed relative to the first row's in the same round.
    - `decode_per_second`: Speed without prompts and first tokens.
    - `agreement`: Share of tokens that equal the reference at the same place.
    - `first_difference`: Place of the first token that differs, as a median over the prompts with a
      difference. None if all tokens are equal.
    - `passes`: Deep passes per token.
    - `token_bytes`, `roofline`: See `add_roofline`.

    Args:
        found: Records by name, then by line, with rounds in order.
        precisions: Precision by name.
        reference: Name whose tokens are compared with. None skips the comparison.
    """
    rows: list[SpeedRow] = []
    base: list[float] = []
    truth = None if reference is None else _rounds(found[reference])[0]
    for name, lines in found.items():
        rounds = _rounds(lines)
        speeds = [_speed(done) for done in rounds]
        base = base or speeds
        ratios = [speed / first for speed, first in zip(speeds, base, strict=True)]
        same, place = (None, None) if truth is None else _agreement(rounds[0], truth)
        every = [one for done in rounds for one in done]
        gaps = 1e3 * np.concatenate([np.diff(one.times) for one in every])
        after_first = [
            sum(one.tokens - 1 for one in done) / sum(one.decode_seconds for one in done)
            for done in rounds
        ]
        row = {
            "name": name,
            "precision": precisions[name],
            "tokens_per_second": median(speeds),
            "spread": spread(speeds),
            "ratio": median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "decode_per_second": median(after_first),
            "first_token_ms": median(1e3 * one.first_seconds for one in every),
            "token_ms": float(np.median(gaps)),
            "token_ms_95": float(np.percentile(gaps, 95)),
            **_decisions(every),
            "agreement": same,
            "first_difference": place,
            "token_bytes": None,
            "roofline": None,
        }
        rows.append(row)
    return rows


def _rounds(lines: Lines) -> list[Round]:
    """Return the records of each complete round, in the order of lines."""
    return [list(turns) for turns in zip(*lines.values(), strict=False)]


def _speed(done: Round) -> float:
    """Return tokens per second of whole requests."""
    return sum(one.tokens for one in done) / sum(one.seconds for one in done)


def _decisions(every: Round) -> SpeedRow:
    """Return the exits, accepted drafts and deep passes.

    Decoders that are not bundles record no calls: they have one deep pass per token.
    """
    calls = [one.calls for one in every if one.calls is not None]
    decided = sum(one.tokens for one in calls)
    passes = sum(sum(one.passes.values()) for one in calls)
    outside = [1e6 * one.overhead / one.tokens for one in every]
    return {
        "exit_rate": sum(sum(one.exited) for one in every) / decided if decided else 0.0,
        "acceptance": fmean(one.acceptance for one in every),
        "passes": passes / decided if decided else 1.0,
        "overhead_us": fmean(outside) if passes else None,
    }


def _agreement(done: Round, truth: Round) -> tuple[float, float | None]:
    """Return the share of equal tokens, and the median place of the first difference."""
    same = [
        np.equal(one.token_ids, other.token_ids) for one, other in zip(done, truth, strict=True)
    ]
    places = [int(np.argmin(row)) for row in same if not row.all()]
    return float(np.concatenate(same).mean()), float(median(places)) if places else None


def add_roofline(row: SpeedRow, model: ByteModel, lines: Lines, bandwidth: float) -> None:
    """Add the bytes that a token reads, and the share of the memory bandwidth (bytes/s) used."""
    calls = [one.calls for turns in lines.values() for one in turns]
    row["token_bytes"] = round(model.token(one for one in calls if one is not None))
    row["roofline"] = row["token_bytes"] * row["decode_per_second"] / bandwidth


def row_names(entries: Sequence[Entry]) -> dict[tuple[str, str], str]:
    """Return the name of each setting's row, by bundle and setting."""
    several = len(entries) > 1
    return {
        (entry.name, setting.name): f"{entry.name} {setting.name}" if several else setting.name
        for entry in entries
        for setting in entry.settings
    }


def speed_facts(
    manifest: Manifest,
    *,
    threads: int,
    device: str,
    prompts: int,
    tokens: int,
    rounds: int,
    choice: str,
    reference: str | None,
    busy: float,
) -> dict[str, Any]:
    """Return the conditions of a measurement of speed."""
    made = environment()
    machine = made["machine"]
    return {
        "freeexport": made["versions"]["freeexport"],
        "onnxruntime": made["versions"]["onnxruntime"],
        "made": made["made"],
        "model": manifest.source,
        "family": manifest.family,
        "exit_layer": f"{manifest.exit_layer} of {manifest.layers}",
        "threads": threads,
        "device": device,
        "batch": 1,
        "prompts": prompts,
        "tokens": tokens,
        "rounds": rounds,
        "decoding": f"{choice}, ends of sequence ignored",
        "compared_with": reference,
        "cpu": machine["processor"],
        "cpu_features": machine["features"],
        "cores": machine["cores"],
        "memory": machine["memory"],
        "busy": busy,
        "idle": not load_note(busy),
    }


def speed_report(
    rows: Sequence[SpeedRow],
    facts: Mapping[str, Any],
    bandwidth: float,
    usable: Collection[str],
) -> dict[str, Any]:
    """Build the JSON report.

    Args:
        facts: Conditions, as returned by `speed_facts`.
        bandwidth: Memory bandwidth in bytes per second.
        usable: Names of the rows that may win. The shallow decoder alone is none of them.
    """
    return {
        "schema": SCHEMA,
        "settings": dict(facts),
        "bandwidth": bandwidth,
        "rows": list(rows),
        "verdict": speed_verdict(rows, usable),
    }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _difference(row: SpeedRow) -> str:
    if row["agreement"] is None:
        return ""
    place = row["first_difference"]
    return "never" if place is None else f"at {place:.0f}"


def _ratio(row: SpeedRow) -> str:
    if row["ratio"] is None:
        return "-"
    return f"{plus_minus(row['ratio'], row.get('ratio_low'), row.get('ratio_high'), 2)}x"


def _kept(row: SpeedRow) -> str:
    drafted = row["exit_rate"] or row["acceptance"] < 1
    return _share(row["acceptance"]) if drafted else ""


def speed_sheet(report: Mapping[str, Any]) -> Sheet:
    """Return the table of a report of speed."""
    columns: dict[str, Callable[[SpeedRow], str]] = {
        "setting": lambda row: row["name"],
        "precision": lambda row: row["precision"],
        "tokens/s#": lambda row: f"{row['tokens_per_second']:.1f}",
        "spread#": lambda row: _share(row["spread"]),
        "ratio#": _ratio,
        "first ms#": lambda row: f"{row['first_token_ms']:.0f}",
        "ms#": lambda row: f"{row['token_ms']:.1f}",
        "95 %#": lambda row: f"{row['token_ms_95']:.1f}",
        "same#": lambda row: _share(row["agreement"]),
        "differs#": _difference,
        "exits#": lambda row: _share(row["exit_rate"] or None),
        "kept#": _kept,
        "roofline#": lambda row: _share(row["roofline"]),
    }
    always = ("setting", "tokens/s", "spread", "ratio", "first ms", "ms", "95 %", "same")
    return sheet("", columns, report["rows"], keep=always)


def speed_lines(report: Mapping[str, Any], shown: Sheet | None = None) -> list[str]:
    """Describe the conditions of a measurement of speed and the meaning of its columns.

    Args:
        report: Report of the measurement.
        shown: Table whose columns are explained. Default: the table with all columns.
    """
    used = report["settings"]
    rows = report["rows"]
    whole = speed_sheet(report)
    hidden = set[str]() if shown is None else shown.hides(whole)
    lines = [f"{name}: {text}" for name, text in whole.facts]
    lines += [
        f"{used['model']}, exit after layer {used['exit_layer']}, {used['threads']} threads, "
        f"batch {used['batch']}, {used['prompts']} prompts, {used['tokens']} new tokens each, "
        f"{used['decoding']}, median of {used['rounds']} interleaved rounds",
        f"{used['cpu']}, {used['cores']} cores ({' '.join(used['cpu_features'])}), "
        f"{human_bytes(used['memory'])}; "
        f"{used['threads']} threads read {report['bandwidth'] / 1e9:.1f} GB/s",
    ]
    if used.get("device", "cpu") != "cpu":
        lines.append(f"the bundles ran on {used['device']}")
    if rows:
        lines.append(f"ratio: to {rows[0]['name']}, ± half the range over rounds")
    if used["compared_with"]:
        lines.append(f"same: tokens equal to those of {used['compared_with']} at the same place")
        if "differs" not in hidden:
            lines.append(
                "differs: the place of the first token that is not the same, "
                "the median over prompts"
            )
    versions = {name: used[name] for name in ("freeexport", "onnxruntime") if name in used}
    lines.append(", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    if not used["idle"]:
        lines.append(load_note(used.get("busy", 1.0)))
    return lines
