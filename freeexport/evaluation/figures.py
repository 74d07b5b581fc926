"""From records to figures: quality with its interval, speed, exits, and what a curve of thresholds comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from freeexport.evaluation.measure import Entry
from freeexport.evaluation.options import Setting
from freeexport.evaluation.records import Record
from freeexport.metrics import Metric, Reference, bounded
from runtime.bundle.manifest import Manifest

RESAMPLES, CONFIDENCE, SEED = 1000, 0.95, 0


@dataclass(frozen=True)
class Score:
    """`value` of a metric, and `relative` to the full model's, with the 95 % interval of a paired bootstrap over lines;
    None where the full model scores 0, or there are too few lines."""

    value: float
    relative: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A bundle in one setting, over all lines.

    `token_speed`, `first_speed` and `request_speed` are multiples of the full model's: of decoding, in time per token,
    of the time to the first token, and of whole requests, both with prompt and encoder. `tokens_per_second` is of
    decoding. `exit_rate` of the tokens that could exit, all but a decoder-only model's first, and `layers`: decoder
    layers that such a token took until it was emitted, on average. `first_exits`: share of the first tokens that
    exited. `same`: the share of lines whose tokens are the
    full model's; `cut`: of those that ended at the limit of tokens. `joules_per_token` where the machine tells.
    `against`: the bundle whose full model it is compared with.
    """

    bundle: str
    precision: str
    setting: Setting
    against: str
    lines: int
    tokens: int
    exit_rate: float
    first_exits: float
    layers: float
    token_speed: float
    first_speed: float
    request_speed: float
    tokens_per_second: float
    seconds_per_request: float
    same: float
    cut: float
    scores: dict[str, Score] = field(default_factory=dict)
    joules_per_token: float | None = None


@dataclass(frozen=True)
class Curve:
    """A method of a bundle over its settings, by the first metric: the `area` under its quality-speed curve, None for
    a single point; and the fastest setting that keeps the wanted quality, with its request speed, None where none
    does."""

    bundle: str
    method: str
    area: float | None
    fastest: Setting | None
    speed: float | None


@dataclass(frozen=True)
class Times:
    """Sums over lines of the median round."""

    seconds: float
    decode_seconds: float
    first_seconds: float
    decoded: int

    @property
    def per_token(self) -> float:
        return self.decode_seconds / max(1, self.decoded)


Lines = Mapping[int, Sequence[Record]]


def rows_of(
    entries: Sequence[Entry],
    found: Mapping[tuple[str, str], Lines],
    references: Mapping[int, Reference],
    metrics: Sequence[Metric],
) -> list[Row]:
    """A row for each setting of each bundle, in order. Raises MetricError where a metric does not fit."""
    rows = []
    tables: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for entry in entries:
        own = any(setting.method == "full" for setting in entry.settings)
        against = entry.name if own else entries[0].name
        whole = found[against, "full"]
        for setting in entry.settings:
            key, lines = (entry.name, setting.name), found[entry.name, setting.name]
            tables[key] = {metric.name: _table(metric, lines, references) for metric in metrics}
            scores = {
                metric.name: _score(metric, tables[key][metric.name], tables[against, "full"][metric.name])
                for metric in metrics
            }
            rows.append(_row(entry, setting, against, lines, whole, scores))
    return rows


def _table(metric: Metric, lines: Lines, references: Mapping[int, Reference]) -> np.ndarray:
    return metric.table([turns[0].text for turns in lines.values()], [references[line] for line in lines])


def _score(metric: Metric, table: np.ndarray, whole: np.ndarray) -> Score:
    value, full = metric.of(table), metric.of(whole)
    if not full:
        return Score(value, None)
    if table is whole or len(table) < 2:
        return Score(value, value / full)
    low, high = interval(metric, table, whole)
    return Score(value, value / full, low, high)


