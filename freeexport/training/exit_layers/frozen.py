"""`--tune exit --exit-layers N`: an exit of N layers is trained on the predictions of the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.exit_file import LossName
from freeexport.training import losses
from freeexport.training.exit_layers.module import ExitLayers
from freeexport.training.exit_layers.start import first_layers, observed
from freeexport.training.exit_layers.teacher import cached_teacher, collate_sequences
from freeexport.training.exit_only import frozen_model, head_and_layers, on_frozen
from freeexport.training.full import Trainable, collator
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import IGNORED, Metrics, SharedHead, exits_of, named_measures
from graphs.description import Description

_OTHERS = 2048  # tokens beside those in question that a step's softmax is estimated from


class FrozenExitLayers(nn.Module):
    """An exit's own layers over cached states, with the frozen head of its model."""

    accepts_loss_kwargs = True
    _keys_to_ignore_on_save: tuple[str, ...] | None = None

    def __init__(
        self, own: ExitLayers, head: SharedHead, layers: tuple[int, int], loss: LossName, alpha: float
    ) -> None:
        """`layers` are the exit layer and the last one."""
        super().__init__()
        self.exit = own
        self.head = head.requires_grad_(False)
        self.exit_layer, self.layers = layers
        self.loss_name, self.alpha = loss, alpha

    def forward(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        best: torch.Tensor,
        chances: torch.Tensor,
        deep_losses: torch.Tensor,
    ) -> Metrics:
        """What `collate_sequences` gives."""
        wanted = labels != IGNORED
        student = self.exit.norm(self.exit(states)[wanted]) * self.head.scale  # [R, d]
        # In float32: logits in bfloat16 are off by a twentieth.
        with torch.autocast(states.device.type, enabled=False):
            if self.training:
                return {"loss": self._loss(student, labels[wanted], best, chances, deep_losses)}
            return self._measures(self.head.linear(student), labels[wanted], best[:, 0], deep_losses)

    def _loss(
        self,
        student: torch.Tensor,
        labels: torch.Tensor,
        best: torch.Tensor,
        chances: torch.Tensor,
        deep_losses: torch.Tensor,
    ) -> torch.Tensor:
        found, places = self._log_chances(student, torch.cat([labels[:, None], best], dim=1))
        found = found.gather(1, places)  # [R, 1 + 32]
        # The deep one is a constant, so that losses compare with other modes.
        loss = losses.by_depth({self.exit_layer: -found[:, 0].sum(), self.layers: deep_losses.sum()})
        if self.loss_name == "logit-kd":
            loss = loss + self.alpha * losses.best_distillation(chances, found[:, 1:])
        return loss

    def _log_chances(self, student: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of probabilities [R, n] of n tokens, and where those of `tokens` [R, m] stand among them.

        The head's product with a large vocabulary is most of a step. All tokens that some row needs are taken, and
        of the others a sample, which stands for all of them.
        """
        weight = cast(torch.Tensor, self.head.linear.weight)
        size = len(weight)
        needed = tokens.unique()
        if len(needed) + _OTHERS >= size:
            return (student @ weight.T).log_softmax(-1), tokens
        place = torch.full((size,), -1, device=tokens.device)
        place[needed] = torch.arange(len(needed), device=tokens.device)
        others = torch.randint(size, (_OTHERS,), device=tokens.device)
        others = others[place[others] < 0]
        logits = student @ weight[torch.cat([needed, others])].T
        more = torch.zeros(logits.shape[1], device=logits.device)
        more[len(needed) :] = torch.log(torch.tensor((size - len(needed)) / max(1, len(others))))
        return (logits + more).log_softmax(-1), place[tokens]

    def _measures(
        self, logits: torch.Tensor, labels: torch.Tensor, deep: torch.Tensor, deep_losses: torch.Tensor
    ) -> Metrics:
        shallow_loss, deep_loss = losses.cross_entropy(logits, labels), deep_losses.sum()
        return named_measures({self.exit_layer: shallow_loss, self.layers: deep_loss}, labels, exits_of(logits), deep)


def tune_exit_layers(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    cache: Path,
) -> Trainable:
    """The model is run once over the data; `cache` takes 2 d bytes a token and 192 more a trained one. Raises
    OptionError for an adapter.

    Of several processes, the first must be through before the others call this: they find the cache filled.
    """
    model, collate = frozen_model(checkpoint, options), collator(checkpoint, options)
    whole = observed(model, description, options)
    if torch.cuda.is_available():
        whole.to("cuda")
    own = first_layers(checkpoint, description, options, whole, training, cache)
    teachers = [
        cached_teacher(cache, name, whole, examples, collate, options.bf16)
        for name, examples in (("training", training), ("validation", validation))
    ]
    whole.to("cpu")
    torch.manual_seed(options.seed)
    module = FrozenExitLayers(own, *head_and_layers(whole, description), options.loss, options.loss_alpha)
    return on_frozen(checkpoint, module, teachers, collate_sequences, exit_layers=options.exit_layers)
