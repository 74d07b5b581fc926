"""GGUF files: tensors under their Hugging Face names, dequantized to float32 as in transformers."""

from __future__ import annotations

import re
import struct
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.gguf_header import (
    ARCHITECTURES,
    MAX_TENSORS,
    TEXT,
    Array,
    Header,
    StoredTensor,
)
from freeexport.checkpoints.gguf_values import KINDS, values_of
from freeexport.checkpoints.weight_files import CheckpointError, TensorFile
from graphs.errors import UnsupportedModelError
from graphs.quantization.panels import InFile
from graphs.quantization.rounding import Rounded
from graphs.shapes import MAX_HEADS, MAX_LAYERS, MAX_WIDTH
from runtime.errors import one_line

# A GGUF name maps to names in many architectures. These patterns match those of transformers.
_DECODER_ONLY = re.compile(
    r"model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm|(pre|post)_feedforward_layernorm"
    r"|self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj))|lm_head"
)
_OTHERS = {
    "gpt2": re.compile(
        r"transformer\.(w[tp]e|ln_f|h\.\d+\.(ln_[12]|attn\.c_(attn|proj)|mlp\.c_(fc|proj)))|lm_head"
    ),
    "phi3": re.compile(
        r"model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm"
        r"|self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj))|lm_head"
    ),
}
_ENCODER_DECODER = re.compile(
    r"(encoder|decoder)\.(block\.\d+\.layer\..+|final_layer_norm)|shared|lm_head"
)
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
# numpy types of unquantized tensors by type number: F32, F16, I8, I16, I32, I64, F64.
_PLAIN = {0: "f4", 1: "f2", 24: "i1", 25: "i2", 26: "i4", 27: "i8", 28: "f8"}


