"""`freeexport exits`: list ready-made exits, and which of them fit a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.packed_exit import (
    PackedExit,
    misfit,
    read_packed,
    ready_made,
    weights_sha256,
)
from freeexport.commands.verb_options import SectionedCommand
from freeexport.system.page import human_bytes


@click.command(cls=SectionedCommand)
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print all metadata of the files as JSON.")
def command(model: str | None, as_json: bool) -> None:
    """List the exits that come with freeexport, for `convert --exit`.

    With MODEL, also report which of them fit its weights.

    \b
    Example:
      freeexport exits
      freeexport exits path/to/checkpoint
    """
    exits = [(path, read_packed(path)[0]) for path in ready_made()]
    reasons: dict[str, str | None] = {}
    if model is not None:
        checkpoint = open_checkpoint(model)
        sha256 = weights_sha256(checkpoint)
        reasons = {packed.name: misfit(packed, checkpoint, sha256) for _, packed in exits}
    if as_json:
        fits = {
            name: {"fits": reason is None, "reason": reason} for name, reason in reasons.items()
        }
        records: list[dict[str, Any]] = [
            {
                **asdict(packed),
                "file": str(path),
                "bytes": path.stat().st_size,
                **fits.get(packed.name, {}),
            }
            for path, packed in exits
        ]
        click.echo(json.dumps(records, indent=2))
        return
    if not exits:
        click.echo("no ready-made exits are installed; train one with freeexport train")
    for path, packed in exits:
        for line in _lines(path, packed):
            click.echo(line)
        if model is not None:
            reason = reasons[packed.name]
            click.echo(f"    fits {model}: {'yes' if reason is None else f'no, {reason}'}")


def _lines(path: Path, packed: PackedExit) -> list[str]:
    own = packed.exit.exit_layers
    vocabulary = packed.exit.vocabulary
    parts = [f"after layer {packed.exit.exit_layer}"]
    if own:
        parts.append(f"{own} layer{'s' if own > 1 else ''} of its own")
    if vocabulary is not None:
        parts.append(f"{vocabulary.size} tokens")
    if packed.adapter_config is not None:
        parts.append("a LoRA adapter of the model")
    parts += [human_bytes(path.stat().st_size), packed.licence]
    facts = {"data": packed.data, "recipe": packed.recipe, "results": packed.results}
    return [
        f"{packed.name}: for {packed.model}, {', '.join(parts)}",
        *(f"    {name}: {text}" for name, text in facts.items() if text),
    ]