def interval(metric: Metric, table: np.ndarray, whole: np.ndarray) -> tuple[float | None, float | None]:
    """Of the ratio of two values over the same lines, [n, k] statistics each: percentiles of a paired bootstrap, over
    those resamples in which the full model does not score 0. The same lines are drawn for every setting."""
    count = len(table)
    drawn = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    ratios = []
    for ours, full in zip(drawn @ table, drawn @ whole, strict=True):
        divisor = bounded(metric.value(full))
        if divisor:
            ratios.append(bounded(metric.value(ours)) / divisor)
    if not ratios:
        return None, None
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _row(entry: Entry, setting: Setting, against: str, lines: Lines, whole: Lines, scores: dict[str, Score]) -> Row:
    manifest = entry.bundle.manifest
    first = [turns[0] for turns in lines.values()]
    predicted = int(not manifest.encoder_decoder)
    decided = [one.exited[predicted:] for one in first]
    count = max(1, sum(map(len, decided)))
    times, full = _times(lines, predicted), _times(whole, predicted)
    joules = [one.joules for turns in lines.values() for one in turns]
    known = [value for value in joules if value is not None]
    tokens = sum(one.tokens for turns in lines.values() for one in turns)
    return Row(
        bundle=entry.name,
        precision=manifest.precision,
        setting=setting,
        against=against,
        lines=len(first),
        tokens=sum(one.tokens for one in first),
        exit_rate=sum(map(sum, decided)) / count,
        first_exits=float(np.mean([any(one.exited[:1]) for one in first])),
        layers=sum(_layers(one, flags, manifest, setting) for one, flags in zip(first, decided, strict=True)) / count,
        token_speed=_ratio(full.per_token, times.per_token),
        first_speed=_ratio(full.first_seconds, times.first_seconds),
        request_speed=_ratio(full.seconds, times.seconds),
        tokens_per_second=_ratio(1.0, times.per_token),
        seconds_per_request=times.seconds / len(first),
        same=float(np.mean([turns[0].token_ids == whole[line][0].token_ids for line, turns in lines.items()])),
        cut=float(np.mean([one.finish_reason == "length" for one in first])),
        scores=scores,
        joules_per_token=sum(known) / max(1, tokens) if len(known) == len(joules) else None,
    )


def _layers(record: Record, exited: Sequence[bool], manifest: Manifest, setting: Setting) -> int:
    """Of the tokens that could exit. Those of the exit's own run in every mode but full."""
    if record.layers is not None:
        return record.layers
    own = 0 if setting.method == "full" else manifest.exit_layers
    return sum(own + (manifest.exit_layer if early else manifest.layers) for early in exited)


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


def _times(lines: Lines, predicted: int) -> Times:
    return Times(
        sum(median(one.seconds for one in turns) for turns in lines.values()),
        sum(median(one.decode_seconds for one in turns) for turns in lines.values()),
        sum(median(one.first_seconds for one in turns) for turns in lines.values()),
        sum(max(0, turns[0].tokens - predicted) for turns in lines.values()),
    )


def curves_of(rows: Sequence[Row], metric: str, quality: float) -> list[Curve]:
    """Of each bundle and method but full. Areas go up to the fastest point of all curves, so that they compare."""
    points: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.setting.method != "full":
            points.setdefault((row.bundle, row.setting.method), []).append(row)
    most = max((row.request_speed for some in points.values() if len(some) > 1 for row in some), default=1.0)
    curves = []
    for (bundle, method), some in points.items():
        known = [(row.request_speed, row.scores[metric].relative or 0.0) for row in some]
        kept = [row for row in some if (row.scores[metric].relative or 0.0) >= quality]
        best = max(kept, key=lambda row: row.request_speed, default=None)
        speed = None if best is None else best.request_speed
        under = area([(1.0, 1.0), *known], most) if len(some) > 1 else None
        curves.append(Curve(bundle, method, under, None if best is None else best.setting, speed))
    return curves


def area(points: Sequence[tuple[float, float]], most: float) -> float:
    """The mean, over speeds from 1 to `most`, of the best quality at that speed or above: points are (speed, quality),
    as multiples of the full model's. 0 beyond the fastest point."""
    total, before = 0.0, 1.0
    for speed in sorted({min(speed, most) for speed, _ in points if speed > 1}):
        total += (speed - before) * max(quality for other, quality in points if other >= speed)
        before = speed
    return total / (most - 1) if most > 1 else 0.0
