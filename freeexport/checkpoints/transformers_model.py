"""Run a checkpoint with transformers, as the reference for all engines."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from freeexport.checkpoints.gguf_transformers import quick_reader
from freeexport.checkpoints.weight_files import CheckpointError
from runtime.errors import FreeExportError, OptionError, one_line
from runtime.machine.device import Device

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from freeexport.checkpoints.checkpoint import Checkpoint

Dtype = Literal["float32", "bfloat16", "float16"]
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


def torch_device(name: str) -> torch.device:
    """Return torch's device for "cpu" or "cuda:0".

    Raises:
        OptionError: If torch does not find the device.
    """
    import torch

    device = Device.parse(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise OptionError(
            f"device {device} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs; choose 'cpu', or a GPU that nvidia-smi shows with "
            "a torch that was built for it"
        )
    return torch.device(str(device))


def reference_model(
    checkpoint: Checkpoint, device: str = "cpu", dtype: Dtype = "float32", capacity: int = 0
) -> PreTrainedModel:
    """Load the Hugging Face model of a checkpoint in evaluation mode, with its LoRA adapter merged.

    Takes 4 bytes of memory per parameter in float32. Suppressed tokens are suppressed as in a
    bundle. The exit's own parameters are not loaded.

    Args:
        checkpoint: The checkpoint.
        device: "cpu" or "cuda:0".
        dtype: Type of the weights.
        capacity: Cache size of the bundle, in positions. Fixes the rotary positions, which
            transformers would change with the length of a prompt.

    Raises:
        UnsupportedModelError: If the sizes of weights differ from the configuration.
        CheckpointError: If a weight is missing.
        OptionError: If torch does not find the device.
    """
    import torch
    import transformers

    from graphs.families import describe
    from graphs.layers import SUPPRESSED
    from graphs.shapes import check_checkpoint

    place = torch_device(device)
    description = describe(checkpoint.config, checkpoint)
    check_checkpoint(checkpoint.config, description, checkpoint)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    seq2seq = checkpoint.config.get("is_encoder_decoder")
    loader: Any = (
        transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    )
    if checkpoint.config.get("model_type") == "whisper":
        loader = transformers.AutoModelForSpeechSeq2Seq
    source, options = checkpoint.source
    # transformers 4.57 accepts `dtype`. Older releases require `torch_dtype`.
    given = {
        "dtype": getattr(torch, dtype),
        "trust_remote_code": False,
        "local_files_only": True,
        **options,
    }
    with quick_reader(options):
        model = loader.from_pretrained(source, **given)
    if "gguf_file" in options:
        # The weights are dequantized, but transformers would refuse to save them.
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
    if (merged := checkpoint.merged) is not None:
        for name in merged.shapes:
            model.get_parameter(name).data += torch.from_numpy(merged.delta(name))
    if never := list(description.decoder.head.suppressed):
        head: Any = model.get_output_embeddings()
        head.register_forward_hook(
            lambda module, inputs, logits: logits.index_fill(
                -1, torch.tensor(never, device=logits.device), SUPPRESSED
            )
        )
    rotary = description.attention.rotary
    if rotary is not None and rotary.at(capacity).inverse_frequencies == rotary.long:
        model.get_decoder().rotary_emb.original_inv_freq.copy_(torch.tensor(rotary.long))
    return model.eval().to(place)


def greedy_ids(
    model: Any,
    checkpoint: Checkpoint,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    ignore_eos: bool = False,
    streamer: Any = None,
) -> list[np.ndarray]:
    """Decode prompts greedily with a Hugging Face model, as one batch.

    A `streamer` of transformers, for a single prompt, gets each token as it is generated.

    Returns ids int32 [m] for each prompt: at most `new_tokens`, including the end of sequence, or
    exactly `new_tokens` with `ignore_eos`.
    """
    import torch
    from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

    from freeexport.checkpoints.special_tokens import end_ids

    seq2seq = model.config.is_encoder_decoder
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        # A decoder continues at the right end. An encoder's positions count from the left.
        place = slice(0, len(prompt)) if seq2seq else slice(width - len(prompt), width)
        ids[row, place] = prompt
        mask[row, place] = 1
    ends = [] if ignore_eos else end_ids(checkpoint)
    # The cache that `generate` creates for T5 has the encoder's number of layers. This one grows.
    cache = (
        {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())} if seq2seq else {}
    )
    values = checkpoint.generation_config
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        decoder_start_token_id=values.get("decoder_start_token_id"),
        bos_token_id=values.get("bos_token_id"),
        forced_bos_token_id=values.get("forced_bos_token_id"),
        forced_eos_token_id=values.get("forced_eos_token_id"),
    )
    own = model.generation_config
    model.generation_config = config  # unset values would come from the model's own
    try:
        with warnings.catch_warnings():
            # transformers 4.57 has no other name for it.
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
            out = model.generate(
                input_ids=torch.from_numpy(ids).to(model.device),
                attention_mask=torch.from_numpy(mask).to(model.device),
                generation_config=config,
                streamer=streamer,
                **cache,
            )
    finally:
        model.generation_config = own
    found = []
    for row in out[:, 1 if seq2seq else width :].cpu().numpy():
        end = np.flatnonzero(np.isin(row, ends))
        found.append(row[: end[0] + 1 if len(end) else None].astype(np.int32))
    return found


def write_random_weights(source: Path, out: Path, seed: int) -> None:
    """Write a checkpoint with the architecture of `source` and random weights to `out`.

    `source` is a directory with config.json and tokenizer files. Weights are initialized by
    transformers.

    Raises:
        CheckpointError: If the configuration cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from graphs.shapes import check_config

    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"{source} has no config.json; give a directory with a configuration and a tokenizer"
        )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        check_config(config.to_dict())
        torch.manual_seed(seed)
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = loader.from_config(config)
    except FreeExportError:
        raise
    except Exception as error:  # every configuration class raises its own types
        raise CheckpointError(
            f"{source}: no model can be made of its config.json ({one_line(error)})"
        ) from None
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and path.suffix not in _WEIGHT_SUFFIXES:
            shutil.copyfile(path, partial / path.name)
    partial.rename(out)
