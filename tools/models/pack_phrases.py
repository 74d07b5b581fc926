"""Count the frequent phrases of a model's outputs, and write them to a file.

    python -m tools.models.pack_phrases NAME outputs.jsonl --bundle BUNDLE --model Qwen2.5-Coder \\
        --licence Apache-2.0 --data "..." --results "..."

Each line has `target_ids`, or a `target`, which the bundle's tokenizer encodes.
"""

from __future__ import annotations

from pathlib import Path

import click

from freeexport.checkpoints.phrase_file import (
    READY_MADE,
    SUFFIX,
    PhraseFile,
    tokens_sha256,
    write_phrase_file,
)
from freeexport.conversion.phrases import MOST_PHRASES
from runtime.bundle.bundle import Bundle
from runtime.decoding.phrases import PhraseTable
from runtime.text.tokenizer import Tokenizer
from tools.data.splits import run_tool
from tools.models.exit_phrases import texts_of


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("name")
@click.argument("outputs", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", required=True, help="Name of the model or its family.")
@click.option("--licence", required=True, help="SPDX licence of the table.")
@click.option("--data", required=True, help="Sentences on the outputs.")
@click.option("--results", required=True, help="Sentences on the results.")
@click.option("--most", default=MOST_PHRASES, type=click.IntRange(1), help="Phrases, at most.")
def main(
    name: str,
    outputs: Path,
    bundle: Path,
    model: str,
    licence: str,
    data: str,
    results: str,
    most: int,
) -> None:
    manifest = Bundle.open(bundle).manifest
    tokenizer = Tokenizer.load(bundle, manifest.files)
    if tokenizer is None:
        raise click.UsageError(f"{bundle} has no tokenizer; name another bundle")
    phrases = PhraseTable.build(texts_of(outputs, bundle), most).entries
    about = PhraseFile(
        name=name,
        model=model,
        vocab_size=manifest.vocab_size,
        tokens_sha256=tokens_sha256(tokenizer, phrases),
        licence=licence,
        data=data,
        results=results,
    )
    path = READY_MADE / f"{name}{SUFFIX}"
    write_phrase_file(path, about, phrases)
    click.echo(f"{path}: {len(phrases):,} phrases, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_tool(main)
