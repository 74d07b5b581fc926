"""Fine-tune a checkpoint for one exit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from freeexport.checkpoints.exit_file import EXIT_FILE, ExitFile, write_exit_file
from freeexport.system.machine import BFLOAT16, keep_freed_memory, multiplies_bfloat16
from freeexport.system.output_directory import output_directory
from freeexport.system.output_file import naming
from freeexport.training.options import TrainingOptions
from freeexport.training.run_directory import METRICS, TENSORBOARD, TrainingDirectory, last_checkpoint

if TYPE_CHECKING:
    from freeexport.checkpoints.checkpoint import Checkpoint
    from freeexport.checkpoints.examples import Example
    from freeexport.training.full import Own, Trainable
    from freeexport.training.selection import WrittenOutputs
    from graphs.description import Description


@dataclass(frozen=True)
class Trained:
    """What a run came to: `metrics` are those of the best evaluation, whose weights are in `out`."""

    out: str
    steps: int
    best_step: int
    seconds: float
    metrics: dict[str, float]
    left_out: tuple[str, ...]


def train(model: str, out: Path, options: TrainingOptions) -> Trained:
    """Fine-tune `model` (a checkpoint directory, hub name, GGUF file or LoRA adapter) and write the result to `out`,
    complete or not at all. Checkpoints and metrics stand in OUT.training until then.

    Started by torchrun or `accelerate launch`, every process calls this. Raises CheckpointError, UnsupportedModelError,
    DataError, OptionError, OutputError, and DivergedError where the loss is no number.
    """
    from accelerate import PartialState
    from torch import cuda

    _quiet()
    if not cuda.is_available():
        keep_freed_memory()
    process = PartialState(cpu=not cuda.is_available())
    with process.main_process_first():
        directory = TrainingDirectory(out, model, options, process.is_main_process)
    if options.bf16 and process.is_main_process and not cuda.is_available() and not multiplies_bfloat16():
        names = f"{', '.join(BFLOAT16[:-1])} or {BFLOAT16[-1]}"
        click.echo(f"warning: --bf16 is slow on this processor, which has no {names}; train without it", err=True)
    try:
        return _train(model, out, options, directory, process)
    except BaseException:
        if process.is_main_process:
            directory.remove_unless_resumable()
        raise


def _train(model: str, out: Path, options: TrainingOptions, directory: TrainingDirectory, process: Any) -> Trained:
    from freeexport.training.batches import described, examples
    from freeexport.training.selection import written_outputs

    with process.main_process_first():
        checkpoint = _base(model, options, directory, process.is_main_process)
    description = described(checkpoint, options)
    training, validation, left_out = examples(checkpoint, description, options)
    if process.is_main_process:
        for line in left_out:
            click.echo(f"warning: {line}", err=True)
    with process.main_process_first():
        tuning = _tuning(model, checkpoint, description, options, training, validation, directory)
    with naming(directory.path):
        written = written_outputs(tuning.module, checkpoint, validation, options)
        steps, best_step, seconds, metrics = _run(tuning, options, directory, process.is_main_process, written)
    if process.is_main_process:
        _write(tuning, checkpoint, options, directory)
    process.wait_for_everyone()
    return Trained(str(out), steps, best_step, seconds, metrics, tuple(left_out))


def leave_group() -> bool:
    """Whether this process speaks for the run. Gloo aborts processes that end while they are in a group."""
    from accelerate import PartialState

    process = PartialState()
    process.destroy_process_group()
    return bool(process.is_main_process)


def _quiet() -> None:
    """transformers and torch announce what is no news here; errors are raised."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|peft)\b")


