"""Let a bundle answer prompts, to count the phrases of its answers.

    python -m tools.data.answers BUNDLE prompts.jsonl answers.jsonl

Answers are greedy, and many are generated at the same time. Prompts that OUT answers already are
skipped, so an interrupted run continues. OUT is a file for `convert --phrases`, and
tools.data.pack_answers reads it.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from freeexport.checkpoints.examples import read_examples
from freeexport.system.jsonl import append_lines, whole_lines
from runtime import PromptError, Session
from tools.data.splits import run_tool

SLOTS = 24


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--max-new-tokens", default=128, type=click.IntRange(1))
@click.option("--threads", type=click.IntRange(1), help="Default: all cores.")
def main(bundle: Path, prompts: Path, out: Path, max_new_tokens: int, threads: int | None) -> None:
    answered = {json.dumps(json.loads(line)["input"]) for line in whole_lines(out)}
    inputs = [line.input for line in read_examples(prompts)]
    left = [prompt for prompt in inputs if json.dumps(prompt) not in answered]

    with Session(bundle, threads=threads, slots=SLOTS, draft_memory_mb=0) as session:

        def answer(prompt: Any) -> dict[str, Any] | None:
            try:
                result = session.generate(prompt, mode="full", max_new_tokens=max_new_tokens)
            except PromptError:
                return None  # too long
            return {"input": prompt, "target": result.text, "complete": result.complete}

        with (
            ThreadPoolExecutor(SLOTS) as pool,
            click.progressbar(
                pool.map(answer, left), length=len(left), label="answers"
            ) as finished,
        ):
            for line in finished:
                append_lines(out, [] if line is None else [line])
    click.echo(f"{out}: {len(whole_lines(out))} answers to {len(inputs)} prompts")


if __name__ == "__main__":
    run_tool(main)
