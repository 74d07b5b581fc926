"""Fine-tune a checkpoint for an early exit."""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from freeexport.checkpoints.exit_file import EXIT_FILE, ExitFile, write_exit_file
from freeexport.system.load import wait_quietly
from freeexport.system.machine import BFLOAT16, keep_freed_memory, multiplies_bfloat16
from freeexport.system.output import naming, output_directory
from freeexport.training.run_directory import (
    ELAPSED,
    METRICS,
    TENSORBOARD,
    last_checkpoint,
    open_run,
    run_directory,
)
from freeexport.training.training_options import LAST, MEASURED, TrainingOptions
from runtime.errors import OptionError
from runtime.machine.machine import usable_cores

if TYPE_CHECKING:
    from freeexport.checkpoints.checkpoint import Checkpoint
    from freeexport.training.self_distill import Generate
    from freeexport.training.tuning import Trainable
    from runtime.bundle.costs import Costs


@dataclass(frozen=True)
class Trained:
    """Outcome of a run.

    Attributes:
        best_step: Step of the evaluation whose weights are in `out`.
        metrics: Metrics of that evaluation.
        before: Metrics before the first step.
        left_out: Notes about examples that were cut or left out.
        verdict: Sentences that interpret the metrics.
    """

    out: str
    steps: int
    best_step: int
    seconds: float
    metrics: dict[str, float]
    before: dict[str, float]
    left_out: tuple[str, ...]
    verdict: tuple[str, ...]


def train(
    model: str, out: Path, options: TrainingOptions, generate: Generate | None = None
) -> Trained:
    """Fine-tune `model` and write the result to `out`.

    `out` appears only when complete. Until then, checkpoints and metrics are in OUT.training. If
    started by torchrun or `accelerate launch`, every process must call this.

    Args:
        model: A checkpoint directory, hub name, GGUF file or LoRA adapter.
        generate: Generates targets for `self_distill`.

    Raises:
        CheckpointError: If the checkpoint is damaged or incomplete.
        UnsupportedModelError: If the model is not supported.
        DataError: If the data are broken or too few.
        OptionError: If options contradict each other or the model.
        OutputError: If `out` is in the way.
        DivergedError: If the loss is NaN or infinite.
    """
    for path in filter(None, (options.data, options.validation)):
        if not path.exists():  # a pipe must not be opened twice
            raise OptionError(f"{path} does not exist; name a JSONL file with 'input' and 'target'")
    _use_threads(options.threads)
    import transformers
    from accelerate import PartialState
    from torch import cuda

    # Silence routine messages. Errors are still raised.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|peft)\b")
    if not cuda.is_available():
        keep_freed_memory()
    process = PartialState(cpu=not cuda.is_available())
    directory = run_directory(out)
    with process.main_process_first():
        if process.is_main_process:
            open_run(out, model, options)
    if (
        process.is_main_process
        and not cuda.is_available()
        and (note := bfloat16_note(options.bf16))
    ):
        click.echo(note, err=True)
    try:
        return _train(model, out, options, generate=generate, directory=directory, process=process)
    except BaseException:
        if process.is_main_process and last_checkpoint(directory) is None:
            shutil.rmtree(directory, ignore_errors=True)  # nothing in it is of use
        raise


