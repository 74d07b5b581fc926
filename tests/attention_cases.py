"""Attention of the library of custom operators, and a float64 reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
from kernel_cases import one_node
from onnx import TensorProto

from runtime.bundle.manifest import cached_width
from runtime.engines.kernels import LIBRARY

EPSILON = 1e-6
POSITIONS = 256  # in rotary tables
TABLES = ("cosine", "sine", "bias", "query_norm", "key_norm")


class _Attention(ctypes.Structure):
    """Mirrors the struct in runtime/engines/kernels/source/attention.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "rows", "prompts", "heads", "kv_heads", "size", "capacity", "width")
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("window", ctypes.c_int64),
        ("input", ctypes.c_void_p),
        ("cache", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("past_key", "past_value", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("cross_lengths", "past_lengths", "query_lengths")),
        ("packed", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("positions", "turned")),
        ("bias", ctypes.c_void_p),
        ("reach", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("query_norm", "key_norm")),
        ("epsilon", ctypes.c_float),
        ("y", ctypes.c_void_p),
        ("prompt", ctypes.c_int),
        ("encoder", ctypes.c_bool),
    )


@dataclass(frozen=True)
class Layer:
    """One attention layer.

    Attributes:
        heads: Query heads.
        kv_heads: Heads of keys and values.
        size: Size of a head.
        window: Sliding window. 0: none.
        tables: Arrays of the layer by their names in TABLES.
        scale: Factor of the scores.
        softcap: Cap of the scores. 0: none.
        cache: Type of keys and values.
    """

    heads: int
    kv_heads: int
    size: int
    window: int = 0
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    scale: float = 0.2
    softcap: float = 0.0
    cache: type = np.float32

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.size

    @property
    def cache_width(self) -> int:
        """Elements of a position and head in the cache."""
        return cached_width(self.size, np.dtype(self.cache).itemsize)


@dataclass(frozen=True)
class Call:
    """Inputs of one call.

    Attributes:
        rows: [B, R, width], padded to the right.
        key: Cache [B, kv_heads, C, cache width].
        value: Cache like `key`.
        past: Cached positions of each sequence, int32 [B].
        lengths: Valid rows of each sequence, int32 [B].
    """

    rows: np.ndarray
    key: np.ndarray
    value: np.ndarray
    past: np.ndarray
    lengths: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """Mask [B, R] of the valid rows."""
        valid: np.ndarray = np.arange(self.rows.shape[1]) < self.lengths[:, None]
        return valid

    def fresh(self) -> Call:
        """Return a copy with its own caches."""
        return replace(self, key=self.key.copy(), value=self.value.copy())


