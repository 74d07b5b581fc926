"""Files of ready-made exits, with an exit's own parameters in 8 bits.

Each file contains the hash of the weights that the exit was trained on. The files are safetensors.
The matrices of the exit's map and layers, and of a LoRA adapter, are stored as int8 [outputs,
inputs]. NAME.scales has their float16 scales for blocks of inputs, as in an int8 bundle. Token ids
are int32, and all other tensors float32. phrases.FIELD are the fields of a table of the model's
frequent phrases, for drafts without an engine call. sound.NUMBER are recordings, the prompts of a
speech model's samples. The metadata contain one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import ExitFile, with_layers
from freeexport.checkpoints.lora_adapter import check_adapter, read_adapter
from freeexport.checkpoints.packed_phrases import PHRASE_PREFIX, fields_of, read_fields
from freeexport.checkpoints.packed_sounds import SOUND_PREFIX, fields_of_sounds, read_sounds
from freeexport.checkpoints.weight_files import CheckpointError, SafetensorsFile, Shape, TensorFile
from freeexport.system.output import OutputError, replacing
from graphs.description import Description
from graphs.exit_head import EXIT, EXIT_LAYERS, EXIT_MAP, VOCABULARY
from graphs.families import describe
from graphs.quantization.rounding import BLOCK, IntegerScheme
from runtime.bundle.schema import Range, Reader, parse_object
from runtime.decoding.phrases import ENTRY
from runtime.errors import BundleError, shown

SUFFIX = ".safetensors"
FORMAT = 3  # 2: may have phrases. 3: may have recordings.
MAX_BYTES = 8_000_000
# Most answers of the base in a file, and most tokens of a prompt and its answer.
MAX_SAMPLES = 32
MAX_SAMPLE_TOKENS = 1024
_METADATA = "freeexport_exit"
_SCALES = ".scales"
_NO_ADAPTER = (EXIT, PHRASE_PREFIX, SOUND_PREFIX)  # beginnings of names
_BLOCKS = (128, 64)  # inputs per scale: the largest that divides the inputs, else BLOCK
_LORA_B = "lora_B.weight"
_REMEDY = "get the file again"
# Names of exits, which become parts of file names.
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,79}", re.ASCII)
_NAMES = "a name has at most 80 letters, digits and . _ + -, and begins with a letter or digit"


@dataclass(frozen=True)
class Sizes:
    """Sizes that a model must share with the one that an exit was trained on.

    Attributes:
        layers: Number of decoder layers.
        hidden_size: Width of the hidden states.
        vocab_size: Number of tokens.
        heads: Number of attention heads.
        kv_heads: Number of heads of keys and values.
        head_dim: Width of a head.
    """

    layers: int
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, description: Description) -> Sizes:
        """Return the sizes of a model."""
        attention = description.attention
        return cls(
            layers=len(description.decoder.layers),
            hidden_size=description.hidden_size,
            vocab_size=description.vocab_size,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
        )


@dataclass(frozen=True)
class SampleAnswer:
    """A greedy answer of the model that an exit was trained on.

    Attributes:
        prompt: Token ids of the prompt. For speech, those that the decoder reads before it answers.
        answer: Token ids of the answer, as an encoder-decoder's decoder predicts them.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class PackedExit:
    """Metadata of an exit's file.

    Attributes:
        name: Name of the exit.
        family: Family of the model.
        model: Name of the base model.
        weights_sha256: Checkpoint.weights_sha256 of the base.
        tensors_sha256: Hash of the bytes after the header.
        exit: Content of exit.json.
        licence: Licence of the exit.
        data: Sentences on the training data.
        recipe: Sentences on the training.
        results: Sentences on the results.
        adapter_config: Configuration of a LoRA adapter of the base, as JSON without the base, or
            None.
        sizes: Sizes of the base. None: unknown, as in older files.
        samples: Answers of the base, at most MAX_SAMPLES. Empty in older files.
        agreement: Share of the tokens of `samples` that the exit predicts with the base. None
            without samples.
        format: Version of this format.
    """

    name: str
    family: str
    model: str
    weights_sha256: str
    tensors_sha256: str
    exit: ExitFile
    licence: str
    data: str
    recipe: str
    results: str
    adapter_config: str | None = None
    sizes: Sizes | None = None
    samples: tuple[SampleAnswer, ...] = ()
    agreement: Annotated[float, Range(0, 1)] | None = None
    format: int = FORMAT

    def check(self, path: Path) -> None:
        """Check the name and the samples.

        Raises:
            CheckpointError: If the name is not allowed, or samples are too many, too long, or not
                of the vocabulary.
        """
        if _NAME.fullmatch(self.name) is None:
            raise CheckpointError(f"{path} names its exit {shown(self.name)}; {_NAMES}")
        if len(self.samples) > MAX_SAMPLES:
            raise CheckpointError(
                f"{path} has {len(self.samples)} samples, at most {MAX_SAMPLES} are read; {_REMEDY}"
            )
        size = 0 if self.sizes is None else self.sizes.vocab_size
        for sample in self.samples:
            length = len(sample.prompt) + len(sample.answer)
            if not sample.prompt or not sample.answer or length > MAX_SAMPLE_TOKENS:
                raise CheckpointError(
                    f"{path} has a sample of {len(sample.prompt)} and {len(sample.answer)} tokens, "
                    f"which must be 1 to {MAX_SAMPLE_TOKENS} in all; {_REMEDY}"
                )
            if not all(0 <= token < size for token in (*sample.prompt, *sample.answer)):
                raise CheckpointError(
                    f"{path} has a sample with a token outside of 0 to {size - 1}; {_REMEDY}"
                )


