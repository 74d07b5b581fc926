"""Manifest of a bundle: the schema that `graphs` and `freeexport` write and `runtime` reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from runtime.bundle.costs import Costs
from runtime.bundle.quantization import Quantization
from runtime.bundle.schema import Range, Reader, is_newer, parse_object
from runtime.errors import BundleError

# Newer minor versions only add optional fields. Newer major versions cannot be read.
SCHEMA_VERSION = 2
SCHEMA_MINOR = 10
MANIFEST = "freeexport.json"
HASH = "manifest_sha256"
REMEDY = "convert the checkpoint again"

# Limits for untrusted manifests: size in bytes, and numbers.
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
# Types of keys and values. int8 is followed by a scale for each head and position.
CacheType = Literal["fp32", "fp16", "bf16", "int8"]
CACHE_BYTES: dict[CacheType, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
SCALE_BYTES = 4

# Types of keys and values that `convert` can be told to use.
ChosenCache = Literal["int8"]
# Type that activations are quantized to in products with quantized weights on a CPU.
Activations = Literal["int8", "int16"]
# Version of this project's operators that a new bundle needs.
ACTIVATION_KERNELS: dict[Activations, int] = {"int8": 9, "int16": 10}
# The same for a bundle with weights of floats that these operators read.
FLOAT_KERNELS = 11
# The same for a bundle whose prologue they write, as 16 or 8 bits.
PROMPT_KERNELS = 12
# Operators that multiply with weights on a CPU.
Kernels = Literal["onnxruntime", "freeexport"]
# Format of a quantized model's head. "int8" is in blocks.
HeadPrecision = Literal["int8", "int4"]
# Input of an exit's layers. state: the exit layer's state. feature: also the deep decoder's normed
# state of the previous token. fused: also its states after a third and two thirds of its layers.
# eagle3: the token's embedding, and one map of three states of the previous token.
TrainedInput = Literal["state", "feature", "fused"]
ExitInput = Literal[TrainedInput, "eagle3"]
# States in the feature of a token, each of d values.
FEATURE_STATES: dict[ExitInput, int] = {"state": 0, "feature": 1, "fused": 3, "eagle3": 1}


def cached_width(head_dim: int, itemsize: int) -> int:
    """Return the elements of a position and head in a KV cache of `itemsize` bytes a value.

    These are its values and, in 8 bits, the bytes of their scale.
    """
    return head_dim + (SCALE_BYTES if itemsize == 1 else 0)


@dataclass(frozen=True)
class ExitVocabulary:
    """Tokens that can exit.

    Attributes:
        size: Number of tokens.
        covered: Share of `text_tokens` that they cover.
        text_tokens: Number of tokens of the text that they were chosen on. 0 if unknown, as for an
            EAGLE-3 head.
        trained: The exit was trained with these tokens and one class for all others.
    """

    size: int
    covered: float
    text_tokens: int
    trained: bool = False


@dataclass(frozen=True)
class Speech:
    """Properties of a speech model.

    Attributes:
        bins: Frequency bins of its spectrogram.
        no_timestamps: Token that switches off timestamps. The timestamp tokens, 0.02 s apart,
            follow it.
        previous: Token before the text of the previous window.
        no_speech: Token for silence.
        languages: Tokens by language code. Empty for English-only models.
        tasks: Tokens of "transcribe" and "translate". Empty for English-only models.
        suppressed: Tokens that are never written.
        begin_suppressed: Tokens that are never written first.
        latest_first: An output begins with one of the first `latest_first` + 1 timestamps.
        alignment_heads: Layer and head of the cross-attention heads that follow the sound, for the
            times of words. Empty if the engines do not output the queries of these layers.
    """

    bins: Width
    no_timestamps: int
    previous: int
    no_speech: int
    languages: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    suppressed: tuple[int, ...] = ()
    begin_suppressed: tuple[int, ...] = ()
    latest_first: int = 50
    alignment_heads: tuple[tuple[int, ...], ...] = ()

    @property
    def ids(self) -> list[int]:
        """All token ids of these properties."""
        named = (
            self.no_timestamps,
            self.previous,
            self.no_speech,
            *self.languages.values(),
            *self.tasks.values(),
        )
        return [*named, *self.suppressed, *self.begin_suppressed]

    def prefix(
        self, language: str, task: str = "transcribe", timestamps: bool = False
    ) -> list[int]:
        """Return the tokens that the decoder reads after its start token, before it writes."""
        chosen = [self.languages[language], self.tasks[task]] if self.languages else []
        return chosen if timestamps else [*chosen, self.no_timestamps]


@dataclass(frozen=True)
class File:
    """A file of the bundle.

    Attributes:
        size: Size in bytes.
        sha256: Hash of its content, in hexadecimal.
    """

    size: Bytes
    sha256: str


@dataclass(frozen=True)
class DeclaredCopy:
    """Weights that are deliberately stored twice.

    Attributes:
        tensor: What is stored twice.
        bytes: Size of the copy.
        reason: Why.
    """

    tensor: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Languages:
    """Languages of a translation model.

    Attributes:
        tokens: Token ids by language code.
        source: Language that the tokenizer writes into a prompt. None if it writes none.
        target: Position of the target language's token: "first" token of the output, "start" token
            of the decoder, or before the "prompt".
    """

    tokens: dict[str, int]
    source: str | None
    target: Literal["first", "start", "prompt"]


@dataclass(frozen=True)
class DraftGain:
    """Speed of mode lossless with the drafts of an exit, as a multiple of drafts from text alone.

    Attributes:
        value: Speed over all prompts.
        low: Lower end of the 95 % interval over prompts.
        high: Upper end.
        prompts: Number of prompts that were decoded.
    """

    value: Annotated[float, Range(0, 1e6)]
    low: Annotated[float, Range(0, 1e6)]
    high: Annotated[float, Range(0, 1e6)]
    prompts: Annotated[int, Range(2, 1 << 20)]

    @property
    def pays(self) -> bool:
        """True if the exit makes mode lossless faster, by the lower end of the interval."""
        return self.low > 1


@dataclass(frozen=True)
class ReadyMadeExit:
    """A ready-made exit that a bundle was converted with.

    Attributes:
        name: Name of the exit.
        sha256: Hash of its content, in hexadecimal.
        file: Name of its file. None if it comes with freeexport.
        agreement: Share of the full model's tokens that it predicts: as its file records, or as
            measured with the weights of this bundle if they differ. None if unknown.
        gain: Measured by `convert`, with the machine and threads of the bundle's costs. None if it
            was not measured, or the machine was busy.
    """

    name: str
    sha256: str
    file: str | None = None
    agreement: Annotated[float, Range(0, 1)] | None = None
    gain: DraftGain | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything `runtime` needs to know about a bundle before it loads an engine.

    Lengths are in tokens. Fields that are not listed are self-explanatory or described at their
    type.

    Attributes:
        capacity: Most valid positions of a decoder's KV cache. The cache has `max_pending` more
            rows.
        max_pending: Most rows of a sync pass.
        encoder_capacity: Longest prompt of an encoder-decoder. For speech, positions of a window. 0
            for decoder-only bundles.
        threshold: Tokens with a higher confidence exit. 1.0 in bundles that are not calibrated.
        costs: Costs measured by `convert`. None if they were not measured.
        quantization: None if no weight was quantized.
        weight_formats: Number of matrices by stored format, if this project's operators multiply
            with their exact values: a type of floats, or a format of the checkpoint file (Q4_K).
        exit_vocabulary: None if the shallow head predicts all tokens.
        rollback_threshold: Limit for mode rollback, in nats. None if not calibrated.
        target: Device that the graphs were built for.
        tuned_max_pending: Most rows of a sync pass in mode free, if calibration chose fewer than
            `max_pending`.
        compute: Type of activations and KV cache if weights are quantized for a GPU. See
            `float_type`.
        packed: The deep engine computes rows without padding.
        exit_trained: The checkpoint was trained for this exit. None if unknown.
        kernels: Version of this project's operators that the graphs need. None: ONNX Runtime's
            only.
        kv_cache: Type of keys and values, if it is not `float_type`. int8 only with this project's
            operators, for encoder-decoders from version 12 on.
        activations: Type of activations in products with quantized weights on a CPU, if it is
            not int8. Only with this project's operators, from version 10 on.
        exit_layers: Number of layers of the exit itself, after the exit layer. If `packed`, they
            run only if an exit may be taken.
        exit_input: What the exit's layers read. Unless it is "state", they and the shallow head are
            an engine, exit.onnx.
        forced_first_token_id: First token of every output. None if it is predicted.
        forced_last_token_id: Last token of an output that reaches its length limit. None if it is
            predicted.
        languages: Languages of a translation model.
        speech: Properties of a speech model. None if prompts are text.
        ready_made_exit: None if the checkpoint has an exit of its own, or none.
        schema_minor: Minor version of this code, after reading.
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
    weight_formats: dict[str, int] = field(default_factory=dict)
    exit_vocabulary: ExitVocabulary | None = None
    rollback_threshold: Annotated[float, Range(0, math.inf)] | None = None
    target: Target = "cpu"
    tuned_max_pending: int | None = None
    compute: FloatType | None = None
    packed: bool = False
    exit_trained: bool | None = None
    kernels: int | None = None
    kv_cache: CacheType | None = None
    activations: Activations | None = None
    exit_layers: LayerCount = 0
    exit_input: ExitInput = "state"
    forced_first_token_id: int | None = None
    forced_last_token_id: int | None = None
    languages: Languages | None = None
    speech: Speech | None = None
    ready_made_exit: ReadyMadeExit | None = None
    schema_minor: Annotated[int, Range(SCHEMA_MINOR, SCHEMA_MINOR)] = SCHEMA_MINOR

    @property
    def encoder_decoder(self) -> bool:
        return self.encoder_capacity > 0

    @property
    def output_begins(self) -> list[int]:
        """Tokens that an encoder-decoder reads before its first prediction."""
        first = self.forced_first_token_id
        return [self.decoder_start_token_id or 0, *([] if first is None else [first])]

    @property
    def exit_engine(self) -> bool:
        """True if the exit is an engine of its own."""
        return self.exit_input != "state"

    @property
    def feature_size(self) -> int:
        """Size of a token's feature. 0 if the exit reads none."""
        return FEATURE_STATES[self.exit_input] * self.hidden_size

    @property
    def exit_skips(self) -> int:
        """Number of first positions that the exit does not read: 1 for an EAGLE-3 head."""
        return int(self.exit_input == "eagle3")

    @property
    def exit_embeds(self) -> bool:
        """True if the exit's engine reads tokens, because no layer precedes it."""
        return self.exit_engine and self.exit_layer == 0

    @property
    def shallow_layers(self) -> range:
        return range(self.exit_layer)

    @property
    def deep_layers(self) -> range:
        return range(self.exit_layer, self.layers)

    @property
    def query_layers(self) -> tuple[int, ...]:
        """Layers whose engine outputs the queries of cross-attention."""
        heads = () if self.speech is None else self.speech.alignment_heads
        return tuple(sorted({layer for layer, _ in heads}))

    @property
    def shallow_caches(self) -> tuple[int | str, ...]:
        """Cache names of the shallow engine's layers."""
        if self.exit_engine:
            return tuple(self.shallow_layers)
        return (*self.shallow_layers, *self.exit_names)

    @property
    def exit_names(self) -> tuple[str, ...]:
        """Cache names of the exit's layers."""
        return tuple(f"exit.{number}" for number in range(self.exit_layers))

    @property
    def float_type(self) -> FloatType:
        """Type of activations and of weights that are not quantized."""
        if self.compute is not None:
            return self.compute
        own = self.kernels is not None
        return self.precision if self.precision in ("fp16", "bf16") and not own else "fp32"

    @property
    def cache_type(self) -> CacheType:
        """Type of keys and values, in the KV cache and of prompts."""
        return self.kv_cache or self.float_type

    @property
    def cache_width(self) -> int:
        """Elements of a position and head in the KV cache: its values, and the bytes of a scale."""
        return cached_width(self.head_dim, CACHE_BYTES[self.cache_type])

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one position in the self-attention caches of all layers."""
        width = self.cache_width * CACHE_BYTES[self.cache_type]
        return 2 * (self.layers + self.exit_layers) * self.kv_heads * width

    @property
    def feature_bytes_per_token(self) -> int:
        """Bytes kept per position for an exit's engine: a state or token, and a feature."""
        if not self.exit_engine:
            return 0
        return 4 * self.feature_size + (8 if self.exit_embeds else 4 * self.hidden_size)

    @property
    def kv_bytes_per_sequence(self) -> int:
        """Bytes of one slot: self-attention caches, and cross-attention for the longest prompt."""
        return self.kv_bytes_per_token * (self.capacity + self.max_pending + self.encoder_capacity)

    def to_json(self) -> str:
        """Return the manifest as JSON, with a hash of itself."""
        content = json.loads(json.dumps(dataclasses.asdict(self)))  # convert keys to strings
        return json.dumps({**content, HASH: _hash(content)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path | str = MANIFEST) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: Names the field that is wrong.
        """
        where = str(where)
        content = parse_object(text, where, REMEDY)
        digest = content.pop(HASH, None)
        written = _hash(content)
        newer = is_newer(content, where, (SCHEMA_VERSION, SCHEMA_MINOR))
        if digest != written:
            raise BundleError(f"{where} was altered (its sha256 differs); {REMEDY}")
        if isinstance(content.get("quantization"), dict):
            content["quantization"].pop("exact_rows", None)  # in older bundles
        remedy = f"upgrade freeexport, or {REMEDY}" if newer else REMEDY
        manifest: Manifest = Reader(remedy, skips=newer).read(cls, content, where)
        manifest._check(where)
        return manifest

    def _in_vocabulary(self, tokens: Iterable[int]) -> bool:
        return all(0 <= token < self.vocab_size for token in tokens)

    def _check(self, where: str) -> None:
        """Check fields that depend on each other.

        Raises:
            BundleError: Names the field that is wrong.
        """
        start = self.decoder_start_token_id
        tuned = self.tuned_max_pending
        rules: list[tuple[bool, str, Any]] = [
            (self.costs is None or self.costs.sound, "costs", self.costs),
            (self.layers >= 2, "layers", self.layers),
            (self.exit_layer >= (0 if self.exit_engine else 1), "exit_layer", self.exit_layer),
            (self.exit_layer < self.layers, "exit_layer", self.exit_layer),
            (self.exit_layers > 0 or not self.exit_engine, "exit_input", self.exit_input),
            (1 <= (tuned or 1) <= self.max_pending, "tuned_max_pending", tuned),
            (start is not None or not self.encoder_decoder, "decoder_start_token_id", start),
        ]
        least = PROMPT_KERNELS if self.encoder_decoder else ACTIVATION_KERNELS["int8"]
        own = (self.kernels or 0) >= least
        rules.append((self.kv_cache != "int8" or own, "kv_cache", self.kv_cache))
        needed = 0 if self.activations is None else ACTIVATION_KERNELS[self.activations]
        rules.append(((self.kernels or 0) >= needed, "activations", self.activations))
        for name in ("decoder_start_token_id", "forced_first_token_id", "forced_last_token_id"):
            token = getattr(self, name)
            rules.append((token is None or self._in_vocabulary([token]), name, token))
        known = self.languages is None or (
            self.languages.source in (None, *self.languages.tokens)
            and self._in_vocabulary(self.languages.tokens.values())
        )
        rules.append((known, "languages", self.languages))
        in_vocabulary = self._in_vocabulary(self.eos_token_ids)
        rules.append((in_vocabulary, "eos_token_ids", self.eos_token_ids))
        encodes = self.speech is None or self.encoder_decoder
        rules.append((encodes, "encoder_capacity", self.encoder_capacity))
        in_vocabulary = self.speech is None or self._in_vocabulary(self.speech.ids)
        rules.append((in_vocabulary, "speech", self.speech))
        heads = () if self.speech is None else self.speech.alignment_heads
        exist = all(
            len(head) == 2 and 0 <= head[0] < self.layers and 0 <= head[1] < self.heads
            for head in heads
        )
        rules.append((exist, "speech: alignment_heads", heads))
        for holds, name, value in rules:
            if not holds:
                raise BundleError(f"{where}: {name} = {repr(value)[:80]} is out of range; {REMEDY}")
        if (self.quantization is None) != (self.precision in ("fp32", "fp16", "bf16")):
            stated = "no" if self.quantization is None else "a"
            raise BundleError(
                f"{where} has {stated} quantization with precision {self.precision!r}; {REMEDY}"
            )
        for name, file in self.files.items():
            _check_file_name(name, where)
            if re.fullmatch("[0-9a-f]{64}", file.sha256) is None:
                raise BundleError(
                    f"{where}: files.{name[:80]}: sha256 = {file.sha256[:80]!r} is not a hash; "
                    f"{REMEDY}"
                )


def _check_file_name(name: str, where: str) -> None:
    path = Path(name)
    outside = not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
    if outside or path.as_posix() != name or not name.isprintable():
        problem = "is outside of the bundle" if outside else "is not a plain file name"
        raise BundleError(f"{where} names {name[:200]!r}, which {problem}; do not use this bundle")


def _hash(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
