"""What a run trains, by `--tune`: the module that is stepped, its batches, and how the result is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.tokenizer_files import write_tokenizer
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.training.batches import Collator
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import ShallowDeep
from graphs.description import Description

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from freeexport.training.exit_layers.module import ExitLayers

    # What makes the exit's layers for a model.
    Own = Callable[[PreTrainedModel], ExitLayers]

from runtime.errors import OptionError

# What a checkpoint directory holds of its tokenizer, beside the weights and the configuration.
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "generation_config.json",
)


class Dataset(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass
class Trainable:
    """`module` is stepped on batches that `collate` makes of `training`; `lengths` in tokens run parallel to the
    two sets. `write` puts the trained weights into an empty directory."""

    module: torch.nn.Module
    training: Dataset
    validation: Dataset
    lengths: tuple[list[int], list[int]]
    collate: Callable[[Any], dict[str, torch.Tensor]]
    write: Callable[[Path], None]
    exit_norm: bool = False
    adapter_rank: int = 0
    exit_layers: int = 0


def tune_full(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    own: Own | None = None,
) -> Trainable:
    """Every weight of the model is trained. Takes 16 bytes of memory a parameter, and what the batch needs. `own` makes
    the exit's layers."""
    model = trainable_model(checkpoint, options)
    module = _with_exit(model, description, options, None if own is None else own(model))

    def write(directory: Path) -> None:
        model.to(getattr(torch, options.dtype)).save_pretrained(directory)
        copy_tokenizer(checkpoint, directory)

    return on_examples(module, checkpoint, options, training, validation, write)


def _with_exit(
    model: PreTrainedModel, description: Description, options: TrainingOptions, own: ExitLayers | None
) -> ShallowDeep:
    at, alpha = options.exit_layer, options.loss_alpha
    return ShallowDeep(model, description, at, options.loss, alpha, own=own, smoothing=options.label_smoothing)


def on_examples(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    write: Callable[[Path], None],
) -> Trainable:
    """A tuning that runs the whole model on text."""
    return Trainable(
        module=module,
        training=training,
        validation=validation,
        lengths=(token_counts(training), token_counts(validation)),
        collate=collator(checkpoint, options),
        write=write,
    )


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


def collator(checkpoint: Checkpoint, options: TrainingOptions) -> Collator:
    return Collator(checkpoint.generation_config.get("decoder_start_token_id"), options.train_on_input)


def token_counts(examples: Sequence[Example]) -> list[int]:
    return [len(example.prompt) + len(example.target) for example in examples]


def copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    """The tokenizer and generation settings of the base, byte for byte where it has them as files."""
    if checkpoint.path.is_file():
        write_tokenizer(checkpoint, directory)
        return
    for pattern in _TOKENIZER_FILES:
        for path in checkpoint.path.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for the file's bytes where the file system can, else a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def tune_lora(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    model_name: str,
    own: Own | None = None,
) -> Trainable:
    """The adapter is written with `model_name` as its base: a hub name as it is, a path as an absolute one.

    `own` makes the exit's layers of the model without the adapter. Raises OptionError where no layer has the name of a
    target.
    """
    from peft import LoraConfig, get_peft_model

    if checkpoint.adapter is not None:
        raise OptionError(f"{model_name} is a LoRA adapter itself; merge it first, or train on its base")
    model = trainable_model(checkpoint, options)
    exit_layers = None if own is None else own(model)
    lora = options.lora
    targets: Any = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    path = Path(model_name)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=lora.dropout,
        base_model_name_or_path=str(path.resolve()) if path.exists() else model_name,
        task_type="SEQ_2_SEQ_LM" if description.encoder is not None else "CAUSAL_LM",
    )
    torch.manual_seed(options.seed)  # of the adapters' random half
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise OptionError(f"--lora-target {', '.join(lora.targets)} fits no linear layer ({error})") from None
    config.base_model_name_or_path = str(path.resolve()) if path.exists() else model_name
    # A frozen embedding would cut gradient checkpointing off from everything below.
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
    module = _with_exit(model, description, options, exit_layers)

    def write(directory: Path) -> None:
        adapted.save_pretrained(str(directory))
        (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card

    return on_examples(module, checkpoint, options, training, validation, write)
