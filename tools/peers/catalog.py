"""The decoders that ours is compared with, and what each needs."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import OptionError

SCRIPTS = Path(__file__).parent

_TORCH = "torch>=2.6,<3"
_TRANSFORMERS = (_TORCH, "transformers>=5,<6")
_OPTIMUM = ("optimum-onnx[onnxruntime]>=0.1,<0.2", "transformers>=4.57,<4.58", _TORCH)
_GENAI = ("onnxruntime-genai>=0.10", *_TRANSFORMERS, "onnx>=1.20", "onnx_ir>=0.1", "sentencepiece>=0.2", "protobuf>=5")
_CTRANSLATE2 = ("ctranslate2>=4.6", *_TRANSFORMERS, "sentencepiece>=0.2")
_LLAMA_CPP = ("llama-cpp-python>=0.3",)


@dataclass(frozen=True)
class Peer:
    """`script` stands in SCRIPTS and serves peers/wire.py's protocol; `requirements` are what pip installs for it, with
    `variables` in its environment. A peer that `converts` makes a model of its own from the checkpoint first;
    `options` go to its conversion and to its loading. `gguf`: it reads the GGUF file itself."""

    name: str
    precision: str
    script: str
    requirements: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    converts: bool = True
    decoder_only: bool = False
    gguf: bool = False


def _transformers(name: str, decoder_only: bool = False, **options: Any) -> Peer:
    return Peer(name, "fp32", "run_transformers.py", _TRANSFORMERS, {}, options, False, decoder_only)


def _genai(name: str, precision: str) -> Peer:
    options = {"precision": precision}
    return Peer(name, precision, "run_genai.py", _GENAI, options=options, decoder_only=True)


def _ctranslate2(name: str, precision: str, compute_type: str) -> Peer:
    return Peer(name, precision, "run_ctranslate2.py", _CTRANSLATE2, options={"compute_type": compute_type})


def _llama_cpp(name: str, precision: str, convert_to: str | None) -> Peer:
    # Without this, the compiled library does without the newest instructions of the processor.
    variables = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    options = {"convert_to": convert_to}
    return Peer(
        name, precision, "run_llama_cpp.py", _LLAMA_CPP, variables, options, convert_to is not None, True, gguf=True
    )


_ALL = (
    _transformers("hf"),
    _transformers("hf-compile", compile=True),
    # The layer is that of the bundle's exit, which the benchmark fills in.
    _transformers("hf-early-exit", decoder_only=True, early_exit=None),
    # As many tokens as its documentation drafts.
    _transformers("hf-lookup", lookup=10),
    Peer("optimum", "fp32", "run_optimum.py", _OPTIMUM),
    _genai("genai", "fp32"),
    _genai("genai-int4", "int4"),
    _ctranslate2("ctranslate2", "fp32", "float32"),
    _ctranslate2("ctranslate2-int8", "int8", "int8"),
    _llama_cpp("llama-cpp", "as the file", None),
    _llama_cpp("llama-cpp-q8", "8 bits", "q8_0"),
    _llama_cpp("llama-cpp-f32", "fp32", "f32"),
)

PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def find_peer(name: str) -> Peer | None:
    """The peer of that name; None where `name` is a path or hub name of a checkpoint.

    Raises OptionError for what is neither, with the names that there are.
    """
    if name in PEERS:
        return PEERS[name]
    if "/" in name or Path(name).exists():
        return None
    near = difflib.get_close_matches(name, PEERS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise OptionError(f"--against {name}: {hint}known are {', '.join(PEERS)}, and the path of a checkpoint")
