"""Checkpoints: a Hugging Face directory, a hub name or a GGUF file, read one tensor at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.exit_file import EXIT_FILE, EXIT_WEIGHTS, ExitFile, read_exit
from freeexport.checkpoints.gguf import GGUFFile, without_arrays
from freeexport.checkpoints.lora_adapter import ADAPTER_CONFIG, LoraAdapter
from freeexport.checkpoints.weight_files import CheckpointError as CheckpointError
from freeexport.checkpoints.weight_files import WeightFile, one_line, read_json, weight_files
from graphs.errors import UnsupportedModelError
from graphs.families import supported
from graphs.shapes import check_config
from runtime.errors import OptionError

_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_HASH_BLOCK = 1 << 20


class Checkpoint:
    """A model's configuration and weights; tensor names are the keys of the Hugging Face state dict.

    `path` is the directory or the GGUF file. `name` is what the user called it, without directories.
    `config` has every value that transformers knows for the model type, `generation_config` only what is set.
    `exit` is what exit.json beside the weights says, None where there is none; parameters of the exit's own are
    tensors like the others, under the names of freeexport.checkpoints.exit_file. `adapter` is the directory of a LoRA
    adapter, merged into what is read; `path` is then its base.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        files: Sequence[WeightFile],
        tensors: dict[str, WeightFile] | None = None,
        exit_file: ExitFile | None = None,
        adapter: Path | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.config = config
        self.generation_config = generation_config
        self.files = tuple(files)
        self.exit = exit_file
        self.adapter = adapter
        self._tensors = {key: file for file in files for key in file.names()} if tensors is None else tensors

    @property
    def architecture(self) -> str:
        """The class that saved the model ("LlamaForCausalLM"), or the model type where that is not recorded."""
        return str((self.config.get("architectures") or [self.config.get("model_type")])[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(file.nbytes for file in self.files)

    @cached_property
    def sha256(self) -> str:
        """Hash over config.json and the weight files, in hexadecimal, and over the exit's parameters and the adapter's
        configuration where there are any. Reads every byte on the first call.

        Raises CheckpointError where the exit's parameters were trained on other weights.
        """
        paths = sorted({file.path for file in self.files if file.path.name != EXIT_WEIGHTS})
        digest = hashlib.sha256()
        _digest(digest, paths if self.path.is_file() else [self.path / "config.json", *paths])
        if self.adapter is not None:
            _digest(digest, [self.adapter / ADAPTER_CONFIG])
        if self.exit is None or not self.exit.has_parameters:
            return digest.hexdigest()
        if digest.hexdigest() != self.exit.base_sha256:
            raise CheckpointError(
                f"{self.name}: its exit was trained on other weights (sha256 {self.exit.base_sha256[:12]}..., "
                f"these have {digest.hexdigest()[:12]}...); put the exit beside the weights it belongs to"
            )
        _digest(digest, [file.path for file in self.files if file.path.name == EXIT_WEIGHTS])
        return digest.hexdigest()

    def exit_layer(self, layers: int, given: int | None) -> int:
        """Return the exit layer in a decoder of so many layers: as trained, or as given. Raises OptionError."""
        trained = None if self.exit is None else self.exit.exit_layer
        if trained is not None and given not in (None, trained):
            raise OptionError(f"{self.name} was trained to exit after layer {trained}, not {given}; leave it out")
        chosen = given if trained is None else trained
        if chosen is None or not 1 <= chosen < layers:
            problem = "there is no exit.json" if chosen is None else f"exit layer {chosen} is out of range"
            raise OptionError(f"{self.name}: {problem}; choose --exit-layer, from 1 to {layers - 1}")
        return chosen

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError when there is no such tensor."""
        return self._file(name).shape(name)

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, in memory of its own. Raises CheckpointError when it is not there or not finite."""
        array = self._file(name).read(name)
        # NaN survives min and max, so these two see every bad value without a mask of the tensor's size.
        if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise CheckpointError(f"{self.name}: tensor {name} holds NaN or infinity; repair or replace the checkpoint")
        return array

    def _file(self, name: str) -> WeightFile:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self.name} has no tensor {name}; check that the weights belong to its config ({self.architecture})"
            )
        return self._tensors[name]


def _digest(digest: hashlib._Hash, paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)


