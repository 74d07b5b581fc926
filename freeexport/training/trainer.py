"""`transformers.Trainer` for a model with an exit.

Losses are exact means over rows, batches have examples of similar length, both exits are evaluated,
and runs end within their time limit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.tokenizer_files import load_tokenizer
from freeexport.checkpoints.transformers_model import greedy_ids
from freeexport.task_metrics import Reference, metric_of
from freeexport.training.batches import LengthBatches, loader
from freeexport.training.run_directory import ELAPSED
from freeexport.training.shallow_deep import IGNORED, MEASURES
from freeexport.training.training_options import LAST, Schedule, TrainingOptions
from freeexport.training.tuning import Trainable

WEIGHTS = "model.safetensors"  # trained weights in a checkpoint
FALL = 0.3  # share of a run in which schedule "hold" lowers the learning rate
AGREEING = 0.99  # agreement required of the exits counted by `oracle_exits`
ENDLESS = 1_000_000_000  # steps of a run that only the time limit ends
# Validation examples whose outputs a metric scores, and how many are decoded at once.
SELECT_SAMPLES = 64
_SELECT_BATCH = 16
_LONGER = 2  # limit of an output's length, relative to the batch's longest target


def selected(options: TrainingOptions) -> str:
    """Return the key, in evaluation metrics, of the value by which a run is selected.

    It is the loss if the last weights are kept.
    """
    name = "loss" if options.select_by == LAST else options.select_by
    return f"eval_{name.replace('-', '_')}"


def training_arguments(
    options: TrainingOptions, directory: Path, lengths: Sequence[int], resumed: bool
) -> TrainingArguments:
    """Return Trainer's arguments."""
    processes = PartialState().num_processes
    on_cpu = not torch.cuda.is_available()
    steps = ENDLESS if options.steps is None else options.steps
    if options.epoch_count is not None:
        batches = len(LengthBatches(lengths, options.batch_tokens, options.seed, devices=processes))
        steps = max(1, math.ceil(options.epoch_count * -(-batches // options.accumulate)))
    every = options.evaluate_every or min(500, max(1, steps // 10))
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.rate,
        optim="adamw_torch_fused",
        bf16=options.bf16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if processes > 1 and on_cpu else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        seed=options.seed,
        eval_strategy="steps",
        eval_on_start=not resumed,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=options.select_by != LAST,
        metric_for_best_model=selected(options),
        greater_is_better=options.select_by not in ("loss", LAST),
        restore_callback_states_from_checkpoint=True,
        logging_steps=min(10, max(1, steps // 100)),
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def rate_factor(schedule: Schedule, warmup: float, progress: float) -> float:
    """Return the learning rate relative to its peak, at a `progress` from 0 to 1 in the run."""
    if progress < warmup:
        return progress / warmup
    fall = FALL if schedule == "hold" else max(1.0 - warmup, 1e-9)
    return min(1.0, (1.0 - min(progress, 1.0)) / fall)


def decided_rows(labels: torch.Tensor, seq2seq: bool) -> torch.Tensor:
    """Return a mask of the rows that may exit, bool [N].

    It covers the N labelled rows of `labels` [B, m]. The first labelled row of a sequence never
    exits in a decoder-only model, nor if its target begins with given tokens, as for speech.
    """
    wanted = labels != IGNORED
    left_out = ~wanted[:, :1] | (not seq2seq)
    return (wanted.cumsum(1) > left_out.int())[wanted]


def oracle_exits(confidence: torch.Tensor, agreed: torch.Tensor) -> float:
    """Return the largest share of tokens that could exit with an agreement of at least AGREEING.

    Tokens are taken in order of `confidence`, float [N]. `agreed`, bool [N], is True if both exits
    predict the same token. The result corresponds to a threshold chosen on these tokens.
    """
    right = agreed[confidence.argsort(descending=True, stable=True)].double().cumsum(0)
    ahead = (right >= AGREEING * torch.arange(1, len(right) + 1)).nonzero()
    return float(ahead.max() + 1) / len(right) if len(ahead) else 0.0


class Clock:
    """Training time in seconds, including time before a resumed checkpoint.

    The last step, the final evaluation and the final checkpoint must fit in the limit. All
    processes have the same `share`, because they must stop at the same step and use the same
    learning rate.

    Attributes:
        limit: Time limit in seconds, or None.
        share: Elapsed share of the time available for steps, at the last `tick`.
        evaluation: Longest time of an evaluation.
        saving: Longest time of a checkpoint.
        step: Longest time of a recent step.
    """

    def __init__(self, limit: float | None, elapsed: float = 0.0) -> None:
        self.limit = limit
        self.evaluation = self.saving = self.step = 0.0
        self._start = time.monotonic() - elapsed
        self.share = self._share()

    @property
    def elapsed(self) -> float:
        """Return the seconds since the start of training."""
        return time.monotonic() - self._start

    @property
    def time_for_steps(self) -> float:
        """Return the seconds that the limit leaves for steps. Infinite without a limit."""
        return math.inf if self.limit is None else self.limit - self.evaluation - self.saving

    def stepped(self, seconds: float) -> None:
        """Record the duration of a step. A slow one loses weight over time."""
        self.step = max(seconds, 0.9 * self.step)

    def tick(self) -> None:
        """Update `share`, with the main process's value in all processes."""
        if self.limit is not None:
            [self.share] = broadcast_object_list([self._share()])

    def _share(self) -> float:
        available = self.time_for_steps - self.step
        return self.elapsed / available if available > 0 else 1.0


def output_metric(
    model: Any, checkpoint: Checkpoint, validation: Sequence[Example], metric: str
) -> Callable[[], float]:
    """Return a function that scores the outputs of the current weights, in [0, 1].

    It decodes the first SELECT_SAMPLES validation examples and applies `metric`.

    Raises:
        OptionError: If the metric is unknown.
        MetricError: If it does not fit the targets.
    """
    examples = sorted(validation[:SELECT_SAMPLES], key=lambda example: len(example.prompt))
    tokenizer = load_tokenizer(checkpoint)
    measure = metric_of(metric)

    def texts(outputs: Iterable[Any]) -> list[str]:
        return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in outputs]

    targets = texts(example.target for example in examples)
    references = [Reference((text,)) for text in targets]
    measure.table(targets, references)  # raises MetricError if the metric does not fit

    def measured() -> float:
        outputs = list[str]()
        for start in range(0, len(examples), _SELECT_BATCH):
            batch = examples[start : start + _SELECT_BATCH]
            max_new_tokens = _LONGER * max(len(example.target) for example in batch)
            outputs += texts(
                greedy_ids(model, checkpoint, [example.prompt for example in batch], max_new_tokens)
            )
        return measure.of(measure.table(outputs, references))

    return measured


class ExitTrainer(Trainer):
    """Trainer for a module that returns a `loss` summed over rows.

    In evaluation mode the module returns the `measures` of the rows instead.
    """

    def __init__(
        self,
        tuning: Trainable,
        arguments: TrainingArguments,
        options: TrainingOptions,
        clock: Clock,
        callbacks: list[TrainerCallback],
        written: Callable[[], float] | None = None,
    ) -> None:
        self.options = options
        self.clock = clock
        self._written = written
        self._seq2seq = bool(tuning.module.seq2seq)
        self.tokens_seen: torch.Tensor | int = 0
        lengths, self._validation_lengths = tuning.lengths
        share = arguments.process_index, arguments.world_size
        self.batches = LengthBatches(lengths, options.batch_tokens, options.seed, *share)
        super().__init__(
            model=tuning.module,
            args=arguments,
            data_collator=tuning.collate,
            train_dataset=tuning.training,
            eval_dataset=tuning.validation,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # metrics go to a file

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Each process selects its own batches, so accelerate must not shard them.
        return loader(self.train_dataset, self.batches, self.data_collator, self.args.seed)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss over the rows of a whole step: all micro-batches and devices."""
        outputs = model(**inputs)
        if "attention_mask" in inputs:
            self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum().detach()
        self.tokens_seen = self.tokens_seen + (inputs["labels"] != IGNORED).sum().detach()
        rows = (
            num_items_in_batch
            if num_items_in_batch is not None
            else (inputs["labels"] != IGNORED).sum()
        )
        # Data parallelism averages gradients over processes. Undo that, since `rows` already counts
        # the rows of all processes.
        loss = (
            outputs["loss"]
            / rows
            * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        )
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate both exits on the validation examples.

        Returns mean losses and accuracies over all rows. The agreement of the exits and
        `oracle_exits` cover only rows that may exit (see `decided_rows`). If a metric was chosen,
        it is included too.
        """
        model = cast(torch.nn.Module, self.model)
        where = self.args
        began = time.monotonic()
        was_training = model.training
        model.eval()
        batches = LengthBatches(self._validation_lengths, self.options.batch_tokens, seed=0)
        seen = list[tuple[torch.Tensor, torch.Tensor]]()
        for number, batch in enumerate(loader(self.eval_dataset, batches, self.data_collator)):
            if number % where.world_size == where.process_index:
                batch = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    outputs = model(**batch)
                seen.append(
                    (outputs["measures"].cpu(), decided_rows(batch["labels"], self._seq2seq).cpu())
                )
        gathered = gather_object(seen) if where.world_size > 1 else seen
        rows, decided = (torch.cat(part) for part in zip(*gathered, strict=True))
        means = dict(zip(MEASURES[:-1], rows.double().mean(0).tolist(), strict=False))
        agreed, confidence = (
            rows[decided, MEASURES.index(name)] for name in ("agreement", "confidence")
        )
        means["agreement"] = float(agreed.double().mean()) if len(agreed) else 0.0
        means["oracle_exits"] = oracle_exits(confidence, agreed > 0)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        if self._written is not None:
            with self.accelerator.autocast():
                quality = [self._written() if where.process_index == 0 else 0.0]
            metrics[selected(self.options)] = broadcast_object_list(quality)[0]
        model.train(was_training)
        self.clock.evaluation = max(self.clock.evaluation, time.monotonic() - began)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.state.global_step == 0 and where.should_save:
            self._save(str(self._start))
        return metrics

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Schedule the learning rate by steps, or by time if the time limit comes first."""
        options = self.options
        clock = self.clock

        def factor(step: int) -> float:
            progress = max((step + 1) / num_training_steps, min(clock.share, 1.0))
            return rate_factor(options.schedule, options.warmup, progress)

        self.lr_scheduler = LambdaLR(
            cast(torch.optim.Optimizer, optimizer or self.optimizer), factor
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def run(self, checkpoint: Path | None) -> None:
        """Train from the start or from `checkpoint`, then load the weights of `best`."""
        if checkpoint is None:
            self.train()
        else:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step < self.args.max_steps and self.clock.share < 1:
                self.train(resume_from_checkpoint=str(checkpoint))
            else:
                self.state = state  # killed after the last step, before the end
                if self.options.select_by == LAST:
                    self._load_from_checkpoint(str(checkpoint))
                else:
                    self._load_best_model()
        if self.best()[0] == 0:
            module = cast(torch.nn.Module, self.model)
            module.load_state_dict(load_file(self._start / WEIGHTS), strict=False)

    @property
    def _start(self) -> Path:
        """Return the directory of the weights of step 0, which are in no checkpoint."""
        return Path(str(self.args.output_dir)) / "start"

    def best(self) -> tuple[int, dict[str, float]]:
        """Return step and metrics of the evaluation whose weights are kept, by default the best.

        Among equal evaluations, the first after a step wins. The evaluation before training counts
        only if its weights were saved.
        """
        name = selected(self.options)
        sign = -1 if self.args.greater_is_better else 1
        evaluations = [entry for entry in self.state.log_history if name in entry]
        if self.options.select_by == LAST:
            return int(evaluations[-1]["step"]), _measures(evaluations[-1])
        if not (self._start / WEIGHTS).exists():  # resumed from an older version
            evaluations = [entry for entry in evaluations if entry["step"] > 0]
        best = min(evaluations, key=lambda entry: (sign * entry[name], entry["step"] == 0))
        return int(best["step"]), _measures(best)

    def before(self) -> dict[str, float]:
        """Return the metrics before training. Empty if an older version started the run."""
        first = next(entry for entry in self.state.log_history if "eval_loss" in entry)
        return _measures(first) if first["step"] == 0 else {}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.monotonic()
        super()._save_checkpoint(model, trial)
        self.clock.saving = max(self.clock.saving, time.monotonic() - began)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save only trained parameters, and each shared tensor once."""
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        parameters = dict(cast(torch.nn.Module, self.model).named_parameters())
        tensors = parameters if state_dict is None else state_dict
        trained = {name for name, value in parameters.items() if value.requires_grad}
        kept = {
            name: value.detach().contiguous() for name, value in tensors.items() if name in trained
        }
        save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / ELAPSED).write_text(json.dumps(self.clock.elapsed), encoding="utf-8")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Suppress warnings: checkpoints contain no frozen parameters."""


def _measures(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("eval_")}
