"""Error rates of a grapheme-to-phoneme bundle over thresholds, on test phrases and on single words.

    python -m tools.quality.g2p_evaluation BUNDLE data/g2p/test.jsonl --output curve.json

Each line needs the field `references` (python -m tools.data.g2p ... --references). One thread; greedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from freeexport.metrics.phonemes import Errors, errors
from freeexport.system.progress import progress
from runtime import Session
from runtime.options import Mode
from tools.data.splits import run

THRESHOLDS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Line:
    """One test item: its prompt, and the pronunciations of each of its words."""

    input: str
    references: list[list[str]]


@dataclass(frozen=True)
class Point:
    """One setting: rates as shares, `seconds` of the whole set."""

    mode: Mode
    threshold: float | None
    exit_rate: float
    phoneme_error_rate: float
    word_error_rate: float
    tokens: int
    seconds: float


def read(path: Path, limit: int) -> tuple[list[Line], list[Line]]:
    """The first `limit` phrases and single words of a test split."""
    items = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    lines = [Line(item["input"], item["references"]) for item in items]
    return [x for x in lines if len(x.references) > 1][:limit], [x for x in lines if len(x.references) == 1][:limit]


def settings() -> Iterator[tuple[Mode, float | None]]:
    yield "full", None
    yield "shallow", None
    for threshold in THRESHOLDS:
        yield "free", threshold


def evaluate(session: Session, lines: Sequence[Line], title: str) -> list[Point]:
    """Every line in every setting, line by line, so that speeds compare."""
    chosen = list(settings())
    totals = [Errors()] * len(chosen)
    tokens, exits = [0] * len(chosen), [0] * len(chosen)
    clock = [0.0] * len(chosen)
    with progress(title, len(lines)) as advance:
        for line in lines:
            for index, (mode, threshold) in enumerate(chosen):
                result = session.generate(line.input, mode=mode, threshold=threshold)
                totals[index] += errors(result.text, line.references)
                tokens[index] += len(result.token_ids)
                exits[index] += result.stats.exits
                clock[index] += result.stats.seconds
            advance()
    return [
        Point(
            mode,
            threshold,
            exits[index] / max(1, tokens[index] - len(lines)),
            totals[index].phoneme_error_rate,
            totals[index].word_error_rate,
            tokens[index],
            clock[index],
        )
        for index, (mode, threshold) in enumerate(chosen)
    ]


def report(bundle: Path, data: Path, limit: int) -> dict[str, Any]:
    """Both sets of a test file, as JSON values."""
    phrases, words = read(data, limit)
    with Session(bundle, threads=1, slots=1) as session:
        return {
            "exit_layer": session.manifest.exit_layer,
            "phrases": len(phrases),
            "words": len(words),
            "on_phrases": [asdict(point) for point in evaluate(session, phrases, "phrases")],
            "on_words": [asdict(point) for point in evaluate(session, words, "words")],
        }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Phrases, and words.")
def command(bundle: Path, data: Path, output: Path, limit: int) -> None:
    """Error rate and exit rate of BUNDLE on the test file DATA, over thresholds."""
    result = report(bundle, data, limit)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for part in ("on_phrases", "on_words"):
        click.echo(f"{part}: exit layer {result['exit_layer']}")
        for point in result[part]:
            name = point["mode"] if point["threshold"] is None else f"free > {point['threshold']:g}"
            click.echo(
                f"  {name:<12} exited {point['exit_rate']:6.1%}  phonemes {point['phoneme_error_rate']:6.2%}  "
                f"words {point['word_error_rate']:6.2%}  {point['tokens'] / point['seconds']:6.0f} tokens/s"
            )


if __name__ == "__main__":
    run(command)
