"""The manifest of a bundle: the one schema that `graphs` and `freeexport` write and `runtime` reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from runtime.bundle.costs import Costs
from runtime.bundle.schema import Range, Reader, is_newer, parse_object
from runtime.errors import BundleError

# A newer minor version only adds fields that may be skipped; a newer major one cannot be read.
SCHEMA_VERSION, SCHEMA_MINOR = 2, 5
MANIFEST = "freeexport.json"
HASH = "manifest_sha256"
REMEDY = "convert the checkpoint again"

# Limits beyond any model that exists: bytes of the manifest, and numbers in it.
LARGEST_MANIFEST = 4 << 20
LayerCount = Annotated[int, Range(0, 10_000)]
Width = Annotated[int, Range(1, 1 << 20)]
Heads = Annotated[int, Range(1, 1 << 16)]
Tokens = Annotated[int, Range(1, 1 << 26)]
Bytes = Annotated[int, Range(0, 1 << 50)]

ConfidenceMeasure = Literal["softmax", "max-prob", "entropy"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4", "mixed"]
Dialect = Literal["ort", "standard"]
Target = Literal["cpu", "cuda", "tensorrt"]
FloatType = Literal["fp32", "fp16", "bf16"]
# int8-block, int4, and int5 and int6 of GGUF files: blocks along the inputs, activations by row and block. For TensorRT
# only weights are quantized: int8 and fp8 by output channel, int4 in blocks. Older bundles for CPUs have int8 too, with
# activations by row.
TensorFormat = Literal["fp32", "fp16", "bf16", "int8", "int8-block", "int6", "int5", "int4", "fp8"]
# Whose operators multiply with quantized weights on a CPU.
Kernels = Literal["onnxruntime", "freeexport"]
# The format of a quantized model's head: "int8" is in blocks.
HeadPrecision = Literal["int8", "int4"]
# What an exit's own layers read: the exit layer's state, or also the deep decoder's normed state of the token before.
ExitInput = Literal["state", "feature"]


@dataclass(frozen=True)
class HigherTensor:
    """A weight stored with more bits than its engine's. `error` is |W - quantized W| / |W| as `wanted`, too large to
    accept, or None where the plan gives the weight more bits."""

    engine: str
    tensor: str
    wanted: TensorFormat
    stored: TensorFormat
    error: float | None


@dataclass(frozen=True)
class EnginePrecision:
    """The linear layers of an engine: their format, that of its head (None for an engine without one), bytes of weights
    and scales, and the largest relative error of a weight, before it was fitted to text. `kept`: tensors in bits that
    the checkpoint had already; `kinds`: how many of them by the file's name of these bits, where it was read."""

    engine: str
    linears: TensorFormat
    head: TensorFormat | None
    bytes: int
    largest_error: float
    kept: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundingData:
    """The text that 4-bit weights were fitted to: lines of a file, tokens of the decoder, sha256 of the file."""

    texts: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Quantization:
    """How weights were quantized. `int8_range` is in older bundles with int8 for a CPU. `rounding_data` is None where
    no text was used."""

    engines: tuple[EnginePrecision, ...] = ()
    higher: tuple[HigherTensor, ...] = ()
    int8_range: Literal["full", "reduced"] | None = None
    rounding_data: RoundingData | None = None


@dataclass(frozen=True)
class ExitVocabulary:
    """`size` tokens that can exit, the share `covered` of the `text_tokens` tokens that they were chosen on. `trained`:
    the exit was trained with them and one class for all others."""

    size: int
    covered: float
    text_tokens: int
    trained: bool = False


@dataclass(frozen=True)
class Speech:
    """Facts about the speech that a bundle reads: `bins` of its spectrogram, and token ids. `languages` by their
    codes and `tasks`, "transcribe" and "translate", are empty where it knows English alone. Behind `no_timestamps`
    stand the timestamps, 0.02 s apart, of which an output begins with one of the first `latest_first` + 1; before it
    stand `previous`, which begins the text before a window, and `no_speech`. `suppressed` tokens are never written,
    those of `begin_suppressed` not as the first."""

    bins: Width
    no_timestamps: int
    previous: int
    no_speech: int
    languages: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    suppressed: tuple[int, ...] = ()
    begin_suppressed: tuple[int, ...] = ()
    latest_first: int = 50

    @property
    def ids(self) -> list[int]:
        """All token ids that it names."""
        named = (self.no_timestamps, self.previous, self.no_speech, *self.languages.values(), *self.tasks.values())
        return [*named, *self.suppressed, *self.begin_suppressed]

    def prefix(self, language: str, task: str = "transcribe", timestamps: bool = False) -> list[int]:
        """The tokens that the decoder reads behind its start token before it writes."""
        chosen = [self.languages[language], self.tasks[task]] if self.languages else []
        return chosen if timestamps else [*chosen, self.no_timestamps]


