"""Attention by the library of our own operators, and what it must be."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
from kernel_cases import one_node
from onnx import TensorProto

from runtime.kernels import LIBRARY

EPSILON = 1e-6
POSITIONS = 256  # of rotary tables
TABLES = ("cosine", "sine", "bias", "query_norm", "key_norm")


class _Attention(ctypes.Structure):
    """The struct of runtime/kernels/source/attention.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "rows", "heads", "kv_heads", "size", "capacity", "width")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("window", ctypes.c_int64),
        ("input", ctypes.c_void_p),
        ("halves", ctypes.c_bool),
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
    )


@dataclass(frozen=True)
class Layer:
    """One attention layer; `tables` are those of TABLES that it has. `window` 0 sees all, `softcap` 0 caps nothing;
    `cache` is the type of keys and values."""

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


@dataclass(frozen=True)
class Call:
    """Rows [B, R, width] of which `lengths` count, behind `past` positions of caches [B, kv_heads, C, size]."""

    rows: np.ndarray
    key: np.ndarray
    value: np.ndarray
    past: np.ndarray
    lengths: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """[B, R]: which rows count."""
        valid: np.ndarray = np.arange(self.rows.shape[1]) < self.lengths[:, None]
        return valid

    def fresh(self) -> Call:
        """With caches of its own."""
        return replace(self, key=self.key.copy(), value=self.value.copy())


def random_layer(rng: np.random.Generator, heads: int, kv_heads: int, size: int, window: int, kinds: str) -> Layer:
    """`kinds` has r for rotary positions, p for those of a part of a head, s for capped scores, b for a bias by
    distance, n for norms of heads, h for keys and values in float16."""
    tables = {}
    if "r" in kinds or "p" in kinds:
        angles = rng.standard_normal((POSITIONS, size // 2 if "r" in kinds else size // 4 + 1)).astype(np.float32)
        tables |= {"cosine": np.cos(angles), "sine": np.sin(angles)}
    if "b" in kinds:
        tables["bias"] = rng.standard_normal((9, heads)).astype(np.float32)
    if "n" in kinds:
        tables |= {name: rng.standard_normal(size).astype(np.float32) for name in ("query_norm", "key_norm")}
    cache = np.float16 if "h" in kinds else np.float32
    return Layer(heads, kv_heads, size, window, tables, softcap=0.5 if "s" in kinds else 0.0, cache=cache)


def random_call(
    rng: np.random.Generator, layer: Layer, past: list[int], lengths: list[int], capacity: int = 40
) -> Call:
    rows = rng.standard_normal((len(past), max(lengths), layer.width)).astype(np.float32)
    shape = len(past), layer.kv_heads, capacity, layer.size
    caches = [rng.standard_normal(shape).astype(layer.cache) for _ in range(2)]
    return Call(rows, *caches, np.array(past, np.int32), np.array(lengths, np.int32))


def attend(
    instructions: str, layer: Layer, call: Call, packed: bool, library: Path = LIBRARY, prompt: bool = False
) -> np.ndarray:
    """y [B, R, heads * size], 0 where rows do not count; extends the caches of `call`. ValueError where refused."""
    function = ctypes.CDLL(str(library)).freeexport_attention
    function.restype = ctypes.c_char_p
    rows = np.ascontiguousarray(call.rows[call.valid] if packed else call.rows.reshape(-1, layer.width))
    y = np.full((len(rows), layer.heads * layer.size), np.nan, np.float32)
    at = {name: array.ctypes.data for name, array in layer.tables.items()}
    given = _Attention(
        batch=len(call.rows), rows=len(rows), heads=layer.heads, kv_heads=layer.kv_heads, size=layer.size,
        capacity=call.key.shape[2], scale=layer.scale, window=layer.window, input=rows.ctypes.data,
        past_key=call.key.ctypes.data, past_value=call.value.ctypes.data, key=call.key.ctypes.data,
        value=call.value.ctypes.data, past_lengths=call.past.ctypes.data, query_lengths=call.lengths.ctypes.data,
        width=layer.width, packed=packed, positions=POSITIONS, softcap=layer.softcap, reach=8,
        halves=layer.cache == np.float16, prompt=prompt,
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
    """Attention in float64, row by row; the caches of `call` are extended."""
    tables = {name: array.astype(np.float64) for name, array in layer.tables.items()}
    y = np.zeros((*call.rows.shape[:2], layer.heads * layer.size))
    for b, (past, length) in enumerate(zip(call.past, call.lengths, strict=True)):
        for r in range(length):
            position = past + r
            heads = call.rows[b, r].astype(np.float64).reshape(-1, layer.size)
            query, key, value = np.split(heads, [layer.heads, layer.heads + layer.kv_heads])
            query = _turned(_normed(query, tables.get("query_norm")), tables, position)
            call.key[b, :, position] = _turned(_normed(key, tables.get("key_norm")), tables, position)
            call.value[b, :, position] = value
            begin = max(0, position + 1 - layer.window) if layer.window else 0
            distance = np.minimum(position - np.arange(begin, position + 1), 8)
            for head in range(layer.heads):
                group = head // (layer.heads // layer.kv_heads)
                scores = call.key[b, group, begin : position + 1].astype(np.float64) @ query[head] * layer.scale
                if layer.softcap:
                    scores = layer.softcap * np.tanh(scores / layer.softcap)
                scores += tables["bias"][distance, head] if "bias" in tables else 0
                weights = np.exp(scores - scores.max())
                place = slice(head * layer.size, (head + 1) * layer.size)
                y[b, r, place] = weights / weights.sum() @ call.value[b, group, begin : position + 1]
    return y


def _normed(x: np.ndarray, norm: np.ndarray | None) -> np.ndarray:
    return x if norm is None else x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPSILON) * norm


def _turned(x: np.ndarray, tables: dict[str, np.ndarray], position: int) -> np.ndarray:
    if "cosine" not in tables:
        return x
    cosine, sine = tables["cosine"][position], tables["sine"][position]
    low, high, rest = np.split(x, [len(cosine), 2 * len(cosine)], axis=-1)
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine, rest], axis=-1)


