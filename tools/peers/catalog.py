"""Decoders to compare with: requirements, environments and models.

`install` creates environments with venv and pip in the user's cache, so that no peer is a
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.system.machine import detect_machine
from freeexport.system.output import output_directory, write_whole
from freeexport.system.progress import progress
from runtime.errors import OptionError
from runtime.machine.machine import user_cache
from tools.peers.worker import PeerError, Worker

# Time limits in seconds. The slowest peer is compiled on one core.
INSTALL_LIMIT = 3600.0
CONVERT_LIMIT = 1800.0
ENVIRONMENT_MARKER = "environment.json"
MODEL_MARKER = "converted"
SCRIPT = Path(__file__).with_name("decoders.py")
# -E: PYTHONDONTWRITEBYTECODE would let only our processes compile all modules again.
OWN = [sys.executable, "-E", "-m", "tools.peers.own_decoders"]
OURS = [*OWN, "ours"]

_TRANSFORMERS = ("torch>=2.6,<3", "transformers>=5,<6")
# Requirements of a library's environment. transformers runs in this one.
REQUIREMENTS = {
    "genai": (
        *("onnxruntime-genai>=0.10", *_TRANSFORMERS, "onnx>=1.20", "onnx_ir>=0.1"),
        *("sentencepiece>=0.2", "protobuf>=5"),
    ),
    "ctranslate2": ("ctranslate2>=4.6", *_TRANSFORMERS, "sentencepiece>=0.2"),
    "llama_cpp": ("llama-cpp-python>=0.3",),
    "faster_whisper": ("faster-whisper>=1.2",),
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
    decoder_only: bool = True
    gguf: bool = False

    @property
    def environment(self) -> Path:
        """Directory of its environment, named by a hash of requirements, build variables, Python
        version, and the machine that a library is compiled for.
        """
        python = ".".join(platform.python_version_tuple()[:2])
        variables = sorted(VARIABLES.get(self.library, {}).items())
        parts: list[Any] = [sorted(REQUIREMENTS[self.library]), variables, python]
        parts.append(platform.machine())
        if variables:
            machine = detect_machine()
            parts.append([machine.cpu, *machine.features])
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return user_cache("peers", "environments", key)

    @property
    def installed(self) -> bool:
        """Its environment exists."""
        if self.library not in REQUIREMENTS:
            return find_spec(self.library) is not None
        return (self.environment / ENVIRONMENT_MARKER).is_file()

    @property
    def command(self) -> list[str]:
        """Command that runs its process."""
        if self.library not in REQUIREMENTS:
            return [*OWN, self.library]
        # -E: PYTHONPATH would add this process's packages to the peer's environment.
        return [str(self.environment / "bin" / "python"), "-E", str(SCRIPT), self.library]


_ALL = (
    Peer("hf", "transformers", converts=False, decoder_only=False),
    Peer("genai", "genai", options={"precision": "fp32"}),
    Peer("genai-int4", "genai", "int4", {"precision": "int4"}),
    Peer("ctranslate2", "ctranslate2", options={"compute_type": "float32"}, decoder_only=False),
    Peer("ctranslate2-int8", "ctranslate2", "int8", {"compute_type": "int8"}, decoder_only=False),
    Peer("openvino", "openvino", options={"precision": "fp32"}),
    Peer("openvino-fp16", "openvino", "fp16", {"precision": "fp16"}),
    Peer("openvino-int8", "openvino", "int8", {"precision": "int8"}),
    Peer("openvino-int4", "openvino", "int4", {"precision": "int4"}),
    Peer("llama-cpp", "llama_cpp", "as the file", converts=False, gguf=True),
    Peer("llama-cpp-q8", "llama_cpp", "8 bits", {"convert_to": "q8_0"}, gguf=True),
    Peer("llama-cpp-f16", "llama_cpp", "fp16", {"convert_to": "f16"}, gguf=True),
    Peer("llama-cpp-f32", "llama_cpp", "fp32", {"convert_to": "f32"}, gguf=True),
    Peer("faster-whisper", "faster_whisper", converts=False),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def chosen(names: Sequence[str]) -> dict[str, str]:
    """Check the peers that are asked for by name. Default: those that are installed.

    Returns:
        Why the others are left out, by name.

    Raises:
        OptionError: If a name is unknown, or its peer is not installed.
    """
    for name in names:
        if name not in PEERS:
            near = difflib.get_close_matches(name, PEERS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise OptionError(f"--against {name}: {hint}known are {', '.join(PEERS)}")
        if not PEERS[name].installed:
            raise OptionError(
                f"--against {name}: it is not installed; run: python -m tools.peers install {name}"
            )
    if names:
        return {name: "not asked for" for name in PEERS if name not in names}
    missing = (peer for peer in PEERS.values() if not peer.installed)
    return {peer.name: "not installed" for peer in missing}


def install(peer: Peer) -> None:
    """Build a peer's environment with venv and pip, unless it exists.

    pip uses the user's configuration. Its output is kept in the cache under logs.

    Raises:
        PeerError: With pip's last error.
    """
    if peer.installed:
        return
    if peer.library not in REQUIREMENTS:
        raise PeerError(f"it runs in this environment; run: pip install {peer.library}")
    place = peer.environment
    log = user_cache("peers", "logs", f"{peer.library}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress(f"installing {peer.library}"),
        output_directory(place, ENVIRONMENT_MARKER, overwrite=True, sync=False) as partial,
        log.open("w", encoding="utf-8") as file,
    ):
        pip = [str(partial / "bin" / "python"), "-m", "pip", "install", "--no-input"]
        for command in (
            [sys.executable, "-m", "venv", str(partial)],
            [*pip, "--no-compile", "--disable-pip-version-check", *REQUIREMENTS[peer.library]],
        ):
            try:
                subprocess.run(
                    command,
                    env={**os.environ, **VARIABLES.get(peer.library, {})},
                    timeout=INSTALL_LIMIT,
                    check=True,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
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
        write_whole(partial / ENVIRONMENT_MARKER, json.dumps(REQUIREMENTS[peer.library]) + "\n")


def peer_model(peer: Peer, model: str) -> Path:
    """Return the path that a peer loads for a checkpoint.

    Converts the checkpoint with the peer's library first, unless the result is in the cache.

    Raises:
        CheckpointError: If the checkpoint cannot be opened.
        PeerError: If the peer does not support the model.
    """
    checkpoint = open_checkpoint(model)
    base = checkpoint.path
    if peer.gguf and base.suffix != ".gguf":
        raise PeerError("it reads GGUF files, and this checkpoint is not one")
    if not peer.converts:
        return base
    plain = checkpoint.merged is None and any(base.glob("*.safetensors"))
    if not peer.gguf and not plain:
        base = _converted(OURS, model, "checkpoint", checkpoint.sha256, {})
    name = f"{peer.name}-{peer.environment.name}"
    return _converted(peer.command, str(base), name, checkpoint.sha256, peer.options)


def _converted(
    command: Sequence[str], base: str, name: str, sha256: str, options: dict[str, Any]
) -> Path:
    place = user_cache("peers", "models", sha256[:16], name)
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
