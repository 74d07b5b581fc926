"""`freeexport train`: fine-tune a checkpoint for one exit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.commands.verb_options import (
    MAX_NEW_TOKENS,
    THREADS,
    SectionedCommand,
    option_of,
    section,
)
from freeexport.system.progress import duration
from freeexport.training.train import leave_group, train
from freeexport.training.training_options import DEFAULT_ALPHA, DEFAULT_RANK, TrainingOptions

OWN = Path("-")  # stands for a directory beside OUT


option = option_of(TrainingOptions)


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@section("Data")
@option("data", "JSONL file with 'input' or 'audio', and 'target'.")
@option("validation", "JSONL file to evaluate on.  [default: 2 % of DATA]")
@option(
    "max_tokens",
    "Maximum length of an example in tokens. Longer ones are skipped.  [default: the model's "
    "limit, at most 2048]",
)
@option(
    "self_distill",
    "Train on MODEL's own greedy outputs instead of targets. They are kept in DIR, and "
    "generated if missing. An interrupted run continues when started again.  [DIR: "
    "OUT.outputs]",
    is_flag=False,
    flag_value=OWN,
    metavar="[DIR]",
)
@option("max_new_tokens", f"{MAX_NEW_TOKENS} For --self-distill.")
@option("truncate", "Cut long inputs, on the left for decoder-only models, otherwise on the right.")
@section("Model and exit")
@option("exit_layer", "Layer after which tokens exit, from 1 to L - 1.")
@option(
    "loss",
    "Training loss. ce: cross-entropy of both exits. kd-dyn, logit-kd: ce, and distillation "
    "of hidden states (as in FREE) or of predictions. deep-ce: cross-entropy of the last "
    "layer only, which trains a model without an exit for comparison.",
)
@option(
    "loss_alpha", f"Weight of the distillation in kd-dyn and logit-kd.  [default: {DEFAULT_ALPHA}]"
)
@option(
    "tune",
    "Weights to train. full: all weights. lora: LoRA adapters in the layers. exit: only the "
    "exit's own weights.",
)
@option(
    "rank",
    "Rank of the LoRA adapters on all linear layers (alpha is twice the rank).  [default: "
    f"{DEFAULT_RANK}]",
)
@option(
    "exit_head_layers",
    "Number of transformer layers that the exit has of its own, before the head.",
)
@option(
    "exit_input",
    "Input of the exit's own layers. state: the state of the exit layer. feature: that, and "
    "the deep decoder's feature of the previous token. fused: both, and the deep decoder's "
    "states after a third and two thirds of its layers. feature and fused require that only "
    "the exit is trained, and allow an exit after layer 0, the embedding.",
)
@option(
    "exit_vocab",
    "Number of tokens that the exit predicts, the most frequent ones in the targets. All "
    "others are one class, which never exits.  [default: all tokens]",
)
@option(
    "exit_from",
    "Exit to start from, of other weights of the same shape: a directory written by `train`, "
    "the name of a ready-made exit, or its file.",
    metavar="EXIT",
)
@option(
    "from_config",
    "Start from random weights. MODEL is a directory with a config.json and a tokenizer.",
)
@section("Length and steps")
@option("steps", "Number of optimizer steps.")
@option("epochs", "Number of epochs.  [default: 3, without --steps or --time-limit]")
@option("time_limit", "Training time in minutes, including evaluations. The schedule ends with it.")
@option("batch_tokens", "Number of padded tokens per device and micro-batch.")
@option("accumulate", "Number of micro-batches per step.")
@option(
    "learning_rate", "Peak learning rate.  [default: 1e-4; 1e-3 for --tune exit and --from-config]"
)
@option(
    "schedule",
    "Schedule of the learning rate after the warmup. linear: fall to 0. hold: stay at the "
    "peak, then fall to 0 in the last 30% of the run.",
)
@option("warmup", "Length of the warmup, as a share of the run.")
@option(
    "dropout",
    "Dropout probability of the model and of LoRA.  [default: the configuration's; 0.1 for LoRA]",
)
@option("seed", "Random seed for the order of examples and for dropout.")
@section("Machine")
@option("threads", THREADS, type=click.IntRange(1))
@option("bf16", "Compute in bfloat16, which is fast on GPUs, and on CPUs with AMX or AVX-512 BF16.")
@option("dtype", "Type of the weights with --tune full.")
@option(
    "gradient_checkpointing", "Gradient checkpointing: saves memory and takes about a third longer."
)
@section("Evaluation")
@option(
    "evaluate_every",
    "Number of steps between evaluations, and checkpoints.  [default: a tenth of the run, by "
    "steps or time, <= 500]",
)
@option(
    "select_by",
    "Criterion for the weights to keep: loss, agreement (of both exits), oracle-exits (at 99 "
    "% agreement, with a threshold chosen on the same tokens), a metric of the full model's "
    "outputs for 64 examples, as in `evaluate`, or last, which makes all steps and keeps the "
    "last weights.",
)
@option(
    "patience",
    "Stop after this many evaluations without improvement. 0: stop only if the full model's "
    "loss rises.",
)
@section("Result")
@option("resume", "Resume the interrupted run in OUT.training.")
@option("overwrite", "Replace the output of an earlier train at OUT, and an interrupted run.")
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

        return own_outputs(model, checkpoint, prompts, new_tokens=new_tokens, directory=directory)

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
