"""`--tune lora`: low-rank updates of linear layers, by peft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freeexport.checkpoint import Checkpoint
from freeexport.shallow_deep import ShallowDeep
from freeexport.training_data import Example
from freeexport.training_options import TrainingOptions
from freeexport.tuning import Tuning, on_examples, trainable_model
from graphs.description import Description
from runtime.errors import OptionError


def tune_lora(
    checkpoint: Checkpoint,
    description: Description,
    options: TrainingOptions,
    training: Sequence[Example],
    validation: Sequence[Example],
    model_name: str,
) -> Tuning:
    """The adapter is written with `model_name` as its base: a hub name as it is, a path as an absolute one.

    Raises OptionError where no layer has the name of a target.
    """
    from peft import LoraConfig, get_peft_model

    if checkpoint.adapter is not None:
        raise OptionError(f"{model_name} is a LoRA adapter itself; merge it first, or train on its base")
    model = trainable_model(checkpoint, options)
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
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise OptionError(f"--lora-target {', '.join(lora.targets)} fits no linear layer ({error})") from None
    config.base_model_name_or_path = str(path.resolve()) if path.exists() else model_name
    # A frozen embedding would cut gradient checkpointing off from everything below.
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
    module = ShallowDeep(model, description, options.exit_layer, options.loss_name, options.loss_alpha)

    def write(directory: Path) -> None:
        adapted.save_pretrained(str(directory))
        (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card

    return on_examples(module, checkpoint, options, training, validation, write)
