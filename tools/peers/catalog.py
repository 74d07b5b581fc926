"""The decoders that ours is compared with: what each needs, the environment and the model that it runs in.

Environments are made once with venv and pip in the user's cache, so that no peer is a dependency; models are converted
there, each by its own library.
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

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.system.output import output_directory
from freeexport.system.progress import progress
from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError
from runtime.machine.machine import user_cache
from tools.peers.worker import PeerError, Worker

# Seconds: the slowest peer is compiled, on one core.
INSTALL_LIMIT, CONVERT_LIMIT = 3600.0, 1800.0
ENVIRONMENT_MARKER, MODEL_MARKER = "environment.json", "converted"
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
# Without this, llama.cpp's library is compiled without the processor's newest instructions.
VARIABLES = {"llama_cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}}


@dataclass(frozen=True)
class Peer:
    """A `library` of decoders.py with `options` for its conversion and its loading. A peer that `converts` makes a
    model of its own from the checkpoint first; `gguf`: it reads the GGUF file itself."""

    name: str
    library: str
    precision: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)
    converts: bool = True
    decoder_only: bool = False
    gguf: bool = False

    @property
    def key(self) -> str:
        """Name the environment by requirements, build variables, Python version and processor type."""
        python = ".".join(platform.python_version_tuple()[:2])
        variables = sorted(VARIABLES.get(self.library, {}).items())
        parts = [sorted(REQUIREMENTS[self.library]), variables, python, platform.machine()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


_ALL = (
    Peer("hf", "transformers", converts=False),
    # The comparison fills in the layer of the bundle's exit.
    Peer("hf-early-exit", "transformers", options={"early_exit": None}, converts=False, decoder_only=True),
    # As many tokens as its documentation drafts.
    Peer("hf-lookup", "transformers", options={"lookup": 10}, converts=False),
    Peer("genai", "genai", options={"precision": "fp32"}, decoder_only=True),
    Peer("genai-int4", "genai", "int4", {"precision": "int4"}, decoder_only=True),
    Peer("ctranslate2", "ctranslate2", options={"compute_type": "float32"}),
    Peer("ctranslate2-int8", "ctranslate2", "int8", {"compute_type": "int8"}),
    Peer("openvino-int8", "openvino", "int8", {"precision": "int8"}, decoder_only=True),
    Peer("openvino-int4", "openvino", "int4", {"precision": "int4"}, decoder_only=True),
    Peer("llama-cpp", "llama_cpp", "as the file", converts=False, decoder_only=True, gguf=True),
    Peer("llama-cpp-q8", "llama_cpp", "8 bits", {"convert_to": "q8_0"}, decoder_only=True, gguf=True),
    Peer("llama-cpp-f32", "llama_cpp", "fp32", {"convert_to": "f32"}, decoder_only=True, gguf=True),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def find_peer(name: str) -> Peer | None:
    """Find the peer of that name; None where `name` is a path or hub name of a checkpoint.

    Raises OptionError for what is neither, with the names that there are.
    """
    if name in PEERS:
        return PEERS[name]
    if "/" in name or Path(name).exists():
        return None
    near = difflib.get_close_matches(name, PEERS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise OptionError(f"--against {name}: {hint}known are {', '.join(PEERS)}, and the path of a checkpoint")


def peer_command(peer: Peer) -> list[str]:
    """Command of the peer's process; its environment is built now unless it is in the cache: beside its place, and
    renamed when complete. pip is the user's own, with its configuration.

    Raises PeerError with pip's last error; all of pip's output is kept in the cache under logs.
    """
    place = user_cache("peers", "environments", peer.key)
    if not (place / ENVIRONMENT_MARKER).is_file():
        log = user_cache("peers", "logs", f"{peer.library}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        title = f"installing {peer.library}"
        with progress(title), output_directory(place, ENVIRONMENT_MARKER, overwrite=True, sync=False) as partial:
            _install(peer, partial, log)
            content = {"requirements": REQUIREMENTS[peer.library], "python": platform.python_version()}
            (partial / ENVIRONMENT_MARKER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # -E: a PYTHONPATH of this process would bring its packages into the peer's environment.
    return [str(place / "bin" / "python"), "-E", str(SCRIPT), peer.library]


def _install(peer: Peer, place: Path, log: Path) -> None:
    install = [str(place / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    environment = {**os.environ, **VARIABLES.get(peer.library, {})}
    with log.open("w", encoding="utf-8") as file:
        common: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        for command in ([sys.executable, "-m", "venv", str(place)], [*install, *REQUIREMENTS[peer.library]]):
            try:
                subprocess.run(command, env=environment, timeout=INSTALL_LIMIT, check=True, **common)
            except subprocess.TimeoutExpired:
                raise PeerError(f"its environment was not built within {INSTALL_LIMIT:.0f} s; see {log}") from None
            except subprocess.CalledProcessError:
                lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
                errors = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line]
                reason = (errors or ["no output"])[-1].removeprefix("ERROR: ")[:200]
                raise PeerError(f"its environment cannot be built ({reason}); see {log}") from None


@dataclass(frozen=True)
class Source:
    """The checkpoint that a bundle came from. `model` is what the user calls it."""

    model: str
    checkpoint: Checkpoint
    encoder_decoder: bool


def find_source(manifest: Manifest, model: str) -> Source:
    """Open the checkpoint. Raises OptionError where the bundle was made from another one, and CheckpointError."""
    checkpoint = open_checkpoint(model)
    if checkpoint.sha256 != manifest.source_sha256:
        raise OptionError(
            f"{model} is not the checkpoint that the bundle came from ({manifest.source}, sha256 "
            f"{manifest.source_sha256[:12]}..., this one {checkpoint.sha256[:12]}...); give --model the one it was "
            "converted from"
        )
    return Source(model, checkpoint, manifest.encoder_decoder)


def peer_model(peer: Peer, source: Source, command: list[str]) -> Path:
    """Path that the peer loads; converted now by its own library, unless it is in the cache.

    Raises PeerError where the peer cannot run such a model.
    """
    if peer.decoder_only and source.encoder_decoder:
        raise PeerError("it runs decoder-only models, this is an encoder-decoder")
    base, checkpoint = source.checkpoint.path, source.checkpoint
    if peer.gguf:
        if base.suffix != ".gguf":
            raise PeerError("it reads GGUF files, and this checkpoint is not one")
    elif checkpoint.adapter is not None or not any(base.glob("*.safetensors")):
        base = _converted(OURS, source.model, "checkpoint", checkpoint, {})
    return (
        _converted(command, str(base), f"{peer.name}-{peer.key}", checkpoint, peer.options) if peer.converts else base
    )


def _converted(command: list[str], base: str, name: str, checkpoint: Checkpoint, options: dict[str, Any]) -> Path:
    place = user_cache("peers", "models", checkpoint.sha256[:16], name)
    if not (place / MODEL_MARKER).is_file():
        with progress(f"converting to {name}"), output_directory(place, MODEL_MARKER, overwrite=True) as partial:
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