def _base(model: str, options: TrainingOptions, directory: TrainingDirectory, writer: bool) -> Checkpoint:
    from freeexport.checkpoints.checkpoint import CheckpointError, open_checkpoint

    if options.from_config:
        from freeexport.checkpoints.random_weights import write_random_weights

        base = directory.path / "base"
        if writer and not base.exists():
            write_random_weights(Path(model), base, options.seed)
        return open_checkpoint(str(base))
    checkpoint = open_checkpoint(model)
    found = checkpoint.exit
    if found is not None and found.has_parameters:
        wanted = options.exit_layers, options.exit_layer
        if not options.exit_layers or (found.exit_layers, found.exit_layer) != wanted:
            raise CheckpointError(
                f"{model} has an exit of its own already; give the checkpoint that it was trained on, or go on with "
                "an exit of layers: the same --exit-layer and --exit-layers"
            )
    return checkpoint


def _tuning(
    model: str,
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    directory: TrainingDirectory,
) -> Trainable:
    states = directory.path / "states"
    if options.tune == "exit" and options.exit_layers:
        from freeexport.training.exit_layers.frozen import tune_exit_layers

        return tune_exit_layers(checkpoint, description, options, training, validation, states)
    if options.tune == "exit":
        from freeexport.training.exit_only import tune_exit

        return tune_exit(checkpoint, description, options, training, validation, states)
    from freeexport.training.full import tune_full, tune_lora

    def tune(own: Own | None = None) -> Trainable:
        if options.tune == "lora":
            return tune_lora(checkpoint, description, options, training, validation, model, own)
        return tune_full(checkpoint, description, options, training, validation, own)

    if not options.exit_layers:
        return tune()
    from freeexport.training.exit_layers.joint import tune_joint

    return tune_joint(tune, checkpoint, description, options, training, states)


def _run(
    tuning: Trainable,
    options: TrainingOptions,
    directory: TrainingDirectory,
    writer: bool,
    written: WrittenOutputs | None,
) -> tuple[int, int, float, dict[str, float]]:
    """Steps, step of the best evaluation, seconds, and that evaluation's measures."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    from freeexport.training.callbacks import Bar, MemoryLeft, Metrics, StopInTime
    from freeexport.training.trainer import ExitTrainer, resumed_clock, training_arguments

    checkpoint = last_checkpoint(directory.path) if options.resume else None
    clock = resumed_clock(options, checkpoint)
    callbacks: list[TrainerCallback] = [StopInTime(clock), MemoryLeft()]
    bar, metrics = Bar(clock), None
    if options.patience:
        callbacks.append(EarlyStoppingCallback(options.patience))
    arguments = training_arguments(options, directory.path, tuning.lengths[0])
    if writer:
        after = None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        metrics = Metrics(directory.path / METRICS, clock, directory.path / TENSORBOARD, after)
        callbacks += [metrics, bar]
    trainer = ExitTrainer(tuning, arguments, options, clock, callbacks, written)
    if metrics is not None:
        metrics.trainer = trainer
    try:
        trainer.run(checkpoint)
    finally:
        bar.close()
    best_step, best = trainer.best()
    return trainer.state.global_step, best_step, round(clock.elapsed, 1), best


def _write(
    tuning: Trainable,
    checkpoint: Checkpoint,
    options: TrainingOptions,
    directory: TrainingDirectory,
) -> None:
    from freeexport.checkpoints.checkpoint import open_checkpoint

    with output_directory(directory.out, EXIT_FILE, options.overwrite) as partial:
        tuning.write(partial)
        # An exit's own parameters belong to the weights beside them.
        beside = open_checkpoint(str(partial)) if tuning.exit_layers else checkpoint
        exit_file = ExitFile(
            exit_layer=options.exit_layer,
            exit_norm=tuning.exit_norm,
            adapter_rank=tuning.adapter_rank,
            exit_layers=tuning.exit_layers,
            base_sha256=beside.sha256,
            loss=options.loss,
            tune=options.tune,
        )
        write_exit_file(partial, exit_file)
        directory.keep_records(partial)
        _open_to_readers(partial)
    directory.remove()


def _open_to_readers(directory: Path) -> None:
    """safetensors creates files that their owner alone may read."""
    mode = (directory / EXIT_FILE).stat().st_mode & 0o777
    for path in directory.glob("*.safetensors"):
        if path.stat().st_nlink == 1:  # a link's mode is its base's
            path.chmod(mode)
