"""The reference model in other arithmetic: float64 for the truth, and what coarser types make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from runtime.bundle.precision import EnginePrecision

# Bits of a significand.
BITS = {"fp16": 11, "bf16": 8}
# The longest block of inputs that shares a scale, where activations have one for each block.
ACTIVATION_BLOCK = 128
# What reads no values, so nothing has to be widened for it.
_ATTRIBUTES = frozenset({"__get__", "size", "dim", "stride", "numel", "is_floating_point", "__len__"})


class Float64(TorchFunctionMode):
    """Every operator in float64, also where code names float32, as norms, softmax and rotary positions do.

    A float32 parameter is widened for the operator that reads it, so a model needs the memory of its largest weight in
    float64 and no more.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _ATTRIBUTES:
            return func(*args, **kwargs)
        if func is functional.embedding:  # the rows that are read, not the table
            return _wide(func(*args, **kwargs))
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return tree_map(_wide, func(*tree_map(_wide, args), **tree_map(_wide, kwargs)))


def _wide(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.double() if item.dtype is torch.float32 else item
    return torch.float64 if item is torch.float32 else item


@contextmanager
def rounding(model: Any, bits: int) -> Iterator[None]:
    """What every layer, norm and activation gives is rounded to `bits` of significand; the range stays float32's."""
    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(_rounder(bits)) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounder(bits: int) -> Callable[[Any, Any, Any], Any]:
    def rounded(module: Any, inputs: Any, output: Any) -> Any:
        return tree_map(lambda item: _rounded(item, bits), output)

    return rounded


def _rounded(item: Any, bits: int) -> Any:
    if not isinstance(item, torch.Tensor) or not item.is_floating_point():
        return item
    fraction, exponent = torch.frexp(item)
    return torch.ldexp(torch.round(fraction * 2**bits) / 2**bits, exponent)


@contextmanager
def coarsening(model: Any, precision_of: Callable[[str], EnginePrecision | None], activations: bool) -> Iterator[None]:
    """Every linear layer is off as if its weights had the relative error of the engine that it is in, at random; with
    `activations` also as if what it reads had 8 bits. `precision_of` says which engine a module is in, by its name."""
    generator, hooks = torch.Generator().manual_seed(0), []
    for name, module in model.named_modules():
        found = precision_of(name) if isinstance(module, torch.nn.Linear) else None
        if found is not None:
            block = (None if found.linears == "int8" else ACTIVATION_BLOCK) if activations else 0
            hooks.append(module.register_forward_hook(_coarsener(found.largest_error, block, generator)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _coarsener(error: float, block: int | None, generator: torch.Generator) -> Callable[[Any, Any, Any], Any]:
    def coarse(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        (read,) = inputs
        wrong = error * torch.linalg.vector_norm(read, dim=-1, keepdim=True)
        if block != 0:
            wrong = torch.hypot(wrong, _rounding_error(read, block))
        rows = torch.linalg.vector_norm(module.weight, dim=1) / module.weight.shape[1] ** 0.5
        return output + torch.randn(output.shape, generator=generator) * rows * wrong

    return coarse


def _rounding_error(read: torch.Tensor, block: int | None) -> torch.Tensor:
    """[..., n] -> [..., 1]: the norm of what 8 bits with a scale for each block, or for the row, round away."""
    size = read.shape[-1]
    length = size if block is None else min(block, size)
    padded = functional.pad(read, (0, -size % length))
    steps = padded.unflatten(-1, (-1, length)).abs().amax(-1) / 127
    # Rounding is off by a step over the root of 12.
    return torch.linalg.vector_norm(steps, dim=-1, keepdim=True) * (length / 12) ** 0.5
