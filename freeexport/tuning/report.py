"""What tuning found: tables, one sentence, and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from freeexport.system.page import table
from freeexport.tuning.bundles import Entry
from freeexport.tuning.tune import Candidate, Tuned

if TYPE_CHECKING:
    from rich.table import Table

BUSY = "the machine was busy, so speeds, and with them the choice, are not to be trusted"
_BUNDLES = ("bundle", "exit layer#", "agree#", "exits pay from#")
_CANDIDATES = ("bundle", "exit layer#", "threshold#", "max pending#", "exit#", "agree#", "predicted#", "measured#",
               "tokens/s#", "quality#", "held out#", "")  # fmt: skip


def tables(tuned: Tuned) -> list[Table]:
    names = short_names(tuned.entries)
    bundles = [_bundle(name, entry) for name, entry in zip(names, tuned.entries, strict=True)]
    rows = [_candidate(names[one.point.bundle], one, tuned) for one in tuned.candidates]
    return [
        table("bundles: tokens at which both decoders agree", _BUNDLES, bundles),
        table(f"candidates: {tuned.options.metric} kept of the full model's", _CANDIDATES, rows),
    ]


def advice(tuned: Tuned) -> str:
    """One sentence, or two."""
    if tuned.choice is None:
        return f"use mode full: {tuned.reason}"
    point, one = tuned.choice.point, tuned.choice
    entry = tuned.entries[point.bundle]
    return (
        f"{entry.path}, exit layer {entry.manifest.exit_layer} of {entry.manifest.layers}, threshold "
        f"{point.threshold:g}, max_pending {point.max_pending}: {one.quality:.1%} of the full model's "
        f"{tuned.options.metric} on {tuned.held_out} sequences not used for the choice, at {one.gain:.2f}x its "
        f"speed ({one.measured:.2f}x measured, {point.predicted:.2f}x predicted of the same bundle in mode full)"
    )


def notes(tuned: Tuned) -> list[str]:
    return [] if tuned.idle else [BUSY]


def as_dict(tuned: Tuned, written: bool) -> dict[str, Any]:
    """For programs. `written`: whether the choice was put into its bundle."""
    entries = [
        {
            "bundle": str(entry.path),
            "exit_layer": entry.manifest.exit_layer,
            "agreement": entry.traces.agreement,
            "break_even": entry.costs.break_even(entry.manifest.max_pending),
            "costs": asdict(entry.costs),
        }
        for entry in tuned.entries
    ]
    return {
        "advice": advice(tuned),
        "notes": notes(tuned),
        "choice": None if tuned.choice is None else _flat(tuned, tuned.choice),
        "candidates": [_flat(tuned, one) for one in tuned.candidates],
        "bundles": entries,
        "full_tokens_per_second": None if math.isnan(tuned.full) else tuned.full,
        "sequences": tuned.sequences,
        "held_out": tuned.held_out,
        "idle": tuned.idle,
        "written": written,
        "settings": asdict(tuned.options),
    }


def short_names(entries: Sequence[Entry]) -> list[str]:
    """Directories' names, or whole paths where these are the same."""
    names = [entry.path.name for entry in entries]
    return names if len(set(names)) == len(names) else [str(entry.path) for entry in entries]


def _bundle(name: str, entry: Entry) -> tuple[str, ...]:
    even = entry.costs.break_even(entry.manifest.max_pending)
    layers = f"{entry.manifest.exit_layer} of {entry.manifest.layers}"
    return name, layers, f"{entry.traces.agreement:.1%}", "never" if even is None else f"{even:.1%} exits"


def _candidate(name: str, one: Candidate, tuned: Tuned) -> tuple[str, ...]:
    point = one.point
    return (
        name,
        str(tuned.entries[point.bundle].manifest.exit_layer),
        f"{point.threshold:g}",
        str(point.max_pending),
        f"{point.exit_rate:.1%}",
        f"{point.agreement:.1%}",
        f"{point.predicted:.2f}x",
        f"{one.measured:.2f}x",
        f"{one.speed:.0f}",
        "" if one.searched is None else f"{one.searched:.2%}",
        f"{one.quality:.2%}",
        "chosen" if one is tuned.choice else "",
    )


def _flat(tuned: Tuned, one: Candidate) -> dict[str, Any]:
    entry = tuned.entries[one.point.bundle]
    return {
        **asdict(one.point),
        "bundle": str(entry.path),
        "exit_layer": entry.manifest.exit_layer,
        "searched_quality": one.searched,
        "quality": one.quality,
        "measured": one.measured,
        "tokens_per_second": one.speed,
        "gain": one.gain,
    }
