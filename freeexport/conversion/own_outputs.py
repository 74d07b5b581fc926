"""A model's own greedy outputs for many prompts, by the engines that it is converted to."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import Recording
from freeexport.checkpoints.transformers_model import greedy_ids, reference_model
from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from graphs.families import describe
from runtime.bundle.bundle import Bundle
from runtime.errors import BundleError
from runtime.session import Session

ENGINES = "engines"  # a bundle
CACHE_BYTES = 1 << 30  # of keys and values in all slots
MOST_SLOTS = 32
GPU_BATCH = 64
PREFIX = 4  # tokens before a transcript


def own_outputs(
    model: str, checkpoint: Checkpoint, prompts: Sequence[Any], new_tokens: int, directory: Path
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the index of each prompt and its greedy output, ids int32 [m] of at most `new_tokens`, the end of the
    sequence among them, as soon as it is done.

    On a CPU by 8-bit engines, in `directory` until all are done, mostly faster than transformers in bfloat16
    (docs/training.md), and the text is that of an int8 bundle; so are all of recordings. An output does not depend on
    the others. On a GPU, of text, by transformers in bfloat16. `checkpoint` is the opened `model`.
    """
    import torch

    sounds = isinstance(prompts[0], Recording)
    if torch.cuda.is_available() and not sounds:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        whole = reference_model(checkpoint, "cuda:0", "bfloat16")
        for start in range(0, len(order), GPU_BATCH):
            batch = order[start : start + GPU_BATCH]
            yield from zip(
                batch,
                greedy_ids(whole, checkpoint, [prompts[i] for i in batch], new_tokens),
                strict=True,
            )
        return
    longest = max(map(len, prompts))
    seq2seq = checkpoint.config.get("is_encoder_decoder")
    capacity = (0 if seq2seq else longest) + new_tokens + 1 + (PREFIX if sounds else 0)
    bundle = directory / ENGINES
    _convert(model, checkpoint, capacity, longest if seq2seq else None, bundle)
    slots = int(
        np.clip(CACHE_BYTES // Bundle.open(bundle).manifest.kv_bytes_per_sequence, 1, MOST_SLOTS)
    )
    cancel = threading.Event()
    with Session(bundle, slots=slots) as session, ThreadPoolExecutor(slots) as pool:

        def answer(index: int) -> tuple[int, np.ndarray]:
            asked: Any = prompts[index]
            given: dict[str, Any] = {"max_new_tokens": new_tokens}
            if isinstance(asked, Recording):
                given |= {"language": asked.language, "fallback_temperatures": ()}
                asked = asked.path
            result = session.generate(asked, mode="full", cancel=cancel, **given)
            return index, np.array(result.token_ids, np.int32)

        waiting = iter(range(len(prompts)))
        running = {
            pool.submit(answer, index) for _, index in zip(range(slots), waiting, strict=False)
        }
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for _, index in zip(done, waiting, strict=False):
                    running.add(pool.submit(answer, index))
                yield from (future.result() for future in done)
        finally:
            cancel.set()
    shutil.rmtree(bundle)


def _convert(
    model: str, checkpoint: Checkpoint, capacity: int, longest_prompt: int | None, bundle: Path
) -> None:
    """Write the engines at `bundle`, unless those there are the model's and large enough."""
    with suppress(BundleError):
        found = Bundle.open(bundle).manifest
        large_enough = found.capacity >= capacity and found.encoder_capacity >= (
            longest_prompt or 0
        )
        if found.source_sha256 == checkpoint.sha256 and large_enough:
            return
    layers = len(describe(checkpoint.config, checkpoint).decoder.layers)
    options = ConvertOptions(
        exit_layer=None if checkpoint.exit else layers - 1,  # nothing exits
        precision="int8",
        capacity=capacity,
        encoder_capacity=longest_prompt,
        verify="none",
        measure=False,
        overwrite=True,
    )
    convert(model, bundle, options)
