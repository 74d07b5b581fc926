"""The demo on the model of this package: pronunciations of English words, with the tokens that exited in colour."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from freeexport.conversion.options import ConvertOptions
from freeexport.demo.bundle import demo_bundle
from freeexport.metrics.phonemes import Errors, errors
from freeexport.system.idle import require_idle
from freeexport.system.page import print_page, table
from runtime import Session
from runtime.options import Mode
from runtime.result import GenerationResult

if TYPE_CHECKING:
    from rich.table import Table

# A matrix of this model is too small to be shared among threads.
THREADS = 1
SHOWN, MEASURED, ROUNDS = 3, 60, 3
MODES: dict[Mode, str] = {"full": "full: the whole model", "shallow": "shallow only", "free": "free: FREE"}


@dataclass(frozen=True)
class Phrase:
    """A test phrase of the model's data set, and every listed pronunciation of each of its words."""

    input: str
    references: list[list[str]]


@dataclass
class Total:
    """What one mode did over all phrases and rounds."""

    errors: Errors = field(default_factory=Errors)
    sequences: int = 0
    tokens: int = 0
    exits: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0] * ROUNDS)

    @property
    def speed(self) -> float:
        """Tokens per second, the median over rounds."""
        return self.tokens / median(self.seconds)


def model_directory() -> Path:
    """The trained checkpoint that this package ships."""
    return Path(str(files("freeexport") / "data" / "g2p"))


def phrases() -> list[Phrase]:
    """The test phrases shipped beside the checkpoint."""
    lines = (model_directory() / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [Phrase(item["input"], item["references"]) for item in map(json.loads, lines)]


def run(directory: Path, threads: int | None) -> None:
    """Convert the checkpoint to a bundle at `directory`, decode test phrases, print them and the comparison."""
    test = phrases()
    bundle = demo_bundle(
        model_directory(), directory, ConvertOptions(overwrite=True, calibration=model_directory() / "calibration.json")
    )
    idle = require_idle(force=True)
    with Session(bundle, threads=threads or THREADS, slots=1) as session:
        _show(session, test[:SHOWN])
        totals = measure(session, test[:MEASURED])
        threshold = session.manifest.threshold
    print_page([comparison(totals, threshold)])
    click.echo(
        f"{MEASURED} phrases of the test split, {ROUNDS} interleaved rounds (the median counts), fp32, "
        f"{threads or THREADS} thread(s); speed of decoding, the encoder included"
    )
    if not idle:
        click.echo("note: the machine was busy with other work, so these speeds are not to be trusted")


def _show(session: Session, chosen: list[Phrase]) -> None:
    layer = session.manifest.exit_layer
    click.echo(f"\n{click.style('green', fg='green')} tokens exited after layer {layer}; the others took every layer")
    for phrase in chosen:
        result = session.generate(phrase.input)
        click.echo(f"\n{phrase.input}\n  {coloured(session, result)}")
    click.echo()


def coloured(session: Session, result: GenerationResult) -> str:
    """The tokens of a result but the end of sequence; those that exited are green."""
    assert session.tokenizer is not None
    ends = session.manifest.eos_token_ids
    shown = []
    for token, exited in zip(result.token_ids, result.exited, strict=True):
        if token not in ends:
            text = session.tokenizer.decode([token])
            shown.append(click.style(text, fg="green") if exited else text)
    return " ".join(shown)


def measure(session: Session, test: list[Phrase]) -> dict[Mode, Total]:
    """Every phrase in every mode, in turn."""
    totals = {mode: Total() for mode in MODES}
    for mode in MODES:
        session.generate(test[0].input, mode=mode)
    for turn in range(ROUNDS):
        for phrase in test:
            for mode, total in totals.items():
                result = session.generate(phrase.input, mode=mode)
                total.seconds[turn] += result.stats.seconds
                if turn == 0:
                    total.errors += errors(result.text, phrase.references)
                    total.sequences += 1
                    total.tokens += len(result.token_ids)
                    total.exits += result.stats.exits
    return totals


def comparison(totals: dict[Mode, Total], threshold: float) -> Table:
    """Error rates, speed and exits of each mode; speeds also as multiples of the whole model's."""
    rows = []
    for mode, total in totals.items():
        rows.append(
            (
                MODES[mode] + (f", threshold {threshold:.2f}" if mode == "free" else ""),
                f"{total.errors.phoneme_error_rate:.1%}",
                f"{total.errors.word_error_rate:.1%}",
                f"{total.speed:.0f}",
                f"{total.speed / totals['full'].speed:.2f}x",
                f"{total.exits / max(1, total.tokens - total.sequences):.0%}",
            )
        )
    columns = ("mode", "phoneme errors#", "word errors#", "tokens/s#", "speed#", "exited#")
    return table("Pronunciations of words that the model has not seen", columns, rows)
