"""Quality and speed of settings, from the records of an evaluation: scores with paired intervals, curves, verdicts.

Rows are dicts, as JSON keeps them: those of `rows_of` have a setting of a bundle each, over all lines, and those of
`curves_of` a method of a bundle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from freeexport.measure.settings import Entry, Record, Setting
from freeexport.measure.timing import spread
from freeexport.metrics import Metric, Reference, bounded, draws

RESAMPLES, CONFIDENCE = 1000, 0.95
# With fewer lines, an interval is too wide, and too uncertain itself, to name a winner.
FEWEST_LINES = 100

Row = dict[str, Any]
Lines = Mapping[int, Sequence[Record]]
Interval = tuple[float | None, float | None]


def rows_of(
    entries: Sequence[Entry],
    found: Mapping[tuple[str, str], Lines],
    references: Mapping[int, Reference],
    metrics: Sequence[Metric],
) -> list[Row]:
    """Compute a row for each setting of each bundle, in order. Raises MetricError where a metric does not fit.

    `scores`: by metric, the value, and the value relative to the full model's with its 95 % interval, None where the
    full model scores 0 or there are too few lines. A bundle without method full is compared with the first one's.
    """
    rows = []
    tables: dict[tuple[str, str, str], np.ndarray] = {}
    for entry in entries:
        own = any(setting.method == "full" for setting in entry.settings)
        against = entry.name if own else entries[0].name
        for setting in entry.settings:
            lines, scores = found[entry.name, setting.name], {}
            outputs, known = [turns[0].text for turns in lines.values()], [references[line] for line in lines]
            for metric in metrics:
                table = tables[entry.name, setting.name, metric.name] = metric.table(outputs, known)
                scores[metric.name] = score(metric, table, tables[against, "full", metric.name])
            figures = _figures(entry, setting, lines, found[against, "full"])
            rows.append({"bundle": entry.name, **figures, "against": against, "scores": scores})
    return rows


def score(metric: Metric, table: np.ndarray, whole: np.ndarray) -> dict[str, float | None]:
    """Score statistics [n, k] against the full model's on the same lines."""
    value, full = metric.of(table), metric.of(whole)
    several = bool(full) and table is not whole and len(table) > 1
    low, high = interval(metric, table, whole) if several else (None, None)
    return {"value": value, "relative": value / full if full else None, "low": low, "high": high}


def interval(metric: Metric, table: np.ndarray, whole: np.ndarray) -> Interval:
    """Compute percentiles of a paired bootstrap of the ratio of two values over the same lines, [n, k] statistics each,
    over those resamples in which the full model does not score 0."""
    drawn = draws(len(table), RESAMPLES)
    pairs = zip(drawn @ table, drawn @ whole, strict=True)
    values = ((bounded(metric.value(ours)), bounded(metric.value(full))) for ours, full in pairs)
    return percentiles([ours / full for ours, full in values if full])


def speed_interval(ours: np.ndarray, full: np.ndarray) -> Interval:
    """Compute percentiles of a paired bootstrap of full's seconds over ours, a number for each line."""
    if len(ours) < 2:
        return None, None
    drawn = draws(len(ours), RESAMPLES)
    return percentiles((drawn @ full) / (drawn @ ours))


def percentiles(values: Sequence[float] | np.ndarray) -> Interval:
    """Compute the 95 % interval of resampled values; None twice without values."""
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _figures(entry: Entry, setting: Setting, lines: Lines, whole: Lines) -> Row:
    manifest, full = entry.bundle.manifest, setting.method == "full"
    first, others = [turns[0] for turns in lines.values()], [whole[line][0] for line in lines]
    # The first token of a decoder-only model is the prompt's deep prediction: nothing is decided.
    decided = [one.exited[0 if manifest.encoder_decoder else 1 :] for one in first]
    count = max(1, sum(map(len, decided)))
    # The exit's own layers run in every mode but full; methods of CALM count theirs.
    early, late = (size + (0 if full else manifest.exit_layers) for size in (manifest.exit_layer, manifest.layers))
    layers = [
        sum(early if exited else late for exited in flags) if one.layers is None else one.layers
        for one, flags in zip(first, decided, strict=True)
    ]
    ours, theirs = _medians(lines), _medians({line: whole[line] for line in lines})
    seconds, decoding, first_token = ours.sum(axis=0).tolist()
    full_seconds, full_decoding, full_first = theirs.sum(axis=0).tolist()
    later, full_later = (sum(max(0, one.tokens - 1) for one in each) for each in (first, others))
    rounds = [sum(one.decode_seconds for one in turns) for turns in zip(*lines.values(), strict=False)]
    speeds = [1 / seconds for seconds in rounds] if all(rounds) else []
    every = [one for turns in lines.values() for one in turns]
    joules = [one.joules for one in every if one.joules is not None]
    known = len(joules) == len(every)
    low, high = (None, None) if full else speed_interval(ours[:, 0], theirs[:, 0])
    return {
        "precision": manifest.precision,
        "setting": setting.name,
        "method": setting.method,
        "threshold": setting.threshold,
        "calibrated": setting.calibrated,
        "lines": len(first),
        "tokens": sum(one.tokens for one in first),
        # Of the tokens that could exit, and the layers that such a token took, on average.
        "exit_rate": sum(map(sum, decided)) / count,
        "layers": sum(layers) / count,
        # Multiples of the full model's: of time per token after the first, to the first token, and of whole requests
        # with prompt and encoder, whose 95 % interval is over lines.
        "token_speed": _ratio(full_decoding / max(1, full_later), decoding / max(1, later)),
        "first_speed": _ratio(full_first, first_token),
        "request_speed": _ratio(full_seconds, seconds),
        "request_low": low,
        "request_high": high,
        "tokens_per_second": _ratio(later, decoding),
        "spread": spread(speeds) if len(speeds) > 1 else None,
        "seconds_per_request": seconds / len(first),
        # Lines whose tokens are the full model's, and those that ended at the limit of tokens.
        "same": float(np.mean([one.token_ids == other.token_ids for one, other in zip(first, others, strict=True)])),
        "cut": float(np.mean([one.finish_reason == "length" for one in first])),
        "joules_per_token": sum(joules) / max(1, sum(one.tokens for one in every)) if known else None,
    }


