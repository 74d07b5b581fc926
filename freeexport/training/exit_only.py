"""`--tune exit`: only the exit's own norm and adapter are trained, on cached states of the frozen model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.exit_file import EXIT_WEIGHTS, LossName
from freeexport.training import losses
from freeexport.training.exit_adapter import Exit, begin_linear
from freeexport.training.full import Trainable, collator, copy_tokenizer, link_or_copy, trainable_model
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import Metrics, ShallowDeep, SharedHead, measures
from freeexport.training.teacher_states import cached_states, collate_states
from graphs.description import Description
from runtime.errors import OptionError


class FrozenExit(nn.Module):
    """An exit over cached hidden states, with the frozen norm and head of its model."""

    accepts_loss_kwargs = True
    _keys_to_ignore_on_save: tuple[str, ...] | None = None

    def __init__(self, own: Exit, head: SharedHead, layers: tuple[int, int], loss: LossName, alpha: float) -> None:
        """`layers` are the exit layer and the last one."""
        super().__init__()
        self.exit = own
        self.head = head.requires_grad_(False).eval()
        self.exit_layer, self.layers = layers
        self.loss_name, self.alpha = loss, alpha

    def train(self, mode: bool = True) -> FrozenExit:
        super().train(mode)
        self.head.eval()  # no dropout between the exit and its teacher
        return self

    def forward(self, shallow: torch.Tensor, deep: torch.Tensor, labels: torch.Tensor) -> Metrics:
        """Hidden states [N, d] after the exit layer and the last one, labels [N]."""
        shallow_logits = self.head.read(self.exit.norm(self.exit.adapted(shallow)))
        with torch.no_grad():
            deep_logits = self.head(deep)
        if not self.training:
            return measures(shallow_logits, deep_logits, labels, self.exit_layer, self.layers)
        exits = {
            self.exit_layer: losses.cross_entropy(shallow_logits, labels),
            # A constant, so that losses compare with other modes.
            self.layers: losses.cross_entropy(deep_logits, labels),
        }
        loss = losses.by_depth(exits)
        if self.loss_name == "logit-kd":
            loss = loss + self.alpha * losses.logit_distillation(deep_logits, shallow_logits)
        return {"loss": loss}


def tune_exit(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    cache: Path,
) -> Trainable:
    """The model is run once over the data; `cache` takes 4 d bytes a trained token. Raises OptionError for an adapter.

    Of several processes, the first must be through before the others call this: they find the cache filled.
    """
    whole = ShallowDeep(frozen_model(checkpoint, options), description, options.exit_layer, "ce")
    if torch.cuda.is_available():
        whole.to("cuda")
    collate = collator(checkpoint, options)
    states = [
        cached_states(cache, name, whole, examples, collate, options.bf16)
        for name, examples in (("training", training), ("validation", validation))
    ]
    whole.to("cpu")
    torch.manual_seed(options.seed)
    norm = description.decoder.head.norm
    weight = cast(torch.Tensor, whole.head.norm.weight)
    own = Exit(weight, norm.epsilon, options.adapter_rank)
    if own.adapter is not None:
        begin_linear(own.adapter, states[0], weight.detach().float().numpy())
    module = FrozenExit(own, *head_and_layers(whole, description), options.loss, options.loss_alpha)
    return on_frozen(checkpoint, module, states, collate_states, adapter_rank=options.adapter_rank)


def head_and_layers(whole: ShallowDeep, description: Description) -> tuple[SharedHead, tuple[int, int]]:
    """The norm and the head alone, so that the layers' memory goes back; and the numbers of exit and last layer."""
    head = SharedHead(whole.head.norm, whole.head.linear, description.decoder.head.scale)
    return head, (whole.exit_layer, whole.layers)


def on_frozen(
    checkpoint: Checkpoint, module: Any, states: Sequence[Any], collate: Callable[..., Any], **exit_sizes: int
) -> Trainable:
    """What trains `module.exit` alone, on cached states for training and for validation."""

    def write(directory: Path) -> None:
        write_exit(module.exit, directory)
        link_base(checkpoint, directory)

    training, validation = states
    lengths = training.lengths, validation.lengths
    return Trainable(module, training, validation, lengths, collate, write, exit_norm=True, **exit_sizes)


def frozen_model(checkpoint: Checkpoint, options: TrainingOptions) -> PreTrainedModel:
    """The checkpoint's model, of which nothing is trained. Raises OptionError for an adapter."""
    if checkpoint.adapter is not None:
        raise OptionError(
            f"{checkpoint.name} is a LoRA adapter; --tune exit needs its weights merged into a checkpoint"
        )
    return trainable_model(checkpoint, options).requires_grad_(False)


def write_exit(own: nn.Module, directory: Path) -> None:
    """The parameters of an exit, as exit.safetensors."""
    tensors = {f"exit.{name}": value.detach().float().cpu().contiguous() for name, value in own.state_dict().items()}
    save_file(tensors, directory / EXIT_WEIGHTS)


def link_base(checkpoint: Checkpoint, directory: Path) -> None:
    """The base's weights, configuration and tokenizer, unchanged."""
    for path in sorted({file.path for file in checkpoint.files if file.path.name != EXIT_WEIGHTS}):
        link_or_copy(path, directory / path.name)
    if checkpoint.path.is_file():
        return
    for index in checkpoint.path.glob("*.index.json"):
        link_or_copy(index, directory / index.name)
    link_or_copy(checkpoint.path / "config.json", directory / "config.json")
    copy_tokenizer(checkpoint, directory)