def _train(
    model: str,
    out: Path,
    options: TrainingOptions,
    generate: Generate | None,
    directory: Path,
    process: Any,
) -> Trained:
    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.costs.bytes import step_bytes
    from freeexport.costs.verdict import prospect
    from freeexport.training.batches import described, examples
    from freeexport.training.exit_start import chosen_tokens
    from freeexport.training.trainer import output_metric
    from freeexport.training.tuning import trainable

    writer = process.is_main_process
    with process.main_process_first():
        checkpoint = _base(model, options, directory, writer)
        start = _start(checkpoint, options)
    description = described(checkpoint, options)
    with process.main_process_first():  # other processes find its outputs
        training, validation, left_out = examples(checkpoint, description, options, generate)
    layers = len(description.decoder.layers)
    lines = [f"warning: {line}" for line in left_out]
    tokens = None
    vocabulary = None
    share = 1.0
    if options.exit_vocab is not None:
        tokens, vocabulary = chosen_tokens(start, description, options, training)
        share = (len(tokens) + 1) / description.vocab_size
        covered = f"{vocabulary.covered:.2%} of those in the training targets"
        lines.append(
            f"exit vocabulary: {len(tokens)} of {description.vocab_size} tokens, {covered}"
        )
    if (
        start.exit is not None
        and start.exit.trained
        and start.exit.exit_layer != options.exit_layer
    ):
        lines.append(
            f"note: {checkpoint.name} was trained for an exit after layer {start.exit.exit_layer}; "
            f"OUT has another, after layer {options.exit_layer}"
        )
    costs = step_bytes(description, checkpoint).at(
        options.exit_layer, layers, options.exit_head_layers, share=share, reads=options.exit_input
    )
    if writer:
        if options.loss != "deep-ce":
            lines.append(prospect(costs, options.exit_layer, layers))
        for line in lines:
            click.echo(line, err=True)
    with process.main_process_first():
        cache = directory / "states"
        tuning = trainable(
            model,
            start,
            description,
            options=options,
            training=training,
            validation=validation,
            tokens=tokens,
            cache=cache,
        )
    with naming(directory):
        written = None
        if options.select_by not in MEASURED:
            written = output_metric(tuning.module.model, checkpoint, validation, options.select_by)
        trained = replace(
            _run(tuning, options, directory, writer=writer, written=written, costs=costs),
            left_out=tuple(left_out),
        )
    if writer:
        with output_directory(out, EXIT_FILE, options.overwrite) as partial:
            tuning.write(partial)
            # An exit's own parameters belong to the weights next to them.
            has_parameters = tuning.own is not None or vocabulary is not None
            # A directory with a GGUF file is a checkpoint once it has the exit's file.
            weights = next(partial.glob("*.gguf"), partial)
            beside = open_checkpoint(str(weights)) if has_parameters else checkpoint
            exit_file = ExitFile(
                exit_layer=options.exit_layer,
                exit_layers=options.exit_head_layers,
                exit_input=options.exit_input,
                vocabulary=vocabulary,
                base_sha256=beside.sha256,
                loss=options.loss_name,
                tune=options.tune,
            )
            write_exit_file(partial, exit_file)
            shutil.copyfile(directory / METRICS, partial / METRICS)
            if (directory / TENSORBOARD).is_dir():
                shutil.copytree(directory / TENSORBOARD, partial / TENSORBOARD)
            # safetensors creates files that only their owner may read. A hard link has the mode of
            # the base.
            for path in partial.glob("*.safetensors"):
                if path.stat().st_nlink == 1:
                    path.chmod((partial / EXIT_FILE).stat().st_mode & 0o777)
        shutil.rmtree(directory, ignore_errors=True)
    process.wait_for_everyone()
    return replace(trained, out=str(out))


def bfloat16_note(bf16: bool) -> str:
    """Return advice about bfloat16 training on this processor. Empty if `bf16` is right."""
    if multiplies_bfloat16() == bf16:
        return ""
    if bf16:
        names = f"{', '.join(BFLOAT16[:-1])} or {BFLOAT16[-1]}"
        return f"warning: --bf16 is slow on this processor, which has no {names}; train without it"
    return "note: this processor multiplies bfloat16 several times as fast as float32; give --bf16"


def _use_threads(count: int | None) -> None:
    """Set the number of torch's threads and how they wait. Call before torch is imported.

    None keeps torch's default number.
    """
    wait_quietly(count or usable_cores())
    import torch

    if count is not None:
        torch.set_num_threads(count)


def step_speed(
    model: str, options: TrainingOptions, directory: Path, seconds: float = 15.0
) -> tuple[float, float]:
    """Measure the training speed over at most `options.steps` steps or `seconds`.

    The first step is not counted. Leaves only temporary files in `directory`. Raises the errors of
    `train`.

    Returns:
        Seconds per step and tokens per second, from the faster half of the steps.
    """
    _use_threads(options.threads)
    from torch import cuda
    from transformers import TrainerCallback

    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.training.batches import described, examples
    from freeexport.training.exit_start import chosen_tokens
    from freeexport.training.trainer import Clock, ExitTrainer, training_arguments
    from freeexport.training.tuning import trainable

    if not cuda.is_available():
        keep_freed_memory()
    checkpoint = open_checkpoint(model)
    description = described(checkpoint, options)
    training, validation, _ = examples(checkpoint, description, options, check=False)
    tokens = (
        chosen_tokens(checkpoint, description, options, training)[0] if options.exit_vocab else None
    )
    tuning = trainable(
        model,
        checkpoint,
        description,
        options=options,
        training=training,
        validation=validation,
        tokens=tokens,
        cache=directory / "states",
    )
    arguments = training_arguments(options, directory, tuning.lengths[0], resumed=True)
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.load_best_model_at_end = False
    # Time and tokens seen at the end of each step. The first step allocates memory for the others.
    marks: list[tuple[float, int]] = []

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            marks.append((time.monotonic(), int(trainer.tokens_seen)))
            control.should_training_stop |= len(marks) > 1 and marks[-1][0] - marks[0][0] > seconds

    trainer = ExitTrainer(tuning, arguments, options, clock=Clock(None), callbacks=[Timer()])
    trainer.train()
    return better_half(marks)


