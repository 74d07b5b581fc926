"""Approximate a fully fine-tuned model by a LoRA adapter, to ship its exit as one small file.

    python -m tools.models.difference_lora BASE TUNED OUT --rank 12
    freeexport train OUT further --tune lora --data train.jsonl ...
    python -m tools.models.pack_exit further NAME ...

BASE and TUNED are checkpoints of one model. TUNED's exit is copied. At small ranks the adapter
misses most of the difference, which a short training recovers.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file

from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint
from freeexport.checkpoints.exit_file import EXIT_FILE, EXIT_WEIGHTS, write_exit_file
from freeexport.checkpoints.lora_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from freeexport.system.output import output_directory
from freeexport.training.tuning import resolved
from tools.data.splits import run_tool

LAYER = ".layers."  # in the names of adapted weights


def write_difference(base: str, tuned: str, directory: Path, rank: int) -> float:
    """Write the adapter and TUNED's exit.

    Returns the share of the squared difference that the adapter reproduces.

    Raises:
        CheckpointError: If the checkpoints are not of one model.
    """
    before = open_checkpoint(base)
    after = open_checkpoint(tuned)
    tensors: dict[str, torch.Tensor] = {}
    total = 0.0
    reproduced = 0.0
    for name in before.names():
        if LAYER not in name or not name.endswith(".weight") or len(before.shape(name)) != 2:
            continue
        if name not in after or after.shape(name) != before.shape(name):
            raise CheckpointError(
                f"{tuned} has no {name} with the size in {base}; give checkpoints of one model"
            )
        difference = torch.from_numpy(after.read(name) - before.read(name))
        torch.manual_seed(0)
        count = min(rank + 16, *difference.shape)
        left, sizes, right = torch.svd_lowrank(difference, q=count, niter=4)
        # The root is halved because the adapter is scaled by lora_alpha / r = 2.
        root = sizes[:rank].sqrt() / np.sqrt(2)
        place = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{place}.lora_A.weight"] = (root[:, None] * right[:, :rank].T).contiguous()
        tensors[f"{place}.lora_B.weight"] = (left[:, :rank] * root).contiguous()
        total += float((difference**2).sum())
        reproduced += float((sizes[:rank] ** 2).sum())
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if before.config.get("is_encoder_decoder") else "CAUSAL_LM",
        "base_model_name_or_path": resolved(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    }
    save_file(tensors, str(directory / ADAPTER_WEIGHTS[0]), metadata={"format": "pt"})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    if after.exit is not None:
        _ = after.sha256  # checks that the exit belongs to these weights
        if after.exit_weights is not None:
            shutil.copyfile(after.exit_weights.path, directory / EXIT_WEIGHTS)
        sha256 = open_checkpoint(str(directory)).sha256
        write_exit_file(directory, replace(after.exit, base_sha256=sha256, tune="lora"))
    return reproduced / total if total else 1.0


@click.command()
@click.argument("base")
@click.argument("tuned")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--rank",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    help="Rank of the adapter.",
)
@click.option("--overwrite", is_flag=True, help="Replace an adapter at OUT.")
def command(base: str, tuned: str, out: Path, rank: int, overwrite: bool) -> None:
    """Write the LoRA adapter of BASE that is nearest to TUNED, with TUNED's exit, to the directory
    OUT.
    """
    with output_directory(out, EXIT_FILE, overwrite) as directory:
        share = write_difference(base, tuned, directory, rank)
    click.echo(f"{out}: rank {rank}, {share:.1%} of the squared difference")


if __name__ == "__main__":
    run_tool(command)
