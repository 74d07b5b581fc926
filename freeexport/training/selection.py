"""Which evaluation of a run is the best: by a measure of it, or by a metric of what the model writes then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.tokenizer_files import load_tokenizer
from freeexport.checkpoints.transformers_model import greedy_ids
from freeexport.metrics import Reference, metric_of
from freeexport.training.options import MEASURED, TrainingOptions

_BATCH = 16  # examples
_LONGER = 2  # outputs may be so many times as long as the longest target


class WrittenOutputs:
    """The metric of a model's greedy outputs for the first validation examples, in [0, 1], 1 is best."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, validation: Sequence[Example], options: TrainingOptions
    ) -> None:
        """Raises OptionError for a metric that is none, and MetricError for one that does not fit the targets."""
        self.name = options.select_by
        self._model, self._checkpoint = model, checkpoint
        self._examples = sorted(validation[: options.select_samples], key=lambda example: len(example.prompt))
        self._tokenizer = load_tokenizer(checkpoint)
        self._metric = metric_of(options.select_by)
        targets = [self._text(example.target) for example in self._examples]
        self._references = [Reference((text,)) for text in targets]
        self._metric.table(targets, self._references)  # does it fit?

    def __call__(self) -> float:
        """With the weights of now."""
        outputs = list[str]()
        for start in range(0, len(self._examples), _BATCH):
            batch = self._examples[start : start + _BATCH]
            most = _LONGER * max(len(example.target) for example in batch)
            written = greedy_ids(self._model, self._checkpoint, [example.prompt for example in batch], most)
            outputs += map(self._text, written)
        return self._metric.of(self._metric.table(outputs, self._references))

    def _text(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def written_outputs(
    module: Any, checkpoint: Checkpoint, validation: Sequence[Example], options: TrainingOptions
) -> WrittenOutputs | None:
    """What `--select-by` needs; None where a measure that every evaluation has is enough."""
    return None if options.select_by in MEASURED else WrittenOutputs(module.model, checkpoint, validation, options)
