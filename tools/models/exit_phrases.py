"""Count the frequent phrases of outputs, and add them to the file of a ready-made exit.

    python -m tools.models.exit_phrases freeexport/exits/NAME.safetensors outputs.jsonl

Each line has `target_ids`, as in the outputs.jsonl of `freeexport train --self-distill`, or a
`target`, which the tokenizer of --bundle encodes. Phrases that the file has are replaced.
"""

from __future__ import annotations

from pathlib import Path

import click

from freeexport.checkpoints.packed_exit import MAX_BYTES, add_phrases
from freeexport.conversion.phrases import MAX_PHRASES
from runtime.bundle.bundle import Bundle
from runtime.decoding.phrases import PhraseTable
from runtime.text.tokenizer import Tokenizer
from tools.data.splits import json_lines, run_tool


def texts_of(outputs: Path, bundle: Path | None) -> list[list[int]]:
    """Return the token ids of each line, with the end of the sequence."""
    tokenizer = None
    ends: tuple[int, ...] = ()
    if bundle is not None:
        opened = Bundle.open(bundle)
        tokenizer = Tokenizer.load(bundle, opened.manifest.files)
        ends = opened.manifest.eos_token_ids[:1]
    texts = []
    for number, given in enumerate(json_lines(outputs), 1):
        if "target_ids" in given:
            texts.append(given["target_ids"])
        elif tokenizer is None or "target" not in given:
            raise click.UsageError(
                f"line {number} of {outputs} has no target_ids; give a target and --bundle"
            )
        else:
            texts.append([*tokenizer.encode(given["target"], special=False), *ends])
    return texts


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("exit_file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("outputs", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--max-phrases", default=MAX_PHRASES, type=click.IntRange(1), help="Number of phrases."
)
@click.option("--data", help="Sentences on the training data, in place of those in the file.")
@click.option("--results", help="Sentences on the results, in place of those in the file.")
def main(
    exit_file: Path,
    outputs: Path,
    bundle: Path | None,
    max_phrases: int,
    data: str | None,
    results: str | None,
) -> None:
    table = PhraseTable.build(texts_of(outputs, bundle), max_phrases)
    add_phrases(exit_file, table.entries, data=data, results=results)
    size = exit_file.stat().st_size
    click.echo(
        f"{exit_file}: {len(table.entries):,} phrases, {size / 1e6:.2f} MB of at most "
        f"{MAX_BYTES / 1e6:.0f}"
    )


if __name__ == "__main__":
    run_tool(main)