class PackedWeights(TensorFile):
    """Tensors of an exit's file, which are unpacked to float32 when they are read.

    Args:
        file: The file.
        names: Names of the tensors, without scales.

    Raises:
        CheckpointError: If the scales of a matrix are inconsistent with it.
    """

    def __init__(self, file: SafetensorsFile, names: Iterable[str]) -> None:
        self.path = file.path
        self._file = file
        self.nbytes = 0
        self.shapes = shapes = dict[str, Shape]()
        for name in names:
            shape = file.shapes[name]
            scales = file.shapes.get(name + _SCALES)
            self.nbytes += math.prod(shape) * (4 if scales is None else 1)
            if scales is not None:
                self.nbytes += 2 * math.prod(scales)
                if len(shape) != 2 or scales != (shape[0], -(-shape[1] // _block(shape[1]))):
                    raise CheckpointError(
                        f"{file.path} is damaged: {name[:80]} is {list(shape)} and its scales are "
                        f"{list(scales)}; {_REMEDY}"
                    )
                shape = shape[::-1] if name.endswith(_LORA_B) else shape
            shapes[name] = shape

    def read(self, name: str) -> np.ndarray:
        array = self._file.read(name)
        if name + _SCALES not in self._file.shapes:
            return array
        inputs = array.shape[1]
        scales = self._file.read(name + _SCALES)
        array *= np.repeat(scales, _block(inputs), axis=1)[:, :inputs]
        return np.ascontiguousarray(array.T) if name.endswith(_LORA_B) else array


@dataclass(frozen=True)
class PackedFile:
    """An exit's file.

    Attributes:
        about: Its metadata.
        sha256: Hash of the tensors, of exit.json and of the adapter's configuration. Independent of
            the other metadata.
        weights: The exit's own tensors.
        adapter: Tensors of the LoRA adapter, and its configuration. None if there is no adapter.
        phrases: Table of the model's frequent phrases, ENTRY [n]. None if there is none.
        sounds: Recordings float32 [n] at 16 kHz, one for each sample. Empty for text.
    """

    about: PackedExit
    sha256: str
    weights: PackedWeights
    adapter: tuple[PackedWeights, dict[str, Any]] | None = None
    phrases: np.ndarray | None = None
    sounds: tuple[np.ndarray, ...] = ()

    @property
    def path(self) -> Path:
        return self.weights.path

    @property
    def prompts(self) -> tuple[np.ndarray, ...]:
        """Return the prompts of the samples: token ids int64 [n], or recordings."""
        return self.sounds or tuple(
            np.array(sample.prompt, np.int64) for sample in self.about.samples
        )


def read_packed(path: Path) -> PackedFile:
    """Open the file of an exit and check its hash.

    Raises:
        CheckpointError: If the file is damaged, not an exit, or of a newer format.
    """
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        raise CheckpointError(
            f"{path} is damaged, or no exit: not a complete safetensors file; {_REMEDY}"
        ) from None
    if _METADATA not in file.metadata:
        raise CheckpointError(f"{path} holds weights, but no exit; name one of: freeexport exits")
    adapter = None
    try:
        value = parse_object(file.metadata[_METADATA], str(path), _REMEDY)
        if type(value.get("format")) is int and value["format"] > FORMAT:
            raise CheckpointError(
                f"{path} has format {value['format']}, this freeexport reads {FORMAT}; upgrade "
                "freeexport"
            )
        if isinstance(value.get("exit"), dict):
            value["exit"] = with_layers(value["exit"], str(path))
        about: PackedExit = Reader(_REMEDY).read(PackedExit, value, str(path))
        if about.adapter_config is not None:
            config = parse_object(about.adapter_config, f"{path}: adapter_config", _REMEDY)
            check_adapter(config, path)
            names = (name for name in file.shapes if not name.startswith(_NO_ADAPTER))
            adapter = (
                PackedWeights(file, (name for name in names if not name.endswith(_SCALES))),
                config,
            )
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    about.check(path)
    if _tensors_sha256(path) != about.tensors_sha256:
        raise CheckpointError(
            f"{path} is damaged: its tensors have another sha256 than it names; {_REMEDY}"
        )
    # Hash what the file has, not the dataclasses, whose fields differ between versions.
    content = [value.get(key) for key in ("tensors_sha256", "exit", "adapter_config")]
    own = (name for name in file.shapes if name.startswith(EXIT) and not name.endswith(_SCALES))
    return PackedFile(
        about=about,
        sha256=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        weights=PackedWeights(file, own),
        adapter=adapter,
        phrases=read_fields(file, 0 if about.sizes is None else about.sizes.vocab_size),
        sounds=read_sounds(file, len(about.samples)),
    )


def pack(
    model: str,
    out: Path,
    name: str,
    base_name: str,
    licence: str,
    data: str,
    recipe: str,
    results: str,
    samples: tuple[SampleAnswer, ...] = (),
    agreement: float | None = None,
    sounds: Sequence[np.ndarray] = (),
) -> PackedExit:
    """Write the exit of a trained checkpoint to the file `out`.

    `base_name` is PackedExit.model. `sounds` are recordings, one for each sample of a speech model.
    The other facts have the names of its fields.

    Raises:
        CheckpointError: If the exit has no parameters of its own.
        OutputError: If the name is invalid, or the exit has more than MAX_BYTES.
    """
    if _NAME.fullmatch(name) is None:
        raise OutputError(f"the exit's name is {shown(name)}; {_NAMES}")
    checkpoint = open_checkpoint(model)
    if checkpoint.exit is None or not checkpoint.exit.has_parameters:
        raise CheckpointError(
            f"{model} has no exit with parameters of its own; train one with --exit-head-layers or "
            "--exit-vocab"
        )
    _ = checkpoint.sha256  # checks that the exit belongs to these weights
    arrays = {
        tensor: checkpoint.read(tensor) for tensor in checkpoint.names() if tensor.startswith(EXIT)
    }
    base = checkpoint
    config = None
    if checkpoint.adapter is not None and (merged := checkpoint.merged) is not None:
        stored, path = read_adapter(checkpoint.adapter)
        base = open_checkpoint(path)
        config = json.dumps({**stored, "base_model_name_or_path": ""}, sort_keys=True)
        arrays |= {tensor: merged.file.read(tensor) for tensor in merged.file.shapes}
    tensors = {
        key: array
        for tensor, whole in arrays.items()
        for key, array in _packed(tensor, whole).items()
    }
    tensors |= fields_of_sounds(sounds)
    size = sum(array.nbytes for array in tensors.values())
    if size > MAX_BYTES:
        raise OutputError(
            f"the exit of {model} has {size / 1e6:.1f} MB in 8 bits, at most "
            f"{MAX_BYTES / 1e6:.0f} are packed; train one with fewer --exit-head-layers, or a "
            "LoRA of a lower --rank"
        )
    description = describe(base.config, base)
    packed = PackedExit(
        name=name,
        family=description.family,
        model=base_name,
        weights_sha256=base.weights_sha256,
        tensors_sha256="",
        exit=checkpoint.exit,
        licence=licence,
        data=data,
        recipe=recipe,
        results=results,
        adapter_config=config,
        sizes=Sizes.of(description),
        samples=samples,
        agreement=agreement,
    )
    return _write(out, packed, tensors)


def add_phrases(
    path: Path, phrases: np.ndarray, data: str | None = None, results: str | None = None
) -> PackedExit:
    """Write a table of phrases into the file of an exit, in place of the one that it has.

    Args:
        phrases: ENTRY [n].
        data: PackedExit.data. Default: unchanged.
        results: PackedExit.results. Default: unchanged.

    Raises:
        CheckpointError: If the file is damaged.
        OutputError: If the file would have more than MAX_BYTES.
    """
    from safetensors.numpy import load_file

    about = read_packed(path).about
    tensors = {
        name: array for name, array in load_file(path).items() if not name.startswith(PHRASE_PREFIX)
    }
    tensors |= fields_of(phrases)
    size = sum(array.nbytes for array in tensors.values())
    if size > MAX_BYTES:
        room = (MAX_BYTES - size) // ENTRY.itemsize + len(phrases)
        raise OutputError(
            f"{path} would have {size / 1e6:.2f} MB with {len(phrases):,} phrases, more than "
            f"{MAX_BYTES / 1e6:.0f}; {max(0, room):,} fit"
        )
    packed = replace(
        about, format=FORMAT, data=data or about.data, results=results or about.results
    )
    return _write(path, packed, tensors)


def _write(out: Path, packed: PackedExit, tensors: dict[str, np.ndarray]) -> PackedExit:
    """Write the file of an exit, and return its metadata with the hash of the tensors."""
    from safetensors.numpy import save_file

    with replacing(out) as partial:
        # The order of the tensors, and with it their hash, is independent of the metadata.
        save_file(tensors, partial)
        packed = replace(packed, tensors_sha256=_tensors_sha256(partial))
        save_file(
            tensors, partial, metadata={_METADATA: json.dumps(asdict(packed), sort_keys=True)}
        )
        partial.chmod(0o644)  # safetensors makes the file private
    return packed


def _tensors_sha256(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _packed(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    if name == VOCABULARY:
        return {name: array.astype(np.int32)}
    linear = name == EXIT_MAP or (name.startswith(EXIT_LAYERS) and "relative_bias" not in name)
    if array.ndim != 2 or (name.startswith(EXIT) and not linear):
        return {name: array}
    # A LoRA matrix B has few inputs, its rank, so its blocks run along the outputs.
    rows = np.ascontiguousarray(array.T) if name.endswith(_LORA_B) else array
    rounded, _ = IntegerScheme(_BLOCKS).round(rows, "int8-block", np.dtype(np.float16))
    if rounded.error > IntegerScheme.limits["int8-block"]:
        return {name: array}
    values = (rounded.data.astype(np.int16) - 128).astype(np.int8).reshape(len(rows), -1)
    return {
        name: np.ascontiguousarray(values[:, : rows.shape[1]]),
        f"{name}{_SCALES}": rounded.scales,
    }


def _block(inputs: int) -> int:
    """Return the number of inputs per scale."""
    return next((size for size in _BLOCKS if inputs % size == 0), BLOCK)
