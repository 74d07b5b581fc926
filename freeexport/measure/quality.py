"""Quality and speed of settings, from the records of an evaluation: scores with paired intervals, curves, verdicts.

Rows are dicts, as JSON keeps them: those of `rows_of` have a setting of a bundle each, over all lines, and those of
`curves_of` a method of a bundle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from freeexport.costs.bytes import ByteModel, Calls
from freeexport.measure.settings import WITHOUT_EXIT, Entry, Record, Setting
from freeexport.measure.timing import spread
from freeexport.metrics import Metric, Reference, bounded, draws

RESAMPLES, CONFIDENCE = 1000, 0.95
# With fewer lines, an interval is too wide, and too uncertain itself, to name a winner.
FEWEST_LINES = 100

Row = dict[str, Any]
Lines = Mapping[int, Sequence[Record]]
Interval = tuple[float | None, float | None]
# A bundle and a setting.
Name = tuple[str, str]


def rows_of(
    entries: Sequence[Entry],
    found: Mapping[tuple[str, str], Lines],
    references: Mapping[int, Reference],
    metrics: Sequence[Metric],
    instructions: str = "",
) -> list[Row]:
    """Compute a row for each setting of each bundle, in order. Raises MetricError where a metric does not fit.

    `scores`: by metric, the value, and the value relative to the full model's with its 95 % interval, None where the
    full model scores 0 or there are too few lines. A bundle without method full is compared with the first one's, and
    one with it also, in `first_bundle`, which is None elsewhere. `predicted`: `token_speed` by the byte model, by
    `bytes_per_token` with these `instructions` of our kernels; both None where calls are not known. `drafts`: by
    source, the share of its tokens that were accepted at each position, and how many were compared there.
    """
    tables: dict[Name, dict[str, np.ndarray]] = {}
    read: dict[Name, float | None] = {}
    for entry in entries:
        model: ByteModel | None = None
        for setting in entry.settings:
            name = entry.name, setting.name
            first = [turns[0] for turns in found[name].values()]
            outputs, known = [one.text for one in first], [references[line] for line in found[name]]
            tables[name] = {metric.name: metric.table(outputs, known) for metric in metrics}
            calls = [one.calls for one in first if one.calls is not None]
            read[name] = None
            if len(calls) == len(first):
                model = model or ByteModel(entry.bundle, instructions)
                read[name] = model.token(calls)

    def compared(name: Name, whole: Name) -> Row:
        scores = {
            metric.name: score(metric, tables[name][metric.name], tables[whole][metric.name])
            for metric in metrics
        }
        ours, full = read[name], read[whole]
        predicted = None if name == whole or not ours or not full else full / ours
        return {**_speeds(found[name], found[whole]), "predicted": predicted, "scores": scores}

    rows, base = [], (entries[0].name, "full")
    for entry in entries:
        whole = entry.name, "full"
        against = whole if whole in found else base
        for setting in entry.settings:
            name = entry.name, setting.name
            row = {"bundle": entry.name, **_figures(entry, setting, found[name], found[against])}
            row |= {"bytes_per_token": read[name], "against": against[0], **compared(name, against)}
            row["drafts"] = _by_position([turns[0].calls for turns in found[name].values()])
            rows.append({**row, "first_bundle": None if against == base else compared(name, base)})
    return rows


def score(metric: Metric, table: np.ndarray, whole: np.ndarray) -> dict[str, float | None]:
    """Score statistics [n, k] against the full model's on the same lines: the value, the share of the full model's that
    is kept, and the percentiles of that share among resamples; where errors are counted, also the error."""
    value, full = metric.of(table), metric.of(whole)
    drawn: list[tuple[float, float]] = []
    if table is not whole and len(table) > 1:
        resamples = draws(len(table), RESAMPLES)
        pairs = zip(resamples @ table, resamples @ whole, strict=True)
        drawn = [
            (bounded(metric.value(ours)), bounded(metric.value(theirs))) for ours, theirs in pairs
        ]
    low, high = (
        percentiles([one / other for one, other in drawn if other]) if full else (None, None)
    )
    found = {"value": value, "relative": value / full if full else None, "low": low, "high": high}
    return found | ({"error": 1 - value} if metric.error else {})


def speed_interval(ours: np.ndarray, full: np.ndarray) -> Interval:
    """Compute percentiles of a paired bootstrap of full's seconds over ours: of [n] seconds, one for each line, or of
    [n, 2] seconds and tokens, then of seconds a token."""
    if len(ours) < 2:
        return None, None
    drawn = draws(len(ours), RESAMPLES)
    ours, full = drawn @ ours, drawn @ full
    if ours.ndim == 1:
        return percentiles(full / ours)
    some = ours.all(axis=1) & full.all(axis=1)  # resamples without a token say nothing
    ours, full = ours[some], full[some]
    return percentiles(full[:, 0] / full[:, 1] * ours[:, 1] / ours[:, 0])


def percentiles(values: Sequence[float] | np.ndarray) -> Interval:
    """Compute the 95 % interval of resampled values; None twice without values."""
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _figures(entry: Entry, setting: Setting, lines: Lines, whole: Lines) -> Row:
    manifest = entry.bundle.manifest
    first, others = [turns[0] for turns in lines.values()], [whole[line][0] for line in lines]
    # The first token of a decoder-only model is the prompt's deep prediction: nothing is decided.
    decided = [one.exited[0 if manifest.encoder_decoder else 1 :] for one in first]
    count = max(1, sum(map(len, decided)))
    # The exit's own layers run wherever its head may, in the standard dialect always; methods of CALM count theirs.
    own = 0 if setting.method in WITHOUT_EXIT and manifest.packed else manifest.exit_layers
    early, late = (size + own for size in (manifest.exit_layer, manifest.layers))
    layers = [
        sum(early if exited else late for exited in flags) if one.layers is None else one.layers
        for one, flags in zip(first, decided, strict=True)
    ]
    seconds, decoding, _ = _medians(lines).sum(axis=0).tolist()
    rounds = [
        sum(one.decode_seconds for one in turns) for turns in zip(*lines.values(), strict=False)
    ]
    speeds = [1 / seconds for seconds in rounds] if all(rounds) else []
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
        "tokens_per_second": _ratio(sum(_later(lines)), decoding),
        "spread": spread(speeds) if len(speeds) > 1 else None,
        "seconds_per_request": seconds / len(first),
        # Lines whose tokens are the full model's, and those that ended at the limit of tokens.
        "same": float(
            np.mean(
                [one.token_ids == other.token_ids for one, other in zip(first, others, strict=True)]
            )
        ),
        "cut": float(np.mean([one.finish_reason == "length" for one in first])),
    }


def _by_position(requests: Sequence[Calls | None]) -> dict[str, list[tuple[float, int]]]:
    """The share of drafts that were accepted at each position, and how many were compared there, by source."""
    sums: dict[str, np.ndarray] = {}
    for source, counts in (
        pair for calls in requests if calls is not None for pair in calls.drafts.items()
    ):
        longest = max(len(counts), len(sums.get(source, ())))
        whole = np.zeros((longest, 2), np.int64)
        for part in (sums.get(source, whole), np.array(counts)):
            whole[: len(part)] += part
        sums[source] = whole
    return {
        source: [(right / compared, compared) for right, compared in each.tolist()]
        for source, each in sums.items()
    }


def _speeds(lines: Lines, whole: Lines) -> Row:
    """Multiples of the full model's speed: of time per token after the first, to the first token, and of whole requests
    with prompt and encoder; 95 % intervals over lines, None for the full model itself."""
    itself, whole = lines is whole, {line: whole[line] for line in lines}
    ours, full = _medians(lines), _medians(whole)
    tokens, full_tokens = (
        np.stack([a[:, 1], _later(b)], axis=1) for a, b in ((ours, lines), (full, whole))
    )
    (seconds, decoding, first), (full_seconds, full_decoding, full_first) = (
        ours.sum(axis=0),
        full.sum(axis=0),
    )
    later, full_later = (max(1.0, one[:, 1].sum()) for one in (tokens, full_tokens))
    token_low, token_high = (None, None) if itself else speed_interval(tokens, full_tokens)
    low, high = (None, None) if itself else speed_interval(ours[:, 0], full[:, 0])
    return {
        "token_speed": _ratio(full_decoding / full_later, decoding / later),
        "token_low": token_low,
        "token_high": token_high,
        "first_speed": _ratio(full_first, first),
        "request_speed": _ratio(full_seconds, seconds),
        "request_low": low,
        "request_high": high,
    }


def _later(lines: Lines) -> list[int]:
    """Tokens of each line after the first."""
    return [max(0, turns[0].tokens - 1) for turns in lines.values()]


def _medians(lines: Lines) -> np.ndarray:
    """Seconds of each line's request, of its decoding, and to its first token: medians over rounds, float64 [n, 3]."""
    seconds = [
        [(one.seconds, one.decode_seconds, one.first_seconds) for one in turns]
        for turns in lines.values()
    ]
    return np.array([np.median(turns, axis=0) for turns in seconds])


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else 0.0


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
                "area": area([(1.0, 1.0), *(p for p in known if p[1] is not None)], most)
                if len(some) > 1
                else None,
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
            made.append(
                (f"{bundle}: " if len(bundles) > 1 else "") + _verdict(some, metric, quality)
            )
    return made


def _verdict(rows: Sequence[Row], metric: Metric, quality: float) -> str:
    lines, wanted = rows[0]["lines"], f"{100 * quality:.4g} % of full's {metric.label}"
    if lines < FEWEST_LINES:
        return f"no winner: {lines} lines are too few to tell settings apart; give {FEWEST_LINES} or more"
    best = fastest(rows, metric.name, quality)
    if best is None:
        return f"no setting keeps {wanted} by the lower bound of its interval: use full or lossless"
    name, speed, low, high = (
        best[field] for field in ("setting", "request_speed", "request_low", "request_high")
    )
    bounds = f"{speed:.2f}x (95 %: {low:.2f} to {high:.2f})"
    if low <= 1:
        return f"no setting that keeps {wanted} is surely faster than full: {name} has {bounds}"
    kept, least, most = (
        100 * best["scores"][metric.name][field] for field in ("relative", "low", "high")
    )
    shares = f"{kept:.1f} % ({least:.1f} to {most:.1f})"
    return f"{name} is the fastest that keeps {wanted}: {bounds} the speed of full at {shares}"
