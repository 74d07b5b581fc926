"""Demos with the pronunciation model of this package, and with SmolLM2-135M-Instruct."""

from __future__ import annotations

import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import click

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.checkpoint import smollm2 as smollm2_checkpoint
from freeexport.checkpoints.examples import read_examples
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.evaluate.evaluate import evaluate
from freeexport.evaluate.settings import EvaluateOptions
from freeexport.evaluate.speed import measure_speed
from freeexport.evaluate.speed_rows import speed_lines, speed_sheet
from freeexport.evaluate.tables import narrow
from freeexport.system.page import print_page, table
from freeexport.system.sheet import terminal
from runtime import Bundle, BundleError, Session
from runtime.result import GenerationResult

if TYPE_CHECKING:
    from rich.table import Table

    from freeexport.evaluate.evaluate import Evaluation

# The trained checkpoint in this package, and phrases with all pronunciations of their words.
G2P = Path(str(files("freeexport") / "data" / "g2p"))
PHRASES = G2P / "test.jsonl"
# The model's matrices are too small to be shared among threads.
THREADS = 1
SHOWN = 3
MEASURED = 60
ROUNDS = 3
MODES = {"full": "full: the whole model", "static": "shallow only", "free": "free: FREE"}

EXIT_LAYER = 10
THRESHOLD = 0.9
TOKENS = 64
QUESTION = "What is the capital of France, and what is it known for?"


def g2p(directory: Path) -> None:
    """Convert the pronunciation model to a bundle at `directory`, decode phrases, compare modes."""
    bundle = demo_bundle(
        G2P, directory, ConvertOptions(overwrite=True, calibration=G2P / "calibration.json")
    )
    with Session(bundle, threads=THREADS, slots=1, draft_memory_mb=0) as session:
        green = click.style("green", fg="green")
        click.echo(
            f"\n{green} tokens exited after layer {session.manifest.exit_layer}; the others took "
            "every layer"
        )
        for phrase in (request.text for request in read_examples(PHRASES, SHOWN)):
            click.echo(f"\n{phrase}\n  {_coloured(session, session.generate(phrase))}")
        click.echo()
    with tempfile.TemporaryDirectory() as results:
        found = evaluate(
            EvaluateOptions(
                bundles=((bundle, ("full", "static", "free")),),
                data=PHRASES,
                output=Path(results),
                metrics=("per", "word-acc"),
                thresholds=(),
                samples=MEASURED,
                rounds=ROUNDS,
                threads=THREADS,
            )
        )
    print_page([_comparison(found)])
    click.echo(
        f"{MEASURED} phrases of the test split, {ROUNDS} interleaved rounds (the median counts), "
        f"fp32, {THREADS} thread(s); speed of requests, the encoder included"
    )
    for note in found.report["notes"]:
        click.echo(f"note: {note}")


def smollm2(directory: Path) -> None:
    """Convert SmolLM2-135M-Instruct to a bundle at `directory`, generate, compare modes."""
    bundle = demo_bundle(
        smollm2_checkpoint(), directory, ConvertOptions(EXIT_LAYER, overwrite=True)
    )
    click.echo(f"\nprompt: {QUESTION}")
    with Session(bundle, slots=1, prefix_cache_mb=0) as session:
        prompt = [{"role": "user", "content": QUESTION}]
        click.echo("mode full: ", nl=False)
        for token in session.stream(prompt, mode="full", max_new_tokens=TOKENS):
            click.echo(token.text, nl=False)
        click.echo()
        result = session.generate(prompt, threshold=THRESHOLD, max_new_tokens=TOKENS)
        click.echo(
            f"mode free, threshold {THRESHOLD}, {result.stats.exit_rate:.0%} exited: {result.text}"
        )
    click.echo(f"\nmeasuring {TOKENS} tokens, {ROUNDS} rounds ...")
    found = measure_speed(
        EvaluateOptions(
            bundles=((bundle, ("full", "free", "lossless")),),
            thresholds=(THRESHOLD,),
            rounds=ROUNDS,
            max_new_tokens=TOKENS,
        )
    )
    shown = narrow(speed_sheet(found))
    print_page([terminal(shown)])
    click.echo("\n".join(speed_lines(found, shown)))
    click.echo(
        f"note: this model was not trained to exit at layer {EXIT_LAYER}, so text in mode free is "
        "poor: it shows speed and mechanics, not quality"
    )


def demo_bundle(checkpoint: Path, path: Path, options: ConvertOptions) -> Path:
    """Return a verified bundle of `checkpoint` at `path`.

    Converts again if the existing one is damaged or of another checkpoint.
    """
    try:
        manifest = Bundle.open(path, verify="full").manifest
        if manifest.verified and manifest.source_sha256 == open_checkpoint(str(checkpoint)).sha256:
            click.echo(f"bundle: {path}, from an earlier run")
            return path
    except BundleError:
        pass  # no usable bundle exists
    exit_at = "" if options.exit_layer is None else f", exit after layer {options.exit_layer}"
    began = time.monotonic()
    click.echo(f"converting {checkpoint.name}{exit_at}, and checking it against transformers ...")
    manifest = convert(str(checkpoint), path, options)
    click.echo(
        f"bundle: {path}, {manifest.weight_bytes / 1e6:.0f} MB, {time.monotonic() - began:.0f} s"
    )
    return path


def _coloured(session: Session, result: GenerationResult) -> str:
    """Return the tokens of a result without the end of sequence. Tokens that exited are green."""
    assert session.tokenizer is not None
    shown = []
    for token, exited in zip(result.token_ids, result.exited, strict=True):
        if token not in session.manifest.eos_token_ids:
            text = session.tokenizer.decode([token])
            shown.append(click.style(text, fg="green") if exited else text)
    return " ".join(shown)


def _comparison(found: Evaluation) -> Table:
    """Build a table of error rates, speed and exits of each mode, relative to the full model."""
    rows = [
        (
            MODES[row["method"]]
            + ("" if row["threshold"] is None else f", threshold {row['threshold']:.2f}"),
            f"{1 - row['scores']['per']['value']:.1%}",
            f"{1 - row['scores']['word-acc']['value']:.1%}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['request_speed']:.2f}x",
            f"{row['exit_rate']:.0%}",
        )
        for row in found.rows
    ]
    columns = ("mode", "phoneme errors#", "word errors#", "tokens/s#", "speed#", "exited#")
    return table("Pronunciations of words that the model has not seen", columns, rows)
