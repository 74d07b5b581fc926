"""`freeexport exits`: list ready-made exits, and which of them fit a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.packed_exit import PackedExit, read_packed
from freeexport.checkpoints.ready_made import misfit, ready_made
from freeexport.commands.verb_options import SectionedCommand
from freeexport.system.page import human_bytes


@click.command(cls=SectionedCommand)
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print all metadata of the files as JSON.")
def command(model: str | None, as_json: bool) -> None:
    """List the exits that come with freeexport, for `convert`.

    With MODEL, also report which of them fit its weights, or may fit them.

    \b
    Example:
      freeexport exits
      freeexport exits path/to/checkpoint
    """
    found = [(path, read_packed(path).about) for path in ready_made()]
    fits: dict[str, dict[str, Any]] = {}
    if model is not None:
        checkpoint = open_checkpoint(model)
        fits = {packed.name: _fit(packed, checkpoint) for _, packed in found}
    if as_json:
        records = [
            {
                **asdict(packed),
                "file": str(path),
                "bytes": path.stat().st_size,
                **fits.get(packed.name, {}),
            }
            for path, packed in found
        ]
        click.echo(json.dumps(records, indent=2))
        return
    if not found:
        click.echo("no ready-made exits are installed; train one with freeexport train")
    for path, packed in found:
        for line in _lines(path, packed):
            click.echo(line)
        if model is not None:
            _echo_fit(model, fits[packed.name])


def _echo_fit(model: str, fit: dict[str, Any]) -> None:
    answer = {True: "yes", False: "no, ", None: "perhaps, "}[fit["fits"]]
    click.echo(f"    fits {model}: {answer}{fit['reason'] or ''}")


def _fit(packed: PackedExit, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return whether an exit fits a model, None if that must be measured, and the reason."""
    if (reason := misfit(packed, checkpoint)) is not None:
        return {"fits": False, "reason": reason}
    if checkpoint.weights_sha256 == packed.weights_sha256:
        return {"fits": True, "reason": None}
    others = f"it was trained on other weights, of {packed.model}"
    if packed.agreement is None:
        return {"fits": False, "reason": others}
    return {"fits": None, "reason": f"{others}: convert --exit measures its agreement"}


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
