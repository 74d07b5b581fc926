"""Ready-made exits: files with an exit's own parameters in 8 bits.

Each file contains the hash of the weights that the exit fits. The files are safetensors. The
matrices of the exit's map and layers, and of a LoRA adapter, are stored as int8 [outputs, inputs].
NAME.scales has their float16 scales for blocks of inputs, as in an int8 bundle. Token ids are
int32, and all other tensors float32. The metadata contain one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.exit_file import (
    EXIT_FILE,
    EXIT_WEIGHTS,
    ExitFile,
    with_layers,
    write_exit_file,
)
from freeexport.checkpoints.lora_adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MergedWeights,
    read_adapter,
)
from freeexport.checkpoints.weight_files import CheckpointError, SafetensorsFile
from freeexport.system.output import OutputError, replacing
from freeexport.system.progress import progress
from graphs.description import ForeignEncoder
from graphs.exit_head import EXIT, EXIT_LAYERS, EXIT_MAP, VOCABULARY
from graphs.families import describe
from graphs.quantization.rounding import BLOCK, IntegerScheme
from graphs.shapes import weight_names
from runtime.bundle.schema import Reader, parse_object
from runtime.errors import BundleError, shown

READY_MADE = Path(__file__).parents[1] / "exits"
SUFFIX = ".safetensors"
FORMAT = 1
MOST_BYTES = 8_000_000
_METADATA = "freeexport_exit"
_SCALES = ".scales"
_BLOCKS = (128, 64)  # inputs per scale: the largest that divides the inputs, else BLOCK
_LORA_B = "lora_B.weight"
_REMEDY = "get the file again"
# Names of exits, which become parts of file names.
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,79}", re.ASCII)
_NAMES = "a name has at most 80 letters, digits and . _ + -, and begins with a letter or digit"


@dataclass(frozen=True)
class PackedExit:
    """Metadata of an exit's file.

    Attributes:
        name: Name of the exit.
        family: Family of the model.
        model: Name of the base model.
        weights_sha256: Hash of the base's weights.
        tensors_sha256: Hash of the bytes after the header.
        exit: Content of exit.json.
        licence: Licence of the exit.
        data: Sentences on the training data.
        recipe: Sentences on the training.
        results: Sentences on the results.
        adapter_config: Configuration of a LoRA adapter of the base, as JSON without the base, or
            None.
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
    format: int = FORMAT


def ready_made() -> list[Path]:
    """Return the files of the exits in this package."""
    return sorted(READY_MADE.glob(f"*{SUFFIX}"))


def find_exit(name: str) -> Path:
    """Return the file of a ready-made exit, or `name` if it is a file.

    Raises:
        CheckpointError: If there is no such exit and no such file.
    """
    known = {path.stem: path for path in ready_made()}
    if name in known:
        return known[name]
    with suppress(OSError, ValueError):  # not a valid file name
        if Path(name).is_file():
            return Path(name)
    listed = f"known are {', '.join(known)}" if known else "this freeexport brings none"
    raise CheckpointError(
        f"there is no exit {name[:100]}, and no such file; {listed} (freeexport exits)"
    )


