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
from freeexport.checkpoints.transformers_model import Dtype
from freeexport.commands.verb_options import MAX_NEW_TOKENS, THREADS, SectionedCommand, section
from freeexport.system.progress import duration
from freeexport.training.options import (
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    BuiltInLoss,
    Schedule,
    TrainingOptions,
    Tune,
)
from freeexport.training.train import leave_group, train
from runtime.bundle.manifest import ExitInput

OWN = Path("-")  # stands for a directory beside OUT


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@section("Data")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="JSONL file with 'input' or 'audio', and 'target'.",
)
@click.option(
    "--validation",
    type=click.Path(path_type=Path),
    help="JSONL file to evaluate on.  [default: 2 % of DATA]",
)
@click.option(
    "--max-tokens",
    type=int,
    help=(
        "Maximum length of an example in tokens. Longer ones are skipped.  [default: the model's "
        "limit, at most 2048]"
    ),
)
@click.option(
    "--self-distill",
    type=click.Path(path_type=Path),
    is_flag=False,
    flag_value=OWN,
    metavar="[DIR]",
    help=(
        "Train on MODEL's own greedy outputs instead of targets. They are kept in DIR, and "
        "generated if missing. An interrupted run continues when started again.  [DIR: "
        "OUT.outputs]"
    ),
)
@click.option(
    "--max-new-tokens",
    type=int,
    default=TrainingOptions.max_new_tokens,
    help=f"{MAX_NEW_TOKENS} For --self-distill.",
)
@click.option(
    "--truncate",
    is_flag=True,
    help="Cut long inputs, on the left for decoder-only models, otherwise on the right.",
)
@section("Model and exit")
@click.option(
    "--exit-layer", type=int, required=True, help="Layer after which tokens exit, from 1 to L - 1."
)
@click.option(
    "--loss",
    type=click.Choice(get_args(BuiltInLoss)),
    default=TrainingOptions.loss,
    help=(
        "Training loss. ce: cross-entropy of both exits. kd-dyn, logit-kd: ce, and distillation "
        "of hidden states (as in FREE) or of predictions. deep-ce: cross-entropy of the last "
        "layer only, which trains a model without an exit for comparison."
    ),
)
@click.option(
    "--loss-alpha",
    type=float,
    help=f"Weight of the distillation in kd-dyn and logit-kd.  [default: {DEFAULT_ALPHA}]",
)
@click.option(
    "--tune",
    type=click.Choice(get_args(Tune)),
    default=TrainingOptions.tune,
    help=(
        "Weights to train. full: all weights. lora: LoRA adapters in the layers. exit: only the "
        "exit's own weights."
    ),
)
@click.option(
    "--rank",
    type=int,
    help=(
        "Rank of the LoRA adapters on all linear layers (alpha is twice the rank).  [default: "
        f"{DEFAULT_RANK}]"
    ),
)
@click.option(
    "--exit-layers",
    type=int,
    default=TrainingOptions.exit_layers,
    help="Number of transformer layers that the exit has of its own, before the head.",
)
@click.option(
    "--exit-input",
    type=click.Choice(get_args(ExitInput)),
    default=TrainingOptions.exit_input,
    help=(
        "Input of the exit's own layers. state: the state of the exit layer. feature: that, and "
        "the deep decoder's feature of the previous token. fused: both, and the deep decoder's "
        "states after a third and two thirds of its layers. feature and fused require that only "
        "the exit is trained, and allow an exit after layer 0, the embedding."
    ),
)
@click.option(
    "--exit-vocab",
    type=int,
    help=(
        "Number of tokens that the exit predicts, the most frequent ones in the targets. All "
        "others are one class, which never exits.  [default: all tokens]"
    ),
)
@click.option(
    "--exit-from",
    metavar="EXIT",
    help=(
        "Exit to start from, of other weights of the same shape: a directory written by `train`, "
        "the name of a ready-made exit, or its file."
    ),
)
@click.option(
    "--from-config",
    is_flag=True,
    help="Start from random weights. MODEL is a directory with a config.json and a tokenizer.",
)
@section("Length and steps")
@click.option("--steps", type=int, help="Number of optimizer steps.")
@click.option(
    "--epochs",
    type=float,
    help="Number of epochs.  [default: 3, without --steps or --time-limit]",
)
@click.option(
    "--time-limit",
    type=float,
    help="Training time in minutes, including evaluations. The schedule ends with it.",
)
@click.option(
    "--batch-tokens",
    type=int,
    default=TrainingOptions.batch_tokens,
    help="Number of padded tokens per device and micro-batch.",
)
@click.option(
    "--accumulate",
    type=int,
    default=TrainingOptions.accumulate,
    help="Number of micro-batches per step.",
)
@click.option(
    "--learning-rate",
    type=float,
    help="Peak learning rate.  [default: 1e-4; 1e-3 for --tune exit and --from-config]",
)
@click.option(
    "--schedule",
    type=click.Choice(get_args(Schedule)),
    default=TrainingOptions.schedule,
    help=(
        "Schedule of the learning rate after the warmup. linear: fall to 0. hold: stay at the "
        "peak, then fall to 0 in the last 30% of the run."
    ),
)
@click.option(
    "--warmup",
    type=float,
    default=TrainingOptions.warmup,
    help="Length of the warmup, as a share of the run.",
)
@click.option(
    "--dropout",
    type=float,
    help=(
        "Dropout probability of the model and of LoRA.  [default: the configuration's; 0.1 for "
        "LoRA]"
    ),
)
@click.option(
    "--seed",
    type=int,
    default=TrainingOptions.seed,
    help="Random seed for the order of examples and for dropout.",
)
@section("Machine")
@click.option("--threads", type=click.IntRange(1), help=THREADS)
@click.option(
    "--bf16",
    is_flag=True,
    help="Compute in bfloat16, which is fast on GPUs, and on CPUs with AMX or AVX-512 BF16.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(Dtype)),
    default=TrainingOptions.dtype,
    help="Type of the weights with --tune full.",
)
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    help="Gradient checkpointing: saves memory and takes about a third longer.",
)
@section("Evaluation")
@click.option(
    "--evaluate-every",
    type=int,
    help=(
        "Number of steps between evaluations, and checkpoints.  [default: a tenth of the run, by "
        "steps or time, <= 500]"
    ),
)
@click.option(
    "--select-by",
    default=TrainingOptions.select_by,
    help=(
        "Criterion for the weights to keep: loss, agreement (of both exits), oracle-exits (at 99 "
        "% agreement, with a threshold chosen on the same tokens), a metric of the full model's "
        "outputs for 64 examples, as in `evaluate`, or last, which makes all steps and keeps the "
        "last weights."
    ),
)
@click.option(
    "--patience",
    type=int,
    default=TrainingOptions.patience,
    help=(
        "Stop after this many evaluations without improvement. 0: stop only if the full model's "
        "loss rises."
    ),
)
@section("Result")
@click.option("--resume", is_flag=True, help="Resume the interrupted run in OUT.training.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the output of an earlier train at OUT, and an interrupted run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(model: str, out: Path, as_json: bool, **options: Any) -> None:
    """Fine-tune MODEL for an exit after one of its layers, and write it to OUT for `convert`.

    MODEL is a Hugging Face checkpoint directory, a hub name, or a GGUF file. DATA has one JSON
    object per line, with 'input' (text or messages) and 'target'. For several GPUs or nodes, start
    it with torchrun or `accelerate launch`.

    \b
    Examples:
      freeexport train path/to/checkpoint trained --data train.jsonl --exit-layer 6
      torchrun --nproc-per-node 4 -m freeexport train path/to/checkpoint trained --data train.jsonl --exit-layer 6
    """  # noqa: E501
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
