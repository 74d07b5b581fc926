"""Ways of tuning: the module that is stepped, its batches, and how it is written."""

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
from freeexport.checkpoints.examples import Example, speech_of
from freeexport.checkpoints.exit_file import EXIT_WEIGHTS
from freeexport.checkpoints.lora_adapter import ADAPTER_CONFIG, MergedWeights, read_adapter
from freeexport.checkpoints.tokenizer_files import write_tokenizer
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.system.output import link_or_copy
from freeexport.training.batches import Collator, token_counts
from freeexport.training.exit_modules import Exit, ExitLayers, KnownTokens, trained_exit, write_exit
from freeexport.training.exit_start import begin_other, first_exit, observed
from freeexport.training.frozen import FrozenExit, cached_teacher, collate_teacher
from freeexport.training.options import TrainingOptions
from freeexport.training.shallow_deep import ENCODER, ShallowDeep
from graphs.description import Description
from graphs.layers import SUPPRESSED

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The tokenizer's files in a checkpoint directory, and its generation settings.
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
    """`module` is stepped on batches that `collate` makes of `training`; `lengths` in tokens run parallel to the
    two sets. `write` puts the trained weights into an empty directory; `own` is the exit, where it has parameters."""

    module: torch.nn.Module
    training: Any
    validation: Any
    lengths: tuple[list[int], list[int]]
    collate: Callable[[Any], dict[str, torch.Tensor]]
    write: Callable[[Path], None]
    own: Exit | None = None

    @property
    def exit_layers(self) -> int:
        """Transformer layers of the exit's own."""
        return len(self.own.layers) if isinstance(self.own, ExitLayers) else 0


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
    """Prepare what `options.tune` names. `tokens`: the exit's vocabulary, None for all.

    full: every weight, in 16 bytes of memory a parameter and what the batch needs, and the exit's own layers.
    lora: an adapter, written with `model_name` as its base or the training of the one that it is, and the exit's own
    layers.
    exit: an exit on a frozen model, or on one with an adapter, which runs once over the data; the directory `cache`
    takes 2 d + 210 bytes, with features 4 d + 214, a position, of all for layers, and 2 d + 4 one of the encoder, of
    the targets for an adapter. Of several processes, the first must be through before the others call this: they find
    the cache filled.
    """
    # An adapter's training goes on beside its base, all else on the two merged.
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
    if own is None and (frozen or options.exit_layers):
        own = first_exit(model, checkpoint, description, options, training, collate)
    begins = known is None
    if known is None and tokens is not None:
        known = KnownTokens(tokens, description.hidden_size)
    for part in filter(None, (own, known)):
        part.to(model.device).train()
    adapted = None
    if options.tune == "lora":
        adapted = _adapted(model, model_name, goes_on, description, options)
    module = ShallowDeep(
        model, description, options.exit_layer, options.loss, options.alpha, own=own, known=known
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
        return Trainable(module, training, validation, lengths, collate, write, own)
    also = (ENCODER,) if options.exit_layers and description.encoder is not None else ()
    whole = ShallowDeep(model, description, options.exit_layer, "ce", also=also)
    first, second = (
        cached_teacher(cache / f"{name}.npy", whole, examples, collate, options, known)
        for name, examples in (("training", training), ("validation", validation))
    )
    torch.manual_seed(options.seed)
    lengths = [one.positions for one in first], [one.positions for one in second]
    return Trainable(FrozenExit(module).cpu(), first, second, lengths, collate_teacher, write, own)


def _suppress(model: PreTrainedModel, tokens: list[int]) -> None:
    """Make what is never written improbable, as decoding does."""

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
    """The model with LoRA on every linear layer but the head, or with the adapter whose training goes on, which keeps
    its rank. A hub name is its base as it is, a path absolute."""
    from peft import LoraConfig, PeftModel, get_peft_model

    # A frozen embedding would cut gradient checkpointing off from everything below.
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
    if goes_on is not None:
        further: PeftModel = PeftModel.from_pretrained(model, str(goes_on), is_trainable=True)
        further.peft_config["default"].base_model_name_or_path = resolved(read_adapter(goes_on)[1])
        return further
    config = LoraConfig(
        r=options.adapter_rank,
        lora_alpha=2 * options.adapter_rank,
        target_modules="all-linear",
        lora_dropout=0.1 if options.dropout is None else options.dropout,  # FREE's authors have 0.1
        task_type="SEQ_2_SEQ_LM" if description.encoder is not None else "CAUSAL_LM",
    )
    torch.manual_seed(options.seed)  # of the adapters' random half
    adapted: PeftModel = get_peft_model(model, config)
    config.base_model_name_or_path = resolved(model_name)
    return adapted


def resolved(base: str) -> str:
    return str(Path(base).resolve()) if Path(base).exists() else base


def trainable_model(checkpoint: Checkpoint, options: TrainingOptions) -> PreTrainedModel:
    """The checkpoint's model in float32 and training mode, with the dropout asked for."""
    model = reference_model(checkpoint).train()
    # T5's gelu is written in six elementwise operations, a fifth of a step of a small model on a CPU.
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
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


def _copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy the tokenizer and generation settings of the base, byte for byte where it has them as files."""
    if checkpoint.path.is_file():
        write_tokenizer(checkpoint, directory)
        return
    for pattern in _TOKENIZER_FILES:
        for path in checkpoint.path.glob(pattern):
            shutil.copyfile(path, directory / path.name)


def link_base(checkpoint: Checkpoint, directory: Path) -> None:
    """Put the base's weights, configuration and tokenizer there, unchanged; of a LoRA adapter its own files."""
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
