"""What a training run does beside training: stop in time, record metrics, show progress."""

from __future__ import annotations

import json
import math
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import psutil
from transformers import TrainerCallback

from freeexport.system.machine import keep_freed_memory
from freeexport.system.progress import progress
from freeexport.training.trainer import AGREEING, ENDLESS, Clock
from runtime.errors import FreeExportError
from runtime.json_file import parse_json

LEAST_LEFT = 0.25  # of the machine's memory


class DivergedError(FreeExportError):
    """The loss is no longer a number."""


class StopInTime(TrainerCallback):  # type: ignore[misc]
    """Ends a run at its last step or its time limit, with an evaluation and a checkpoint."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._clock.tick()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step >= state.max_steps or self._clock.share >= 1:
            control.should_training_stop = control.should_evaluate = control.should_save = control.should_log = True


class MemoryLeft(TrainerCallback):  # type: ignore[misc]
    """Ends the keeping of freed memory where little is left on the machine."""

    def __init__(self) -> None:
        self._keeps = True

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        memory = psutil.virtual_memory()
        if self._keeps and memory.available < LEAST_LEFT * memory.total:
            self._keeps = False
            keep_freed_memory(False)


class Metrics(TrainerCallback):  # type: ignore[misc]
    """One JSON object a line, and TensorBoard where it is installed. `after` drops what a killed run logged later."""

    def __init__(self, path: Path, clock: Clock, tensorboard: Path, after: int | None) -> None:
        self._path, self._clock = path, clock
        self.trainer: Any = None
        self._seen, self._time = 0, time.monotonic()
        lines = path.read_text(encoding="utf-8").splitlines() if after is not None and path.exists() else []
        kept = [line for line in lines if _step(line) <= (after or 0)]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board: Any = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=None if after is None else after + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        values = {key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))}
        if "train_runtime" in values:
            return  # Trainer's own summary, which counts batches as it would have made them
        if not math.isfinite(values.get("loss", 0.0)):
            raise DivergedError(
                f"the loss is {values['loss']} at step {state.global_step}; lower --learning-rate, or train without "
                "--bf16"
            )
        if "loss" in values:
            values["tokens_per_second"] = self._tokens_per_second()
        record = {"step": state.global_step, **values, "elapsed": round(self._clock.elapsed, 2)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, state.global_step)

    def _tokens_per_second(self) -> float:
        now, seen = time.monotonic(), int(self.trainer.tokens_seen)
        rate = (seen - self._seen) / (now - self._time)
        self._seen, self._time = seen, now
        return round(rate, 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._board is not None:
            self._board.close()


def _step(line: str) -> float:
    try:
        return float(parse_json(line, nan=True)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a kill cut off


class Bar(TrainerCallback):  # type: ignore[misc]
    """Progress in steps, or in seconds where only the time ends the run."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._shown = clock, 0.0
        self._context: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._timed = state.max_steps >= ENDLESS
        total = self._clock.limit if self._timed else state.max_steps
        # A run that goes on after an interruption begins where that was.
        self._shown = float(int(self._clock.elapsed)) if self._timed else state.global_step
        self._context = progress("training, seconds" if self._timed else "training, steps", total, self._shown)
        self._advance = self._context.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        now = float(int(self._clock.elapsed)) if self._timed else state.global_step
        self._advance(now - self._shown)
        self._shown = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        metrics, chosen = others["metrics"], args.metric_for_best_model
        shown = ("eval_shallow_loss", "eval_agreement", "eval_exits", "eval_loss")
        also = "" if chosen in shown else f", {chosen.removeprefix('eval_')} {metrics[chosen]:.3f}"
        click.echo(
            f"step {state.global_step}: shallow loss {metrics['eval_shallow_loss']:.3f}, agreement "
            f"{metrics['eval_agreement']:.3f}, exits at {AGREEING:.0%} agreement {metrics['eval_exits']:.3f}{also}",
            err=True,
        )

    def close(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
