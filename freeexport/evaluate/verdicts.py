"""Quality-speed curves, and the setting to choose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from freeexport.evaluate.scores import Row
from freeexport.task_metrics import Metric

# Fewest lines for a winner. With fewer, intervals are too wide and too uncertain themselves.
FEWEST_LINES = 100
# Methods that generate the full model's tokens.
LOSSLESS = ("lookup", "phrases", "exit-drafts", "lossless")


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
    most = max((row["request_speed"] for row in rows), default=1.0)
    curves = []
    for (bundle, method), some in points.items():
        known = [(row["request_speed"], row["scores"][metric.name]["relative"]) for row in some]
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
    """Return the mean, over speeds from 1 to `most`, of the best quality at that speed or above.

    Points are pairs of speed and quality. The quality is 0 beyond the fastest point.
    """
    total = 0.0
    before = 1.0
    for speed in sorted({min(speed, most) for speed, _ in points if speed > 1}):
        total += (speed - before) * max(quality for other, quality in points if other >= speed)
        before = speed
    return total / (most - 1) if most > 1 else 0.0


def too_few_lines(score: Row, lines: int, metric: Metric, quality: float) -> str:
    """Explain why a score cannot tell whether a setting keeps `quality` of it. "" if it can.

    It cannot if the full model's score rests on so few lines that one of them is worth more than
    the share that may be lost.
    """
    lost = 1 - quality
    if score["support"] * lost >= 1:
        return ""
    return (
        f"{metric.label} of the full model rests on {score['support']:.0f} of {lines} lines, too "
        f"few to see a loss of {100 * lost:.3g} %; give more lines, or another metric"
    )


def keeps(row: Row, metric: Metric, quality: float) -> bool:
    """Return True if a setting surely keeps the share `quality` of the full model's score.

    It does if it generates the full model's tokens, or if the lower bound of its relative score
    reaches `quality`.
    """
    score = row["scores"][metric.name]
    if score["low"] is None:
        return False
    if row["method"] in LOSSLESS and row["same"] == 1:
        return True
    return bool(score["low"] >= quality) and not too_few_lines(score, row["lines"], metric, quality)


def fastest(rows: Iterable[Row], metric: Metric, quality: float) -> Row | None:
    """Return the row with the highest lower bound of its speed, except full.

    It must keep `quality`. None without such a row, or with fewer than FEWEST_LINES lines.
    """
    enough = [row for row in rows if row["method"] != "full" and row["lines"] >= FEWEST_LINES]
    good = [row for row in enough if keeps(row, metric, quality)]
    return max(good, key=lambda row: row["request_low"] or 0.0, default=None)


def verdicts(rows: Sequence[Row], metric: Metric, quality: float) -> list[str]:
    """Return a sentence for each bundle that recommends a setting, with its uncertainty."""
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
    lines = rows[0]["lines"]
    wanted = f"{100 * quality:.4g} % of full's {metric.label}"
    if lines < FEWEST_LINES:
        return (
            f"no winner: {lines} lines are too few to tell settings apart; "
            f"give {FEWEST_LINES} or more"
        )
    too_few = too_few_lines(rows[0]["scores"][metric.name], lines, metric, quality)
    best = fastest(rows, metric, quality)
    if best is None:
        if too_few:
            return f"no verdict: {too_few}"
        return f"no setting keeps {wanted} by the lower bound of its interval: use full or lossless"
    name, speed, low, high = (
        best[field] for field in ("setting", "request_speed", "request_low", "request_high")
    )
    bounds = f"{speed:.2f}x (95 %: {low:.2f} to {high:.2f})"
    scope = "with full's tokens" if too_few else f"that keeps {wanted}"
    others = f"; no verdict on the others: {too_few}" if too_few else ""
    if low <= 1:
        return f"no setting {scope} is surely faster than full: {name} has {bounds}{others}"
    kept, least, most = (
        100 * best["scores"][metric.name][field] for field in ("relative", "low", "high")
    )
    shares = "" if too_few else f" at {kept:.1f} % ({least:.1f} to {most:.1f})"
    return f"{name} is the fastest {scope}: {bounds} the speed of full{shares}{others}"