@dataclass(frozen=True)
class File:
    """A file of the bundle: its size in bytes and the sha256 of its content in hexadecimal."""

    size: Bytes
    sha256: str


@dataclass(frozen=True)
class DeclaredCopy:
    """Bytes of weights that are stored twice on purpose, and why."""

    tensor: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Languages:
    """Token ids by language code. `source`: the language that the tokenizer writes into a prompt, None for none.
    `target`: where the target's token stands: as the output's first token, as the decoder's start token, or before the
    prompt."""

    tokens: dict[str, int]
    source: str | None
    target: Literal["first", "start", "prompt"]


@dataclass(frozen=True)
class Manifest:
    """Everything `runtime` must know about a bundle before it loads an engine. Lengths count tokens.

    `capacity` is the most valid positions of a decoder's KV cache; the cache itself has `max_pending` more rows.
    `encoder_capacity` is the longest prompt of an encoder-decoder (0 for a decoder-only bundle).
    `threshold` 1.0 means not calibrated: nothing exits. `quantization` is None where no weight was quantized, and
    `exit_vocabulary` where the shallow head knows all tokens. `rollback_threshold`: nats, None where not calibrated.
    `target` is the device the graphs were written for. `tuned_max_pending`: the most rows of a sync pass in mode free,
    where calibration chose fewer than there is room for. `compute`: the type of activations and KV cache where weights
    are quantized for a GPU, None elsewhere; see `float_type`. `packed`: the deep engine computes the rows of a call
    that count only. `exit_trained`: whether the checkpoint was trained for this exit, None in bundles that do not say.
    `exit_layers`: how many layers the exit has of its own, behind the exit layer, which only its prediction reads:
    where `packed`, they are run only where an exit may be taken. `exit_input`: what they read; with "feature" they and
    the shallow head are an engine of their own, exit.onnx.
    `speech` is None where prompts are text; else `encoder_capacity` is the positions of a window of sound.
    `kernels`: the version of our own operators that the graphs need, None for ONNX Runtime's alone. `kv_cache`: the
    type of keys and values where it is not `float_type`, else None. `costs`: as
    `convert` measured them, None where it did not. `forced_first_token_id`, `forced_last_token_id`: what an output
    begins with, and ends with where it is cut at its limit; None for what is predicted. `languages` of a translation
    model, None elsewhere. `schema_minor`: once read, that of this code.
    """

    schema_version: Annotated[int, Range(SCHEMA_VERSION, SCHEMA_VERSION)]
    family: str
    dialect: Dialect
    precision: Precision
    layers: LayerCount
    exit_layer: LayerCount
    hidden_size: Width
    vocab_size: Tokens
    heads: Heads
    kv_heads: Heads
    head_dim: Heads
    capacity: Tokens
    max_pending: Annotated[int, Range(1, 1 << 16)]
    encoder_capacity: Annotated[int, Range(0, 1 << 26)]
    confidence: ConfidenceMeasure
    threshold: Annotated[float, Range(0, 1)]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    decoder_start_token_id: int | None
    verified: bool
    source: str
    source_sha256: str
    weight_bytes: Bytes
    files: dict[str, File]
    versions: dict[str, str] = field(default_factory=dict)
    copies: tuple[DeclaredCopy, ...] = ()
    costs: Costs | None = None
    quantization: Quantization | None = None
    exit_vocabulary: ExitVocabulary | None = None
    rollback_threshold: Annotated[float, Range(0, math.inf)] | None = None
    target: Target = "cpu"
    tuned_max_pending: int | None = None
    compute: FloatType | None = None
    packed: bool = False
    exit_trained: bool | None = None
    kernels: int | None = None
    kv_cache: FloatType | None = None
    exit_layers: LayerCount = 0
    exit_input: ExitInput = "state"
    forced_first_token_id: int | None = None
    forced_last_token_id: int | None = None
    languages: Languages | None = None
    speech: Speech | None = None
    schema_minor: Annotated[int, Range(SCHEMA_MINOR, SCHEMA_MINOR)] = SCHEMA_MINOR

    @property
    def encoder_decoder(self) -> bool:
        return self.encoder_capacity > 0

    @property
    def output_begins(self) -> list[int]:
        """The tokens that an encoder-decoder reads before the first that is predicted."""
        first = self.forced_first_token_id
        return [self.decoder_start_token_id or 0, *([] if first is None else [first])]

    @property
    def exit_engine(self) -> bool:
        """Whether the exit is an engine of its own."""
        return self.exit_input == "feature"

    @property
    def exit_embeds(self) -> bool:
        """Whether an engine of the exit reads tokens, as no layer stands before it."""
        return self.exit_engine and self.exit_layer == 0

    @property
    def shallow_layers(self) -> range:
        return range(self.exit_layer)

    @property
    def deep_layers(self) -> range:
        return range(self.exit_layer, self.layers)

    @property
    def shallow_caches(self) -> tuple[int | str, ...]:
        """The names that the layers of the shallow engine have in its KV cache."""
        return tuple(self.shallow_layers) if self.exit_engine else (*self.shallow_layers, *self.exit_names)

    @property
    def exit_names(self) -> tuple[str, ...]:
        """The names of the exit's own layers in caches."""
        return tuple(f"exit.{number}" for number in range(self.exit_layers))

    @property
    def float_type(self) -> FloatType:
        """The type of activations, and of weights that are not quantized."""
        if self.compute is not None:
            return self.compute
        return self.precision if self.precision in ("fp16", "bf16") else "fp32"

    @property
    def cache_type(self) -> FloatType:
        """The type of keys and values, in the cache and of prompts."""
        return self.kv_cache or self.float_type

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one position in the self-attention caches of all layers."""
        element = 4 if self.cache_type == "fp32" else 2
        return 2 * (self.layers + self.exit_layers) * self.kv_heads * self.head_dim * element

    @property
    def feature_bytes_per_token(self) -> int:
        """Bytes of what an exit's engine reads at one position, which is kept: a state, or a token, and a feature."""
        feature = 4 * self.hidden_size
        return (feature + (8 if self.exit_embeds else feature)) if self.exit_engine else 0

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
        where = str(where)
        content = parse_object(text, where, REMEDY)
        digest = content.pop(HASH, None)
        written = _hash(content)
        newer = is_newer(content, where, (SCHEMA_VERSION, SCHEMA_MINOR))
        if digest != written:
            raise BundleError(f"{where} was altered (its own sha256 differs); {REMEDY}")
        if isinstance(content.get("quantization"), dict):
            content["quantization"].pop("exact_rows", None)  # of older bundles
        remedy = f"upgrade freeexport, or {REMEDY}" if newer else REMEDY
        manifest: Manifest = Reader(remedy, skips=newer).read(cls, content, where)
        manifest._check(where)
        return manifest

    def _knows(self, languages: Languages) -> bool:
        source = languages.source is None or languages.source in languages.tokens
        return source and all(0 <= token < self.vocab_size for token in languages.tokens.values())

    def _check(self, where: str) -> None:
        """Check the fields that depend on each other."""
        start = self.decoder_start_token_id
        rules: list[tuple[bool, str, Any]] = [
            (self.costs is None or self.costs.sound, "costs", self.costs),
            (self.layers >= 2, "layers", self.layers),
            (self.exit_layer >= (0 if self.exit_engine else 1), "exit_layer", self.exit_layer),
            (self.exit_layer < self.layers, "exit_layer", self.exit_layer),
            (self.exit_layers > 0 or not self.exit_engine, "exit_input", self.exit_input),
            (self.packed or not self.exit_engine, "exit_input", self.exit_input),
            (1 <= (self.tuned_max_pending or 1) <= self.max_pending, "tuned_max_pending", self.tuned_max_pending),
            (start is not None or not self.encoder_decoder, "decoder_start_token_id", start),
            *(
                (0 <= (token or 0) < self.vocab_size, name, token)
                for name, token in (
                    ("decoder_start_token_id", start),
                    ("forced_first_token_id", self.forced_first_token_id),
                    ("forced_last_token_id", self.forced_last_token_id),
                )
            ),
            (self.languages is None or self._knows(self.languages), "languages", self.languages),
            (all(0 <= token < self.vocab_size for token in self.eos_token_ids), "eos_token_ids", self.eos_token_ids),
            (self.speech is None or self.encoder_decoder, "encoder_capacity", self.encoder_capacity),
            (all(0 <= token < self.vocab_size for token in getattr(self.speech, "ids", ())), "speech", self.speech),
        ]
        for holds, name, value in rules:
            if not holds:
                raise BundleError(f"{where}: {name} = {repr(value)[:80]} is out of range; {REMEDY}")
        if (self.quantization is None) != (self.precision in ("fp32", "fp16", "bf16")):
            stated = "no" if self.quantization is None else "a"
            raise BundleError(f"{where} has {stated} quantization with precision {self.precision!r}; {REMEDY}")
        for name, file in self.files.items():
            path = Path(name)
            leaves = not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
            if leaves or path.as_posix() != name or not name.isprintable():
                problem = "leaves the bundle" if leaves else "is no plain file name"
                raise BundleError(f"{where} names {name[:200]!r}, which {problem}; do not use this bundle")
            if re.fullmatch("[0-9a-f]{64}", file.sha256) is None:
                raise BundleError(f"{where}: files.{name[:80]}: sha256 = {file.sha256[:80]!r} is no hash; {REMEDY}")


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
