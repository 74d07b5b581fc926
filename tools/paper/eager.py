"""The full model in eager PyTorch, to which the paper's speedups are relative."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.transformers_model import Dtype, greedy_ids, reference_model
from freeexport.evaluate.settings import Setting
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Precision
from runtime.text.tokenizer import Tokenizer

_DTYPES: dict[Precision, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}


class TokenTimes:
    """Streamer of transformers that notes when each token was generated."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Note the time. `generate` calls this with the prompt first, and copies to the CPU."""
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


class EagerDecoder:
    """Decodes with `generate` of transformers, greedily, one prompt at a time.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        OptionError: If the device is missing.
    """

    def __init__(self, bundle: Bundle, checkpoint: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._checkpoint = open_checkpoint(checkpoint)
        dtype = _DTYPES.get(bundle.manifest.precision, "float32")
        self._model = reference_model(self._checkpoint, device, dtype)
        self._tokenizer = Tokenizer.load(bundle.path, bundle.manifest.files)
        self._ends = bundle.manifest.eos_token_ids

    def decode(self, setting: Setting, prompt: Any, most: int) -> dict[str, Any]:
        """Decode a prompt, and return the fields of its record."""
        clock = TokenTimes()
        began = perf_counter()
        with torch.inference_mode():
            (made,) = greedy_ids(
                self._model, self._checkpoint, [np.asarray(prompt)], most, streamer=clock
            )
        seconds = perf_counter() - began
        first = clock.times[1] - began
        ids = tuple(map(int, made))
        ended = ids[-1] in self._ends
        written = ids[:-1] if ended else ids
        return {
            "seconds": round(seconds, 7),
            "decode_seconds": round(seconds - first, 7),
            "first_seconds": round(first, 7),
            "tokens": len(ids),
            "text": "" if self._tokenizer is None else self._tokenizer.decode(list(written)),
            "token_ids": ids,
            "exited": (False,) * len(ids),
            "finish_reason": "eos" if ended else "length",
        }
