"""The whole model with a smaller vocabulary, to compare exits with: how much of their speed is their smaller head's?

    python -m tools.models.cut_vocabulary CHECKPOINT OUT --data train.jsonl --tokens 8192
    freeexport convert OUT bundle --precision int8
    freeexport evaluate full-bundle=full bundle=static ...

OUT has an exit after the last layer but one, whose only layer is the last one, behind no map, and which knows the
tokens alone: method `static` is then the whole model that cannot write any other token.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.examples import TARGETS_WANTED, encode, read_examples, text_format
from freeexport.checkpoints.exit_file import EXIT_FILE, ExitFile, write_exit_file
from freeexport.system.output import output_directory
from freeexport.training.batches import DEFAULT_MAX_TOKENS
from freeexport.training.exit_modules import ExitLayers, KnownTokens, norm_module, write_exit
from freeexport.training.exit_start import chosen_tokens
from freeexport.training.options import TrainingOptions
from freeexport.training.tuning import link_base
from graphs.families import describe
from tools.data.splits import run

NEVER = -1e4  # the logit of the class of all other tokens


@torch.no_grad()
def write_cut(model: str, directory: Path, data: Path, tokens: int) -> None:
    """Write the checkpoint. Raises what `train --exit-vocab` raises for such data and numbers."""
    checkpoint = open_checkpoint(model)
    description = describe(checkpoint.config, checkpoint)
    decoder, width = description.decoder, description.hidden_size
    before = len(decoder.layers) - 1
    form = text_format(checkpoint, description, DEFAULT_MAX_TOKENS)
    examples, _ = encode(read_examples(data, need_target=TARGETS_WANTED), form, data)
    options = TrainingOptions(data, before, exit_vocab=tokens)
    ids, vocabulary = chosen_tokens(checkpoint, description, options, examples)
    known = KnownTokens(ids, width)
    known.other.weight.zero_()
    known.other.bias.fill_(NEVER)
    identity, norm = np.eye(width, dtype=np.float32), norm_module(decoder.head.norm, checkpoint.read)
    own = ExitLayers(decoder.layers[before:], checkpoint.read, identity, norm)
    link_base(checkpoint, directory)
    write_exit(own, known, directory)
    base = open_checkpoint(str(directory)).sha256
    write_exit_file(directory, ExitFile(before, True, 0, base, "ce", "exit", 1, vocabulary))


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="JSONL with targets.")
@click.option("--tokens", type=int, required=True, help="The most frequent ones; those of MODEL's exit if it has some.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at OUT.")
def command(model: str, out: Path, data: Path, tokens: int, overwrite: bool) -> None:
    """Write MODEL, whose head has so many tokens, to the directory OUT."""
    with output_directory(out, EXIT_FILE, overwrite) as directory:
        write_cut(model, directory, data, tokens)


if __name__ == "__main__":
    run(command)
