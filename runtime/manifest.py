"""The manifest of a bundle: the one schema that `graphs` and `freeexport` write and `runtime` reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.errors import BundleError
from runtime.exit_vocabulary import ExitVocabulary
from runtime.precision import FloatType, Quantization
from runtime.schema import Reader

SCHEMA_VERSION = 1
MANIFEST = "freeexport.json"
HASH = "manifest_sha256"

# A cost of the manifest: how much faster a deep pass and shallow steps are at the same time than in turn. Part of what
# is run ahead is thrown away, so it must be clearly faster.
OVERLAP_GAIN, LEAST_GAIN = "overlap_gain", 1.3

ConfidenceMeasure = Literal["softmax", "max-prob", "entropy"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4", "mixed"]
Dialect = Literal["ort", "standard"]
Target = Literal["cpu", "cuda", "tensorrt"]


@dataclass(frozen=True)
class File:
    """A file of the bundle: size in bytes, and the sha256 of its content in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class DeclaredCopy:
    """Bytes of weights that stand a second time on purpose, and why."""

    tensor: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Everything `runtime` must know about a bundle before it loads an engine. Lengths count tokens.

    `capacity` is the most valid positions of a decoder's KV cache; the cache itself has `max_pending` more rows.
    `encoder_capacity` is the longest prompt of an encoder-decoder (0 for a decoder-only bundle).
    `threshold` 1.0 means not calibrated: nothing exits. `quantization` is None where no weight was rounded, and
    `exit_vocabulary` where the shallow head knows all tokens. `rollback_threshold`: nats, None where not calibrated.
    `target` is what the graphs were written for. `tuned_max_pending`: rows of a sync pass at most, in mode free, where
    `freeexport tune` chose fewer than there is room for. `compute`: the type of activations and KV cache where weights
    are rounded for a GPU, None elsewhere; see `float_type`. `packed`: the deep engine computes the rows of a call that
    count only. `kernels`: the version of our own operators that the graphs need, None for ONNX Runtime's alone.
    """

    schema_version: int
    family: str
    dialect: Dialect
    precision: Precision
    layers: int
    exit_layer: int
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    max_pending: int
    encoder_capacity: int
    confidence: ConfidenceMeasure
    threshold: float
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    decoder_start_token_id: int | None
    verified: bool
    source: str
    source_sha256: str
    weight_bytes: int
    files: dict[str, File]
    versions: dict[str, str] = field(default_factory=dict)
    copies: tuple[DeclaredCopy, ...] = ()
    break_even: dict[str, float] = field(default_factory=dict)
    quantization: Quantization | None = None
    exit_vocabulary: ExitVocabulary | None = None
    rollback_threshold: float | None = None
    target: Target = "cpu"
    tuned_max_pending: int | None = None
    compute: FloatType | None = None
    packed: bool = False
    kernels: int | None = None

    @property
    def encoder_decoder(self) -> bool:
        return self.encoder_capacity > 0

    @property
    def shallow_layers(self) -> range:
        return range(self.exit_layer)

    @property
    def deep_layers(self) -> range:
        return range(self.exit_layer, self.layers)

    @property
    def float_type(self) -> FloatType:
        """Of activations, the KV cache, and weights that are not rounded."""
        if self.compute is not None:
            return self.compute
        return self.precision if self.precision in ("fp16", "bf16") else "fp32"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one position takes in the self-attention caches of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (4 if self.float_type == "fp32" else 2)

    @property
    def kv_bytes_per_sequence(self) -> int:
        """Bytes of one slot: self-attention caches, and the cross-attention cache at full encoder capacity."""
        return self.kv_bytes_per_token * (self.capacity + self.max_pending + self.encoder_capacity)

    def to_json(self) -> str:
        """The manifest as text, with a hash of itself."""
        content = dataclasses.asdict(self)
        return json.dumps({**content, HASH: _hash(content)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path | str = MANIFEST) -> Manifest:
        """Parse and check a manifest. Raises BundleError naming the field that is wrong."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where} is not JSON ({error}); convert the checkpoint again") from None
        if not isinstance(raw, dict):
            raise BundleError(f"{where} holds {type(raw).__name__}, not an object; convert the checkpoint again")
        version = raw.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BundleError(
                f"{where} has schema version {version}, this freeexport reads up to {SCHEMA_VERSION}; upgrade it"
            )
        digest = raw.pop(HASH, None)
        if digest != _hash(raw):
            raise BundleError(f"{where} was altered (its own sha256 differs); convert the checkpoint again")
        manifest: Manifest = Reader("convert the checkpoint again").read(cls, raw, str(where))
        manifest._check(str(where))
        return manifest

    def _check(self, where: str) -> None:
        rules = [
            (self.schema_version == SCHEMA_VERSION, "schema_version", self.schema_version),
            (self.layers >= 2, "layers", self.layers),
            (1 <= self.exit_layer < self.layers, "exit_layer", self.exit_layer),
            (min(self.hidden_size, self.vocab_size, self.heads, self.kv_heads, self.head_dim) > 0, "sizes", 0),
            (self.capacity > 0, "capacity", self.capacity),
            (self.max_pending >= 1, "max_pending", self.max_pending),
            (1 <= (self.tuned_max_pending or 1) <= self.max_pending, "tuned_max_pending", self.tuned_max_pending),
            (self.encoder_capacity >= 0, "encoder_capacity", self.encoder_capacity),
            (0.0 <= self.threshold <= 1.0, "threshold", self.threshold),
            (0.0 <= (self.rollback_threshold or 0.0) < math.inf, "rollback_threshold", self.rollback_threshold),
            (not self.encoder_decoder or self.decoder_start_token_id is not None, "decoder_start_token_id", None),
            (all(0 <= token < self.vocab_size for token in self.eos_token_ids), "eos_token_ids", self.eos_token_ids),
        ]
        for holds, name, value in rules:
            if not holds:
                raise BundleError(f"{where}: {name} = {value!r} is out of range; convert the checkpoint again")
        for name in self.files:
            check_relative(name, where)


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_relative(name: str, where: str) -> None:
    """Refuse a file name that could leave the bundle's directory."""
    path = Path(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise BundleError(f"{where} names {name!r}, which leaves the bundle; do not use this bundle")
