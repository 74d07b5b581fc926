"""Trainings of the methods that FREE's paper compares, as its authors run them.

    options = recipe_options(RECIPES["free"], data, exit_layer=6, epochs=20)
    train_recipe("t5-large", out, options)

Defaults are the settings of the authors' scripts: AdamW at a rate of 1e-4 that falls linearly to 0
without warmup, a fixed number of epochs, and the weights of the last step. Their batches hold 8
examples, ours a number of tokens.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import Tune
from freeexport.checkpoints.transformers_model import torch_device
from freeexport.system.child import ChildError, run_child
from freeexport.system.load import wait_quietly
from freeexport.training.batches import described
from freeexport.training.run_directory import last_checkpoint, run_directory
from freeexport.training.train import train
from freeexport.training.training_options import LAST, BuiltInLoss, LayerLoss, TrainingOptions
from runtime.errors import FreeExportError
from runtime.machine.device import Device
from runtime.machine.machine import usable_cores
from tools.paper.losses import HiddenDistillation, WeightedCrossEntropy

LEARNING_RATE = 1e-4
# CALM exits after this layer or a later one (`min_layer` of EagerDecoder). The loss trains all
# layers.
EXIT_MIN_LAYER = 4
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Recipe:
    """Training of one method.

    Attributes:
        description: What is trained, in one line.
        loss: Name of a loss of the product, or a loss with its options.
        tune: Weights to train: all, or LoRA adapters on all linear layers.
        rank: Rank of the adapters. Their alpha is twice the rank, their dropout 0.1.
    """

    name: str
    description: str
    loss: BuiltInLoss | LayerLoss
    tune: Tune = "full"
    rank: int | None = None


_ALL_LAYERS = WeightedCrossEntropy()
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("full", "cross-entropy of the last layer, no exit", "deep-ce"),
        Recipe("static", "cross-entropies of all layers, weighted by depth", _ALL_LAYERS),
        Recipe("calm", "as static: tokens may exit after any layer", _ALL_LAYERS),
        Recipe("calm-single", "cross-entropies of exit and last layer, weighted by depth", "ce"),
        Recipe("free", "calm-single and distillation to the nearest layers", HiddenDistillation()),
        Recipe(
            "free-kd-unif",
            "calm-single and distillation to layers in order",
            HiddenDistillation("unif"),
        ),
        Recipe(
            "free-kd-last",
            "calm-single and distillation from the last layer to the exit layer",
            HiddenDistillation("last"),
        ),
        Recipe(
            "free-drop",
            "free, without teachers that find no layer of their own",
            HiddenDistillation(leftover="drop"),
        ),
        Recipe(
            "free-lora",
            "free, by LoRA of rank 64 and alpha 128 on all linear layers",
            HiddenDistillation(),
            tune="lora",
            rank=64,
        ),
    )
}


def recipe_options(recipe: Recipe, data: Path, **others: Any) -> TrainingOptions:
    """Return the authors' settings, overridden by `others`, as options of a training."""
    as_authors = {
        "learning_rate": LEARNING_RATE,
        "truncate": True,
        "warmup": 0.0,
        "patience": 0,
        "select_by": LAST,
    }
    options = {"loss": recipe.loss, "tune": recipe.tune, "rank": recipe.rank, **as_authors}
    return TrainingOptions(data, **{**options, **others})


def train_recipe(model: str, out: Path, options: TrainingOptions, device: str = "cpu") -> None:
    """Train `model` and write the checkpoint `out`, which `freeexport convert` accepts.

    A child process trains, so that its memory is free afterwards. It ends when this process does.
    A run that was interrupted continues if its options are the same.

    Args:
        model: A checkpoint directory, hub name or GGUF file.
        out: Output directory, which must not exist.
        options: Options, as `recipe_options` returns them.
        device: "cpu" or "cuda:0".

    Raises:
        OptionError: If the device is missing, or the exit layer is outside the decoder, or the
            model has no linear layers for LoRA.
        FreeExportError: If the training fails, or its process was killed.
    """
    torch_device(device)
    described(open_checkpoint(model), options)
    if last_checkpoint(run_directory(out)) is not None:
        options = replace(options, resume=True)
    wait_quietly(options.threads or usable_cores())  # inherited: the child imports torch at once
    # Hide other GPUs, since a training uses all that it sees.
    visible = os.environ.get(_VISIBLE)
    index = Device.parse(device).index
    chosen = "" if index is None else visible.split(",")[index] if visible else str(index)
    call = pickle.dumps((model, out, options)).hex()
    try:
        run_child(__name__, call, variables={_VISIBLE: chosen})
    except ChildError as error:
        raise FreeExportError(
            f"the training of {out} failed: {error}; correct that, and start it again to continue"
        ) from None


def main(arguments: Sequence[str]) -> None:
    """Train by the pickled arguments of `train`, in the child process of `train_recipe`."""
    train(*pickle.loads(bytes.fromhex(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
