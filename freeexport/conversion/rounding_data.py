"""Round weights to 4 bits for given text.

Each decoder layer is rounded for inputs that come from the rounded layers before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Linear, Module

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import (
    TARGETS_WANTED,
    DataError,
    Example,
    encode,
    read_examples,
    text_format,
)
from freeexport.checkpoints.transformers_model import reference_model
from freeexport.system.progress import progress
from freeexport.verification.arithmetic import engine_of, hooked
from freeexport.verification.reference import layer_list
from graphs.description import Description
from graphs.engine_options import EngineOptions
from graphs.quantization.inputs import round_4_bits_for
from graphs.quantization.rounding import BLOCK, FLOAT32, Rounded, dequantize
from graphs.shapes import weight_names
from runtime.bundle.bundle import sha256_of
from runtime.bundle.quantization import RoundingData
from runtime.errors import OptionError
from runtime.machine.machine import available_memory

# Decoder tokens: maximum used, minimum required, and longest sequence. Then the maximum number of
# lines read.
MAX_TOKENS = 8192
MIN_TOKENS = 512
LONGEST = 512
LINES = 4096

# A call of a layer: hidden states [1, n, d], and its other arguments.
_Call = tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class RoundedWeights:
    """Weights rounded to 4 bits.

    Attributes:
        weights: Rounded weights by tensor name.
        data: The text that they were rounded for.
    """

    weights: dict[str, Rounded]
    data: RoundingData


def round_for_text(
    checkpoint: Checkpoint, description: Description, engines: EngineOptions, data: Path
) -> RoundedWeights:
    """Round the decoder's 4-bit weights for the first lines of `data`.

    `data` is a JSONL file with inputs and targets. Memory holds the model in float32 (4 bytes per
    parameter), the quantized weights, and the hidden states of the text. Results are reproducible
    on the same machine.

    Raises:
        DataError: If the file is broken or has too little text.
        OptionError: If the model reads speech, there is too little memory, or all these weights
            have 4 bits already.
        CheckpointError: If the checkpoint has no tokenizer.
    """
    texts, tokens = _texts(checkpoint, description, engines, data)
    need = 4 * sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    available = available_memory()
    if need > available:
        raise OptionError(
            f"--quantization-data needs {need / 1e9:.1f} GB of memory for {checkpoint.name} in "
            f"float32, but {available / 1e9:.1f} GB is available; leave it out, or free memory"
        )
    model = reference_model(checkpoint)
    stack, field = layer_list(model)
    rounder = _Rounder(
        model,
        checkpoint,
        description,
        engines=engines,
        read=set(weight_names(description, checkpoint)),
    )
    if rounder.done:
        raise OptionError(
            f"--quantization-data has nothing to fit: {checkpoint.name} has its weights in 4 bits "
            "already, or in parts of tensors; leave it out"
        )
    layers = list(getattr(stack, field))
    with torch.no_grad(), progress("rounding for text", len(layers) + 1) as advance:
        calls = _calls(model, layers, texts)
        states = [hidden for hidden, _, _ in calls[layers[0]]]
        advance()
        for layer in layers:
            if rounder.done:
                break
            rounder.round(layer, partial(_run, layer, calls[layer], states))
            states = _run(layer, calls.pop(layer), states)
            advance()
        rounder.round(model.get_output_embeddings(), partial(_forward, model, *texts))
    return RoundedWeights(rounder.weights, RoundingData(len(texts), tokens, sha256_of(data)))


class _Rounder:
    """Round the linear layers of a model that get 4 bits, also in place.

    `weights` collects the rounded weights.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        description: Description,
        engines: EngineOptions,
        read: set[str],
    ) -> None:
        self.weights: dict[str, Rounded] = {}
        used = engines.rounding
        self._scheme = used.scheme
        self._type = np.dtype(np.float16) if used.products.own else FLOAT32
        self._modules = {
            name: module
            for name, module in _with_4_bits(model, description, engines).items()
            if name in read  # only whole tensors: parts, and Conv1D, are rounded without text
            and not (
                engines.keeps_file_bits(name == description.decoder.head.weight)
                and checkpoint.in_file(name)
            )
            and not self._scheme.keeps(module.weight.detach().numpy(), self._type)
        }

    @property
    def done(self) -> bool:
        return not self._modules

    def round(self, part: Module, read: Callable[[], object]) -> None:
        """Round the layers inside `part`. `read()` runs the text through it."""
        inside = set(part.modules())
        modules = {
            name: self._modules.pop(name)
            for name, module in list(self._modules.items())
            if module in inside
        }
        if not modules:
            return
        moments = _moments(list(modules.values()), read)
        for name, module in modules.items():
            weight = module.weight.numpy()
            seen = moments[module]
            plain, _ = self._scheme.round(weight, "int4", self._type)
            if not plain.error <= self._scheme.limits["int4"] or not np.isfinite(seen).all():
                continue  # it gets more bits, or its inputs are not finite
            self.weights[name] = rounded = round_4_bits_for(weight, seen, BLOCK, self._type)
            weight[:] = dequantize(rounded)[:, : weight.shape[1]]


