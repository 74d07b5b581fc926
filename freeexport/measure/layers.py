"""Layers of a checkpoint's decoder as exits, read from one forward pass: all of them, or the traces of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.transformers_model import greedy_ids
from freeexport.measure.traces import Traces
from freeexport.training.batches import Collator
from freeexport.training.exit_modules import known_tokens, own_exit
from freeexport.training.shallow_deep import EXIT, IGNORED, ShallowDeep, exits_of
from graphs.description import Description

if TYPE_CHECKING:
    from freeexport.system.progress import Advance
    from runtime.bundle.manifest import ConfidenceMeasure

Head = Callable[[torch.Tensor], torch.Tensor]  # [N, d] -> [N, V]
_LOGIT_ROWS = 256  # tokens whose logits are in memory at a time: a vocabulary of 150,000 takes 150 MB


@dataclass(frozen=True)
class Evaluation:
    """N tokens that may exit, seen from each of L layers, of which the last is the whole model: the `prediction` int64
    [L, N] and the `confidence` float32 [L, N]. `targets` [N] are the tokens that were forced, and `sequence` int64 [N]
    the number of the sequence that each stands in."""

    prediction: np.ndarray
    confidence: np.ndarray
    targets: np.ndarray
    sequence: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.targets)

    def agrees(self, layer: int) -> np.ndarray:
        """Whether `layer` (from 1) predicts what the last layer predicts, bool [N]."""
        agreeing: np.ndarray = self.prediction[layer - 1] == self.prediction[-1]
        return agreeing

    def accuracy(self, layer: int) -> float:
        """Share of tokens that `layer` predicts as the targets have them."""
        return float((self.prediction[layer - 1] == self.targets).mean())


class LayerReader:
    """A loaded checkpoint whose layers are read through the final norm and the head; the exit layer of one whose exit
    has parameters of its own, through those."""

    def __init__(self, model: Any, checkpoint: Checkpoint, description: Description, exit_layer: int) -> None:
        self._model, self._checkpoint = model, checkpoint
        own, known = own_exit(checkpoint, description), known_tokens(checkpoint, description)
        # The loss of all layers keeps the states of all.
        module = ShallowDeep(model, description, exit_layer, "weighted-ce", own=own, known=known)
        self._module, self._exit_layer = module.eval().to(model.device), exit_layer
        normed = module.head.normed if own is None else own.norm
        self._heads: list[Head] = [module.head] * module.layers
        self._heads[exit_layer - 1] = lambda hidden: module.read_exit(normed(hidden))
        self._known: list[torch.Tensor | None] = [None] * module.layers
        self._known[exit_layer - 1] = None if known is None else known.vocabulary
        start = checkpoint.generation_config.get("decoder_start_token_id") if module.seq2seq else None
        self._collate = Collator(start)

    @torch.no_grad()
    def greedy_outputs(
        self, examples: Sequence[Example], new_tokens: int, batch_size: int, advance: Advance
    ) -> list[Example]:
        """The examples with the model's own greedy output, at most `new_tokens` ids, in place of their targets."""
        outputs = []
        for batch in _batches(examples, batch_size):
            written = greedy_ids(self._model, self._checkpoint, [example.prompt for example in batch], new_tokens)
            outputs += [replace(example, target=ids) for example, ids in zip(batch, written, strict=True)]
            advance(len(batch))
        return outputs

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], batch_size: int, advance: Advance) -> Evaluation:
        """Every layer's prediction at each token of the examples' targets that may exit. Takes the memory of all
        hidden states of a batch, not of their logits."""
        none = np.zeros(0, np.int64)
        targets, sequences, begun = [none], [none], 0
        seen: list[list[tuple[np.ndarray, np.ndarray]]] = [[(none, none.astype(np.float32))] for _ in self._heads]
        # Long examples first: where memory does not do, it shows at once.
        for batch in _batches(sorted(examples, key=lambda one: -len(one.prompt) - len(one.target)), batch_size):
            labels, hidden = self._hidden(batch)
            for number, head in enumerate(self._heads):
                for rows in hidden[self._state(number + 1)].split(_LOGIT_ROWS):
                    token, sure = exits_of(head(rows), self._known[number])
                    seen[number].append((token.cpu().numpy(), sure.cpu().numpy()))
            targets.append(labels[labels != IGNORED].numpy())
            sequences.append(begun + (labels != IGNORED).nonzero()[:, 0].numpy())
            begun += len(batch)
            advance(len(batch))
        layers = [[np.concatenate(parts) for parts in zip(*layer, strict=True)] for layer in seen]
        prediction, confidence = (np.stack(parts) for parts in zip(*layers, strict=True))
        return Evaluation(prediction, confidence, np.concatenate(targets), np.concatenate(sequences))

    @torch.no_grad()
    def traces(self, batch: Sequence[Example], max_new_tokens: int, measure: ConfidenceMeasure) -> Iterator[Traces]:
        """The traces of a batch's own greedy outputs, in its order."""
        outputs = self.greedy_outputs(batch, max_new_tokens, len(batch), lambda n=1: None)
        labels, hidden = self._hidden(outputs)
        ends = np.cumsum((labels != IGNORED).sum(dim=1).numpy())[:-1]
        parts: list[tuple[torch.Tensor, ...]] = []
        states = (hidden[self._state(self._exit_layer)], hidden[self._module.layers])
        for low, high in zip(*(one.split(_LOGIT_ROWS) for one in states), strict=True):
            shallow = self._heads[self._exit_layer - 1](low)
            deep = self._module.head(high).float().log_softmax(-1)
            token, sure = exits_of(shallow, self._known[self._exit_layer - 1], measure)
            nll = -deep.gather(1, token[:, None])[:, 0]
            parts.append((sure, token == deep.argmax(-1), nll, token))
        values = (torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True))
        for example, *one in zip(batch, *(np.split(each, ends) for each in values), strict=True):
            yield Traces.one(example.line, **dict(zip(("confidence", "agrees", "nll", "token"), one, strict=True)))

    def _hidden(self, batch: Sequence[Example]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Labels [B, m], which are IGNORED where no token may exit, and the states of the others by layer."""
        inputs = {name: value.to(self._module.device) for name, value in self._collate(batch).items()}
        labels = inputs.pop("labels")
        if not self._module.seq2seq:  # the first token comes from the prompt's pass, which always runs all layers
            first = (labels != IGNORED).int().argmax(dim=1, keepdim=True)
            labels = labels.scatter(1, first, IGNORED)
        return labels.cpu(), self._module.hidden_states(labels, **inputs)

    def _state(self, layer: int) -> int:
        return EXIT if self._module.own is not None and layer == self._exit_layer else layer


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
