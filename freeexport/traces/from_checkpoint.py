"""Traces from a checkpoint, before it is converted: transformers decodes, and both exits are read from one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from freeexport.traces.every_layer import Head, greedy_outputs, own_head, without_first
from freeexport.traces.trace import Trace
from freeexport.training.batches import Collator
from freeexport.training.exit_layers.module import own_exit
from freeexport.training.shallow_deep import EXIT, IGNORED, ShallowDeep

if TYPE_CHECKING:
    from freeexport.checkpoints.checkpoint import Checkpoint
    from freeexport.checkpoints.examples import Example
    from graphs.description import Description
    from runtime.bundle.manifest import ConfidenceMeasure

_LOGIT_ROWS = 256  # tokens whose logits are in memory at a time


class CheckpointTracer:
    """A checkpoint that exits after `exit_layer`, ready to decode."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, description: Description, exit_layer: int, measure: ConfidenceMeasure
    ) -> None:
        self._model, self._checkpoint, self._measure = model, checkpoint, measure
        own = own_exit(checkpoint, description)
        self._module = ShallowDeep(model, description, exit_layer, "ce", own=own).eval().to(model.device)
        self._layers, self._exit_layer = self._module.layers, exit_layer
        self._exit_head: Head = self._module.head
        if own is not None:
            self._exit_head = lambda hidden: self._module.head.read(own.norm(hidden))
        elif checkpoint.exit is not None and checkpoint.exit.has_parameters:
            self._exit_head = own_head(checkpoint, description, self._module.head)
        start = checkpoint.generation_config.get("decoder_start_token_id") if self._module.seq2seq else None
        self._collate = Collator(start)

    @torch.no_grad()
    def traces(self, examples: Sequence[Example], max_new_tokens: int) -> Iterator[Trace]:
        """Traces of one batch, in its order, without the first tokens of a decoder-only model, which reading the prompt
        predicts."""
        outputs = greedy_outputs(
            self._model, self._checkpoint, examples, max_new_tokens, len(examples), lambda n=1: None
        )
        inputs = {name: value.to(self._module.device) for name, value in self._collate(outputs).items()}
        labels = inputs.pop("labels")
        if not self._module.seq2seq:
            labels = without_first(labels)
        hidden = self._module.hidden_states(labels, **inputs)
        ends = np.cumsum((labels != IGNORED).sum(dim=1).cpu().numpy())[:-1]
        exit_layer = self._exit_layer if self._module.own is None else EXIT
        read = self._read(hidden[exit_layer], hidden[self._layers])
        for example, *parts in zip(examples, *(np.split(values, ends) for values in read), strict=True):
            yield Trace(example.line, *parts)

    def _read(self, shallow: torch.Tensor, deep: torch.Tensor) -> list[np.ndarray]:
        """Of rows [N, d], what a trace has."""
        parts: list[tuple[torch.Tensor, ...]] = []
        for low, high in zip(shallow.split(_LOGIT_ROWS), deep.split(_LOGIT_ROWS), strict=True):
            shallow = self._exit_head(low).float().log_softmax(-1)
            deep = self._module.head(high).float().log_softmax(-1)
            token = shallow.argmax(-1)
            nll = -deep.gather(1, token[:, None])[:, 0]
            parts.append((confidence_of(shallow, self._measure), token == deep.argmax(-1), nll, token.int()))
        return [torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True)]


def confidence_of(log_probabilities: torch.Tensor, measure: ConfidenceMeasure) -> torch.Tensor:
    """Of rows [N, V]: [N] in [0, 1], higher is more confident; as the engines compute it (graphs/head.py)."""
    if measure == "entropy":
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        return (1 - entropy / np.log(log_probabilities.shape[-1])).clamp(0, 1)
    best = log_probabilities.topk(2, dim=-1).values.exp()
    return (best[:, 0] if measure == "max-prob" else best[:, 0] - best[:, 1]).clamp(0, 1)
