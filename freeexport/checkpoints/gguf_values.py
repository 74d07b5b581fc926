"""Values, scales and offsets of the quantized blocks in a GGUF file, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from graphs.quantization.rounding import Rounded
from runtime.bundle.quantization import TensorFormat

# Number of inputs of a super-block, and of one of its blocks.
_SUPER = 256
_BLOCK = 32


class Blocks(NamedTuple):
    """Blocks of a tensor, n in all.

    Attributes:
        values: uint8 [n, inputs per block].
        scales: float16 [n].
        offsets: float16 [n], or None.
        multiples: int8 [n, blocks per super-block, 1 or 2], or None.
    """

    values: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None
    multiples: np.ndarray | None = None


class Kind(NamedTuple):
    """A type of blocks.

    Attributes:
        format: Format in a bundle.
        block: Number of inputs that share a scale.
        read: Decodes uint8 [n, bytes per block].
    """

    format: TensorFormat
    block: int
    read: Callable[[np.ndarray], Blocks]


def _halves(raw: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2")[:, 0]


def _q4(raw: np.ndarray) -> Blocks:
    """Decode Q4_0, or Q4_1, whose blocks have two more bytes for an offset."""
    low = raw[:, -16:]
    values = np.concatenate([low & 15, low >> 4], axis=1)
    return Blocks(values, _halves(raw, 0), _halves(raw, 2) if raw.shape[1] == 20 else None)


def _q5(raw: np.ndarray) -> Blocks:
    """Decode Q5_0, or Q5_1, whose blocks have two more bytes for an offset."""
    start = raw.shape[1] - 20
    low = raw[:, start + 4 :]
    fifth = np.unpackbits(raw[:, start : start + 4], axis=1, bitorder="little")
    values = np.concatenate([low & 15, low >> 4], axis=1) | fifth << 4
    return Blocks(values, _halves(raw, 0), _halves(raw, 2) if start == 4 else None)


def _q4_k(raw: np.ndarray) -> Blocks:
    """Decode Q4_K, or Q5_K, which adds 32 bytes with the fifth bits.

    Bit k of byte i belongs to value i of block k.
    """
    packed = raw[:, 4:16]  # 6-bit scales of 8 blocks, and 6-bit offsets to subtract
    first = packed[:, 0:4]
    second = packed[:, 4:8]
    last = packed[:, 8:12]
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    offsets = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    low = raw[:, -128:].reshape(-1, 4, 1, _BLOCK)
    values = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 8, _BLOCK)
    if raw.shape[1] > 144:
        fifth = raw[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1
        values = values | fifth.transpose(0, 2, 1) << 4
    multiples = np.stack([scales, offsets], axis=-1).view(np.int8)
    return Blocks(values.reshape(-1, _SUPER), _halves(raw, 0), -_halves(raw, 2), multiples)


def _q6_k(raw: np.ndarray) -> Blocks:
    low = raw[:, :128].reshape(-1, 2, 1, 64)
    high = raw[:, 128:192].reshape(-1, 2, 1, _BLOCK)
    fours = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, _BLOCK)
    values = fours | (high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3) << 4
    return Blocks(
        values.reshape(-1, _SUPER), _halves(raw, 208), None, raw[:, 192:208, None].view(np.int8)
    )


KINDS = {
    "Q4_0": Kind("int4", _BLOCK, _q4),
    "Q4_1": Kind("int4", _BLOCK, _q4),
    "Q5_0": Kind("int5", _BLOCK, _q5),
    "Q5_1": Kind("int5", _BLOCK, _q5),
    "Q8_0": Kind("int8-block", _BLOCK, lambda raw: Blocks(raw[:, 2:] ^ 128, _halves(raw, 0))),
    "Q4_K": Kind("int4", _BLOCK, _q4_k),
    "Q5_K": Kind("int5", _BLOCK, _q4_k),
    "Q6_K": Kind("int6", _BLOCK // 2, _q6_k),
}


def values_of(kind: str, raw: np.ndarray, outputs: int) -> Rounded | None:
    """Decode a tensor with `outputs` rows from uint8 [blocks, bytes].

    Returns None if a scale or an offset is not finite.
    """
    found = KINDS[kind].read(raw)
    if not np.isfinite(found.scales).all() or not (
        found.offsets is None or np.isfinite(found.offsets).all()
    ):
        return None
    values = found.values.reshape(outputs, -1, KINDS[kind].block)
    if KINDS[kind].format == "int4":
        values = values[..., 0::2] | values[..., 1::2] << 4
    offsets = found.offsets
    multiples = found.multiples
    if offsets is not None:
        offsets = offsets.reshape(outputs, -1)
    if multiples is not None:
        multiples = multiples.reshape(outputs, -1, multiples.shape[-1])
    return Rounded(
        values,
        found.scales.reshape(outputs, -1),
        None,
        error=0.0,
        offsets=offsets,
        multiples=multiples,
    )
