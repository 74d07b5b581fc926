"""What judgements come to: means over lines with intervals, and how far repeats agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.evaluation.figures import CONFIDENCE, RESAMPLES, SEED
from freeexport.evaluation.judging.judge import Judgement, JudgeOptions
from freeexport.system.page import pairs

if TYPE_CHECKING:
    from rich.table import Table


def summary(judgements: Sequence[Judgement], options: JudgeOptions) -> dict[str, Any]:
    """Of each kind: means over lines with 95 % intervals of a bootstrap over them, and how far repeats agree."""
    made: dict[str, Any] = {"lines": len({one.line for one in judgements}), "repeats": options.repeats}
    for kind in options.kinds:
        mine = [one for one in judgements if one.kind == kind]
        valid = [one for one in mine if one.verdict is not None]
        found = _likert(valid, options.setting) if kind == "likert" else _pairwise(valid)
        made[kind] = {**found, "agreement": _agreement(valid), "without_verdict": len(mine) - len(valid)}
    return made


def _likert(valid: Sequence[Judgement], setting: str) -> dict[str, Any]:
    grades: dict[str, dict[int, list[float]]] = {"full": defaultdict(list), setting: defaultdict(list)}
    for one in valid:
        grades[one.of][one.line].append(float(one.verdict or 0))
    other = {line: grades[setting].get(line, full) for line, full in grades["full"].items()}
    lines = [line for line in other if other[line]]
    ours, full = (np.array([np.mean(each[line]) for line in lines]) for each in (other, grades["full"]))
    return {"full": _mean(full), "other": _mean(ours), "difference": _mean(ours - full)}


def _pairwise(valid: Sequence[Judgement]) -> dict[str, Any]:
    """A line's preference is the mean over its repeats: 1 for the other setting, 0 for full, a half for a tie."""
    worth = {"other": 1.0, "tie": 0.5, "full": 0.0}
    lines: Mapping[int, list[float]] = defaultdict(list)
    for one in valid:
        lines[one.line].append(worth[str(one.verdict)])
    values = np.array([np.mean(each) for each in lines.values()])
    asked = [one for one in valid if one.asked and one.verdict != "tie"]
    first = [(one.verdict == "other") == one.swapped for one in asked]
    return {
        "other_wins": int((values > 0.5).sum()),
        "ties": int((values == 0.5).sum()),
        "full_wins": int((values < 0.5).sum()),
        "same_text": len({one.line for one in valid if not one.asked}),
        "preference": _mean(values),
        "first_position": float(np.mean(first)) if first else None,
    }


def _mean(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    drawn = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def _agreement(valid: Sequence[Judgement]) -> float | None:
    """The share of pairs of repeats with the same verdict, of what was asked; None without repeats."""
    groups: dict[tuple[int, str], list[Any]] = defaultdict(list)
    for one in valid:
        if one.asked:
            groups[one.line, one.of].append(one.verdict)
    pairs = [a == b for each in groups.values() for place, a in enumerate(each) for b in each[place + 1 :]]
    return float(np.mean(pairs)) if pairs else None


def summary_tables(found: Mapping[str, Any], options: JudgeOptions) -> list[Table]:
    """For a terminal."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['value']:.3f} (95 %: {value['low']:.3f} to {value['high']:.3f})"
        return "unknown" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    about = (
        f"{options.setting} beside full, {found['lines']} lines, {found['repeats']} verdict(s) each, {options.model}"
    )
    return [
        pairs(f"{kind}: {about}", [(name.replace("_", " "), shown(value)) for name, value in found[kind].items()])
        for kind in options.kinds
    ]
