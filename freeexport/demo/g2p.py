"""The demo on the model of this package: pronunciations of English words, with the tokens that exited in colour."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from freeexport.checkpoints.examples import read_examples
from freeexport.conversion.options import ConvertOptions
from freeexport.demo.bundle import demo_bundle
from freeexport.measure.evaluate import evaluate
from freeexport.measure.settings import EvaluateOptions
from freeexport.system.page import print_page, table
from runtime import Session
from runtime.result import GenerationResult

if TYPE_CHECKING:
    from rich.table import Table

    from freeexport.measure.evaluate import Evaluation

# A matrix of this model is too small to be shared among threads.
THREADS = 1
SHOWN, MEASURED, ROUNDS = 3, 60, 3
MODES = {"full": "full: the whole model", "static": "shallow only", "free": "free: FREE"}


def model_directory() -> Path:
    """The trained checkpoint that this package ships."""
    return Path(str(files("freeexport") / "data" / "g2p"))


def phrases_file() -> Path:
    """Phrases shipped beside the checkpoint, with every listed pronunciation of each of their words."""
    return model_directory() / "test.jsonl"


def run(directory: Path, threads: int | None) -> None:
    """Convert the checkpoint to a bundle at `directory`, decode test phrases, print them and the comparison."""
    bundle = demo_bundle(
        model_directory(), directory, ConvertOptions(overwrite=True, calibration=model_directory() / "calibration.json")
    )
    threads = threads or THREADS
    with Session(bundle, threads=threads, slots=1) as session:
        _show(session, [request.input for request in read_examples(phrases_file(), SHOWN)])
    with tempfile.TemporaryDirectory() as results:
        found = evaluate(
            EvaluateOptions(
                bundles=((bundle, ("full", "static", "free")),),
                data=phrases_file(),
                output=Path(results),
                metrics=("per", "word-acc"),
                thresholds=(),
                samples=MEASURED,
                rounds=ROUNDS,
                threads=threads,
            )
        )
    print_page([comparison(found)])
    click.echo(
        f"{MEASURED} phrases of the test split, {ROUNDS} interleaved rounds (the median counts), fp32, "
        f"{threads} thread(s); speed of requests, the encoder included"
    )
    for note in found.notes:
        click.echo(f"note: {note}")


def _show(session: Session, chosen: Sequence[Any]) -> None:
    layer = session.manifest.exit_layer
    click.echo(f"\n{click.style('green', fg='green')} tokens exited after layer {layer}; the others took every layer")
    for phrase in chosen:
        result = session.generate(phrase)
        click.echo(f"\n{phrase}\n  {coloured(session, result)}")
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


def comparison(found: Evaluation) -> Table:
    """Error rates, speed and exits of each mode; speeds also as multiples of the whole model's."""
    rows = []
    for row in found.rows:
        at = "" if row.threshold is None else f", threshold {row.threshold:.2f}"
        rows.append(
            (
                MODES[row.method] + at,
                f"{1 - row.scores['per'].value:.1%}",
                f"{1 - row.scores['word-acc'].value:.1%}",
                f"{row.tokens_per_second:.0f}",
                f"{row.request_speed:.2f}x",
                f"{row.exit_rate:.0%}",
            )
        )
    columns = ("mode", "phoneme errors#", "word errors#", "tokens/s#", "speed#", "exited#")
    return table("Pronunciations of words that the model has not seen", columns, rows)