def random_layer(rng: np.random.Generator, heads: int, kv_heads: int, size: int, window: int, kinds: str) -> Layer:
    """Return a random layer.

    Args:
        kinds: Letters of the features: r for rotary positions, p for rotary positions in part of a head, s for capped
            scores, b for a bias by distance, n for norms of heads, h for keys and values in float16, i for 8 bits.
    """
    tables = {}
    if "r" in kinds or "p" in kinds:
        angles = rng.standard_normal((POSITIONS, size // 2 if "r" in kinds else size // 4 + 1)).astype(np.float32)
        tables |= {"cosine": np.cos(angles), "sine": np.sin(angles)}
    if "b" in kinds:
        tables["bias"] = rng.standard_normal((9, heads)).astype(np.float32)
    if "n" in kinds:
        tables |= {name: rng.standard_normal(size).astype(np.float32) for name in ("query_norm", "key_norm")}
    cache = np.float16 if "h" in kinds else np.int8 if "i" in kinds else np.float32
    return Layer(heads, kv_heads, size, window, tables, softcap=0.5 if "s" in kinds else 0.0, cache=cache)


def random_call(
    rng: np.random.Generator, layer: Layer, past: list[int], lengths: list[int], capacity: int = 40
) -> Call:
    """Return a call with random rows and caches."""
    rows = rng.standard_normal((len(past), max(lengths), layer.width)).astype(np.float32)
    shape = len(past), layer.kv_heads, capacity, layer.size
    caches = [in_cache(layer, rng.standard_normal(shape).astype(np.float32)) for _ in range(2)]
    return Call(rows, *caches, np.array(past, np.int32), np.array(lengths, np.int32))


def in_cache(layer: Layer, x: np.ndarray) -> np.ndarray:
    """Return keys or values [..., size] in float32 as a cache has them, [..., cache width]."""
    if layer.cache != np.int8:
        return x.astype(layer.cache)
    scales = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    values = np.rint(x / np.where(scales > 0, scales, 1)).astype(np.int8)
    return np.concatenate([values, scales.astype(np.float32).view(np.int8)], -1)


def from_cache(layer: Layer, cache: np.ndarray) -> np.ndarray:
    """Return keys or values of a cache in float64, [..., size]."""
    if layer.cache != np.int8:
        return cache.astype(np.float64)
    scales = np.ascontiguousarray(cache[..., layer.size :]).view(np.float32)
    return cache[..., : layer.size].astype(np.float64) * scales


def attend(
    instructions: str, layer: Layer, call: Call, packed: bool, library: Path = LIBRARY, prompt: bool = False
) -> np.ndarray:
    """Return y [B, R, heads * size], 0 in padding. Extends the caches of `call`.

    Raises:
        ValueError: If the library rejects the call.
    """
    function = ctypes.CDLL(str(library)).freeexport_attention
    function.restype = ctypes.c_char_p
    rows = np.ascontiguousarray(call.rows[call.valid] if packed else call.rows.reshape(-1, layer.width))
    y = np.full((len(rows), layer.heads * layer.size), np.nan, np.float32)
    at = {name: array.ctypes.data for name, array in layer.tables.items()}
    given = _Attention(
        batch=len(call.rows), rows=len(rows), prompts=len(call.rows), heads=layer.heads, kv_heads=layer.kv_heads,
        size=layer.size, capacity=call.key.shape[2], scale=layer.scale, window=layer.window, input=rows.ctypes.data,
        past_key=call.key.ctypes.data, past_value=call.value.ctypes.data, key=call.key.ctypes.data,
        value=call.value.ctypes.data, past_lengths=call.past.ctypes.data, query_lengths=call.lengths.ctypes.data,
        width=layer.width, packed=packed, positions=POSITIONS, softcap=layer.softcap, reach=8,
        cache=(np.float32, np.float16, np.int8).index(layer.cache), prompt=prompt,
        turned=layer.tables["cosine"].shape[1] if "cosine" in at else 0, epsilon=EPSILON, y=y.ctypes.data, **at,
    )  # fmt: skip
    problem = function(instructions.encode(), ctypes.byref(given))
    if problem is not None:
        raise ValueError(problem.decode())
    if not packed:
        return y.reshape(*call.rows.shape[:2], -1)
    spread = np.zeros((*call.rows.shape[:2], y.shape[1]), np.float32)
    spread[call.valid] = y
    return spread


def exact(layer: Layer, call: Call) -> np.ndarray:
    """Return the result of `attend` in float64, computed row by row. Extends the caches of `call`."""
    tables = {name: array.astype(np.float64) for name, array in layer.tables.items()}
    y = np.zeros((*call.rows.shape[:2], layer.heads * layer.size))
    for b, (past, length) in enumerate(zip(call.past, call.lengths, strict=True)):
        for r in range(length):
            position = past + r
            heads = call.rows[b, r].astype(np.float64).reshape(-1, layer.size)
            query, key, value = np.split(heads, [layer.heads, layer.heads + layer.kv_heads])
            query = _turned(_normed(query, tables.get("query_norm")), tables, position)
            key = _turned(_normed(key, tables.get("key_norm")), tables, position).astype(np.float32)
            call.key[b, :, position] = in_cache(layer, key)
            call.value[b, :, position] = in_cache(layer, value.astype(np.float32))
            begin = max(0, position + 1 - layer.window) if layer.window else 0
            seen_keys, seen_values = (
                from_cache(layer, part[b, :, begin : position + 1]) for part in (call.key, call.value)
            )
            distance = np.minimum(position - np.arange(begin, position + 1), 8)
            for head in range(layer.heads):
                group = head // (layer.heads // layer.kv_heads)
                scores = seen_keys[group] @ query[head] * layer.scale
                if layer.softcap:
                    scores = layer.softcap * np.tanh(scores / layer.softcap)
                scores += tables["bias"][distance, head] if "bias" in tables else 0
                weights = np.exp(scores - scores.max())
                place = slice(head * layer.size, (head + 1) * layer.size)
                y[b, r, place] = weights / weights.sum() @ seen_values[group]
    return y


def _normed(x: np.ndarray, norm: np.ndarray | None) -> np.ndarray:
    return x if norm is None else x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPSILON) * norm


def _turned(x: np.ndarray, tables: dict[str, np.ndarray], position: int) -> np.ndarray:
    if "cosine" not in tables:
        return x
    cosine = tables["cosine"][position]
    sine = tables["sine"][position]
    low, high, rest = np.split(x, [len(cosine), 2 * len(cosine)], axis=-1)
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine, rest], axis=-1)


LENGTHS = {"past_lengths", "query_lengths", "lengths"}


