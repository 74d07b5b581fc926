"""Ways to tune a model: the trained module, its batches, and how results are written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.exit_file import EXIT_WEIGHTS
from freeexport.checkpoints.lora_adapter import ADAPTER_CONFIG, MergedWeights, read_adapter
from freeexport.checkpoints.special_tokens import speech_of
from freeexport.checkpoints.tokenizer_files import write_tokenizer
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.system.output import link_or_copy
from freeexport.training.batches import Collator, token_counts
from freeexport.training.exit_modules import ExitLayers, KnownTokens, trained_exit, write_exit
from freeexport.training.exit_start import begin_other, first_exit, observed
from freeexport.training.frozen import FrozenExit, cached_teacher, collate_teacher
from freeexport.training.shallow_deep import ENCODER, ShallowDeep
from freeexport.training.training_options import TrainingOptions
from graphs.description import Description
from graphs.exit_head import fused_layers
from graphs.layers import SUPPRESSED
from runtime.errors import OptionError, one_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Files of the tokenizer and the generation settings in a checkpoint directory.
_TOKENIZER_FILES = (
    *(
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.model",
    ),
    *("chat_template.*", "generation_config.json", "preprocessor_config.json"),
)


@dataclass
class Trainable:
    """A module with its data.

    Attributes:
        lengths: Lengths of both, in tokens.
        collate: Makes a batch of examples.
        write: Writes the trained weights to an empty directory.
        own: The exit, if it has layers of its own.
    """

    module: torch.nn.Module
    training: Any
    validation: Any
    lengths: tuple[list[int], list[int]]
    collate: Callable[[Any], dict[str, torch.Tensor]]
    write: Callable[[Path], None]
    own: ExitLayers | None = None


def trainable(
    model_name: str,
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    tokens: np.ndarray | None,
    cache: Path,
) -> Trainable:
    """Prepare a training of the kind `options.tune`.

    Kinds:
        full: Train all weights and the exit's own layers. Needs 16 bytes of memory per parameter,
            plus the batch.
        lora: Train a LoRA adapter and the exit's own layers. The adapter is written with
            `model_name` as its base. If the model is itself an adapter, its training continues.
        exit: Train an exit on a frozen model, possibly with an adapter. The model runs over the
            data once, and its outputs are cached. A cache record takes 2 d + 210 bytes (4 d + 214
            with features, 8 d + 214 with fused ones) for every position, plus 2 d + 4 bytes for
            every encoder position.

    In distributed runs, call on rank 0 first. It fills the cache.
    """
    # With "lora", training of an adapter continues on its base, unmerged. Otherwise the two are
    # merged.
    goes_on = checkpoint.adapter if options.tune == "lora" else None
    base = checkpoint if goes_on is None else replace(checkpoint, adapter=None)
    model = trainable_model(base, options)
    frozen = options.tune == "exit"
    if (speech := speech_of(checkpoint, description)) is not None:
        _suppress(model, [*speech.suppressed, speech.no_speech, speech.no_timestamps])
    collate = Collator(checkpoint.generation_config.get("decoder_start_token_id"))
    if frozen:
        model.requires_grad_(False)
    if frozen and torch.cuda.is_available():
        torch.nn.Module.cuda(model)
    own, known = trained_exit(checkpoint, description)
    if own is None and options.exit_head_layers:
        own = first_exit(
            model, checkpoint, description, options=options, examples=training, collate=collate
        )
    elif own is not None and (own.reads, options.exit_input) == ("feature", "fused"):
        own.fuse()
    begins = known is None or (
        tokens is not None and not np.array_equal(known.vocabulary.cpu(), tokens)
    )
    if begins and tokens is not None:
        known = KnownTokens(tokens, description.hidden_size)
    for part in filter(None, (own, known)):
        part.to(model.device).train()
    adapted = None
    if options.tune == "lora":
        adapted = _adapted(model, model_name, goes_on, description=description, options=options)
    module = ShallowDeep(
        model,
        description,
        options.exit_layer,
        loss=options.loss,
        alpha=options.alpha,
        own=own,
        known=known,
    )
    if known is not None and begins:
        states = observed(module, training, collate, options.bf16)
        begin_other(known, module.head, (module.exit_normed(hidden) for hidden in states))

    def write(directory: Path) -> None:
        if saved is None:
            link_base(checkpoint, directory)
        elif adapted is not None:
            saved.save_pretrained(str(directory))
            (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card
        else:
            saved.to(getattr(torch, options.dtype)).save_pretrained(directory)
            _copy_tokenizer(checkpoint, directory)
        write_exit(own, known, directory)

    saved: Any = None if frozen else adapted or model
    if not frozen:
        lengths = token_counts(training), token_counts(validation)
        return Trainable(
            module, training, validation, lengths=lengths, collate=collate, write=write, own=own
        )
    layers = len(description.decoder.layers)
    also = fused_layers(options.exit_input, options.exit_layer, layers)
    if description.encoder is not None:
        also = (*also, ENCODER)
    whole = ShallowDeep(model, description, options.exit_layer, "ce", also=also)
    first, second = (
        cached_teacher(
            cache / f"{name}.npy", whole, examples, collate=collate, options=options, known=known
        )
        for name, examples in (("training", training), ("validation", validation))
    )
    torch.manual_seed(options.seed)
    lengths = [one.positions for one in first], [one.positions for one in second]
    return Trainable(
        FrozenExit(module).cpu(),
        first,
        second,
        lengths=lengths,
        collate=collate_teacher,
        write=write,
        own=own,
    )


def _suppress(model: PreTrainedModel, tokens: list[int]) -> None:
    """Make tokens that are never emitted improbable, as decoding does."""

    def suppressed(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill_(-1, torch.tensor(tokens, device=logits.device), SUPPRESSED)

    model.get_output_embeddings().register_forward_hook(suppressed)


def _adapted(
    model: PreTrainedModel,
    model_name: str,
    goes_on: Path | None,
    description: Description,
    options: TrainingOptions,
) -> PeftModel:
    """Add LoRA to every linear layer except the head, or load the adapter to continue.

    A loaded adapter keeps its rank. A base given as a path is recorded as an absolute path, a hub
    name unchanged.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    # With gradient checkpointing, a frozen embedding would block all gradients.
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
    if goes_on is not None:
        further: PeftModel = PeftModel.from_pretrained(model, str(goes_on), is_trainable=True)
        further.peft_config["default"].base_model_name_or_path = resolved(read_adapter(goes_on)[1])
        return further
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules="all-linear",
        # FREE's authors use a dropout of 0.1.
        lora_dropout=0.1 if options.dropout is None else options.dropout,
        task_type="SEQ_2_SEQ_LM" if description.encoder is not None else "CAUSAL_LM",
    )
    torch.manual_seed(options.seed)  # initialises the random half of the adapter
    try:
        adapted: PeftModel = get_peft_model(model, config)
    except ValueError as error:  # peft finds nothing to adapt
        raise OptionError(
            f"{model_name} has no linear layers that LoRA could adapt ({one_line(error)}); "
            "train all weights with --tune full"
        ) from None
    config.base_model_name_or_path = resolved(model_name)
    return adapted


