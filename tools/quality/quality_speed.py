"""Quality against speed on the shipped model: every mode and threshold in turn, one thread, and a picture.

    python -m tools.quality.quality_speed BUNDLE --plot docs/g2p.png --json figures.json

BUNDLE is what `freeexport demo` leaves in .demo/g2p. The test phrases come with the package; speeds are medians over
interleaved rounds, the encoder included. The machine must be idle.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click

from freeexport.demo.g2p import THREADS, Phrase, phrases
from freeexport.metrics.phonemes import Errors, errors
from freeexport.system.idle import require_idle
from freeexport.system.machine import detect_machine
from freeexport.system.plot import BLUE, GREY, ORANGE, new_figure, save_figure
from freeexport.system.progress import progress
from runtime import Session
from runtime.options import Mode

THRESHOLDS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
SETTINGS: list[tuple[Mode, float | None]] = [("full", None), ("shallow", None), *(("free", at) for at in THRESHOLDS)]


@dataclass(frozen=True)
class Point:
    """`speedup` over mode full; rates are shares."""

    mode: Mode
    threshold: float | None
    phoneme_error_rate: float
    exit_rate: float
    tokens_per_second: float
    speedup: float


def measure(session: Session, test: list[Phrase], rounds: int) -> list[Point]:
    """Every phrase at every setting, in turn."""
    seconds = [[0.0] * rounds for _ in SETTINGS]
    found = [Errors() for _ in SETTINGS]
    tokens, exits = [0] * len(SETTINGS), [0] * len(SETTINGS)
    with progress("decoding", rounds * len(test)) as advance:
        for turn in range(rounds):
            for phrase in test:
                for place, (mode, threshold) in enumerate(SETTINGS):
                    result = session.generate(phrase.input, mode=mode, threshold=threshold)
                    seconds[place][turn] += result.stats.seconds
                    if turn == 0:
                        found[place] += errors(result.text, phrase.references)
                        tokens[place] += len(result.token_ids)
                        exits[place] += result.stats.exits
                advance()
    speeds = [count / median(times) for count, times in zip(tokens, seconds, strict=True)]
    return [
        Point(
            mode,
            threshold,
            found[place].phoneme_error_rate,
            exits[place] / (tokens[place] - len(test)),
            speeds[place],
            speeds[place] / speeds[0],
        )
        for place, (mode, threshold) in enumerate(SETTINGS)
    ]


def draw(points: list[Point], path: Path) -> None:
    """Phoneme errors by speedup, a mark for each setting."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    free = [point for point in points if point.mode == "free"]
    axes.plot(
        [point.speedup for point in free],
        [100 * point.phoneme_error_rate for point in free],
        color=BLUE,
        marker="o",
        label="FREE, by threshold",
    )
    for point in free:
        at = (point.speedup, 100 * point.phoneme_error_rate)
        axes.annotate(f"{point.threshold:g}", at, textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    for point, colour, marker in ((points[0], GREY, "s"), (points[1], ORANGE, "^")):
        label = "full model" if point.mode == "full" else "shallow decoder alone"
        axes.plot(point.speedup, 100 * point.phoneme_error_rate, marker, color=colour, markersize=9, label=label)
    axes.axhline(100 * points[0].phoneme_error_rate, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xlabel="speed, as a multiple of the full model's", ylabel="phoneme errors (%)")
    axes.margins(0.08, 0.15)
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    save_figure(figure, path)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--phrases", "count", type=int, default=100, show_default=True, help="Of the shipped test phrases.")
@click.option("--plot", type=click.Path(path_type=Path), help="A PNG.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="The figures.")
@click.option("--force", is_flag=True, help="On a busy machine too.")
def main(bundle: Path, rounds: int, count: int, plot: Path | None, output: Path | None, force: bool) -> None:
    """Measure BUNDLE, a bundle of the shipped model."""
    require_idle(force)
    with Session(bundle, threads=THREADS, slots=1) as session:
        points = measure(session, phrases()[:count], rounds)
    machine = detect_machine()
    click.echo(
        f"{machine.cpu} ({' '.join(machine.features)}), {THREADS} thread, fp32, {count} phrases, {rounds} rounds"
    )
    for one in points:
        at = "" if one.threshold is None else f"{one.threshold:g}"
        rates = f"{one.phoneme_error_rate:6.2%} errors, {one.exit_rate:4.0%} exit"
        click.echo(f"{one.mode:8} {at:5} {rates}, {one.tokens_per_second:6.0f} tokens/s, {one.speedup:.2f}x")
    if output is not None:
        output.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw(points, plot)


if __name__ == "__main__":
    main()
