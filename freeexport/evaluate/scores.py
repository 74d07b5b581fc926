"""Quality and speed from the records of an evaluation: scores with intervals, and curves.

Rows are JSON objects. `rows_of` returns one per bundle and setting, `curves_of` one per bundle and
method.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from freeexport.costs.bytes import ByteModel, Calls
from freeexport.costs.intervals import RESAMPLES, percentiles, speed_interval
from freeexport.costs.timing import spread
from freeexport.costs.verdict import Row, fastest
from freeexport.evaluate.records import Lines
from freeexport.evaluate.settings import WITHOUT_EXIT, Entry, Setting
from freeexport.task_metrics import Metric, Reference, bounded, draws

# Bundle and setting.
Name = tuple[str, str]


def rows_of(
    entries: Sequence[Entry],
    found: Mapping[tuple[str, str], Lines],
    references: Mapping[int, Reference],
    metrics: Sequence[Metric],
    instructions: str = "",
) -> list[Row]:
    """Compute a row for each setting of each bundle, in order.

    Settings are compared with method full of their bundle, or of the first bundle if theirs lacks
    it. Fields that need an explanation:

    - `scores`: Value of each metric, and the value relative to full with its 95 % interval. None if
      full scores 0 or there are too few lines.
    - `first_bundle`: Comparison with full of the first bundle. None if `scores` has it already.
    - `bytes_per_token`: Bytes that a token reads. None if calls are unknown.
    - `predicted`: `token_speed` according to the byte model. None for full itself, or if calls are
      unknown.
    - `drafts`: By source, the share of accepted drafts and the number of compared drafts at each
      position.

    Args:
        found: Records by bundle and setting, then by line.
        references: References by line.
        instructions: Instruction set of the kernels.

    Raises:
        MetricError: If a metric does not fit the references.
    """
    tables: dict[Name, dict[str, np.ndarray]] = {}
    for name, lines in found.items():
        outputs = [turns[0].text for turns in lines.values()]
        known = [references[line] for line in lines]
        tables[name] = {metric.name: metric.table(outputs, known) for metric in metrics}
    read = _bytes_read(entries, found, instructions)

    def compared(name: Name, whole: Name) -> Row:
        scores = {
            metric.name: score(metric, tables[name][metric.name], tables[whole][metric.name])
            for metric in metrics
        }
        ours = read[name]
        full = read[whole]
        predicted = None if name == whole or not ours or not full else full / ours
        return {**speeds(found[name], found[whole]), "predicted": predicted, "scores": scores}

    rows = []
    base = entries[0].name, "full"
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


def _bytes_read(
    entries: Sequence[Entry], found: Mapping[Name, Lines], instructions: str
) -> dict[Name, float | None]:
    """Return the bytes that a token of each setting reads. None if calls are unknown."""
    read: dict[Name, float | None] = {}
    for entry in entries:
        model: ByteModel | None = None
        for setting in entry.settings:
            name = entry.name, setting.name
            first = [turns[0].calls for turns in found[name].values()]
            calls = [one for one in first if one is not None]
            read[name] = None
            if len(calls) == len(first):
                model = model or ByteModel(entry.bundle, instructions)
                read[name] = model.token(calls)
    return read


def score(metric: Metric, table: np.ndarray, whole: np.ndarray) -> dict[str, float | None]:
    """Score the statistics of a setting against those of the full model.

    Args:
        table: Statistics of the setting's lines, [n, k].
        whole: Statistics of the full model on the same lines, [n, k].

    Returns:
        The value, the value relative to the full model's with its 95 % interval, and for metrics
        that count errors also the error. `support` is the number of lines that the full model's
        value rests on: if its scores are equal in some lines and 0 in all others, the number of
        these lines.
    """
    value = metric.of(table)
    full = metric.of(whole)
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
    each = np.array([bounded((metric.single or metric.value)(line)) for line in whole])
    found = {
        "value": value,
        "relative": value / full if full else None,
        "low": low,
        "high": high,
        "support": float(each.sum() ** 2 / np.square(each).sum()) if each.any() else 0.0,
    }
    return found | ({"error": 1 - value} if metric.error else {})


def _figures(entry: Entry, setting: Setting, lines: Lines, whole: Lines) -> Row:
    manifest = entry.bundle.manifest
    first = [turns[0] for turns in lines.values()]
    others = [whole[line][0] for line in lines]
    # The first token of a decoder-only model is the prompt's deep prediction and cannot exit.
    decided = [one.exited[0 if manifest.encoder_decoder else 1 :] for one in first]
    count = max(1, sum(map(len, decided)))
    # The exit's own layers run in all methods with an exit, and always in the standard dialect.
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
        # Share of the tokens that could exit, and their mean number of layers.
        "exit_rate": sum(map(sum, decided)) / count,
        "layers": sum(layers) / count,
        "tokens_per_second": _ratio(sum(_later(lines)), decoding),
        "spread": spread(speeds) if len(speeds) > 1 else None,
        "seconds_per_request": seconds / len(first),
        # Shares of lines with the full model's tokens, and of lines that reached the token limit.
        "same": float(
            np.mean(
                [one.token_ids == other.token_ids for one, other in zip(first, others, strict=True)]
            )
        ),
        "cut": float(np.mean([one.finish_reason == "length" for one in first])),
    }


def _by_position(requests: Sequence[Calls | None]) -> dict[str, list[tuple[float, int]]]:
    """Return the share of accepted drafts and the number of compared ones, by source.

    The lists have an entry per position.
    """
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


def speeds(lines: Lines, whole: Lines) -> Row:
    """Return speeds relative to the full model, with 95 % intervals over lines.

    The speeds are those of tokens after the first, of the first token, and of whole requests.
    Intervals are None for the full model itself.
    """
    itself = lines is whole
    whole = {line: whole[line] for line in lines}
    ours = _medians(lines)
    full = _medians(whole)
    tokens, full_tokens = (
        np.stack([a[:, 1], _later(b)], axis=1) for a, b in ((ours, lines), (full, whole))
    )
    seconds, decoding, first = ours.sum(axis=0)
    full_seconds, full_decoding, full_first = full.sum(axis=0)
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
    """Return the number of tokens after the first, by line."""
    return [max(0, turns[0].tokens - 1) for turns in lines.values()]


def _medians(lines: Lines) -> np.ndarray:
    """Return seconds of request, decoding and first token of each line, float64 [n, 3].

    The values are medians over rounds.
    """
    seconds = [
        [(one.seconds, one.decode_seconds, one.first_seconds) for one in turns]
        for turns in lines.values()
    ]
    return np.array([np.median(turns, axis=0) for turns in seconds])


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else 0.0


def curves_of(rows: Sequence[Row], metric: Metric, quality: float) -> list[Row]:
    """Compute a curve for each bundle and method except full.

    - `area`: Area under the curve, up to the fastest point of all curves. None for a single point.
    - `fastest`, `speed`: Setting chosen by `fastest`, and its request speed. None without one.

    Args:
        quality: Share of the full model's quality that the fastest setting must keep.
    """
    points: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] != "full":
            points[row["bundle"], row["method"]].append(row)
    max_speed = max((row["request_speed"] for row in rows), default=1.0)
    curves = []
    for (bundle, method), some in points.items():
        known = [(row["request_speed"], row["scores"][metric.name]["relative"]) for row in some]
        best = fastest(some, metric, quality)
        curves.append(
            {
                "bundle": bundle,
                "method": method,
                "area": area([(1.0, 1.0), *(p for p in known if p[1] is not None)], max_speed)
                if len(some) > 1
                else None,
                "fastest": None if best is None else best["setting"],
                "speed": None if best is None else best["request_speed"],
            }
        )
    return curves


def area(points: Sequence[tuple[float, float]], max_speed: float) -> float:
    """Return the mean of the best quality at a speed or above, over speeds from 1 to `max_speed`.

    Points are pairs of speed and quality. The quality is 0 beyond the fastest point.
    """
    total = 0.0
    before = 1.0
    for speed in sorted({min(speed, max_speed) for speed, _ in points if speed > 1}):
        total += (speed - before) * max(quality for other, quality in points if other >= speed)
        before = speed
    return total / (max_speed - 1) if max_speed > 1 else 0.0
