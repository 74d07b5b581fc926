"""The demo on SmolLM2-135M-Instruct: generate with it, and compare the speed of its modes."""

from __future__ import annotations

from pathlib import Path

import click

from freeexport.checkpoints.packaged_models import smollm2
from freeexport.conversion.options import ConvertOptions
from freeexport.demo.bundle import demo_bundle
from freeexport.measure.bench import BenchOptions, bench_sheet, benchmark, facts_lines, narrow
from freeexport.measure.table import terminal
from freeexport.system.page import print_page
from runtime import Session

EXIT_LAYER, THRESHOLD = 10, 0.9
QUESTION = "What is the capital of France, and what is it known for?"
TOKENS, ROUNDS = 64, 3


def run(directory: Path, threads: int | None) -> None:
    """Convert SmolLM2-135M-Instruct to a bundle at `directory`, generate with it, measure its modes."""
    checkpoint = smollm2()
    bundle = demo_bundle(checkpoint, directory, ConvertOptions(EXIT_LAYER, overwrite=True))
    _generate(bundle, threads)
    _compare(bundle, threads)


def _generate(bundle: Path, threads: int | None) -> None:
    click.echo(f"\nprompt: {QUESTION}")
    with Session(bundle, threads=threads, slots=1) as session:
        prompt = [{"role": "user", "content": QUESTION}]
        click.echo("mode full: ", nl=False)
        for token in session.stream(prompt, mode="full", max_new_tokens=TOKENS):
            click.echo(token.text, nl=False)
        click.echo()
        result = session.generate(prompt, threshold=THRESHOLD, max_new_tokens=TOKENS)
        click.echo(f"mode free, threshold {THRESHOLD}, {result.stats.exit_rate:.0%} exited: {result.text}")


def _compare(bundle: Path, threads: int | None) -> None:
    click.echo(f"\nmeasuring {TOKENS} tokens, {ROUNDS} rounds ...")
    options = BenchOptions((bundle,), tokens=TOKENS, rounds=ROUNDS, threads=threads, thresholds=(THRESHOLD,))
    found = benchmark(options)
    print_page([terminal(narrow(bench_sheet(found)))])
    click.echo("\n".join(facts_lines(found)))
    click.echo(
        f"note: this model was not trained to exit at layer {EXIT_LAYER}, so text in mode free is poor: it shows speed "
        "and mechanics, not quality"
    )
