"""Reduce or widen the arithmetic of transformers: float64, fewer bits, errors of quantization."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from runtime.bundle.manifest import Manifest
from runtime.bundle.quantization import EnginePrecision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bits of the significand.
BITS = {"fp16": 11, "bf16": 8}
# Longest block of inputs that shares a scale, if activations have one scale per block.
ACTIVATION_BLOCK = 128
# Functions that read no values, so nothing needs to be widened.
_ATTRIBUTES = frozenset(
    {"__get__", "size", "dim", "stride", "numel", "is_floating_point", "__len__"}
)


def in_precision_of(manifest: Manifest, model: PreTrainedModel) -> AbstractContextManager[None]:
    """Context manager: reduce the precision of the reference to that of a bundle."""
    if manifest.quantization is not None:
        engines = {engine.engine: engine for engine in manifest.quantization.engines}
        exit_layer = manifest.exit_layer
        return add_quantization_errors(
            model, lambda name: engines.get(engine_of(name, exit_layer)), manifest.target == "cpu"
        )
    return (
        round_outputs(model, BITS[manifest.precision])
        if manifest.precision in BITS
        else nullcontext()
    )


def engine_of(module: str, exit_layer: int) -> str:
    """Return the engine that computes a module of transformers, from the module's name."""
    if module.startswith(("encoder.", "model.encoder.")):
        return "encoder"
    if module.endswith(
        ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
    ):
        return "prologue"
    layer = re.search(r"\.(?:layers|block|h)\.(\d+)\.", module)
    return "shallow" if layer and int(layer[1]) < exit_layer else "deep"


class Float64(TorchFunctionMode):
    """Run every operator in float64, even if the code requests float32.

    Norms, softmax and rotary positions do that. A float32 parameter is widened only while an
    operator reads it, so the extra memory is one float64 copy of the largest weight.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _ATTRIBUTES:
            return func(*args, **kwargs)
        if func is functional.embedding:  # widens the rows read, not the table
            return _wide(func(*args, **kwargs))
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return tree_map(_wide, func(*tree_map(_wide, args), **tree_map(_wide, kwargs)))


def _wide(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.double() if item.dtype is torch.float32 else item
    return torch.float64 if item is torch.float32 else item


@contextmanager
def hooked(hooks: Iterable[Any]) -> Iterator[None]:
    """Context manager: register hooks of torch modules, and remove them at the end."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def round_outputs(model: Any, bits: int) -> AbstractContextManager[None]:
    """Round the output of every leaf module to `bits` of significand, with the range of float32."""

    def rounded(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or not item.is_floating_point():
            return item
        fraction, exponent = torch.frexp(item)
        return torch.ldexp(torch.round(fraction * 2**bits) / 2**bits, exponent)

    leaf_modules = [
        module for module in model.modules() if not any(True for _ in module.children())
    ]
    return hooked(
        leaf.register_forward_hook(lambda _, inputs, output: tree_map(rounded, output))
        for leaf in leaf_modules
    )


def add_quantization_errors(
    model: Any, precision_of: Callable[[str], EnginePrecision | None], activations: bool
) -> AbstractContextManager[None]:
    """Add random errors to every linear layer, as from quantization.

    The errors correspond to the relative error of weights in the layer's engine.

    Args:
        precision_of: Returns the precision of a module's engine, by the module's name.
        activations: Add errors as if inputs had 8 bits too.
    """
    generator = torch.Generator().manual_seed(0)

    def coarsener(precision: EnginePrecision) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
        def coarse(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            (read,) = inputs
            wrong = precision.largest_error * torch.linalg.vector_norm(read, dim=-1, keepdim=True)
            if activations:
                size = read.shape[-1]
                wrong = torch.hypot(
                    wrong,
                    _rounding_error(
                        read, size if precision.linears == "int8" else ACTIVATION_BLOCK
                    ),
                )
            weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
            rows = torch.linalg.vector_norm(weight, dim=1) / weight.shape[1] ** 0.5
            return output + torch.randn(output.shape, generator=generator) * rows * wrong

        return coarse

    linear = (
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, (torch.nn.Linear, Conv1D))
    )
    known = (
        (part, precision) for name, part in linear if (precision := precision_of(name)) is not None
    )
    return hooked(part.register_forward_hook(coarsener(precision)) for part, precision in known)


def _rounding_error(read: torch.Tensor, block: int) -> torch.Tensor:
    """Return the norm [..., 1] of the error of rounding [..., n] to 8 bits.

    Each block of inputs has a scale.
    """
    size = read.shape[-1]
    length = min(block, size)
    padded = functional.pad(read, (0, -size % length))
    steps = padded.unflatten(-1, (-1, length)).abs().amax(-1) / 127
    # The standard deviation of rounding is a step divided by sqrt(12).
    return torch.linalg.vector_norm(steps, dim=-1, keepdim=True) * (length / 12) ** 0.5