class GGUFFile(TensorFile):
    """Weights of a GGUF file.

    Raises:
        CheckpointError: If the file is damaged or is one part of a split file.
        UnsupportedModelError: If the architecture is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = header = Header(path)
        if (self._field("split.count", MAX_TENSORS) or 1) > 1:
            raise CheckpointError(
                f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge"
            )
        self._architecture = str(header.fields.get("general.architecture"))
        if self._architecture not in ARCHITECTURES:
            raise CheckpointError(f"{path} names no general.architecture; download it again")
        if "rope_factors_short.weight" in header.tensors:
            raise UnsupportedModelError(
                f"{path}: its rotary positions have factors (rope_factors_short), which "
                "transformers does not read; give the original checkpoint"
            )
        embedding = header.tensors.get("token_embd.weight")
        for name in ("tokens", "scores", "token_type"):
            # transformers reads every item, so there must not be more items than embedding rows.
            array = header.fields.get(f"tokenizer.ggml.{name}")
            if (
                isinstance(array, Array)
                and embedding is not None
                and array.length > embedding.shape[0]
            ):
                raise CheckpointError(
                    f"{path}: tokenizer.ggml.{name} has {array.length} items, and the embedding "
                    f"{embedding.shape[0]} rows; download it again"
                )
        for key, maximum in (("attention.head_count", MAX_HEADS), ("embedding_length", MAX_WIDTH)):
            self._field(f"{self._architecture}.{key}", maximum)
        keys = (f"{self._architecture}.{key}" for key in ("block_count", "decoder_block_count"))
        blocks = max(self._field(key, MAX_LAYERS) or 0 for key in keys)
        self._data: Any = np.memmap(path, mode="r")
        self._tensors = _hugging_face_names(header.tensors, self._architecture, blocks)
        self.shapes = {
            name: tensor.shape[::-1] if self._is_conv(tensor) else tensor.shape
            for name, tensor in self._tensors.items()
        }
        self.nbytes = sum(tensor.nbytes for tensor in header.tensors.values())

    def _field(self, key: str, maximum: int, minimum: int = 1) -> int | None:
        value = self.header.fields.get(key)
        if value is not None and not (type(value) is int and minimum <= value <= maximum):
            raise CheckpointError(
                f"{self.path}: {key} is {str(value)[:40]!r}; it must be a whole number from "
                f"{minimum} to {maximum}"
            )
        return value

    def _is_conv(self, tensor: StoredTensor) -> bool:
        """Return True if transformers stores the matrix transposed, as in GPT-2's Conv1D layers."""
        return (
            self._architecture == "gpt2"
            and tensor.name.startswith("blk.")
            and len(tensor.shape) == 2
        )

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.tokens" in self.header.fields

    def special_tokens(self) -> dict[str, str]:
        """Return the bos, eos, unk and pad tokens that the file defines.

        The keys are "bos_token", "eos_token", "unk_token" and "pad_token".
        """
        tokens = self.header.fields.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, Array) or tokens.kind != TEXT or not tokens.length:
            return {}
        found = {}
        unpack = struct.Struct(self.header.order + "Q").unpack_from
        for name, key in _SPECIAL_TOKENS.items():
            index = self._field(f"tokenizer.ggml.{key}_token_id", tokens.length - 1, 0)
            if index is not None:
                at = tokens.at
                for _ in range(index):
                    at += 8 + unpack(self._data, at)[0]
                (length,) = unpack(self._data, at)
                found[name] = (
                    self._data[at + 8 : at + 8 + length].tobytes().decode("utf-8", "replace")
                )
        return found

    def _ordered(self, tensor: StoredTensor, array: np.ndarray) -> np.ndarray:
        """Reorder the rows [heads * head_dim, ...] of a Llama's query and key.

        llama.cpp stores the two halves of a rotation as interleaved pairs.
        """
        if self._architecture != "llama" or not (
            part := re.search(r"\.attn_([qk])\.", tensor.name)
        ):
            return array
        heads = self._field("llama.attention.head_count", MAX_HEADS)
        if part[1] == "k":
            heads = self._field("llama.attention.head_count_kv", MAX_HEADS) or heads
        if heads is None:
            raise CheckpointError(
                f"{self.path} has no llama.attention.head_count; download it again"
            )
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)

    def kinds(self) -> Counter[str]:
        """Count the matrices of the file by the name of their type."""
        from gguf.constants import GGMLQuantizationType

        return Counter(
            GGMLQuantizationType(one.kind).name
            for one in self._tensors.values()
            if len(one.shape) == 2
        )

    def in_file(self, name: str, exact: bool = False) -> InFile | None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        tensor = self._tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        known = KINDS.get(kind.name)
        # Unless a file has other types, the conversion plan decides the format of Q8_0. Q4_0 and
        # Q4_1 are recognized by their values, like other 4-bit checkpoints.
        planned = {"Q8_0", "Q4_0", "Q4_1"}
        if not exact and kind.name in planned:
            others = self.kinds().keys() & (KINDS.keys() - planned)
            if kind.name != "Q8_0" or not others:
                return None
        if (
            known is None
            or len(tensor.shape) != 2
            or self.header.order == ">"
            or self._is_conv(tensor)
        ):
            return None

        def read() -> Rounded:
            begin = self.header.data + tensor.at
            raw = np.asarray(self._data[begin : begin + tensor.nbytes]).reshape(
                -1, GGML_QUANT_SIZES[kind][1]
            )
            found = values_of(kind.name, raw, tensor.shape[0])
            if found is None:
                raise CheckpointError(
                    f"{self.path}: tensor {name} holds NaN or infinity; repair or replace the file"
                )
            order = self._ordered(tensor, np.arange(tensor.shape[0]))
            rest = (
                None if part is None else part[order] for part in (found.offsets, found.multiples)
            )
            return Rounded(found.data[order], found.scales[order], None, 0.0, *rest)

        return InFile(kind.name, known.format, known.block, read)

    def read(self, name: str) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        order = self.header.order
        begin = self.header.data + tensor.at
        stored = np.asarray(self._data[begin : begin + tensor.nbytes])
        try:
            if tensor.kind in _PLAIN:
                array = stored.view(np.dtype(_PLAIN[tensor.kind]).newbyteorder(order)).astype(
                    np.float32
                )
            elif order == ">":
                raise NotImplementedError("its quantized blocks are in the other byte order")
            else:
                array = dequantize(
                    stored.reshape(*tensor.shape[:-1], -1), GGMLQuantizationType(tensor.kind)
                )
            array = self._ordered(tensor, array.reshape(tensor.shape))
            if self._architecture in ("gemma2", "gemma3") and tensor.name.endswith("norm.weight"):
                array = array - 1  # llama.cpp stores weight + 1
            if self._is_conv(tensor):
                array = np.ascontiguousarray(array.T)
        except (
            NotImplementedError,
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            OverflowError,
        ) as error:
            raise CheckpointError(
                f"{self.path}: {name} cannot be dequantised ({one_line(error)}); use a file of "
                "another quantisation"
            ) from None
        return array


def _hugging_face_names(
    found: dict[str, StoredTensor], architecture: str, blocks: int
) -> dict[str, StoredTensor]:
    """Map tensors to their Hugging Face names.

    Tensors without one, such as rope_freqs.weight, keep theirs.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    candidates: dict[str, list[str]] = defaultdict(list)
    for name, (_, gguf_name) in get_tensor_name_map(known, blocks).mapping.items():
        candidates[gguf_name].append(name)
    present = {name.rpartition(".")[0] for name in found}
    canonical = (
        _ENCODER_DECODER
        if "enc.output_norm" in present
        else _OTHERS.get(architecture, _DECODER_ONLY)
    )
    tensors = {}
    for tensor in found.values():
        stem, dot, suffix = tensor.name.rpartition(".")
        names = (
            [name for name in candidates[stem] if canonical.fullmatch(name)]
            or candidates[stem]
            or [stem]
        )
        # T5 names its ungated input `wi`, and the gated pair `wi_0` and `wi_1`. Both `wi` and
        # `wi_1` are GGUF's ffn_up.
        if stem.replace("ffn_up", "ffn_gate") in present:
            names = [name for name in names if not name.endswith(".wi")]
        tensors[names[0] + dot + suffix] = tensor
    return tensors
