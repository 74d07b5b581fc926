"""Report on a training run: plan, progress, metrics file and verdict. Also end it in time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import psutil
from transformers import TrainerCallback

from freeexport.costs.verdict import trained_verdict
from freeexport.system.machine import keep_freed_memory
from freeexport.system.progress import duration, progress
from freeexport.training.trainer import AGREEING, ENDLESS, Clock
from runtime.bundle.costs import Costs
from runtime.bundle.json_file import parse_json
from runtime.errors import FreeExportError

MIN_FREE_MEMORY = 0.25  # share of the machine's memory
PLANNED_AFTER = 5  # first steps, which set the speed assumed by the plan
FEW_STEPS = 100  # recipes in tools/models take 400 or more
_LOST = 0.02  # relative rise of the full model's loss that counts
RISES = 2  # consecutive rises that end a run


class DivergedError(FreeExportError):
    """Raised if the loss is NaN or infinite."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Trainer callback that ends a run in time and reports on it.

    Ends the run at its last step or its time limit, with an evaluation and a checkpoint. If only
    time limits the run, each tenth ends with an evaluation, unless `evaluate_every` is set. Stops
    keeping freed memory when little memory is left. On the main process it also logs metrics,
    prints a plan after the first steps, prints evaluations, and shows progress. The remaining time
    shown never rises.
    """

    def __init__(self, clock: Clock, log: MetricLog | None, exits: bool = True) -> None:
        """Create the callback."""
        self._clock = clock
        self._log = log
        self._exits = exits
        self.trainer: Any = None  # set later: the trainer is created with its callbacks
        self._keeps = True
        self._context: Any = None
        self._left = math.inf
        self._tenths = 0
        self._shown = 0.0
        self._first = self._began = self._planned = 0.0
        self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._timed = state.max_steps >= ENDLESS
        self._first = state.global_step
        self._clock.tick()
        self._tenths = int(10 * self._clock.share)
        if self._log is None:
            return
        self._shown = self._now(state)
        total = self._clock.limit if self._timed else state.max_steps
        what = "training, seconds" if self._timed else "training, steps"
        self._context = progress(what, total, self._shown, left=lambda: self.seconds_left(state))
        self._advance = self._context.__enter__()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.trainer.batches.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._began = time.monotonic()
        # The first step allocates memory that later steps reuse, so it is not timed.
        if state.global_step == self._first + 1:
            self._planned = self._began
            self._tokens = int(self.trainer.tokens_seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        now = time.monotonic()
        clock = self._clock
        clock.stepped(now - self._began)
        clock.tick()
        tenths = int(10 * clock.share)
        if self._timed and tenths > self._tenths and self.trainer.options.evaluate_every is None:
            self._tenths = tenths
            control.should_evaluate = control.should_save = True
        if state.global_step >= state.max_steps or clock.share >= 1:
            control.should_training_stop = control.should_evaluate = control.should_save = (
                control.should_log
            ) = True
        memory = psutil.virtual_memory()
        if self._keeps and memory.available < MIN_FREE_MEMORY * memory.total:
            self._keeps = False
            keep_freed_memory(False)
        if self._log is None:
            return
        self._advance(self._now(state) - self._shown)
        self._shown = self._now(state)
        if state.global_step == self._first + PLANNED_AFTER:
            seconds = (now - self._planned) / (PLANNED_AFTER - 1)
            tokens = (int(self.trainer.tokens_seen) - self._tokens) / (PLANNED_AFTER - 1)
            batches = len(self.trainer.batches) / args.gradient_accumulation_steps
            every = args.eval_steps
            if self._timed and self.trainer.options.evaluate_every is None:
                every = max(1, min(every, int(clock.time_for_steps / seconds / 10)))
            for line in plan(
                clock,
                state.max_steps,
                state.global_step,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                batches=batches,
                every=every,
            ):
                click.echo(line, err=True)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        values = {
            key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))
        }
        if "train_runtime" in values:
            return  # Trainer's own summary assumes batches of its own making
        if not math.isfinite(values.get("loss", 0.0)):
            raise DivergedError(
                f"the loss is {values['loss']} at step {state.global_step}; lower --learning-rate, "
                "or train without --bf16"
            )
        if self._log is not None:
            self._log.write(
                state.global_step, values, int(self.trainer.tokens_seen), self._clock.elapsed
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        deep = [entry["eval_deep_loss"] for entry in state.log_history if "eval_deep_loss" in entry]
        # Without a selection of the best weights all steps are made.
        selects = args.load_best_model_at_end
        rises = selects and rising(deep) and not control.should_training_stop
        control.should_training_stop |= rises
        if self._log is None:
            return
        metrics = others["metrics"]
        chosen = args.metric_for_best_model
        names = ["eval_shallow_loss", "eval_agreement", "eval_oracle_exits"] if self._exits else []
        names += [name for name in ("eval_deep_loss", chosen) if name not in (*names, "eval_loss")]
        shown = (
            f"{name.removeprefix('eval_').replace('_', ' ')} {metrics[name]:.3f}"
            for name in dict.fromkeys(names)
        )
        click.echo(f"step {state.global_step}: {', '.join(shown)}", err=True)

        if rises:
            click.echo(
                f"stopped: the whole model's loss rose at {RISES} evaluations in a row, from "
                f"{min(deep):.3f} to {deep[-1]:.3f}; the best weights are kept; lower "
                "--learning-rate, or leave the model unchanged with --tune exit",
                err=True,
            )

    def _now(self, state: Any) -> float:
        return float(int(self._clock.elapsed)) if self._timed else float(state.global_step)

    def seconds_left(self, state: Any) -> float | None:
        """Return the seconds until the time limit or the last step, whichever comes first.

        None until one of them can be estimated. Never rises from call to call.
        """
        found = math.inf if self._clock.limit is None else self._clock.limit - self._clock.elapsed
        done = state.global_step - self._first
        if done > 0 and not self._timed:
            found = min(
                found,
                self._clock.elapsed / state.global_step * (state.max_steps - state.global_step),
            )
        self._left = max(0.0, min(self._left, found))
        return self._left if math.isfinite(self._left) else None

    def close(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
        if self._log is not None:
            self._log.close()


class MetricLog:
    """Write metrics as JSON lines, and to TensorBoard if it is installed.

    Args:
        tensorboard: Directory for TensorBoard.
        after: Step from which a run resumes. Entries logged after it are dropped. None: new log.
    """

    def __init__(self, path: Path, tensorboard: Path, after: int | None) -> None:
        self._path = path
        self._seen = 0
        self._time = time.monotonic()
        lines = (
            path.read_text(encoding="utf-8").splitlines()
            if after is not None and path.exists()
            else []
        )
        kept = [line for line in lines if _step(line) <= (after or 0)]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board: Any = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(tensorboard), purge_step=None if after is None else after + 1
            )

    def write(self, step: int, values: dict[str, float], tokens: int, elapsed: float) -> None:
        """Log `values` at `step`.

        If they contain a loss, add the tokens per second since the last such entry. `tokens` is the
        total number of tokens seen.
        """
        if "loss" in values:
            now = time.monotonic()
            values["tokens_per_second"] = round(
                (tokens - self._seen) / max(now - self._time, 1e-6), 1
            )
            self._seen = tokens
            self._time = now
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values, "elapsed": round(elapsed, 2)}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _step(line: str) -> float:
    try:
        return float(parse_json(line, nan=True)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off when the run was killed


def plan(
    clock: Clock,
    end: int,
    done: int,
    seconds: float,
    tokens_per_second: float,
    batches: float,
    every: int,
) -> list[str]:
    """Describe the expected course of a run, in lines of text.

    Args:
        end: Maximum number of steps.
        done: Steps made so far.
        seconds: Seconds per step.
        tokens_per_second: Measured training speed.
        batches: Steps per pass over the data.
        every: Steps between evaluations.
    """
    pause = clock.evaluation + clock.saving
    each = seconds + pause / every
    fitting = (
        done + max(0, math.floor((clock.time_for_steps - clock.elapsed) / each))
        if clock.limit
        else end
    )
    steps = min(end, fitting)
    left = (steps - done) * each + pause
    lines = [
        f"plan: {steps} steps, about {duration(left)} more at {tokens_per_second:,.0f} tokens/s; "
        f"{steps / batches:.1f} passes over the data"
    ]
    if steps < FEW_STEPS:
        more = (
            "a longer --time-limit or a smaller --batch-tokens"
            if fitting < end
            else "more --steps or --epochs"
        )
        lines.append(
            f"warning: an exit hardly learns in {steps} steps; give it {FEW_STEPS} or more: {more}"
        )
    return lines


def rising(losses: Sequence[float]) -> bool:
    """Return True if the last RISES losses each rose and the last is well above the lowest."""
    last = losses[-RISES - 1 :]
    return (
        len(last) > RISES
        and all(a < b for a, b in pairwise(last))
        and last[-1] > (1 + _LOST) * min(losses)
    )


def training_verdict(before: dict[str, float], after: dict[str, float], costs: Costs) -> list[str]:
    """Describe in sentences what training achieved.

    Args:
        before: Evaluation before training. Empty if unknown.
        after: Evaluation of the best step.
    """
    start = before or after
    agreement, oracle = (
        f"{start[name]:.1%} -> {after[name]:.1%}"
        for name in ("eval_agreement", "eval_oracle_exits")
    )
    lines = [
        f"agreement of both exits {agreement}; oracle exits {oracle} (tokens that could exit with "
        f"{AGREEING:.0%} agreement, by a threshold chosen on these tokens)"
    ]
    rise = after["eval_deep_loss"] / max(start["eval_deep_loss"], 1e-9) - 1
    if rise > _LOST:
        lines.append(
            f"warning: the whole model's loss rose from {start['eval_deep_loss']:.3f} to "
            f"{after['eval_deep_loss']:.3f}; lower --learning-rate, or leave the model unchanged "
            "with --tune exit"
        )
    return [*lines, f"verdict: {trained_verdict(costs, before, after)}"]