def _moments(modules: Sequence[Module], read: Callable[[], object]) -> dict[Module, np.ndarray]:
    """Return the sums of x x^T over the inputs of linear layers.

    Consecutive layers with the same input share one sum.
    """
    sums: dict[Module, np.ndarray] = {}
    last: tuple[torch.Tensor, Module] | None = None

    def add(module: Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal last
        (x,) = inputs
        if last is not None and last[0] is x:
            sums[module] = sums[last[1]]
            return
        rows = x.reshape(-1, x.shape[-1])
        new = (rows.T @ rows).numpy()
        if module in sums:
            sums[module] += new
        else:
            sums[module] = new.astype(np.float64)
        last = x, module

    with hooked(module.register_forward_pre_hook(add) for module in modules):
        read()
    return sums


class _Enough(Exception):
    """Raised to end a forward pass once all layers have been called."""


def _calls(
    model: Any, layers: Sequence[Module], texts: Sequence[Example]
) -> dict[Module, list[_Call]]:
    """Record how the model calls its layers, one call per text."""
    calls: dict[Module, list[_Call]] = {layer: [] for layer in layers}

    def note(layer: Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        # The states of later layers are replaced by outputs of the rounded layers, so they are not
        # kept.
        calls[layer].append(
            (inputs[0] if layer is layers[0] else inputs[0][:, :0], inputs[1:], options)
        )
        if layer is layers[-1]:
            raise _Enough

    with hooked(layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers):
        for text in texts:
            with suppress(_Enough):
                _forward(model, text)
    return calls


def _run(layer: Any, calls: Sequence[_Call], states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs of a layer for the states of each text."""
    found = [
        layer(hidden, *rest, **options)
        for (_, rest, options), hidden in zip(calls, states, strict=True)
    ]
    return [out[0] if isinstance(out, tuple) else out for out in found]


def _forward(model: Any, *texts: Example) -> None:
    for text in texts:
        prompt, target = (
            torch.from_numpy(ids.astype(np.int64))[None] for ids in (text.prompt, text.target)
        )
        if model.config.is_encoder_decoder:
            start = torch.full((1, 1), model.config.decoder_start_token_id or 0)
            model(
                input_ids=prompt,
                decoder_input_ids=torch.cat([start, target[:, :-1]], dim=1),
                use_cache=False,
            )
        else:
            model(input_ids=torch.cat([prompt, target], dim=1), use_cache=False)


def _with_4_bits(model: Any, description: Description, engines: EngineOptions) -> dict[str, Linear]:
    """Return the decoder's linear layers that get 4 bits, by the names of their weights."""
    plan = engines.plan
    assert plan is not None
    head = description.decoder.head.weight
    stack, field = layer_list(model)
    inside = {module for layer in getattr(stack, field) for module in layer.modules()}
    found = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        and module in inside
        and engines.wanted(description, engine_of(name, engines.exit_layer), head)(f"{name}.weight")
        == "int4"
    }
    return found | ({head: model.get_output_embeddings()} if plan.head == "int4" else {})


def _texts(
    checkpoint: Checkpoint, description: Description, engines: EngineOptions, data: Path
) -> tuple[list[Example], int]:
    """Return the first lines of `data`, and the number of their decoder tokens."""
    if description.spectrogram is not None:
        raise OptionError(
            f"--quantization-data rounds weights for text, and {checkpoint.name} reads speech; "
            "leave it out"
        )
    form = replace(
        text_format(checkpoint, description, min(LONGEST, engines.capacity)), truncate=True
    )
    examples, _ = encode(read_examples(data, LINES, TARGETS_WANTED), form, data)
    texts = []
    tokens = 0
    for example in examples:
        if tokens >= MAX_TOKENS:
            break
        texts.append(example)
        tokens += len(example.target) + (0 if form.seq2seq else len(example.prompt))
    if tokens < MIN_TOKENS:
        raise DataError(
            f"{data} has {tokens} tokens for the decoder; rounding needs at least {MIN_TOKENS}, "
            "give more lines"
        )
    return texts, tokens
