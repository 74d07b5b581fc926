"""Quality and speed of settings, from the records of an evaluation: scores with paired intervals, curves, verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from freeexport.measure.records import Record
from freeexport.measure.settings import Entry, Setting
from freeexport.measure.timing import spread
from freeexport.metrics import Metric, Reference, bounded
from runtime.bundle.manifest import Manifest

RESAMPLES, CONFIDENCE, SEED = 1000, 0.95, 0
# With fewer lines, an interval is too wide, and too uncertain itself, to name a winner.
FEWEST_LINES = 100


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

    `token_speed`, `first_speed` and `request_speed` are multiples of the full model's: of decoding, in time per token
    after the first, of the time to the first token, and of whole requests with prompt and encoder; `request_low` and
    `request_high` are the latter's 95 % interval over lines. `tokens_per_second` is of decoding, and `spread` its
    largest less its smallest over rounds as a share of the median, None for one round. `exit_rate`: of the tokens that
    could exit, and `layers` that such a token took, on average. `same`: the share of lines whose tokens are the full
    model's; `cut`: of those that ended at the limit of tokens. `joules_per_token` where the machine tells. `against`:
    the bundle whose full model it is compared with.
    """

    bundle: str
    precision: str
    setting: str
    method: str
    threshold: float | None
    calibrated: bool
    against: str
    lines: int
    tokens: int
    exit_rate: float
    layers: float
    token_speed: float
    first_speed: float
    request_speed: float
    request_low: float | None
    request_high: float | None
    tokens_per_second: float
    spread: float | None
    seconds_per_request: float
    same: float
    cut: float
    scores: dict[str, Score] = field(default_factory=dict)
    joules_per_token: float | None = None

    def keeps(self, metric: str, quality: float) -> bool:
        """Say whether the lower bound of its interval keeps this share of the full model's metric."""
        low = self.scores[metric].low
        return low is not None and low >= quality


@dataclass(frozen=True)
class Curve:
    """A method of a bundle over its settings, by the first metric: the `area` under its quality-speed curve, None for
    a single point; and the `fastest` setting whose interval keeps the wanted quality, with its request `speed`: None
    where none does, or there are fewer than FEWEST_LINES."""

    bundle: str
    method: str
    area: float | None
    fastest: str | None
    speed: float | None


Lines = Mapping[int, Sequence[Record]]


def rows_of(
    entries: Sequence[Entry],
    found: Mapping[tuple[str, str], Lines],
    references: Mapping[int, Reference],
    metrics: Sequence[Metric],
) -> list[Row]:
    """Compute a row for each setting of each bundle, in order. Raises MetricError where a metric does not fit."""
    rows = []
    tables: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for entry in entries:
        own = any(setting.method == "full" for setting in entry.settings)
        against = entry.name if own else entries[0].name
        whole = found[against, "full"]
        for setting in entry.settings:
            key, lines = (entry.name, setting.name), found[entry.name, setting.name]
            outputs, known = [turns[0].text for turns in lines.values()], [references[line] for line in lines]
            tables[key] = {metric.name: metric.table(outputs, known) for metric in metrics}
            scores = {
                metric.name: score(metric, tables[key][metric.name], tables[against, "full"][metric.name])
                for metric in metrics
            }
            rows.append(_row(entry, setting, against, lines, whole, scores))
    return rows


def score(metric: Metric, table: np.ndarray, whole: np.ndarray) -> Score:
    """Score statistics [n, k] against the full model's on the same lines."""
    value, full = metric.of(table), metric.of(whole)
    if not full:
        return Score(value, None)
    if table is whole or len(table) < 2:
        return Score(value, value / full)
    return Score(value, value / full, *interval(metric, table, whole))


def interval(metric: Metric, table: np.ndarray, whole: np.ndarray) -> tuple[float | None, float | None]:
    """Compute percentiles of a paired bootstrap of the ratio of two values over the same lines, [n, k] statistics each,
    over those resamples in which the full model does not score 0."""
    drawn = _draws(len(table))
    pairs = zip(drawn @ table, drawn @ whole, strict=True)
    values = ((bounded(metric.value(ours)), bounded(metric.value(full))) for ours, full in pairs)
    return _percentiles([ours / full for ours, full in values if full])


def speed_interval(ours: Sequence[float], full: Sequence[float]) -> tuple[float | None, float | None]:
    """Compute percentiles of a paired bootstrap of full's seconds over ours, a number for each line."""
    if len(ours) < 2:
        return None, None
    drawn = _draws(len(ours))
    return _percentiles((drawn @ np.array(full)) / (drawn @ np.array(ours)))


def _draws(count: int) -> np.ndarray:
    """Draw how often each of `count` lines is in each resample, the same for every setting, [RESAMPLES, count]."""
    return np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), RESAMPLES)


