"""`freeexport train`: fine-tune a checkpoint for one exit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.exit_file import LossName
from freeexport.checkpoints.transformers_model import Dtype
from freeexport.commands.verb_options import MAX_NEW_TOKENS, THREADS, SectionedCommand, section
from freeexport.system.progress import duration
from freeexport.training.options import (
    DEFAULT_ALPHA,
    DEFAULT_RANKS,
    Schedule,
    TrainingOptions,
    Tune,
)
from freeexport.training.train import leave_group, train
from runtime.bundle.manifest import ExitInput

OWN = Path("-")  # beside OUT


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@section("Data")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="JSONL with 'input', or 'audio', and 'target'.",
)
@click.option(
    "--validation",
    type=click.Path(path_type=Path),
    help="JSONL to evaluate on.  [default: 2 % of DATA]",
)
@click.option(
    "--max-tokens",
    type=int,
    help="Skip longer examples.  [default: the model's limit, at most 2048]",
)
@click.option("--self-distill", type=click.Path(path_type=Path), is_flag=False, flag_value=OWN, metavar="[DIR]",
              help="Train on MODEL's own greedy outputs instead of targets. They are kept in DIR, and generated where "
              "they are missing; interrupted, run again.  [DIR: OUT.outputs]")  # fmt: skip
@click.option("--max-new-tokens", type=int, default=TrainingOptions.max_new_tokens,
              help=f"{MAX_NEW_TOKENS} For --self-distill.")  # fmt: skip
@click.option("--truncate", is_flag=True,
              help="Cut long inputs, on the left for decoder-only models, else on the right.")  # fmt: skip
@section("What is trained")
@click.option("--exit-layer", type=int, required=True, help="Exit after this layer, 1 to L - 1.")
@click.option("--loss", type=click.Choice(get_args(LossName)), default=TrainingOptions.loss,
              help="ce: cross-entropy of both exits. weighted-ce: of all layers. kd-dyn, logit-kd: ce, and "
              "distillation of hidden states (FREE's own) or of predictions. deep-ce: of the last layer alone, a model "
              "without an exit, to compare with.")  # fmt: skip
@click.option("--loss-alpha", type=float,
              help=f"Weight of the distillation of kd-dyn and logit-kd.  [default: {DEFAULT_ALPHA}]")  # fmt: skip
@click.option("--tune", type=click.Choice(get_args(Tune)), default=TrainingOptions.tune,
              help="full: all weights. lora: adapters in the layers. exit: only the exit's own weights.")  # fmt: skip
@click.option("--rank", type=int,
              help="Rank of LoRA adapters, on all linear layers (alpha is twice the rank); of the adapter of --tune "
              "exit, 0 for a norm only.  "
              f"[default: {DEFAULT_RANKS['lora']}; exit: {DEFAULT_RANKS['exit']}]")  # fmt: skip
@click.option("--exit-layers", type=int, default=TrainingOptions.exit_layers,
              help="Transformer layers of the exit's own, before the head.")  # fmt: skip
@click.option("--exit-input", type=click.Choice(get_args(ExitInput)), default=TrainingOptions.exit_input,
              help="What these layers read: the exit layer's state, or that and the deep decoder's feature of the "
              "token before, with --tune exit, where exits after layer 0, the embedding, are possible.")  # fmt: skip
@click.option("--exit-vocab", type=int,
              help="So many tokens are all that the exit knows, beside one class for all others, which never exits: "
              "the most frequent in the targets.  [default: all tokens]")  # fmt: skip
@click.option("--exit-from", metavar="EXIT",
              help="Begin with an exit of other weights of the same shape: a directory that `train` wrote, the name of "
              "a ready-made one, or its file.")  # fmt: skip
@click.option(
    "--from-config",
    is_flag=True,
    help="Start from random weights: MODEL has a config.json and a tokenizer.",
)
@section("Length and steps")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option(
    "--epochs",
    type=float,
    help="Passes over the data.  [default: 3, without --steps or --time-limit]",
)
@click.option(
    "--time-limit",
    type=float,
    help="Minutes of training, evaluations included; the schedule ends with it.",
)
@click.option("--batch-tokens", type=int, default=TrainingOptions.batch_tokens,
              help="Padded tokens per device and micro-batch.")  # fmt: skip
@click.option(
    "--accumulate", type=int, default=TrainingOptions.accumulate, help="Micro-batches per step."
)
@click.option(
    "--learning-rate",
    type=float,
    help="Peak learning rate.  [default: 1e-4; 1e-3 for --tune exit and --from-config]",
)
@click.option("--schedule", type=click.Choice(get_args(Schedule)), default=TrainingOptions.schedule,
              help="Learning rate after the warmup.")  # fmt: skip
@click.option(
    "--warmup", type=float, default=TrainingOptions.warmup, help="Warmup, as a share of the run."
)
@click.option("--dropout", type=float,
              help="Dropout of the model and of LoRA.  [default: the configuration's; 0.1 for LoRA]")  # fmt: skip
@click.option(
    "--seed",
    type=int,
    default=TrainingOptions.seed,
    help="Seed for the order of examples, and for dropout.",
)
@section("Machine")
@click.option("--threads", type=click.IntRange(1), help=THREADS)
@click.option(
    "--bf16",
    is_flag=True,
    help="Compute in bfloat16 (fast on GPUs, and on CPUs with AMX or AVX-512 BF16).",
)
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default=TrainingOptions.dtype,
              help="Type of the weights of --tune full.")  # fmt: skip
@click.option(
    "--gradient-checkpointing", is_flag=True, help="Use less memory and a third more time."
)
@section("Evaluation")
@click.option(
    "--evaluate-every",
    type=int,
    help="Steps between evaluations, and checkpoints.  [default: a tenth, <= 500]",
)
@click.option("--select-by", default=TrainingOptions.select_by,
              help="Keep the weights of the evaluation that is best by this: loss, agreement (of both exits), "
              "oracle-exits (at 99 % agreement, by a threshold chosen on the same tokens), or a metric of the whole "
              "model's outputs for 64 examples, as of `evaluate`.")  # fmt: skip
@click.option("--patience", type=int, default=TrainingOptions.patience,
              help="Stop after this many evaluations without progress. 0: only where the whole model's loss "
              "rises.")  # fmt: skip
@section("Result")
@click.option("--resume", is_flag=True, help="Continue the interrupted run in OUT.training.")
@click.option(
    "--overwrite", is_flag=True, help="Replace what train wrote at OUT, and an interrupted run."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Fine-tune MODEL for an exit after one of its layers, and write it to OUT for `convert`.

    MODEL is a Hugging Face checkpoint directory, a hub name, or a GGUF file. DATA has one JSON object a line, with
    'input' (text or messages) and 'target'. Start it with torchrun or `accelerate launch` for several GPUs or nodes.

    \b
    Examples:
      freeexport train path/to/checkpoint trained --data train.jsonl --exit-layer 6
      torchrun --nproc-per-node 4 -m freeexport train path/to/checkpoint trained --data train.jsonl --exit-layer 6
    """
    if options["self_distill"] == OWN:
        options["self_distill"] = out.absolute().with_name(f"{out.absolute().name}.outputs")

    def generate(
        checkpoint: Checkpoint, prompts: Sequence[Any], new_tokens: int, directory: Path
    ) -> Iterator[tuple[int, np.ndarray]]:
        from freeexport.conversion.own_outputs import own_outputs  # torch

        return own_outputs(model, checkpoint, prompts, new_tokens, directory)

    trained = train(model, out, TrainingOptions(**options), generate)
    if not leave_group():
        return
    if as_json:
        click.echo(json.dumps(asdict(trained)))
        return
    click.echo(f"{out}: step {trained.best_step} of {trained.steps}, {duration(trained.seconds)}")
    for name, value in trained.metrics.items():
        click.echo(f"{name.removeprefix('eval_').replace('_', ' ')}: {value:.4f}")
    for line in trained.verdict:
        click.echo(line)
    click.echo(f"next: freeexport convert {shlex.quote(str(out))} {shlex.quote(str(out))}-bundle")
