"""Every layer of a decoder as an exit: its prediction and confidence at each token, from one forward pass a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.transformers_model import greedy_ids
from freeexport.traces.share import Share, share
from freeexport.training.batches import Collator
from freeexport.training.exit_layers.module import own_exit
from freeexport.training.shallow_deep import EXIT, IGNORED, ShallowDeep, SharedHead
from graphs.description import Description
from graphs.exit_head import ADAPTER_DOWN, ADAPTER_NORM, ADAPTER_UP, EXIT_NORM

if TYPE_CHECKING:
    from freeexport.system.progress import Advance

Forcing = Literal["output", "targets"]
Head = Callable[[torch.Tensor], torch.Tensor]  # [N, d] -> [N, V]
_LOGIT_ROWS = 256  # tokens whose logits are in memory at a time: a vocabulary of 150,000 takes 150 MB


@dataclass(frozen=True)
class Exits:
    """Tokens [N] seen from one layer: `prediction` int64, `confidence` float32 (probability of the best token minus
    that of the second best)."""

    prediction: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """`layers[i]` is layer i + 1; the last is the whole model. `targets` [N] are the tokens that were forced, and
    `sequences` int64 [N] the number of the sequence that each stands in; None where all are of one."""

    layers: tuple[Exits, ...]
    targets: np.ndarray
    sequences: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        return len(self.targets)

    def share(self, hits: np.ndarray, among: np.ndarray | None = None) -> Share | None:
        """The share of `hits`, bool [N], among all tokens or those `among`, bool [N]; None where there are none."""
        of = np.zeros(self.tokens, np.int64) if self.sequences is None else self.sequences
        counted = np.ones(self.tokens, np.bool_) if among is None else among
        return share(np.bincount(of, hits & counted), np.bincount(of, counted))

    def agrees(self, layer: int) -> np.ndarray:
        """Whether `layer` (from 1) predicts what the last layer predicts, bool [N]."""
        agreeing: np.ndarray = self.layers[layer - 1].prediction == self.layers[-1].prediction
        return agreeing

    def accuracy(self, layer: int) -> float:
        """Share of tokens that `layer` predicts as the targets have them."""
        return float((self.layers[layer - 1].prediction == self.targets).mean())


@torch.no_grad()
def greedy_outputs(
    model: Any, checkpoint: Checkpoint, examples: Sequence[Example], new_tokens: int, batch_size: int, advance: Advance
) -> list[Example]:
    """The examples with the model's own greedy output, at most `new_tokens` ids, in place of their targets."""
    outputs = []
    for batch in _batches(examples, batch_size):
        written = greedy_ids(model, checkpoint, [example.prompt for example in batch], new_tokens)
        outputs += [replace(example, target=ids) for example, ids in zip(batch, written, strict=True)]
        advance(len(batch))
    return outputs


@torch.no_grad()
def evaluate(
    model: Any,
    checkpoint: Checkpoint,
    description: Description,
    examples: Sequence[Example],
    batch_size: int,
    advance: Advance,
) -> Evaluation:
    """Every layer's prediction at each token of the examples' targets, a decoder-only model's first left out:
    it comes from the prefill, which always runs all layers.

    A layer is read through the final norm and the head; the exit layer of a checkpoint whose exit has parameters of
    its own, through those. Takes the memory of all hidden states of a batch, not of their logits.
    """
    own, exit_layer = own_exit(checkpoint, description), 1 if checkpoint.exit is None else checkpoint.exit.exit_layer
    module = ShallowDeep(model, description, exit_layer, "weighted-ce", own=own).eval().to(model.device)
    heads: list[Head] = [module.head] * module.layers
    if own is not None:
        heads[exit_layer - 1] = lambda hidden: module.head.read(own.norm(hidden))
    elif checkpoint.exit is not None and checkpoint.exit.has_parameters:
        heads[checkpoint.exit.exit_layer - 1] = own_head(checkpoint, description, module.head)
    collate = Collator(checkpoint.generation_config.get("decoder_start_token_id") if module.seq2seq else None)
    targets: list[np.ndarray] = []
    sequences: list[np.ndarray] = []
    seen: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in heads]
    begun = 0
    # Long examples first: where memory does not do, it shows at once.
    for batch in _batches(sorted(examples, key=lambda one: -len(one.prompt) - len(one.target)), batch_size):
        inputs = {name: value.to(module.device) for name, value in collate(batch).items()}
        labels = inputs.pop("labels")
        if not module.seq2seq:
            labels = without_first(labels)
        hidden = module.hidden_states(labels, **inputs)
        for number, head in enumerate(heads):
            layer = EXIT if own is not None and number + 1 == exit_layer else number + 1
            seen[number] += list(_read(head, hidden[layer]))
        labels = labels.cpu()
        targets.append(labels[labels != IGNORED].numpy())
        sequences.append(begun + (labels != IGNORED).nonzero()[:, 0].numpy())
        begun += len(batch)
        advance(len(batch))
    layers = tuple(Exits(*(np.concatenate(parts) for parts in zip(*layer, strict=True))) for layer in seen if layer)
    if not targets:
        return Evaluation(layers, np.zeros(0, np.int64))
    return Evaluation(layers, np.concatenate(targets), np.concatenate(sequences))


def without_first(labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, m] with the first that is not -100 of each row made -100."""
    first = (labels != IGNORED).int().argmax(dim=1, keepdim=True)
    return labels.scatter(1, first, IGNORED)


def _read(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for rows in hidden.split(_LOGIT_ROWS):
        if len(rows):
            logits = head(rows).float()
            best = logits.topk(2, dim=-1)
            chances = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
            yield best.indices[:, 0].cpu().numpy(), (chances[:, 0] - chances[:, 1]).cpu().numpy()


def own_head(checkpoint: Checkpoint, description: Description, shared: SharedHead) -> Head:
    """The head of an exit with parameters of its own: [N, d] -> [N, V]."""
    epsilon = description.decoder.head.norm.epsilon
    device = next(shared.linear.parameters()).device
    own = {
        name: torch.from_numpy(checkpoint.read(name)).to(device)
        for name in (EXIT_NORM, ADAPTER_NORM, ADAPTER_DOWN, ADAPTER_UP)
        if name in checkpoint
    }

    def norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon) * weight

    def read(hidden: torch.Tensor) -> torch.Tensor:
        if ADAPTER_UP in own:
            inner = torch.nn.functional.silu(norm(hidden, own[ADAPTER_NORM]) @ own[ADAPTER_DOWN].T)
            hidden = hidden + inner @ own[ADAPTER_UP].T
        return shared.read(norm(hidden, own[EXIT_NORM]) if EXIT_NORM in own else shared.norm(hidden))

    return read


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