def resolved(base: str) -> str:
    return str(Path(base).resolve()) if Path(base).exists() else base


def trainable_model(checkpoint: Checkpoint, options: TrainingOptions) -> PreTrainedModel:
    """Load the checkpoint's model in float32 and training mode, with the requested dropout."""
    model = reference_model(checkpoint).train()
    # T5's gelu consists of six elementwise operations, which take a fifth of a step of a small
    # model on a CPU.
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    if not torch.cuda.is_available():
        # On a CPU, the backward pass of torch's fused attention takes four times as long on short
        # sequences.
        model.set_attn_implementation("eager")
    if options.gradient_checkpointing:
        # Not left to Trainer, whose module is not the model itself.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = options.dropout
            for name in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, options.dropout)
    return model


def _copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy the base's tokenizer and generation settings, unchanged if they are files."""
    if checkpoint.path.is_file():
        write_tokenizer(checkpoint, directory)
        return
    for pattern in _TOKENIZER_FILES:
        for path in checkpoint.path.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def link_base(checkpoint: Checkpoint, directory: Path) -> None:
    """Link the base's weights, configuration and tokenizer into `directory`, unchanged.

    For a LoRA adapter, link the adapter's own files.
    """
    if checkpoint.adapter is not None:
        config, base = read_adapter(checkpoint.adapter)
        config = {**config, "base_model_name_or_path": resolved(base)}
        (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        path = next(file.path for file in checkpoint.files if isinstance(file, MergedWeights))
        link_or_copy(path, directory / path.name)
        return
    paths = {file.path for file in checkpoint.files if file.path.name != EXIT_WEIGHTS}
    if not checkpoint.path.is_file():
        paths |= {checkpoint.path / "config.json", *checkpoint.path.glob("*.index.json")}
        _copy_tokenizer(checkpoint, directory)
    for path in paths:
        link_or_copy(path, directory / path.name)
