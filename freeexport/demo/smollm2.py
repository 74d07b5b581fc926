"""The demo on SmolLM2-135M-Instruct: generate with it, and compare its speed with transformers'."""

from __future__ import annotations

from pathlib import Path

import click

from freeexport.benchmark.benchmark import reference_answers
from freeexport.benchmark.contenders import Contender, Ours, Transformers
from freeexport.benchmark.options import BenchOptions
from freeexport.benchmark.report import Report, settings, table
from freeexport.benchmark.rounds import measure
from freeexport.benchmark.rows import rows_of
from freeexport.checkpoints.packaged_models import smollm2
from freeexport.conversion.options import ConvertOptions
from freeexport.demo.bundle import demo_bundle
from freeexport.measure.byte_model import bandwidth_of
from freeexport.system.idle import require_idle
from runtime import Bundle, Session
from runtime.machine.machine import usable_cores

EXIT_LAYER, THRESHOLD = 10, 0.9
QUESTION = "What is the capital of France, and what is it known for?"
TOKENS, ROUNDS = 64, 3


def run(directory: Path, threads: int | None) -> None:
    """Convert SmolLM2-135M-Instruct to a bundle at `directory`, generate with it, measure it beside transformers."""
    checkpoint = smollm2()
    bundle = demo_bundle(checkpoint, directory, ConvertOptions(EXIT_LAYER, overwrite=True))
    _generate(bundle, threads)
    _compare(bundle, checkpoint, threads or usable_cores())


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


def _compare(bundle: Path, checkpoint: Path, threads: int) -> None:
    idle = require_idle(force=True)
    contenders: list[Contender] = [
        Transformers(str(checkpoint), threads),
        Ours(bundle, threads, "full", precision="fp32"),
        Ours(bundle, threads, "free", THRESHOLD, precision="fp32"),
    ]
    with Session(bundle, threads=threads, slots=1) as session:
        assert session.tokenizer is not None
        prompts = [session.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])]
    click.echo(f"\nmeasuring {TOKENS} tokens, {ROUNDS} rounds ...")
    options = BenchOptions(bundle, tokens=TOKENS, rounds=ROUNDS, threads=threads)
    measured = measure(contenders, prompts, TOKENS, ROUNDS)
    answers, truth = reference_answers(contenders, measured, None, prompts, options)
    rows = rows_of(contenders, measured, answers, idle=True)
    used = settings(Bundle.open(bundle), options, len(prompts), idle, truth)
    click.echo(table(Report(used, rows, measured.failed, bandwidth_of(threads))))
    click.echo(
        f"note: this model was not trained to exit at layer {EXIT_LAYER}, so text in mode free is poor: it shows speed "
        "and mechanics, not quality"
    )