def _percentiles(ratios: Sequence[float] | np.ndarray) -> tuple[float | None, float | None]:
    if not len(ratios):
        return None, None
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _row(entry: Entry, setting: Setting, against: str, lines: Lines, whole: Lines, scores: dict[str, Score]) -> Row:
    manifest = entry.bundle.manifest
    first = [turns[0] for turns in lines.values()]
    # The first token of a decoder-only model is the prompt's deep prediction: nothing is decided.
    decided = [one.exited[0 if manifest.encoder_decoder else 1 :] for one in first]
    count = max(1, sum(map(len, decided)))
    ours, full = ({line: _typical(turns) for line, turns in each.items()} for each in (lines, whole))
    seconds, decoding, first_token = (sum(column) for column in zip(*ours.values(), strict=True))
    full_seconds, full_decoding, full_first = (sum(full[line][place] for line in lines) for place in range(3))
    later = sum(max(0, one.tokens - 1) for one in first)
    full_later = sum(max(0, whole[line][0].tokens - 1) for line in lines)
    joules = [one.joules for turns in lines.values() for one in turns]
    known = [value for value in joules if value is not None]
    tokens = sum(one.tokens for turns in lines.values() for one in turns)
    low, high = speed_interval([one[0] for one in ours.values()], [full[line][0] for line in lines])
    return Row(
        bundle=entry.name,
        precision=manifest.precision,
        setting=setting.name,
        method=setting.method,
        threshold=setting.threshold,
        calibrated=setting.calibrated,
        against=against,
        lines=len(first),
        tokens=sum(one.tokens for one in first),
        exit_rate=sum(map(sum, decided)) / count,
        layers=sum(_layers(one, flags, manifest, setting) for one, flags in zip(first, decided, strict=True)) / count,
        token_speed=_ratio(full_decoding / max(1, full_later), decoding / max(1, later)),
        first_speed=_ratio(full_first, first_token),
        request_speed=_ratio(full_seconds, seconds),
        request_low=None if setting.method == "full" else low,
        request_high=None if setting.method == "full" else high,
        tokens_per_second=_ratio(later, decoding),
        spread=_spread(lines),
        seconds_per_request=seconds / len(first),
        same=float(np.mean([turns[0].token_ids == whole[line][0].token_ids for line, turns in lines.items()])),
        cut=float(np.mean([one.finish_reason == "length" for one in first])),
        scores=scores,
        joules_per_token=sum(known) / max(1, tokens) if len(known) == len(joules) else None,
    )


def _layers(record: Record, exited: Sequence[bool], manifest: Manifest, setting: Setting) -> int:
    """Count the layers of the tokens that could exit. The exit's own run in every mode but full."""
    if record.layers is not None:
        return record.layers
    own = 0 if setting.method == "full" else manifest.exit_layers
    return sum(own + (manifest.exit_layer if early else manifest.layers) for early in exited)


def _typical(turns: Sequence[Record]) -> tuple[float, float, float]:
    """The median over rounds of the seconds of a request, of decoding, and to the first token."""
    return (
        median(one.seconds for one in turns),
        median(one.decode_seconds for one in turns),
        median(one.first_seconds for one in turns),
    )


def _spread(lines: Lines) -> float | None:
    rounds = min(map(len, lines.values()))
    seconds = [sum(turns[place].decode_seconds for turns in lines.values()) for place in range(rounds)]
    return spread([1 / each for each in seconds]) if rounds > 1 and all(seconds) else None


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


def curves_of(rows: Sequence[Row], metric: str, quality: float) -> list[Curve]:
    """Compute a curve for each bundle and method but full. Areas go up to the fastest point of all curves, so that they
    compare."""
    points: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.method != "full":
            points.setdefault((row.bundle, row.method), []).append(row)
    most = max((row.request_speed for row in rows), default=1.0)
    curves = []
    for (bundle, method), some in points.items():
        known = [(row.request_speed, relative) for row in some if (relative := row.scores[metric].relative) is not None]
        best = fastest(some, metric, quality)
        curves.append(
            Curve(
                bundle,
                method,
                area([(1.0, 1.0), *known], most) if len(some) > 1 else None,
                None if best is None else best.setting,
                None if best is None else best.request_speed,
            )
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
    good = [row for row in rows if row.method != "full" and row.lines >= FEWEST_LINES and row.keeps(metric, quality)]
    return max(good, key=lambda row: row.request_low or 0.0, default=None)


def verdicts(rows: Sequence[Row], metric: Metric, quality: float) -> list[str]:
    """Say in a sentence for each bundle which setting to use, and how certain that is."""
    made = []
    for bundle in dict.fromkeys(row.bundle for row in rows):
        some = [row for row in rows if row.bundle == bundle and row.method != "full"]
        if some:
            of = f"{bundle}: " if len({row.bundle for row in rows}) > 1 else ""
            made.append(of + _verdict(some, metric, quality))
    return made


def _verdict(rows: Sequence[Row], metric: Metric, quality: float) -> str:
    lines = rows[0].lines
    if lines < FEWEST_LINES:
        return f"no winner: {lines} lines are too few to tell settings apart; give {FEWEST_LINES} or more"
    wanted = f"{100 * quality:.4g} % of full's {metric.label}"
    best = fastest(rows, metric.name, quality)
    if best is None:
        return f"no setting keeps {wanted} by the lower bound of its interval: use full or lossless"
    bounds = f"{best.request_speed:.2f}x (95 %: {best.request_low:.2f} to {best.request_high:.2f})"
    if best.request_low is None or best.request_low <= 1:
        return f"no setting that keeps {wanted} is surely faster than full: {best.setting} has {bounds}"
    kept = best.scores[metric.name]
    assert kept.relative is not None
    assert kept.low is not None
    assert kept.high is not None
    shares = f"{100 * kept.relative:.1f} % ({100 * kept.low:.1f} to {100 * kept.high:.1f})"
    return f"{best.setting} is the fastest that keeps {wanted}: {bounds} the speed of full at {shares}"
