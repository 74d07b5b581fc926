"""GGUF files: tensors under their Hugging Face names, dequantised to float32 as transformers does it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.weight_files import CheckpointError, one_line

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

# A GGUF name stands for the names of many architectures; these are the ones transformers' own classes use.
_DECODER_ONLY = re.compile(
    r"model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm"
    r"|self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj))|lm_head"
)
_ENCODER_DECODER = re.compile(r"(encoder|decoder)\.(block\.\d+\.layer\..+|final_layer_norm)|shared|lm_head")
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError)


class GGUFFile:
    """Raises CheckpointError when the file is truncated, or of an architecture the gguf package does not know."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            self._reader = GGUFReader(path)
        except _DAMAGE as error:
            raise CheckpointError(
                f"{path} is not a complete GGUF file ({one_line(error)}); download it again"
            ) from None
        if (self._field("split.count") or 1) > 1:
            raise CheckpointError(f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge")
        self._architecture = str(self._field("general.architecture"))
        self._tensors = _hugging_face_names(path, self._reader, self._architecture, self._blocks())
        self.nbytes = sum(tensor.n_bytes for tensor in self._reader.tensors)

    @property
    def has_tokenizer(self) -> bool:
        return self._field("tokenizer.ggml.tokens") is not None

    def special_tokens(self) -> dict[str, str]:
        """The tokenizer's "bos_token", "eos_token", "unk_token" and "pad_token", as far as the file has them."""
        tokens = self._reader.get_field("tokenizer.ggml.tokens")
        ids = {name: self._field(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_TOKENS.items()}
        return {name: tokens.contents(index) for name, index in ids.items() if tokens is not None and index is not None}

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type)).reshape(self.shape(name))
        except (NotImplementedError, *_DAMAGE) as error:
            raise CheckpointError(
                f"{self.path}: {name} cannot be dequantised ({one_line(error)}); use a file of another quantisation"
            ) from None
        array = array if array.flags.writeable else array.copy()
        if self._architecture == "llama" and (part := re.search(r"\.attn_([qk])\.", tensor.name)):
            return _halves(array, self._heads(part[1]))
        return array

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _blocks(self) -> int:
        counts = [self._field(f"{self._architecture}.{key}") for key in ("block_count", "decoder_block_count")]
        return max(count or 0 for count in counts)

    def _heads(self, part: str) -> int:
        heads = self._field("llama.attention.head_count")
        kv_heads = self._field("llama.attention.head_count_kv") or heads
        return int(heads if part == "q" else kv_heads)


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary rows from llama.cpp's interleaved pairs back to halves. [heads * head_dim, ...] both ways."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _hugging_face_names(path: Path, reader: GGUFReader, architecture: str, blocks: int) -> dict[str, ReaderTensor]:
    """Tensors by Hugging Face name; those that have none (rope_freqs.weight) keep their own."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise CheckpointError(
            f"{path} has the architecture {architecture!r}, unknown to the gguf package; upgrade gguf, "
            "or convert the original checkpoint"
        )
    candidates: dict[str, list[str]] = defaultdict(list)
    for name, (_, gguf_name) in get_tensor_name_map(known[architecture], blocks).mapping.items():
        candidates[gguf_name].append(name)
    present = {tensor.name.rpartition(".")[0] for tensor in reader.tensors}
    canonical = _ENCODER_DECODER if "enc.output_norm" in present else _DECODER_ONLY
    tensors = {}
    for tensor in reader.tensors:
        stem, dot, suffix = tensor.name.rpartition(".")
        names = [name for name in candidates[stem] if canonical.fullmatch(name)] or candidates[stem] or [stem]
        # T5 calls its ungated input `wi`, the gated pair `wi_0` and `wi_1`; both `wi` and `wi_1` are GGUF's ffn_up.
        if stem.replace("ffn_up", "ffn_gate") in present:
            names = [name for name in names if not name.endswith(".wi")]
        tensors[names[0] + dot + suffix] = tensor
    return tensors
