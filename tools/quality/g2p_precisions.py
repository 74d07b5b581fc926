"""What precisions cost the g2p model on its own task: error rates, and greedy tokens against those of the first bundle.

    python -m tools.quality.g2p_precisions data/g2p/test.jsonl fp32 int8 mixed int4 --output precisions.json

Bundles of one checkpoint, fp32 first. Phrases only; mode full, and free at each bundle's own threshold. One thread.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from freeexport.metrics.phonemes import Errors, errors
from freeexport.system.progress import progress
from runtime import GenerationResult, Session
from runtime.options import Mode
from tools.data.splits import run

MODES: tuple[Mode, ...] = ("full", "free")


@dataclass(frozen=True)
class Line:
    """One test item: its prompt, and the pronunciations of each of its words."""

    input: str
    references: list[list[str]]


def read(path: Path, limit: int) -> list[Line]:
    """The first `limit` phrases of a test split."""
    items = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return [Line(item["input"], item["references"]) for item in items if len(item["references"]) > 1][:limit]


@dataclass(frozen=True)
class Row:
    """Rates as shares. `same_tokens`: tokens that stand at their place in the full model's fp32 sequence; `same_lines`:
    sequences that are equal to it."""

    bundle: str
    mode: Mode
    threshold: float
    exit_rate: float
    phoneme_error_rate: float
    word_error_rate: float
    same_tokens: float
    same_lines: float


def measure(bundle: Path, lines: Sequence[Line], reference: list[tuple[int, ...]]) -> list[Row]:
    """A row a mode; an empty `reference` is filled with the first mode's tokens."""
    rows = []
    with Session(bundle, threads=1, slots=1) as session, progress(bundle.name, len(lines) * len(MODES)) as advance:
        for mode in MODES:
            results = []
            for line in lines:
                results.append(session.generate(line.input, mode=mode))
                advance()
            if not reference:
                reference += [result.token_ids for result in results]
            rows.append(_row(bundle.name, mode, session.threshold, lines, results, reference))
    return rows


def _row(
    name: str,
    mode: Mode,
    threshold: float,
    lines: Sequence[Line],
    results: Sequence[GenerationResult],
    reference: Sequence[tuple[int, ...]],
) -> Row:
    total = sum(
        (errors(result.text, line.references) for result, line in zip(results, lines, strict=True)), start=Errors()
    )
    tokens = [result.token_ids for result in results]
    equal = sum(sum(a == b for a, b in zip(*pair, strict=False)) for pair in zip(tokens, reference, strict=True))
    return Row(
        bundle=name,
        mode=mode,
        threshold=threshold,
        exit_rate=sum(result.stats.exits for result in results) / max(1, sum(map(len, tokens)) - len(tokens)),
        phoneme_error_rate=total.phoneme_error_rate,
        word_error_rate=total.word_error_rate,
        same_tokens=equal / sum(map(len, reference)),
        same_lines=sum(a == b for a, b in zip(tokens, reference, strict=True)) / len(tokens),
    )


@click.command(help=__doc__)
@click.argument("data", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Phrases.")
@click.option("--output", type=click.Path(path_type=Path))
def command(data: Path, bundles: tuple[Path, ...], limit: int, output: Path | None) -> None:
    phrases = read(data, limit)
    reference: list[tuple[int, ...]] = []
    rows: list[Row] = []
    for bundle in bundles:
        for row in measure(bundle, phrases, reference):
            rows.append(row)
            lost = row.phoneme_error_rate / rows[0].phoneme_error_rate - 1
            click.echo(
                f"{row.bundle:<8} {row.mode} at {row.threshold:g}: exited {row.exit_rate:.1%}, "
                f"phonemes {row.phoneme_error_rate:.3%} ({lost:+.1%}), words {row.word_error_rate:.2%}; "
                f"as fp32 in full: {row.same_tokens:.2%} of tokens, {row.same_lines:.1%} of lines"
            )
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(command)
