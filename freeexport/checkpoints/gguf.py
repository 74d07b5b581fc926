"""GGUF files: tensors under their Hugging Face names, dequantised to float32 as transformers does it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.checkpoints.gguf_header import MAX_TENSORS, check_gguf_header
from freeexport.checkpoints.weight_files import CheckpointError, one_line
from graphs.limits import MAX_HEADS, MAX_LAYERS, MAX_WIDTH

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
        check_gguf_header(path)
        try:
            self._reader = GGUFReader(path)
        except _DAMAGE as error:
            raise CheckpointError(
                f"{path} is not a complete GGUF file ({one_line(error)}); download it again"
            ) from None
        if (self._number("split.count", MAX_TENSORS) or 1) > 1:
            raise CheckpointError(f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge")
        self._architecture = str(self._field("general.architecture"))
        self._tensors = _hugging_face_names(path, self._reader, self._architecture, self._blocks())
        self.nbytes = sum(tensor.n_bytes for tensor in self._reader.tensors)

    @property
    def has_tokenizer(self) -> bool:
        return self._field("tokenizer.ggml.tokens") is not None

    def special_tokens(self) -> dict[str, str]:
        """The tokenizer's "bos_token", "eos_token", "unk_token" and "pad_token", as far as the file has them."""
        tokens = self._field("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            return {}
        last = len(tokens) - 1
        ids = {name: self._number(f"tokenizer.ggml.{key}_token_id", last, 0) for name, key in _SPECIAL_TOKENS.items()}
        return {name: str(tokens[index]) for name, index in ids.items() if index is not None}

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type)).reshape(self.shape(name))
            array = array if array.flags.writeable else array.copy()
            if self._architecture == "llama" and (part := re.search(r"\.attn_([qk])\.", tensor.name)):
                return _halves(array, self._heads(part[1]))
        except (NotImplementedError, *_DAMAGE) as error:
            raise CheckpointError(
                f"{self.path}: {name} cannot be dequantised ({one_line(error)}); use a file of another quantisation"
            ) from None
        return array

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except _DAMAGE as error:
            raise CheckpointError(f"{self.path}: {key} cannot be read ({one_line(error)}); download it again") from None

    def _number(self, key: str, most: int, least: int = 1) -> int | None:
        """A whole number of the metadata, None where it is not there. CheckpointError where it is out of range."""
        value = self._field(key)
        if value is not None and not (type(value) is int and least <= value <= most):
            raise CheckpointError(
                f"{self.path}: {key} is {str(value)[:40]!r}; it must be a whole number from {least} to {most}"
            )
        return value

    def _blocks(self) -> int:
        """Of the encoder or the decoder, the more. What other sizes are made from is checked too."""
        for key, most in (("attention.head_count", MAX_HEADS), ("embedding_length", MAX_WIDTH)):
            self._number(f"{self._architecture}.{key}", most)
        keys = (f"{self._architecture}.{key}" for key in ("block_count", "decoder_block_count"))
        return max(self._number(key, MAX_LAYERS) or 0 for key in keys)

    def _heads(self, part: str) -> int:
        heads = self._number("llama.attention.head_count", MAX_HEADS)
        kv_heads = self._number("llama.attention.head_count_kv", MAX_HEADS) or heads
        found = heads if part == "q" else kv_heads
        if found is None:
            raise CheckpointError(f"{self.path} has no llama.attention.head_count; download it again")
        return found


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
