"""Trainings of the methods that FREE's paper compares, as its authors run them.

    train_recipe(RECIPES["free"], "t5-large", data, None, out, exit_layer=6, epochs=20)

Defaults are the settings of the authors' scripts: AdamW at a rate of 1e-4 that falls linearly to 0
without warmup, a fixed number of epochs, and the weights of the last step. Their batches hold 8
examples, ours a number of tokens.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import Tune
from freeexport.checkpoints.transformers_model import torch_device
from freeexport.system.load import wait_quietly
from freeexport.training.batches import described
from freeexport.training.options import LAST, BuiltInLoss, LayerLoss, TrainingOptions
from freeexport.training.run_directory import last_checkpoint, run_directory
from freeexport.training.train import train
from runtime.errors import FreeExportError, OptionError
from runtime.machine.device import Device
from runtime.machine.machine import usable_cores
from tools.paper.losses import HiddenDistillation, WeightedCrossEntropy

LEARNING_RATE = 1e-4
# CALM exits after this layer or a later one (`least` of CalmDecoder). The loss trains all layers.
EXIT_MIN_LAYER = 4
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Recipe:
    """Training of one method.

    Attributes:
        name: Name of the method.
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

    @property
    def training(self) -> tuple[BuiltInLoss | LayerLoss, Tune, int | None]:
        """Return what determines the weights. Recipes with equal ones can share a checkpoint."""
        return self.loss, self.tune, self.rank

    @property
    def any_exit(self) -> bool:
        """Return True if the checkpoint can be converted with an exit after any layer."""
        return isinstance(self.loss, WeightedCrossEntropy)


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


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        OptionError: If there is none.
    """
    if name not in RECIPES:
        raise OptionError(f"recipe {name!r} is unknown; choose {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_options(
    recipe: Recipe,
    data: Path,
    validation: Path | None,
    *,
    exit_layer: int,
    max_steps: int | None = None,
    epochs: float | None = None,
    batch_tokens: int = TrainingOptions.batch_tokens,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    **others: Any,
) -> TrainingOptions:
    """Return the options of a training.

    Args:
        recipe: The recipe.
        data: JSONL file of training examples.
        validation: JSONL file of validation examples. None: a part of `data`.
        exit_layer: Number of layers before the exit.
        max_steps: Number of steps. None: by `epochs`.
        epochs: Passes over the data. Default: 3, unless `max_steps` is given.
        batch_tokens: Padded tokens of prompt and target per micro-batch.
        learning_rate: Peak learning rate.
        seed: Seed of all random numbers.
        others: Other fields of TrainingOptions. They override the authors' settings.

    Raises:
        OptionError: If a value is out of range or two contradict each other.
    """
    as_authors = {"truncate": True, "warmup": 0.0, "patience": 0, "select_by": LAST}
    return TrainingOptions(
        data,
        exit_layer,
        validation,
        loss=recipe.loss,
        tune=recipe.tune,
        rank=recipe.rank,
        steps=max_steps,
        epochs=epochs,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        seed=seed,
        **{**as_authors, **others},
    )


def train_recipe(
    recipe: Recipe,
    model: str,
    data: Path,
    validation: Path | None,
    out: Path,
    *,
    exit_layer: int,
    device: str = "cpu",
    **settings: Any,
) -> Path:
    """Train `model` by a recipe and return `out`, which `freeexport convert` accepts.

    A child process trains, so that its memory is free afterwards. A run that was interrupted
    continues if its options are the same.

    Args:
        recipe: The recipe.
        model: A checkpoint directory, hub name or GGUF file.
        data: JSONL file of training examples.
        validation: JSONL file of validation examples. None: a part of `data`.
        out: Output directory, which must not exist.
        exit_layer: Number of layers before the exit. `full` only records it.
        device: "cpu" or "cuda:0".
        settings: Further arguments of `recipe_options`.

    Raises:
        OptionError: If the device is missing, or the exit layer is outside the decoder, or the
            model has no linear layers for LoRA, or options do not fit each other or an interrupted
            run.
        FreeExportError: The errors of `train`, or if the child process was killed.
    """
    options = recipe_options(recipe, data, validation, exit_layer=exit_layer, **settings)
    torch_device(device)
    described(open_checkpoint(model), options)
    if last_checkpoint(run_directory(out)) is not None:
        options = replace(options, resume=True)
    wait_quietly(options.threads or usable_cores())
    # Hide other GPUs, since a training uses all that it sees.
    visible = os.environ.get(_VISIBLE)
    index = Device.parse(device).index
    chosen = "" if index is None else visible.split(",")[index] if visible else str(index)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _see_only, (chosen,)) as pool:
        try:
            pool.submit(train, model, out, options).result()
        except BrokenProcessPool:
            raise FreeExportError(
                f"the training of {out} was killed, probably for lack of memory; lower "
                "batch_tokens, or free memory, and start it again"
            ) from None
    return out


def _see_only(gpu: str) -> None:
    """Make one GPU visible to this process. Empty: none."""
    os.environ[_VISIBLE] = gpu