def _medians(lines: Lines) -> np.ndarray:
    """Seconds of each line's request, of its decoding, and to its first token: medians over rounds, float64 [n, 3]."""
    seconds = [[(one.seconds, one.decode_seconds, one.first_seconds) for one in turns] for turns in lines.values()]
    return np.array([np.median(turns, axis=0) for turns in seconds])


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


def curves_of(rows: Sequence[Row], metric: str, quality: float) -> list[Row]:
    """Compute a curve for each bundle and method but full: the `area` under it, None for a single point, up to the
    fastest point of all curves, so that they compare; and the `fastest` setting whose interval keeps the wanted
    quality, with its request `speed`: None where none does, or there are fewer than FEWEST_LINES."""
    points: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] != "full":
            points[row["bundle"], row["method"]].append(row)
    most = max((row["request_speed"] for row in rows), default=1.0)
    curves = []
    for (bundle, method), some in points.items():
        known = [(row["request_speed"], row["scores"][metric]["relative"]) for row in some]
        best = fastest(some, metric, quality)
        curves.append(
            {
                "bundle": bundle,
                "method": method,
                "area": area([(1.0, 1.0), *(p for p in known if p[1] is not None)], most) if len(some) > 1 else None,
                "fastest": None if best is None else best["setting"],
                "speed": None if best is None else best["request_speed"],
            }
        )
    return curves


def area(points: Sequence[tuple[float, float]], most: float) -> float:
    """Compute the mean, over speeds from 1 to `most`, of the best quality at that speed or above: points are (speed,
    quality), as multiples of the full model's. 0 beyond the fastest point."""
    total, before = 0.0, 1.0
    for speed in sorted({min(speed, most) for speed, _ in points if speed > 1}):
        total += (speed - before) * max(quality for other, quality in points if other >= speed)
        before = speed
    return total / (most - 1) if most > 1 else 0.0


def fastest(rows: Iterable[Row], metric: str, quality: float) -> Row | None:
    """Find the fastest row, by the lower bound of its speed, of those whose lower bound keeps the quality; none of
    fewer than FEWEST_LINES."""
    enough = [row for row in rows if row["method"] != "full" and row["lines"] >= FEWEST_LINES]
    good = [row for row in enough if (row["scores"][metric]["low"] or 0.0) >= quality]
    return max(good, key=lambda row: row["request_low"] or 0.0, default=None)


def verdicts(rows: Sequence[Row], metric: Metric, quality: float) -> list[str]:
    """Say in a sentence for each bundle which setting to use, and how certain that is."""
    made = []
    bundles = dict.fromkeys(row["bundle"] for row in rows)
    for bundle in bundles:
        some = [row for row in rows if row["bundle"] == bundle and row["method"] != "full"]
        if some:
            made.append((f"{bundle}: " if len(bundles) > 1 else "") + _verdict(some, metric, quality))
    return made


def _verdict(rows: Sequence[Row], metric: Metric, quality: float) -> str:
    lines, wanted = rows[0]["lines"], f"{100 * quality:.4g} % of full's {metric.label}"
    if lines < FEWEST_LINES:
        return f"no winner: {lines} lines are too few to tell settings apart; give {FEWEST_LINES} or more"
    best = fastest(rows, metric.name, quality)
    if best is None:
        return f"no setting keeps {wanted} by the lower bound of its interval: use full or lossless"
    name, speed, low, high = (best[field] for field in ("setting", "request_speed", "request_low", "request_high"))
    bounds = f"{speed:.2f}x (95 %: {low:.2f} to {high:.2f})"
    if low <= 1:
        return f"no setting that keeps {wanted} is surely faster than full: {name} has {bounds}"
    kept, least, most = (100 * best["scores"][metric.name][field] for field in ("relative", "low", "high"))
    shares = f"{kept:.1f} % ({least:.1f} to {most:.1f})"
    return f"{name} is the fastest that keeps {wanted}: {bounds} the speed of full at {shares}"