def attention_session(layer: Layer, packed: bool, threads: int = 1, **changes: object) -> ort.InferenceSession:
    """Return an ONNX Runtime session of one attention node. Tables are inputs too. `changes` are attributes."""
    capped = {"softcap": layer.softcap} if layer.softcap else {}
    attributes = {"window": layer.window, **capped, "epsilon": EPSILON, **_attributes(layer, packed), **changes}
    inputs = "rows", "past_key", "past_value", "past_lengths", "query_lengths"
    names = [*inputs, *(name if name in layer.tables else "" for name in TABLES)]
    kind = "CappedAttention" if layer.softcap else "CachedAttention"
    if layer.cache != np.float32:
        kind = "HalfAttention" if layer.cache == np.float16 else "Int8Attention"
        attributes = {"softcap": 0.0, **attributes}
    outputs = _types(["y", "key", "value"], layer)
    return one_node(kind, _types(names, layer), outputs, {}, names, threads, **attributes)


def cross_session(layer: Layer, packed: bool, threads: int = 1) -> ort.InferenceSession:
    """Return a session of one CrossAttention for the cache of a layer, with capped scores if the layer has."""
    given = _types(["rows", "key", "value", "lengths", "query_lengths"], layer)
    kinds = {np.float32: "CrossAttention", np.float16: "HalfCrossAttention", np.int8: "Int8CrossAttention"}
    kind = "CappedCrossAttention" if layer.softcap and layer.cache == np.float16 else kinds[layer.cache]
    attributes = {**_attributes(layer, packed), "softcap": layer.softcap}
    return one_node(kind, given, ["y"], {}, threads=threads, **attributes)


def prompt_session(layer: Layer, threads: int = 1, **changed: object) -> ort.InferenceSession:
    """Return a session of one PromptCache for the cache of a layer."""
    kind = "HalfPromptCache" if layer.cache == np.float16 else "Int8PromptCache"
    attributes = {"kv_num_heads": layer.kv_heads, "head_size": layer.size, **changed}
    return one_node(kind, _types(["rows"], layer), _types(["key", "value"], layer), {}, threads=threads, **attributes)


def encoder_session(layer: Layer, threads: int = 1) -> ort.InferenceSession:
    """Return a session of one EncoderAttention, with the input `bias` if the layer has one."""
    names = ["rows", "lengths", *(name for name in layer.tables if name == "bias")]
    attributes = {name: value for name, value in _attributes(layer, False).items() if name != "packed"}
    return one_node("EncoderAttention", _types(names, layer), ["y"], {}, threads=threads, **attributes)


def exact_encoder(layer: Layer, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the attention of an encoder in float64, [B, E, heads * size], 0 in padding.

    Args:
        layer: The layer. Its bias is [2 R + 1, heads], by key - query + R.
        rows: [B, E, width].
        lengths: Valid rows of each sequence, int32 [B].
    """
    count = rows.shape[1]
    heads = rows.astype(np.float64).reshape(len(rows), count, -1, layer.size).transpose(0, 2, 1, 3)
    query, key, value = np.split(heads, [layer.heads, layer.heads + layer.kv_heads], axis=1)
    key, value = (part.repeat(layer.heads // layer.kv_heads, 1) for part in (key, value))
    scores = query @ key.transpose(0, 1, 3, 2) * layer.scale
    if (bias := layer.tables.get("bias")) is not None:
        reach = len(bias) // 2
        distance = np.clip(np.arange(count)[None] - np.arange(count)[:, None], -reach, reach)
        scores = scores + bias[distance + reach].transpose(2, 0, 1)
    valid = np.arange(count) < lengths[:, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * valid[:, None, None]
    y = (weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)) @ value
    return np.where(valid[..., None], y.transpose(0, 2, 1, 3).reshape(len(rows), count, -1), 0.0)


def _types(names: list[str], layer: Layer) -> dict[str, int]:
    types = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.int8: TensorProto.INT8}
    caches = dict.fromkeys(("past_key", "past_value", "key", "value"), types[layer.cache])
    known = dict.fromkeys(LENGTHS, TensorProto.INT32) | caches
    return {name: known.get(name, TensorProto.FLOAT) for name in names if name}


def _attributes(layer: Layer, packed: bool) -> dict[str, object]:
    heads = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "head_size": layer.size}
    return {**heads, "packed": int(packed), "scale": layer.scale}


def feeds(layer: Layer, call: Call, packed: bool) -> dict[str, np.ndarray]:
    """Return the inputs of `attention_session` for a call."""
    rows = call.rows[call.valid] if packed else call.rows.reshape(-1, layer.width)
    return {
        "rows": np.ascontiguousarray(rows), "past_key": call.key, "past_value": call.value,
        "past_lengths": call.past, "query_lengths": call.lengths, **layer.tables,
    }  # fmt: skip