def open_checkpoint(model: str) -> Checkpoint:
    """Open a Hugging Face checkpoint directory, a GGUF file (or a directory with one and an exit.json), a directory
    with a LoRA adapter of peft, or a model of the hub (downloaded unless cached).

    Reads the configuration and the headers of the weight files. Raises CheckpointError when the checkpoint cannot be
    had, is incomplete or damaged, or is stored quantised other than as GGUF; UnsupportedModelError where a size of the
    configuration is out of range.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_local(path)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.exists():
        raise CheckpointError(f"{model} is a file, but not GGUF; give a directory, a hub name or a .gguf file")
    return _open_directory(_download(model), model)


def _open_local(path: Path) -> Checkpoint:
    if (path / ADAPTER_CONFIG).is_file():
        return _open_adapter(path)
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) == 1 and (path / EXIT_FILE).is_file() and not (path / "config.json").is_file():
        return _open_gguf(gguf[0])
    return _open_directory(path, path.resolve().name)


def _open_adapter(path: Path) -> Checkpoint:
    adapter = LoraAdapter(path)
    base = open_checkpoint(adapter.base)
    merged = adapter.merged(base)
    tensors = {name: base._file(name) for name in base.names()} | dict.fromkeys(merged.names(), merged)
    files = [*base.files, adapter.weights]
    exit_file = read_exit(path, base.config, files, tensors)
    return Checkpoint(
        base.path, path.resolve().name, base.config, base.generation_config, files, tensors, exit_file, path
    )


def _open_gguf(path: Path) -> Checkpoint:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the path of the GGUF file")
    file = GGUFFile(path)
    with without_arrays(file) as header:
        config = _config(header.parent, str(path), gguf_file=header.name)
    files: list[WeightFile] = [file]
    tensors: dict[str, WeightFile] = dict.fromkeys(file.names(), file)
    exit_file = read_exit(path.parent, config, files, tensors)
    return Checkpoint(path, path.name, config, _derived_generation_config(config), files, tensors, exit_file)


def _open_directory(path: Path, name: str) -> Checkpoint:
    for file in path.iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise CheckpointError(f"{file} is no regular file; do not use this checkpoint")
    if not (path / "config.json").is_file():
        hint = "give the .gguf file itself" if any(path.glob("*.gguf")) else "give a complete checkpoint"
        raise CheckpointError(f"{path} has no config.json; {hint}")
    stored = _check_family(path, name)
    check_config(stored)  # before transformers makes a list of that many layers
    if "quantization_config" in stored:
        raise CheckpointError(f"{path} is stored quantised; give the original float checkpoint, or a GGUF file")
    config = _config(path, str(path))
    files, tensors = weight_files(path)
    exit_file = read_exit(path, config, files, tensors)
    return Checkpoint(path, name, config, _generation_config(path, config), files, tensors, exit_file)


def _check_family(path: Path, name: str) -> dict[str, Any]:
    """config.json, whose architecture has a description."""
    stored = read_json(path / "config.json")
    if (model_type := stored.get("model_type")) not in supported():
        raise UnsupportedModelError(
            f"{name}: architecture {str(model_type)[:80]!r} is not supported; supported are {', '.join(supported())}"
        )
    return stored


def _download(model: str) -> Path:
    """Fetch the checkpoint from the hub, or the cache: its configuration first, and weights only of what is
    supported."""
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise CheckpointError(f"{model} does not exist; give a checkpoint directory, a hub name or a GGUF file")
    metadata = ["*.json", "*.txt", "*.model", "*.jinja"]
    for weights in ([], ["model*.safetensors"], ["pytorch_model*.bin"]):
        try:
            path = Path(snapshot_download(model, allow_patterns=[*metadata, *weights], ignore_patterns=["*/*"]))
        except Exception as error:  # the hub's client raises types of whichever HTTP library it uses
            raise CheckpointError(
                f"{model} is no file or directory here and cannot be had from the hub: offline, or wrong name "
                f"({one_line(error)})"
            ) from None
        if not weights and (path / "config.json").is_file():
            _check_family(path, model)
        if weights and any(path.glob(weights[0])):
            break
    return path


def _config(directory: Path, shown: str, **options: Any) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # each configuration class checks its values in its own way
        raise CheckpointError(
            f"{shown}: transformers cannot read its configuration ({one_line(error)}); "
            "check model_type, or upgrade transformers"
        ) from None
    values = config.to_dict()
    values.pop("_name_or_path", None)  # a path of this machine
    check_config(values)
    return values


def _generation_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    derived = _derived_generation_config(config)
    if not (path / "generation_config.json").is_file():
        return derived
    values = read_json(path / "generation_config.json")
    if "decoder_start_token_id" in derived:
        values.setdefault("decoder_start_token_id", derived["decoder_start_token_id"])
    return values


def _derived_generation_config(config: dict[str, Any]) -> dict[str, Any]:
    values = {key: config[key] for key in _GENERATION_KEYS if config.get(key) is not None}
    if config.get("is_encoder_decoder"):
        # The fallback of `generate`, then T5's own.
        start = values.get("decoder_start_token_id", values.get("bos_token_id", values.get("pad_token_id")))
        values.update({} if start is None else {"decoder_start_token_id": start})
    return values