def read_packed(path: Path) -> tuple[PackedExit, SafetensorsFile]:
    """Read the file of an exit and check its hash.

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
    try:
        value = parse_object(file.metadata[_METADATA], str(path), _REMEDY)
        if type(value.get("format")) is int and value["format"] > FORMAT:
            raise CheckpointError(
                f"{path} has format {value['format']}, this freeexport reads {FORMAT}; upgrade "
                "freeexport"
            )
        if isinstance(value.get("exit"), dict):
            value["exit"] = with_layers(value["exit"], str(path))
        packed: PackedExit = Reader(_REMEDY).read(PackedExit, value, str(path))
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    if _NAME.fullmatch(packed.name) is None:
        raise CheckpointError(f"{path} names its exit {shown(packed.name)}; {_NAMES}")
    if _tensors_sha256(path) != packed.tensors_sha256:
        raise CheckpointError(
            f"{path} is damaged: its tensors have another sha256 than it names; {_REMEDY}"
        )
    return packed, file


def misfit(packed: PackedExit, checkpoint: Checkpoint, sha256: str) -> str | None:
    """Return the reason why an exit does not fit a model, or None if it fits.

    Args:
        packed: The exit.
        checkpoint: The model.
        sha256: `weights_sha256` of the model.
    """
    if (family := describe(checkpoint.config, checkpoint).family) != packed.family:
        return (
            f"it is for {packed.family} models, of {packed.model}, and {checkpoint.name} is a "
            f"{family} model"
        )
    if sha256 != packed.weights_sha256:
        return (
            f"it was trained on other weights, of {packed.model} (sha256 "
            f"{packed.weights_sha256[:12]}..., those of {checkpoint.name} have {sha256[:12]}...)"
        )
    return None


def fitting_exits(checkpoint: Checkpoint) -> list[PackedExit]:
    """Return the ready-made exits that fit the weights of a checkpoint.

    A checkpoint that has an exit or an adapter fits none. Weights are read only if an exit has the
    same family and sizes.
    """
    if checkpoint.adapter is not None or checkpoint.exit is not None:
        return []
    description = describe(checkpoint.config, checkpoint)
    found = []
    for path in ready_made():
        packed, file = read_packed(path)
        width = file.shapes[EXIT_MAP][0] if EXIT_MAP in file.shapes else description.hidden_size
        if packed.family == description.family and width == description.hidden_size:
            found.append(packed)
    sha256 = weights_sha256(checkpoint) if found else ""
    return [packed for packed in found if packed.weights_sha256 == sha256]


def weights_sha256(checkpoint: Checkpoint) -> str:
    """Hash the weights of the model as float32, in the order of the description.

    Files with the same numbers have the same hash, regardless of their format and tensor names. The
    exit's own parameters are not included.
    """
    description = describe(checkpoint.config, checkpoint)
    names = weight_names(description, checkpoint)
    if isinstance(description.encoder, ForeignEncoder):
        names += sorted(
            name
            for name in checkpoint.names()
            if not name.startswith(EXIT) and name not in set(names)
        )
    digest = hashlib.sha256()
    with progress("hash of the weights, tensors", len(names)) as advance:
        for name in names:
            array = checkpoint.read(name)
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array, "<f4").data)
            advance()
    return digest.hexdigest()


@contextmanager
def with_exit_applied(model: str, name: str | None) -> Iterator[str]:
    """Yield a temporary checkpoint directory with exit `name` applied.

    Yields `model` unchanged if `name` is None.

    Raises:
        CheckpointError: If there is no such exit, it does not fit, or the model is a LoRA adapter.
    """
    if name is None:
        yield model
        return
    path = find_exit(name)
    packed, file = read_packed(path)
    base = open_checkpoint(model)
    if base.adapter is not None:
        raise CheckpointError(
            f"{model} is a LoRA adapter; merge it into its base with peft, then apply an exit"
        )
    if (reason := misfit(packed, base, weights_sha256(base))) is not None:
        raise CheckpointError(
            f"exit {name} does not fit: {reason}; choose another (freeexport exits {model})"
        )
    with tempfile.TemporaryDirectory(prefix="freeexport-exit-") as work:
        stem = base.path.stem if base.path.is_file() else base.path.name
        directory = Path(work) / f"{stem[:80]}+{packed.name}"
        directory.mkdir()
        try:
            _unpack(packed, file, base, directory)
        except (LookupError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); {_REMEDY}") from None
        yield str(directory)


def exit_directory(name: str, work: Path) -> Path:
    """Return a directory with exit.json and an exit's parameters.

    The directory is `name` itself, or `work` for a ready-made exit or one in a file. `work` is
    written unless it exists.

    Raises:
        CheckpointError: If there is no such exit, or it requires a LoRA adapter.
    """
    from safetensors.numpy import save_file

    if Path(name).is_dir():
        return Path(name)
    packed, file = read_packed(find_exit(name))
    if packed.adapter_config is not None:
        raise CheckpointError(
            f"exit {name} goes with a LoRA adapter of {packed.model}; choose another to begin with"
        )
    if not (work / EXIT_FILE).exists():
        work.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(file), work / EXIT_WEIGHTS)
        write_exit_file(work, packed.exit)
    return work


def _unpack(packed: PackedExit, file: SafetensorsFile, base: Checkpoint, directory: Path) -> None:
    """Write the model with the exit to an empty directory.

    The model's own files are symbolic links.
    """
    from safetensors.numpy import save_file

    tensors = _tensors(file)
    if packed.adapter_config is not None:
        config = parse_object(packed.adapter_config, "adapter_config", _REMEDY)
        config["base_model_name_or_path"] = str(base.path.resolve())
        (directory / ADAPTER_CONFIG).write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8"
        )
        adapter = {name: array for name, array in tensors.items() if not name.startswith(EXIT)}
        save_file(adapter, directory / ADAPTER_WEIGHTS[0])
    elif base.path.is_file():
        (directory / f"{directory.name}.gguf").symlink_to(base.path.resolve())
    else:
        for path in base.path.iterdir():
            if path.is_file() and path.name not in (EXIT_FILE, EXIT_WEIGHTS):
                (directory / path.name).symlink_to(path.resolve())
    # A directory with a GGUF file is a checkpoint only if it also has an exit.json.
    write_exit_file(directory, ExitFile(1, "0" * 64, packed.exit.loss, packed.exit.tune))
    sha256 = open_checkpoint(str(directory)).sha256
    save_file(
        {name: array for name, array in tensors.items() if name.startswith(EXIT)},
        directory / EXIT_WEIGHTS,
    )
    write_exit_file(directory, replace(packed.exit, base_sha256=sha256))


def pack(
    model: str,
    out: Path,
    name: str,
    base_name: str,
    licence: str,
    data: str,
    recipe: str,
    results: str,
) -> PackedExit:
    """Write the exit of a trained checkpoint to the file `out`.

    `base_name` is PackedExit.model. The other facts have the names of its fields.

    Raises:
        CheckpointError: If the exit has no parameters of its own.
        OutputError: If the name is invalid, or the exit has more than MOST_BYTES.
    """
    from safetensors.numpy import save_file

    if _NAME.fullmatch(name) is None:
        raise OutputError(f"the exit's name is {shown(name)}; {_NAMES}")
    checkpoint = open_checkpoint(model)
    if checkpoint.exit is None or not checkpoint.exit.has_parameters:
        raise CheckpointError(
            f"{model} has no exit with parameters of its own; train one with --exit-layers or "
            "--exit-vocab"
        )
    _ = checkpoint.sha256  # checks that the exit belongs to these weights
    arrays = {
        tensor: checkpoint.read(tensor) for tensor in checkpoint.names() if tensor.startswith(EXIT)
    }
    base = checkpoint
    config = None
    if checkpoint.adapter is not None:
        stored, path = read_adapter(checkpoint.adapter)
        base = open_checkpoint(path)
        config = json.dumps({**stored, "base_model_name_or_path": ""}, sort_keys=True)
        merged = next(file for file in checkpoint.files if isinstance(file, MergedWeights))
        arrays |= {tensor: merged.file.read(tensor) for tensor in merged.file.shapes}
    tensors = {
        key: array
        for tensor, whole in arrays.items()
        for key, array in _packed(tensor, whole).items()
    }
    size = sum(array.nbytes for array in tensors.values())
    if size > MOST_BYTES:
        raise OutputError(
            f"the exit of {model} has {size / 1e6:.1f} MB in 8 bits, at most "
            f"{MOST_BYTES / 1e6:.0f} are packed; train one with fewer --exit-layers, or a LoRA of "
            "a lower --rank"
        )
    packed = PackedExit(
        name=name,
        family=describe(base.config, base).family,
        model=base_name,
        weights_sha256=weights_sha256(base),
        tensors_sha256="",
        exit=checkpoint.exit,
        licence=licence,
        data=data,
        recipe=recipe,
        results=results,
        adapter_config=config,
    )
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


def _tensors(file: SafetensorsFile) -> dict[str, np.ndarray]:
    """Unpack all tensors.

    Raises:
        CheckpointError: If they are inconsistent.
    """
    try:
        return {name: _unpacked(file, name) for name in file.shapes if not name.endswith(_SCALES)}
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"{file.path} is damaged ({error}); {_REMEDY}") from None


def _unpacked(file: SafetensorsFile, name: str) -> np.ndarray:
    array = file.read(name)
    if name == VOCABULARY:
        return array.astype(np.int32)
    if f"{name}{_SCALES}" not in file.shapes:
        return array
    inputs = array.shape[1]
    block = next((size for size in _BLOCKS if inputs % size == 0), BLOCK)
    array *= np.repeat(file.read(f"{name}{_SCALES}"), block, axis=1)[:, :inputs]
    return np.ascontiguousarray(array.T) if name.endswith(_LORA_B) else array