LENGTHS = {"past_lengths", "query_lengths", "lengths"}


def attention_session(layer: Layer, packed: bool, threads: int = 1, **changes: object) -> ort.InferenceSession:
    """ONNX Runtime's, with a graph of one attention whose tables are inputs, too. `changes` are attributes."""
    capped = {"softcap": layer.softcap} if layer.softcap else {}
    attributes = {"window": layer.window, **capped, "epsilon": EPSILON, **_attributes(layer, packed), **changes}
    inputs = "rows", "past_key", "past_value", "past_lengths", "query_lengths"
    names = [*inputs, *(name if name in layer.tables else "" for name in TABLES)]
    kind = "CappedAttention" if layer.softcap else "CachedAttention"
    if layer.cache == np.float16:
        kind, attributes = "HalfAttention", {"softcap": 0.0, **attributes}
    outputs = _types(["y", "key", "value"], layer)
    return one_node(kind, _types(names, layer), outputs, {}, names, threads, **attributes)


def cross_session(layer: Layer, packed: bool, threads: int = 1) -> ort.InferenceSession:
    """With a graph of one CrossAttention, or that of a prompt in float16."""
    given = _types(["rows", "key", "value", "lengths", "query_lengths"], layer)
    kind = "HalfCrossAttention" if layer.cache == np.float16 else "CrossAttention"
    return one_node(kind, given, ["y"], {}, threads=threads, **_attributes(layer, packed))


def _types(names: list[str], layer: Layer) -> dict[str, int]:
    cache = TensorProto.FLOAT16 if layer.cache == np.float16 else TensorProto.FLOAT
    caches = dict.fromkeys(("past_key", "past_value", "key", "value"), cache)
    known = dict.fromkeys(LENGTHS, TensorProto.INT32) | caches
    return {name: known.get(name, TensorProto.FLOAT) for name in names if name}


def _attributes(layer: Layer, packed: bool) -> dict[str, object]:
    heads = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "head_size": layer.size}
    return {**heads, "packed": int(packed), "scale": layer.scale}


def feeds(layer: Layer, call: Call, packed: bool) -> dict[str, np.ndarray]:
    rows = call.rows[call.valid] if packed else call.rows.reshape(-1, layer.width)
    return {
        "rows": np.ascontiguousarray(rows), "past_key": call.key, "past_value": call.value,
        "past_lengths": call.past, "query_lengths": call.lengths, **layer.tables,
    }  # fmt: skip
