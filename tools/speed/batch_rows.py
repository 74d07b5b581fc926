"""Figures of tools/speed/batches.py: a row for each mode and batch, and where a mode stops paying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from tools.speed.closed_loop import Window

MODES = ("full", "free", "lossless")


@dataclass(frozen=True)
class Setting:
    mode: str
    batch: int


@dataclass(frozen=True)
class Row:
    """`tokens_per_second`: the median over rounds, `spread` the largest less the smallest as a share of it, `ratio` its
    multiple of mode full's at the same batch. Milliseconds between tokens, and of whole requests from joining to the
    last token: median and 95th percentile."""

    mode: str
    batch: int
    tokens_per_second: float
    spread: float
    ratio: float
    token_ms: float
    token_ms_95: float
    request_ms: float
    request_ms_95: float
    exit_rate: float


def rows_of(windows: Mapping[Setting, Sequence[Window]]) -> list[Row]:
    full = {setting.batch: _speed(turns)[0] for setting, turns in windows.items() if setting.mode == "full"}
    rows = []
    for setting, turns in windows.items():
        speed, spread = _speed(turns)
        gaps = 1e3 * np.concatenate([turn.gaps for turn in turns])
        latencies = 1e3 * np.concatenate([turn.latencies for turn in turns])
        rows.append(
            Row(
                setting.mode,
                setting.batch,
                speed,
                spread,
                speed / full[setting.batch],
                *_percentiles(gaps),
                *_percentiles(latencies),
                median(turn.exit_rate for turn in turns),
            )
        )
    return sorted(rows, key=lambda row: (MODES.index(row.mode), row.batch))


def _speed(turns: Sequence[Window]) -> tuple[float, float]:
    speeds = [turn.tokens_per_second for turn in turns]
    middle = median(speeds)
    return middle, (max(speeds) - min(speeds)) / middle


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    return float(np.median(values)), float(np.percentile(values, 95))


def verdict(ratios: Mapping[int, float], mode: str) -> str:
    """Where a mode stops paying, of its multiples of mode full's tokens/s by batch."""
    batches = sorted(ratios)
    losing = next((batch for batch in batches if ratios[batch] < 1), None)
    if losing is None:
        return f"{mode} pays at every batch measured, up to {batches[-1]} ({ratios[batches[-1]]:.2f}x)"
    if losing == batches[0]:
        return f"{mode} pays at no batch from {losing} on ({ratios[losing]:.2f}x)"
    last = batches[batches.index(losing) - 1]
    return f"{mode} stops paying between batch {last} ({ratios[last]:.2f}x) and {losing} ({ratios[losing]:.2f}x)"


def table(about: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Markdown, with what it depends on above and what follows from it below."""
    lines = [
        f"{about['model']}, exit after layer {about['exit_layer']}, {about['precision']}, exits {about['exits']}; "
        f"{about['threads']} threads of {about['of_cores']} cores ({about['cpu']}), {about['prompts']} prompts, up to "
        f"{about['tokens']} tokens, {about['rounds']} rounds of {about['seconds']:g} s"
        + ("" if about["idle"] else ", BUSY MACHINE: not figures"),
        "",
        "| batch | mode | tokens/s | spread | of full | token ms | 95 % | request ms | 95 % | exits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exits = "" if row.mode == "full" else f"{row.exit_rate:.0%}"
        lines.append(
            f"| {row.batch} | {row.mode} | {row.tokens_per_second:.1f} | {row.spread:.0%} | {row.ratio:.2f}x "
            f"| {row.token_ms:.2f} | {row.token_ms_95:.2f} | {row.request_ms:.0f} | {row.request_ms_95:.0f} | {exits} |"
        )
    for mode in dict.fromkeys(row.mode for row in rows if row.mode != "full"):
        lines += ["", verdict({row.batch: row.ratio for row in rows if row.mode == mode}, mode)]
    return "\n".join(lines)
