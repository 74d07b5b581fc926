"""`freeexport train`: fine-tune a checkpoint for one exit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.commands.verb_options import SectionedCommand, section
from freeexport.training.options import (
    LORA_PRESETS,
    LoraOptions,
    LossName,
    Schedule,
    TrainingOptions,
    Tune,
)
from freeexport.training.train import leave_group, train


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@section("Data")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' and 'target'.")
@click.option("--validation", type=click.Path(path_type=Path), help="JSONL to evaluate on.  [default: a share of DATA]")
@click.option(
    "--validation-share",
    type=float,
    default=0.02,
    help="Share of DATA to evaluate on, by a hash of the input.",
)
@click.option("--train-on-input", is_flag=True, help="Decoder-only: also train on the tokens of the input.")
@click.option("--max-tokens", type=int, help="Skip longer examples.  [default: the model's limit, at most 2048]")
@click.option("--truncate", is_flag=True,
              help="Cut long inputs, on the left for decoder-only models, else on the right.")  # fmt: skip
@section("What is trained")
@click.option("--exit-layer", type=int, required=True, help="Exit after this layer, 1 to L - 1.")
@click.option("--loss", type=click.Choice(get_args(LossName)), default=TrainingOptions.loss,
              help="ce: cross-entropy of both exits. weighted-ce: of all layers. kd-dyn, logit-kd: ce, and "
              "distillation of hidden states (FREE's own) or of predictions.")  # fmt: skip
@click.option("--loss-alpha", type=float, default=0.5, help="Weight of the distillation.")
@click.option("--label-smoothing", type=float, default=0.0,
              help="Share of each label to spread over all tokens, in training.")  # fmt: skip
@click.option("--tune", type=click.Choice(get_args(Tune)), default="full",
              help="full: all weights. lora: adapters in the layers. exit: only the exit's own weights.")  # fmt: skip
@click.option("--lora-rank", type=int, help="Rank of the adapters.  [default: 16]")
@click.option("--lora-alpha", type=float, help="Weight of the adapters, times the rank.  [default: 32]")
@click.option(
    "--lora-target", "lora_targets", multiple=True, help="A layer's name. May be repeated.  [default: all-linear]"
)
@click.option("--lora-dropout", type=float, help="Dropout before the adapters.  [default: 0]")
@click.option("--lora-preset", type=click.Choice(tuple(LORA_PRESETS)), help="Rank, alpha and targets of a publication.")
@click.option("--adapter-rank", type=int, default=64, help="Rank of the adapter of --tune exit; 0 is a norm only.")
@click.option(
    "--exit-layers",
    type=int,
    default=0,
    help="Transformer layers of the exit's own, before the head; decoder-only.",
)
@click.option("--from-config", is_flag=True, help="Start from random weights: MODEL has a config.json and a tokenizer.")
@section("Length and steps")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--epochs", type=float, help="Passes over the data.  [default: 3, without --steps or --time-limit]")
@click.option("--time-limit", type=float, help="Minutes of training; the schedule ends with them.")
@click.option("--batch-size", type=int, default=32, help="Examples per device and micro-batch.")
@click.option("--batch-tokens", type=int, help="Padded tokens per device and micro-batch, instead of examples.")
@click.option("--accumulate", type=int, default=1, help="Micro-batches per step.")
@click.option(
    "--learning-rate", type=float, help="Peak learning rate.  [default: 1e-4; 1e-3 for --tune exit and --from-config]"
)
@click.option("--schedule", type=click.Choice(get_args(Schedule)), default="linear",
              help="Learning rate after the warmup.")  # fmt: skip
@click.option("--warmup", type=float, default=0.05, help="Warmup, as a share of the run.")
@click.option("--weight-decay", type=float, default=0.0, help="Weight decay of AdamW.")
@click.option("--dropout", type=float, help="Dropout of the model.  [default: the configuration's]")
@click.option("--seed", type=int, default=0, help="Seed for the order of examples, and for dropout.")
@section("Machine")
@click.option("--bf16", is_flag=True, help="Compute in bfloat16 (fast on GPUs, and on CPUs with AMX or AVX-512 BF16).")
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32",
              help="Type of the weights of --tune full.")  # fmt: skip
@click.option("--gradient-checkpointing", is_flag=True, help="Use less memory and a third more time.")
@section("Evaluation")
@click.option(
    "--evaluate-every", type=int, help="Steps between evaluations, and checkpoints.  [default: a tenth, <= 500]"
)
@click.option("--select-by", default="loss",
              help="Keep the weights of the evaluation that is best by this: loss, agreement (of both exits), exits "
              "(at 99 % agreement), or a metric of the whole model's outputs, as of `evaluate`.")  # fmt: skip
@click.option("--select-samples", type=int, default=64,
              help="Examples whose outputs a metric of --select-by sees.")  # fmt: skip
@click.option("--log-every", type=int, default=10, help="Steps between lines of metrics.jsonl.")
@click.option("--patience", type=int, default=5, help="Stop after so many evaluations without progress; 0 never stops.")
@section("Result")
@click.option("--resume", is_flag=True, help="Continue the interrupted run in OUT.training.")
@click.option("--overwrite", is_flag=True, help="Replace what train wrote at OUT, and an interrupted run.")
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
    lora = _lora_options(**{name: options.pop(name) for name in tuple(options) if name.startswith("lora_")})
    trained = train(model, out, TrainingOptions(lora=lora, **options))
    if not leave_group():
        return
    if as_json:
        click.echo(json.dumps(asdict(trained)))
        return
    click.echo(f"{out}: step {trained.best_step} of {trained.steps}, {trained.seconds:.0f} s")
    for name, value in trained.metrics.items():
        click.echo(f"{name.removeprefix('eval_').replace('_', ' ')}: {value:.4f}")


def _lora_options(
    lora_preset: str | None,
    lora_rank: int | None,
    lora_alpha: float | None,
    lora_targets: tuple[str, ...],
    lora_dropout: float | None,
) -> LoraOptions:
    """The preset, or the default, with what was given."""
    given: dict[str, Any] = {
        "rank": lora_rank,
        "alpha": lora_alpha,
        "targets": lora_targets or None,
        "dropout": lora_dropout,
    }
    base = LORA_PRESETS[lora_preset] if lora_preset else LoraOptions()
    return replace(base, **{name: value for name, value in given.items() if value is not None})
