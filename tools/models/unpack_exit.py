"""Unpack a ready-made exit into a checkpoint, to train it further.

    python -m tools.models.unpack_exit NAME MODEL OUT
    freeexport train OUT further --tune exit --data train.jsonl ...
    python -m tools.models.pack_exit further NAME ...

OUT is what `freeexport train` wrote before the exit was packed, with matrices rounded to 8 bits: a
LoRA adapter of MODEL, or MODEL itself, with exit.json and exit.safetensors. Packing it again gives
the same tensors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
from safetensors.numpy import save_file

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import EXIT_FILE, EXIT_WEIGHTS, write_exit_file
from freeexport.checkpoints.lora_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from freeexport.checkpoints.packed_exit import PackedFile, PackedWeights, read_packed
from freeexport.checkpoints.ready_made import apply_exit, does_not_fit, find_exit
from freeexport.checkpoints.weight_files import CheckpointError
from freeexport.system.output import output_directory
from freeexport.training.tuning import link_base, resolved
from tools.data.splits import run_tool


def unpack(packed: PackedFile, model: str, directory: Path) -> None:
    """Write the exit of a file, and the model or adapter that it belongs to, to `directory`.

    Raises:
        CheckpointError: If the exit was not trained on the weights of `model`.
    """
    base = open_checkpoint(model)
    apply_exit(base, packed)  # checks family, sizes and shapes
    if base.weights_sha256 != packed.about.weights_sha256:
        trained_on = f"it was trained on other weights, of {packed.about.model}"
        raise CheckpointError(does_not_fit(packed.about, base, trained_on))
    if packed.adapter is None:
        link_base(base, directory)
    else:
        weights, config = packed.adapter
        config = {**config, "base_model_name_or_path": resolved(model)}
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        _write_tensors(weights, directory / ADAPTER_WEIGHTS[0])
    beside = open_checkpoint(str(next(directory.glob("*.gguf"), directory)))
    _write_tensors(packed.weights, directory / EXIT_WEIGHTS)
    write_exit_file(directory, replace(packed.about.exit, base_sha256=beside.sha256))


def _write_tensors(weights: PackedWeights, path: Path) -> None:
    save_file({name: weights.read(name) for name in weights.shapes}, path, {"format": "pt"})


@click.command()
@click.argument("name")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at OUT.")
def command(name: str, model: str, out: Path, overwrite: bool) -> None:
    """Write exit NAME of MODEL, or the exit in the file NAME, to the directory OUT."""
    packed = read_packed(find_exit(name))
    with output_directory(out, EXIT_FILE, overwrite) as directory:
        unpack(packed, model, directory)
    adapter = "" if packed.adapter is None else f", LoRA of rank {packed.adapter[1]['r']}"
    about = packed.about.exit
    click.echo(
        f"{out}: exit after layer {about.exit_layer}, --exit-layers {about.exit_layers} "
        f"--exit-input {about.exit_input}{adapter}"
    )


if __name__ == "__main__":
    run_tool(command)
