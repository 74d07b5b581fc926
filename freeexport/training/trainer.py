"""`transformers.Trainer` for a model with an exit: row-exact losses, batches by length, evaluation of both exits, and
an end that keeps to the time limit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.tokenizer_files import load_tokenizer
from freeexport.checkpoints.transformers_model import greedy_ids
from freeexport.metrics import Reference, metric_of
from freeexport.training.batches import LengthBatches, loader
from freeexport.training.options import MEASURED, Schedule, TrainingOptions
from freeexport.training.run_directory import ELAPSED
from freeexport.training.shallow_deep import IGNORED, MEASURES
from freeexport.training.tuning import Trainable

FALL = 0.3  # share of a run in which the learning rate of schedule "hold" falls
AGREEING = 0.99  # share of exits that agree, for which evaluations say how many there would be
ENDLESS = 1_000_000_000  # steps, where only the time ends a run
SELECT_SAMPLES = 64  # validation examples whose outputs a metric sees
_SELECT_BATCH = 16  # examples
_LONGER = 2  # outputs may be so many times as long as the longest target


def selected(options: TrainingOptions) -> str:
    """The key in evaluations of what a run is selected by."""
    return f"eval_{options.select_by.replace('-', '_')}"


def training_arguments(
    options: TrainingOptions, directory: Path, lengths: Sequence[int], resumed: bool
) -> TrainingArguments:
    """Trainer's arguments; checkpoints go to `directory`. `lengths` are those of the examples, in tokens."""
    steps = _step_count(options, lengths)
    every = options.evaluate_every or min(500, max(1, steps // 10))
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.rate,
        optim="adamw_torch_fused",
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if PartialState().num_processes > 1 and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        seed=options.seed,
        eval_strategy="steps",
        eval_on_start=not resumed,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=selected(options),
        greater_is_better=options.select_by != "loss",
        restore_callback_states_from_checkpoint=True,
        logging_steps=min(10, max(1, steps // 100)),
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def _step_count(options: TrainingOptions, lengths: Sequence[int]) -> int:
    if options.steps is not None:
        return options.steps
    if options.epoch_count is None:
        return ENDLESS
    processes = PartialState().num_processes
    batches = len(LengthBatches(lengths, options.batch_tokens, options.seed, devices=processes))
    return max(1, math.ceil(options.epoch_count * -(-batches // options.accumulate)))


def rate_factor(schedule: Schedule, warmup: float, progress: float) -> float:
    """Return the learning rate as a share of its peak, at `progress` in [0, 1] of a run; `warmup` is a share of it."""
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "inverse-sqrt":
        return math.sqrt(max(warmup, 1e-3) / max(progress, warmup, 1e-3))
    if schedule == "hold":
        return min(1.0, (1.0 - min(progress, 1.0)) / FALL)
    rest = (min(progress, 1.0) - warmup) / max(1.0 - warmup, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * rest)) if schedule == "cosine" else 1.0 - rest


def decided_rows(labels: torch.Tensor, seq2seq: bool) -> torch.Tensor:
    """The rows that may exit, bool [N], of those of labels [B, m] that are not IGNORED: all but a decoder-only model's
    first of each sequence."""
    wanted = labels != IGNORED
    return (wanted.cumsum(1) > (0 if seq2seq else 1))[wanted]


def oracle_exits(confidence: torch.Tensor, agreed: torch.Tensor) -> float:
    """The largest share of tokens, the surest, of which AGREEING agree with the deep prediction: what would exit at a
    threshold that is chosen on these very tokens. `confidence` float [N], `agreed` bool [N]."""
    right = agreed[confidence.argsort(descending=True, stable=True)].double().cumsum(0)
    ahead = (right >= AGREEING * torch.arange(1, len(right) + 1)).nonzero()
    return float(ahead.max() + 1) / len(right) if len(ahead) else 0.0


class Clock:
    """Seconds of training, those before a resumed checkpoint included; `limit` in seconds or None.

    The evaluation and checkpoint that end a run, and the step before, must fit in the limit: `share` is how much of
    the time for steps had passed at the last `tick`. It is the same in every process, since they must stop at the same
    step and agree on the learning rate.
    """

    def __init__(self, limit: float | None, elapsed: float = 0.0) -> None:
        self.limit = limit
        self.evaluation = self.saving = self.step = 0.0  # seconds of one
        self._start = time.monotonic() - elapsed
        self.share = self._share()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def time_for_steps(self) -> float:
        """Seconds of the limit that are left for steps; infinite without one."""
        return math.inf if self.limit is None else self.limit - self.evaluation - self.saving

    def stepped(self, seconds: float) -> None:
        """Note what a step took. A slow one is forgotten after a while."""
        self.step = max(seconds, 0.9 * self.step)

    def tick(self) -> None:
        if self.limit is not None:
            [self.share] = broadcast_object_list([self._share()])

    def _share(self) -> float:
        available = self.time_for_steps - self.step
        return self.elapsed / available if available > 0 else 1.0


def resumed_clock(options: TrainingOptions, checkpoint: Path | None) -> Clock:
    """A clock that goes on where the checkpoint's stood."""
    elapsed = 0.0 if checkpoint is None else float(json.loads((checkpoint / ELAPSED).read_text(encoding="utf-8")))
    return Clock(None if options.time_limit is None else 60 * options.time_limit, elapsed)


class WrittenOutputs:
    """The metric of a model's greedy outputs for the first validation examples, in [0, 1], 1 is best."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, validation: Sequence[Example], options: TrainingOptions
    ) -> None:
        """Raises OptionError for an unknown metric, and MetricError for one that does not fit the targets."""
        self.key = selected(options)
        self._model, self._checkpoint = model, checkpoint
        self._examples = sorted(validation[:SELECT_SAMPLES], key=lambda example: len(example.prompt))
        self._tokenizer = load_tokenizer(checkpoint)
        self._metric = metric_of(options.select_by)
        targets = [self._text(example.target) for example in self._examples]
        self._references = [Reference((text,)) for text in targets]
        self._metric.table(targets, self._references)  # does it fit?

    def __call__(self) -> float:
        """Decode with the present weights."""
        outputs = list[str]()
        for start in range(0, len(self._examples), _SELECT_BATCH):
            batch = self._examples[start : start + _SELECT_BATCH]
            most = _LONGER * max(len(example.target) for example in batch)
            written = greedy_ids(self._model, self._checkpoint, [example.prompt for example in batch], most)
            outputs += map(self._text, written)
        return self._metric.of(self._metric.table(outputs, self._references))

    def _text(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def written_outputs(
    module: Any, checkpoint: Checkpoint, validation: Sequence[Example], options: TrainingOptions
) -> WrittenOutputs | None:
    """Make what `--select-by` needs; None where a measure that every evaluation has is enough."""
    return None if options.select_by in MEASURED else WrittenOutputs(module.model, checkpoint, validation, options)


class ExitTrainer(Trainer):
    """Trains a module that returns a `loss` summed over rows, and sums of measures in evaluation mode."""

    def __init__(
        self,
        tuning: Trainable,
        arguments: TrainingArguments,
        options: TrainingOptions,
        clock: Clock,
        callbacks: list[TrainerCallback],
        written: WrittenOutputs | None = None,
    ) -> None:
        self.options, self._written = options, written
        self._seq2seq = bool(tuning.module.seq2seq)
        self.clock = clock
        self.tokens_seen: torch.Tensor | int = 0
        training_lengths, self._validation_lengths = tuning.lengths
        self.batches = self._length_batches(training_lengths, options, arguments)
        super().__init__(
            model=tuning.module,
            args=arguments,
            data_collator=tuning.collate,
            train_dataset=tuning.training,
            eval_dataset=tuning.validation,
            callbacks=[*callbacks, _Epochs(self.batches)],
        )
        self.remove_callback(PrinterCallback)  # metrics go to a file

    @staticmethod
    def _length_batches(lengths: Sequence[int], options: TrainingOptions, where: TrainingArguments) -> LengthBatches:
        return LengthBatches(lengths, options.batch_tokens, options.seed, where.process_index, where.world_size)

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Each process cuts its own share of the batches, so accelerate has nothing to shard.
        return loader(self.train_dataset, self.batches, self.data_collator, self.args.seed)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean over the rows of the whole step, all micro-batches and devices."""
        outputs = model(**inputs)
        if "attention_mask" in inputs:
            self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum().detach()
        self.tokens_seen = self.tokens_seen + (inputs["labels"] != IGNORED).sum().detach()
        rows = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != IGNORED).sum()
        # Data parallelism averages gradients over processes: undo it, since `rows` already counts those of all.
        loss = outputs["loss"] / rows * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure means over the rows of the validation examples, and the share that each exit predicts right. The
        agreement of both, and oracle exits, leave out a decoder-only model's first tokens: the prompt predicts them."""
        model, where, began = cast(torch.nn.Module, self.model), self.args, time.monotonic()
        was_training = model.training
        model.eval()
        batches = LengthBatches(self._validation_lengths, self.options.batch_tokens, seed=0)
        rows, *zeros = torch.zeros(1 + len(MEASURES), dtype=torch.float64, device=where.device)
        seen = list[tuple[torch.Tensor, torch.Tensor]]()
        sums = dict(zip(MEASURES, zeros, strict=True))  # of a process without batches too
        for number, batch in enumerate(loader(self.eval_dataset, batches, self.data_collator)):
            if number % where.world_size != where.process_index:
                continue
            batch = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                outputs = model(**batch)
            rows += (batch["labels"] != IGNORED).sum()
            for name in MEASURES:
                sums[name] += outputs[name].double()
            decided = decided_rows(batch["labels"], self._seq2seq).cpu()
            seen.append((outputs["confidence"].float().cpu()[decided], outputs["agreed"].cpu()[decided]))
        metrics = self._means(sums, rows, metric_key_prefix)
        if self._written is not None:
            with self.accelerator.autocast():
                quality = [self._written() if where.process_index == 0 else 0.0]
            metrics[self._written.key] = broadcast_object_list(quality)[0]
        model.train(was_training)
        gathered = gather_object(seen) if where.world_size > 1 else seen
        confidence, agreed = (torch.cat(part) for part in zip(*gathered, strict=True))
        metrics[f"{metric_key_prefix}_agreement"] = float(agreed.double().mean()) if len(agreed) else 0.0
        metrics[f"{metric_key_prefix}_oracle_exits"] = oracle_exits(confidence, agreed)
        self.clock.evaluation = max(self.clock.evaluation, time.monotonic() - began)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _means(self, sums: dict[str, torch.Tensor], rows: torch.Tensor, prefix: str) -> dict[str, float]:
        names = list(sums)
        stacked = torch.stack([rows, *(sums[name] for name in names)])
        if self.args.world_size > 1:
            stacked = self.accelerator.reduce(stacked, "sum")
        total, *values = stacked.tolist()
        return {f"{prefix}_{name}": value / total for name, value in zip(names, values, strict=True)}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Schedule by steps, or by time where the time limit comes first."""
        options, clock = self.options, self.clock

        def factor(step: int) -> float:
            progress = max((step + 1) / num_training_steps, min(clock.share, 1.0))
            return rate_factor(options.schedule, options.warmup, progress)

        self.lr_scheduler = LambdaLR(cast(torch.optim.Optimizer, optimizer or self.optimizer), factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def run(self, checkpoint: Path | None) -> None:
        """Train from the start or from `checkpoint`, and leave the module with the weights of the best evaluation."""
        if checkpoint is None:
            self.train()
            return
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < self.args.max_steps and self.clock.share < 1:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self.state = state  # it was killed between its last step and the end
        self._load_best_model()

    def best(self) -> tuple[int, dict[str, float]]:
        """Step and measures of the best evaluation after a step, of equal ones the first."""
        name, sign = selected(self.options), -1 if self.args.greater_is_better else 1
        best = min(self._evaluations(name), key=lambda entry: (entry["step"] == 0, sign * entry[name]))
        return int(best["step"]), _measures(best)

    def before(self) -> dict[str, float]:
        """Measures before the first step; empty where a run of another version is continued."""
        first = self._evaluations("eval_loss")[0]
        return _measures(first) if first["step"] == 0 else {}

    def _evaluations(self, name: str) -> list[dict[str, float]]:
        return [entry for entry in self.state.log_history if name in entry]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.monotonic()
        super()._save_checkpoint(model, trial)
        self.clock.saving = max(self.clock.saving, time.monotonic() - began)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save only what is trained, each shared tensor once."""
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        parameters = dict(cast(torch.nn.Module, self.model).named_parameters())
        tensors = parameters if state_dict is None else state_dict
        trained = {name for name, value in parameters.items() if value.requires_grad}
        kept = {name: value.detach().contiguous() for name, value in tensors.items() if name in trained}
        save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / ELAPSED).write_text(json.dumps(self.clock.elapsed), encoding="utf-8")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Frozen parameters are missing from a checkpoint on purpose."""


def _measures(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("eval_")}


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells the batches which epoch begins."""

    def __init__(self, batches: LengthBatches) -> None:
        self._batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._batches.set_epoch(int(state.epoch or 0))
