"""A checkpoint with random weights, from a configuration and a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from freeexport.checkpoints.weight_files import CheckpointError, one_line
from graphs.limits import check_config
from runtime.errors import FreeExportError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def write_random_weights(source: Path, out: Path, seed: int) -> None:
    """Write a checkpoint to `out` with the architecture of `source`, a directory with config.json and tokenizer files,
    initialised as transformers does it. Raises CheckpointError where the configuration cannot be read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json; give a directory with a configuration and a tokenizer")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        check_config(config.to_dict())
        torch.manual_seed(seed)
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = loader.from_config(config)
    except FreeExportError:
        raise
    except Exception as error:  # each configuration class checks its values in its own way
        raise CheckpointError(f"{source}: no model can be made of its config.json ({one_line(error)})") from None
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and path.suffix not in _WEIGHTS:
            shutil.copyfile(path, partial / path.name)
    partial.rename(out)
