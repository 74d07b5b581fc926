"""The manifest of a bundle: the one schema that `graphs` and `freeexport` write and `runtime` reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.bundle.costs import Costs
from runtime.bundle.schema import Reader, is_newer
from runtime.errors import BundleError
from runtime.json_file import UnreadableError, parse_json

# A newer minor version only adds fields that may be skipped; a newer major one cannot be read.
SCHEMA_VERSION, SCHEMA_MINOR = 2, 1
MANIFEST = "freeexport.json"
HASH = "manifest_sha256"

# Limits, far beyond any model there is: bytes of the manifest, entries of each of its lists, and the largest numbers.
LARGEST_MANIFEST = 4 << 20
MOST_ENTRIES = 10_000
LARGEST = {
    "layers": 10_000,
    "exit_layers": 10_000,
    "hidden_size": 1 << 20,
    "vocab_size": 1 << 26,
    "heads": 1 << 16,
    "kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "capacity": 1 << 26,
    "max_pending": 1 << 16,
    "encoder_capacity": 1 << 26,
    "weight_bytes": 1 << 50,
}
LARGEST_SIZE = 1 << 50
_SHA256 = re.compile(r"[0-9a-f]{64}")

ConfidenceMeasure = Literal["softmax", "max-prob", "entropy"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4", "mixed"]
Dialect = Literal["ort", "standard"]
Target = Literal["cpu", "cuda", "tensorrt"]
# int8-block and int4: blocks along the inputs, activations by row and block. For TensorRT weights alone are rounded:
# int8 and fp8 by output channel, int4 in blocks. Older bundles for CPUs have int8 too, with activations by row.
TensorFormat = Literal["fp32", "fp16", "bf16", "int8", "int8-block", "int4", "fp8"]
FloatType = Literal["fp32", "fp16", "bf16"]
# Whose operators multiply with quantized weights on a CPU.
Kernels = Literal["onnxruntime", "freeexport"]
# Of a head whose model is rounded: "int8" is in blocks.
HeadPrecision = Literal["int8", "int4"]


@dataclass(frozen=True)
class HigherTensor:
    """A weight with a higher format than its engine: it would lose too much as `wanted`, and `error` is
    |W - rounded W| / |W|, or the plan gives it more bits, and `error` is None."""

    engine: str
    tensor: str
    wanted: TensorFormat
    stored: TensorFormat
    error: float | None


@dataclass(frozen=True)
class EnginePrecision:
    """The linear layers of an engine: their format, that of its head (None for an engine without one), bytes of weights
    and scales, and the largest relative error of a weight, before it was fitted to text. `kept`: tensors in 4 bits that
    the checkpoint had in 4 bits already."""

    engine: str
    linears: TensorFormat
    head: TensorFormat | None
    bytes: int
    largest_error: float
    kept: int = 0


@dataclass(frozen=True)
class RoundingData:
    """The text that weights in 4 bits were rounded for: how many lines of a file, how many tokens of the decoder, and
    the sha256 of the file."""

    texts: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Quantization:
    """How a bundle's weights were quantized. `int8_range` is of older bundles: of weights that are int8 for a CPU.
    `rounding_data` is None where no text was used."""

    engines: tuple[EnginePrecision, ...] = ()
    higher: tuple[HigherTensor, ...] = ()
    int8_range: Literal["full", "reduced"] | None = None
    rounding_data: RoundingData | None = None


@dataclass(frozen=True)
class ExitVocabulary:
    """`size` tokens, chosen on `text_tokens` tokens of text, of which they are the share `covered`: the others can
    never exit."""

    size: int
    covered: float
    text_tokens: int


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
    are quantized for a GPU, None elsewhere; see `float_type`. `packed`: the deep engine computes the rows of a call
    that count only. `exit_trained`: whether the checkpoint was trained for this exit, None in bundles that do not say.
    `exit_layers`: how many layers the exit has of its own, behind the exit layer, which only its prediction reads.
    `kernels`: the version of our own operators that the graphs need, None for ONNX Runtime's alone. `costs`: as
    `convert` measured them, None where it did not. `schema_minor`: once read, that of this code.
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
    costs: Costs | None = None
    quantization: Quantization | None = None
    exit_vocabulary: ExitVocabulary | None = None
    rollback_threshold: float | None = None
    target: Target = "cpu"
    tuned_max_pending: int | None = None
    compute: FloatType | None = None
    packed: bool = False
    exit_trained: bool | None = None
    kernels: int | None = None
    exit_layers: int = 0
    schema_minor: int = SCHEMA_MINOR

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
    def shallow_caches(self) -> tuple[int | str, ...]:
        """The names that the layers of the shallow engine have in its KV cache."""
        return (*self.shallow_layers, *(f"exit.{number}" for number in range(self.exit_layers)))

    @property
    def float_type(self) -> FloatType:
        """The type of activations, the KV cache, and weights that are not quantized."""
        if self.compute is not None:
            return self.compute
        return self.precision if self.precision in ("fp16", "bf16") else "fp32"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one position takes in the self-attention caches of all layers."""
        return (
            2
            * (self.layers + self.exit_layers)
            * self.kv_heads
            * self.head_dim
            * (4 if self.float_type == "fp32" else 2)
        )

    @property
    def kv_bytes_per_sequence(self) -> int:
        """Bytes of one slot: self-attention caches, and the cross-attention cache at full encoder capacity."""
        return self.kv_bytes_per_token * (self.capacity + self.max_pending + self.encoder_capacity)

    def to_json(self) -> str:
        """The manifest as text, with a hash of itself."""
        content = json.loads(json.dumps(dataclasses.asdict(self)))  # keys as they are read back
        return json.dumps({**content, HASH: _hash(content)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path | str = MANIFEST) -> Manifest:
        """Parse and check a manifest. Raises BundleError naming the field that is wrong."""
        try:
            raw = parse_json(text, nan=True)
        except UnreadableError as reason:
            raise BundleError(f"{where} cannot be read ({reason}); convert the checkpoint again") from None
        if not isinstance(raw, dict):
            raise BundleError(f"{where} holds {type(raw).__name__}, not an object; convert the checkpoint again")
        digest = raw.pop(HASH, None)
        written = _hash(raw)
        newer = is_newer(raw, str(where), (SCHEMA_VERSION, SCHEMA_MINOR))
        if digest != written:
            raise BundleError(f"{where} was altered (its own sha256 differs); convert the checkpoint again")
        if isinstance(raw.get("quantization"), dict):
            raw["quantization"].pop("exact_rows", None)  # of older bundles
        remedy = "upgrade freeexport, or convert the checkpoint again" if newer else "convert the checkpoint again"
        manifest: Manifest = Reader(remedy, True, MOST_ENTRIES, skips=newer).read(cls, raw, str(where))
        manifest._check(str(where))
        return manifest

    def _check(self, where: str) -> None:
        start = self.decoder_start_token_id
        rules: list[tuple[bool, str, Any]] = [
            *(((value := getattr(self, name)) <= most, name, value) for name, most in LARGEST.items()),
            (self.schema_version == SCHEMA_VERSION, "schema_version", self.schema_version),
            (self.schema_minor == SCHEMA_MINOR, "schema_minor", self.schema_minor),
            (self.costs is None or self.costs.sound, "costs", self.costs),
            (self.layers >= 2, "layers", self.layers),
            (1 <= self.exit_layer < self.layers, "exit_layer", self.exit_layer),
            (self.exit_layers == 0 or (self.exit_layers > 0 and self.packed), "exit_layers", self.exit_layers),
            (min(self.hidden_size, self.vocab_size, self.heads, self.kv_heads, self.head_dim) > 0, "sizes", 0),
            (self.capacity > 0, "capacity", self.capacity),
            (self.max_pending >= 1, "max_pending", self.max_pending),
            (1 <= (self.tuned_max_pending or 1) <= self.max_pending, "tuned_max_pending", self.tuned_max_pending),
            (self.encoder_capacity >= 0, "encoder_capacity", self.encoder_capacity),
            (0.0 <= self.threshold <= 1.0, "threshold", self.threshold),
            (0.0 <= (self.rollback_threshold or 0.0) < math.inf, "rollback_threshold", self.rollback_threshold),
            (start is not None or not self.encoder_decoder, "decoder_start_token_id", start),
            (0 <= (start or 0) < self.vocab_size, "decoder_start_token_id", start),
            (self.weight_bytes >= 0, "weight_bytes", self.weight_bytes),
            (all(0 <= token < self.vocab_size for token in self.eos_token_ids), "eos_token_ids", self.eos_token_ids),
        ]
        for holds, name, value in rules:
            if not holds:
                raise BundleError(f"{where}: {name} = {repr(value)[:80]} is out of range; convert the checkpoint again")
        if (self.quantization is None) != (self.precision in ("fp32", "fp16", "bf16")):
            stated = "no" if self.quantization is None else "a"
            raise BundleError(
                f"{where} has {stated} quantization with precision {self.precision!r}; convert the checkpoint again"
            )
        for name, file in self.files.items():
            check_relative(name, where)
            if not 0 <= file.size <= LARGEST_SIZE or _SHA256.fullmatch(file.sha256) is None:
                raise BundleError(
                    f"{where}: {name!r} has size {file.size} and sha256 {file.sha256[:80]!r}, which cannot be; "
                    "convert the checkpoint again"
                )


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_relative(name: str, where: str) -> None:
    """Refuse a file name that could leave the bundle's directory."""
    path = Path(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise BundleError(f"{where} names {name[:200]!r}, which leaves the bundle; do not use this bundle")
    if path.as_posix() != name or not name.isprintable():
        raise BundleError(f"{where} names {name[:200]!r}, which is no plain file name; do not use this bundle")
