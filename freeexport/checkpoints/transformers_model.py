"""The checkpoint as transformers runs it: what every engine is compared with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.checkpoints.checkpoint import Checkpoint
from graphs.weight_shapes import check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reference_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The Hugging Face model of the checkpoint, float32, in evaluation mode; peft merges a LoRA adapter into it.

    Takes 4 bytes of memory a parameter. An exit's own parameters are not part of it. Raises UnsupportedModelError where
    the weights are of other sizes than the configuration says, CheckpointError where one is missing.
    """
    import torch
    import transformers

    check_weights(checkpoint.config, checkpoint)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    seq2seq = checkpoint.config.get("is_encoder_decoder")
    loader = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    source, options = checkpoint.path, {}
    if checkpoint.path.is_file():
        source, options = checkpoint.path.parent, {"gguf_file": checkpoint.path.name}
    # 4.57 takes `dtype` as well; only older releases want `torch_dtype`.
    model = loader.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=False, local_files_only=True, **options
    )
    if "gguf_file" in options:
        # Its weights are float32 by now, but transformers would refuse to save them.
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
    return (model if checkpoint.adapter is None else _merged(model, checkpoint.adapter)).eval()


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    from peft import PeftModel

    merged: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged
