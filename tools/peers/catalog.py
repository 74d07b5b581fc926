"""Decoders to compare with: requirements, environments and models.

Environments are created once with venv and pip in the user's cache, so that no peer is a
dependency. Models are converted there, each by its own library.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.ready_made import open_source
from freeexport.system.output import output_directory
from freeexport.system.progress import progress
from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError
from runtime.machine.machine import user_cache
from tools.peers.worker import PeerError, Worker

# Time limits in seconds. The slowest peer is compiled on one core.
INSTALL_LIMIT = 3600.0
CONVERT_LIMIT = 1800.0
ENVIRONMENT_MARKER = "environment.json"
MODEL_MARKER = "converted"
SCRIPT = Path(__file__).with_name("decoders.py")
OURS = [sys.executable, "-m", "tools.peers.decoders", "ours"]

_TRANSFORMERS = ("torch>=2.6,<3", "transformers>=5,<6")
REQUIREMENTS = {
    "transformers": _TRANSFORMERS,
    "genai": (
        *("onnxruntime-genai>=0.10", *_TRANSFORMERS, "onnx>=1.20", "onnx_ir>=0.1"),
        *("sentencepiece>=0.2", "protobuf>=5"),
    ),
    "ctranslate2": ("ctranslate2>=4.6", *_TRANSFORMERS, "sentencepiece>=0.2"),
    "llama_cpp": ("llama-cpp-python>=0.3",),
    "openvino": ("openvino-genai>=2025.3", "optimum-intel[openvino]>=2", *_TRANSFORMERS),
}
# Lets llama.cpp be compiled with the processor's newest instructions.
VARIABLES = {"llama_cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}}


@dataclass(frozen=True)
class Peer:
    """A decoder to compare with.

    Attributes:
        name: Name for --against.
        library: Library in decoders.py.
        precision: Precision shown in tables.
        options: Options for conversion and loading.
        converts: Converts the checkpoint to its own format first.
        decoder_only: Supports decoder-only models only.
        gguf: Reads GGUF files.
    """

    name: str
    library: str
    precision: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)
    converts: bool = True
    decoder_only: bool = False
    gguf: bool = False

    @property
    def key(self) -> str:
        """Name of the environment: a hash of requirements, build variables, Python version and
        machine.
        """
        python = ".".join(platform.python_version_tuple()[:2])
        variables = sorted(VARIABLES.get(self.library, {}).items())
        parts = [sorted(REQUIREMENTS[self.library]), variables, python, platform.machine()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


_ALL = (
    Peer("hf", "transformers", converts=False),
    # The comparison sets the bundle's exit layer.
    Peer(
        "hf-early-exit",
        "transformers",
        options={"early_exit": None},
        converts=False,
        decoder_only=True,
    ),
    # Draft length of its documentation.
    Peer("hf-lookup", "transformers", options={"lookup": 10}, converts=False),
    Peer("genai", "genai", options={"precision": "fp32"}, decoder_only=True),
    Peer("genai-int4", "genai", "int4", {"precision": "int4"}, decoder_only=True),
    Peer("ctranslate2", "ctranslate2", options={"compute_type": "float32"}),
    Peer("ctranslate2-int8", "ctranslate2", "int8", {"compute_type": "int8"}),
    Peer("openvino-int8", "openvino", "int8", {"precision": "int8"}, decoder_only=True),
    Peer("openvino-int4", "openvino", "int4", {"precision": "int4"}, decoder_only=True),
    Peer("llama-cpp", "llama_cpp", "as the file", converts=False, decoder_only=True, gguf=True),
    Peer(
        "llama-cpp-q8",
        "llama_cpp",
        "8 bits",
        {"convert_to": "q8_0"},
        decoder_only=True,
        gguf=True,
    ),
    Peer("llama-cpp-f32", "llama_cpp", "fp32", {"convert_to": "f32"}, decoder_only=True, gguf=True),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def find_peer(name: str) -> Peer | None:
    """Return the peer of that name. None if `name` is a path or hub name of a checkpoint.

    Raises:
        OptionError: If it is neither. The message lists the peers.
    """
    if name in PEERS:
        return PEERS[name]
    if "/" in name or Path(name).exists():
        return None
    near = difflib.get_close_matches(name, PEERS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise OptionError(
        f"--against {name}: {hint}known are {', '.join(PEERS)}, and the path of a checkpoint"
    )


def peer_command(peer: Peer) -> list[str]:
    """Return the command that runs a peer's process.

    Builds the peer's environment first, unless it is in the cache. pip uses the user's
    configuration. Its output is kept in the cache under logs.

    Raises:
        PeerError: With pip's last error.
    """
    place = user_cache("peers", "environments", peer.key)
    if not (place / ENVIRONMENT_MARKER).is_file():
        log = user_cache("peers", "logs", f"{peer.library}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        title = f"installing {peer.library}"
        with (
            progress(title),
            output_directory(place, ENVIRONMENT_MARKER, overwrite=True, sync=False) as partial,
        ):
            _install(peer, partial, log)
            content = {
                "requirements": REQUIREMENTS[peer.library],
                "python": platform.python_version(),
            }
            text = json.dumps(content, indent=2) + "\n"
            (partial / ENVIRONMENT_MARKER).write_text(text, encoding="utf-8")
    # -E: PYTHONPATH would add this process's packages to the peer's environment.
    return [str(place / "bin" / "python"), "-E", str(SCRIPT), peer.library]


def _install(peer: Peer, place: Path, log: Path) -> None:
    create = [sys.executable, "-m", "venv", str(place)]
    install = [str(place / "bin" / "python"), "-m", "pip", "install"]
    install += ["--disable-pip-version-check", "--no-input", *REQUIREMENTS[peer.library]]
    environment = {**os.environ, **VARIABLES.get(peer.library, {})}
    with log.open("w", encoding="utf-8") as file:
        common: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": file,
            "stderr": subprocess.STDOUT,
        }
        for command in (create, install):
            try:
                subprocess.run(
                    command,
                    env=environment,
                    timeout=INSTALL_LIMIT,
                    check=True,
                    **common,
                )
            except subprocess.TimeoutExpired:
                raise PeerError(
                    f"its environment was not built within {INSTALL_LIMIT:.0f} s; see {log}"
                ) from None
            except subprocess.CalledProcessError:
                lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
                errors = [line for line in lines if line.startswith("ERROR:")]
                errors = errors or [line for line in lines if line] or ["no output"]
                reason = errors[-1].removeprefix("ERROR: ")[:200]
                raise PeerError(f"its environment cannot be built ({reason}); see {log}") from None


@dataclass(frozen=True)
class Source:
    """Checkpoint that a bundle was converted from.

    Attributes:
        model: Name or path as given by the user.
        checkpoint: The opened checkpoint.
        encoder_decoder: It is an encoder-decoder.
    """

    model: str
    checkpoint: Checkpoint
    encoder_decoder: bool


def find_source(manifest: Manifest, model: str) -> Source:
    """Open the checkpoint of a bundle.

    Raises:
        OptionError: If the bundle was converted from another one.
        CheckpointError: If it cannot be opened.
    """
    checkpoint = open_source(model, manifest)
    if checkpoint.sha256 != manifest.source_sha256:
        raise OptionError(
            f"{model} (sha256 {checkpoint.sha256[:12]}...) is not the checkpoint that the bundle "
            f"came from, {manifest.source} (sha256 {manifest.source_sha256[:12]}...); "
            "give --model the one it was converted from"
        )
    if checkpoint.base is not None and checkpoint.ready_made is not None:
        if checkpoint.merged is not None:
            raise OptionError(
                f"the bundle has the LoRA adapter of exit {checkpoint.ready_made.name}, and "
                f"{model} does not; give a bundle without it"
            )
        checkpoint = checkpoint.base
    return Source(model, checkpoint, manifest.encoder_decoder)


def peer_model(peer: Peer, source: Source, command: list[str]) -> Path:
    """Return the path that a peer loads.

    Converts the checkpoint with the peer's library first, unless the result is in the cache.

    Raises:
        PeerError: If the peer does not support the model.
    """
    if peer.decoder_only and source.encoder_decoder:
        raise PeerError("it supports decoder-only models, and this is an encoder-decoder")
    base = source.checkpoint.path
    checkpoint = source.checkpoint
    if peer.gguf:
        if base.suffix != ".gguf":
            raise PeerError("it reads GGUF files, and this checkpoint is not one")
    elif checkpoint.merged is not None or not any(base.glob("*.safetensors")):
        base = _converted(OURS, source.model, "checkpoint", checkpoint, {})
    if not peer.converts:
        return base
    return _converted(command, str(base), f"{peer.name}-{peer.key}", checkpoint, peer.options)


def _converted(
    command: list[str], base: str, name: str, checkpoint: Checkpoint, options: dict[str, Any]
) -> Path:
    place = user_cache("peers", "models", checkpoint.sha256[:16], name)
    if not (place / MODEL_MARKER).is_file():
        with (
            progress(f"converting to {name}"),
            output_directory(place, MODEL_MARKER, overwrite=True) as partial,
        ):
            worker = Worker(command, {})
            try:
                request = {"op": "convert", "source": base, "out": str(partial), "options": options}
                worker.ask(request, CONVERT_LIMIT)
            except PeerError as error:
                raise PeerError(f"its model cannot be converted: {error}") from None
            finally:
                worker.close()
            (partial / MODEL_MARKER).touch()
    return place
