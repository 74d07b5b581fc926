"""Tiny GGUF files with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def decoder_shapes(
    hidden: int, inner: int, heads: int, kv_heads: int, width: int, norms: bool, layers: int = 2
) -> dict[str, Any]:
    query = heads * width
    kv = kv_heads * width
    shapes: dict[str, Any] = {"token_embd": (32, hidden), "output_norm": (hidden,), "output": (32, hidden)}
    layer: dict[str, Any] = {"attn_q": (query, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    layer |= {"attn_output": (hidden, query), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    layer |= {"ffn_down": (hidden, inner), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    layer |= {"attn_q_norm": (width,), "attn_k_norm": (width,)} if norms else {}
    return shapes | {f"blk.{block}.{name}": shape for block in range(layers) for name, shape in layer.items()}


def t5_shapes(hidden: int, inner: int, heads: int, width: int) -> dict[str, Any]:
    query = (heads * width, hidden)
    shapes = {"token_embd": (32, hidden), "output": (32, hidden)}
    for side, attentions in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
        shapes[f"{side}.output_norm"] = (hidden,)
        shapes[f"{side}.blk.0.attn_rel_b"] = (32, heads)
        layer: dict[str, Any] = {f"{name}_{part}": query for name in attentions for part in "qkv"}
        layer |= {f"{name}_o": query[::-1] for name in attentions}
        layer |= {f"{name}_norm": (hidden,) for name in (*attentions, "ffn")}
        layer |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        shapes |= {f"{side}.blk.{block}.{name}": shape for block in range(2) for name, shape in layer.items()}
    return shapes


def gpt2_shapes(hidden: int) -> dict[str, Any]:
    shapes: dict[str, Any] = {"token_embd": (50257, hidden), "position_embd": (1024, hidden)}
    layer: dict[str, Any] = {"attn_qkv": (3 * hidden, hidden), "attn_output": (hidden, hidden)}
    layer |= {"ffn_up": (4 * hidden, hidden), "ffn_down": (hidden, 4 * hidden)}
    layer |= {f"{name}.bias": shape[:1] for name, shape in layer.items()}
    norms = {f"{name}_norm{part}": (hidden,) for name in ("attn", "ffn") for part in ("", ".bias")}
    shapes |= {"output_norm": (hidden,), "output_norm.bias": (hidden,)}
    return shapes | {f"blk.{block}.{name}": shape for block in range(2) for name, shape in (layer | norms).items()}


def write_gguf(
    path: Path, architecture: str = "llama", kind: str = "Q8_0", only: str = "attn", layers: int = 2
) -> Path:
    """Write a model with random weights. Matrices with `only` in their names are quantized to `kind`.

    `layers` other than 2 are for "llama".
    """
    hidden = 64
    inner = 96
    heads = 4
    kv_heads = 4 if architecture == "t5" else 2
    width = 128 if architecture == "qwen3" else hidden // heads  # transformers assumes this size for Qwen 3
    if architecture == "t5":
        shapes = t5_shapes(hidden, inner, heads, width)
    elif architecture == "gpt2":
        shapes = gpt2_shapes(hidden)
    else:
        normed = architecture in ("qwen3", "gemma3")
        shapes = decoder_shapes(hidden, inner, heads, kv_heads, width, normed, layers)
    for block in range(2):
        if architecture in ("gemma2", "gemma3"):
            shapes |= {f"blk.{block}.{name}": (hidden,) for name in ("post_attention_norm", "post_ffw_norm")}
        if architecture == "phi3":
            parts = [shapes.pop(f"blk.{block}.{name}")[0] for name in ("attn_q", "attn_k", "attn_v")]
            shapes[f"blk.{block}.attn_qkv"] = sum(parts), hidden
            shapes[f"blk.{block}.ffn_up"] = 2 * shapes.pop(f"blk.{block}.ffn_gate")[0], hidden
    if architecture == "gemma2":
        del shapes["output"]  # tied to the embedding
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(32)
    if architecture == "phi3":
        writer.add_pad_token_id(0)  # the default of transformers is not in the embedding
    if architecture in ("t5", "gemma2", "gemma3"):
        writer.add_key_length(width)
    if architecture == "t5":
        writer.add_relative_attn_buckets_count(32)
        writer.add_decoder_start_token_id(0)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = random.standard_normal(shape, np.float32)
        quantized = array.ndim == 2 and only in name and "rel" not in name
        stored = gguf.GGMLQuantizationType[kind if quantized else "F32"]
        full = name if name.endswith(".bias") else f"{name}.weight"
        writer.add_tensor(full, gguf.quantize(array, stored) if quantized else array, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