def better_half(marks: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return the seconds per step and tokens per second of the faster half of the steps.

    `marks` are the time and the tokens seen at the end of each step. One half may be disturbed by
    other work.
    """
    middle = (len(marks) + 1) // 2
    halves = [half for half in (marks[:middle], marks[middle - 1 :]) if len(half) > 1]
    found = []
    for half in halves:
        began, before = half[0]
        ended, after = half[-1]
        found.append(((ended - began) / (len(half) - 1), (after - before) / (ended - began)))
    return max(found, key=lambda one: one[1])


def leave_group() -> bool:
    """Leave the process group, and return True in the main process.

    Otherwise gloo aborts the processes at the end.
    """
    from accelerate import PartialState

    process = PartialState()
    process.destroy_process_group()
    return bool(process.is_main_process)


def _base(model: str, options: TrainingOptions, directory: Path, writer: bool) -> Checkpoint:
    from freeexport.checkpoints.checkpoint import open_checkpoint

    if options.from_config:
        from freeexport.checkpoints.transformers_model import write_random_weights

        base = directory / "base"
        if writer and not base.exists():
            write_random_weights(Path(model), base, options.seed)
        return open_checkpoint(str(base))
    return open_checkpoint(model)


def _start(checkpoint: Checkpoint, options: TrainingOptions) -> Checkpoint:
    """Return the checkpoint with the exit from which training starts, if it has one."""
    from freeexport.checkpoints.checkpoint import CheckpointError
    from freeexport.checkpoints.ready_made import begin_with

    if options.exit_from is not None:
        checkpoint = begin_with(checkpoint, options.exit_from)
    found = checkpoint.exit
    if found is not None and found.has_parameters:
        wanted = options.exit_head_layers, options.exit_layer, options.exit_input
        reads = found.exit_input
        if (reads, options.exit_input) == ("feature", "fused"):  # see ExitLayers.fuse
            reads = "fused"
        has_vocabulary = found.vocabulary is not None
        fits = (found.exit_layers, found.exit_layer, reads) == wanted
        if options.exit_from is not None:
            if not fits or has_vocabulary != (options.exit_vocab is not None):
                known = f" --exit-vocab {found.vocabulary.size}" if found.vocabulary else ""
                raise CheckpointError(
                    f"--exit-from {options.exit_from} goes with --exit-layer {found.exit_layer} "
                    f"--exit-head-layers {found.exit_layers} --exit-input {found.exit_input}"
                    f"{known}; give these"
                )
        elif not fits or (found.vocabulary and found.vocabulary.size != options.exit_vocab):
            raise CheckpointError(
                f"{checkpoint.name} has an exit of its own already; give the checkpoint that it "
                "was trained on, or train this exit further: the same --exit-layer, "
                "--exit-head-layers, --exit-input and --exit-vocab"
            )
    return checkpoint


def _run(
    tuning: Trainable,
    options: TrainingOptions,
    directory: Path,
    writer: bool,
    written: Any,
    costs: Costs,
) -> Trained:
    from transformers import EarlyStoppingCallback, TrainerCallback

    from freeexport.training.report import MetricLog, Watch, training_verdict
    from freeexport.training.shallow_deep import matmul_precision
    from freeexport.training.trainer import Clock, ExitTrainer, training_arguments

    checkpoint = last_checkpoint(directory) if options.resume else None
    elapsed = 0.0
    after = None
    if checkpoint is not None:
        elapsed = float(json.loads((checkpoint / ELAPSED).read_text(encoding="utf-8")))
        after = int(checkpoint.name.rpartition("-")[2])
    clock = Clock(None if options.time_limit is None else 60 * options.time_limit, elapsed)
    log = MetricLog(directory / METRICS, directory / TENSORBOARD, after) if writer else None
    watch = Watch(clock, log, options.loss != "deep-ce")
    callbacks: list[TrainerCallback] = [watch]
    if options.patience and options.select_by != LAST:
        callbacks.append(EarlyStoppingCallback(options.patience))
    arguments = training_arguments(options, directory, tuning.lengths[0], checkpoint is not None)
    watch.trainer = trainer = ExitTrainer(
        tuning, arguments, options, clock=clock, callbacks=callbacks, written=written
    )
    try:
        with matmul_precision(options.bf16):
            trainer.run(checkpoint)
    finally:
        watch.close()
    best_step, best = trainer.best()
    before = trainer.before()
    seconds = round(clock.elapsed, 1)
    sentences = training_verdict(before, best, costs) if options.loss != "deep-ce" else []
    if best_step == 0:
        sentences.append(
            "kept: the weights from before training, as no evaluation was better by "
            f"{options.select_by}"
        )
    return Trained(
        "",
        trainer.state.global_step,
        best_step,
        seconds=seconds,
        metrics=best,
        before=before,
        left_out=(),
        verdict=tuple(sentences),
    )
