"""`--tune full` and `lora`: the module that is stepped, its batches, and how it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.tokenizer_files import write_tokenizer
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.training.batches import Collator
from freeexport.training.exit_modules import Exit, ExitLayers, KnownTokens, known_tokens, write_exit
from freeexport.training.exit_start import begin_other, exit_states, first_exit
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import ShallowDeep
from graphs.description import Description
from runtime.errors import OptionError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The tokenizer's files in a checkpoint directory, and its generation settings.
_TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template.*", "generation_config.json"),
)


class Dataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass
class Trainable:
    """`module` is stepped on batches that `collate` makes of `training`; `lengths` in tokens run parallel to the
    two sets. `write` puts the trained weights into an empty directory; `own` is the exit, where it has parameters."""

    module: torch.nn.Module
    training: Dataset
    validation: Dataset
    lengths: tuple[list[int], list[int]]
    collate: Callable[[Any], dict[str, torch.Tensor]]
    write: Callable[[Path], None]
    own: Exit | None = None

    @property
    def exit_layers(self) -> int:
        """Transformer layers of the exit's own."""
        return len(self.own.layers) if isinstance(self.own, ExitLayers) else 0


def tune_model(
    model_name: str,
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    tokens: np.ndarray | None,
) -> Trainable:
    """Train every weight (16 bytes of memory a parameter, and what the batch needs), or a LoRA adapter, which is
    written with `model_name` as its base; together with the exit's own layers where there are to be some. `tokens`: the
    exit's vocabulary, None for all."""
    lora = options.tune == "lora"
    if lora and checkpoint.adapter is not None:
        raise OptionError(f"{model_name} is a LoRA adapter itself; merge it first, or train on its base")
    model, collate = trainable_model(checkpoint, options), collator(checkpoint)
    own = first_exit(model, checkpoint, description, options, training, collate) if options.exit_layers else None
    known, begun = first_known(checkpoint, description, tokens)
    adapted = _adapted(model, model_name, description, options) if lora else None
    module = ShallowDeep(model, description, options.exit_layer, options.loss, options.loss_alpha, own=own, known=known)
    if known is not None and not begun:
        begin_other(known, module.head, exit_states(module.eval(), training, collate, options.bf16))
        module.train()

    def write(directory: Path) -> None:
        if adapted is None:
            model.to(getattr(torch, options.dtype)).save_pretrained(directory)
            copy_tokenizer(checkpoint, directory)
        else:
            adapted.save_pretrained(str(directory))
            (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card
        write_exit(own, known, directory)

    lengths = token_counts(training), token_counts(validation)
    return Trainable(module, training, validation, lengths, collate, write, own)


def first_known(
    checkpoint: Checkpoint, description: Description, tokens: np.ndarray | None
) -> tuple[KnownTokens | None, bool]:
    """The exit vocabulary of `tokens`, and whether the checkpoint has trained it already."""
    trained = known_tokens(checkpoint, description)
    if trained is not None or tokens is None:
        return trained, trained is not None
    return KnownTokens(tokens, description.hidden_size), False


def _adapted(model: PreTrainedModel, model_name: str, description: Description, options: TrainingOptions) -> PeftModel:
    """The model with LoRA on every linear layer but the head. A hub name is its base as it is, a path absolute."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules="all-linear",
        lora_dropout=options.lora_dropout,
        task_type="SEQ_2_SEQ_LM" if description.encoder is not None else "CAUSAL_LM",
    )
    torch.manual_seed(options.seed)  # of the adapters' random half
    adapted: PeftModel = get_peft_model(model, config)
    path = Path(model_name)
    config.base_model_name_or_path = str(path.resolve()) if path.exists() else model_name
    # A frozen embedding would cut gradient checkpointing off from everything below.
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
    return adapted


def trainable_model(checkpoint: Checkpoint, options: TrainingOptions) -> PreTrainedModel:
    """The checkpoint's model in float32 and training mode, with the dropout asked for."""
    model = reference_model(checkpoint).train()
    _fuse_gelu(model)
    if not torch.cuda.is_available():
        # The backward pass of torch's fused attention is four times as slow on a CPU, for sentences.
        model.set_attn_implementation("eager")
    if options.gradient_checkpointing:
        # Here rather than by Trainer: the model is not what it steps.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = options.dropout
            for name in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, options.dropout)
    return model


def _fuse_gelu(model: torch.nn.Module) -> None:
    """T5's gelu is written in six elementwise operations, a fifth of a step of a small model on a CPU."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def collator(checkpoint: Checkpoint) -> Collator:
    return Collator(checkpoint.generation_config.get("decoder_start_token_id"))


def token_counts(examples: Sequence[Example]) -> list[int]:
    return [len(example.prompt) + len(example.target) for example in examples]


def copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy the tokenizer and generation settings of the base, byte for byte where it has them as files."""
    if checkpoint.path.is_file():
        write_tokenizer(checkpoint, directory)
        return
    for pattern in _TOKENIZER_FILES:
        for path in checkpoint.path.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Give the file's bytes a second name where the file system can, else copy them."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
