"""EAGLE-3 heads in the published layout: a directory with config.json and model.safetensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.exit_file import ExitFile
from freeexport.checkpoints.weight_files import (
    CheckpointError,
    SafetensorsFile,
    TensorFile,
    read_json,
)
from graphs.description import Description
from graphs.eagle_head import FUSION, HEAD, KNOWN, LAYER, NORM, OFFSETS, with_eagle_head
from graphs.errors import GraphError, UnsupportedModelError
from graphs.exit_head import EXIT
from graphs.families import describe
from graphs.shapes import check_config, check_weights
from runtime.bundle.bundle import sha256_of
from runtime.bundle.manifest import ExitVocabulary, ReadyMadeExit

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
EMBEDDING = f"{EXIT}embed_tokens.weight"
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps", "vocab_size")
_PROJECTIONS = (
    *(f"{LAYER}.self_attn.{part}_proj" for part in "qkvo"),
    *(f"{LAYER}.mlp.{part}_proj" for part in ("gate", "up", "down")),
)
_NORMS = (
    *(f"{LAYER}.{part}norm" for part in ("input_layer", "hidden_", "post_attention_layer")),
    NORM,
)
_REQUIRED = (f"{FUSION}.weight", HEAD, *(f"{name}.weight" for name in (*_PROJECTIONS, *_NORMS)))
_OPTIONAL = (OFFSETS, KNOWN, EMBEDDING, *(f"{name}.bias" for name in _PROJECTIONS))
# Largest difference of a head's embedding from the model's, relative to its norm. Rounding to 4
# bits, as in a GGUF file, makes one of 0.09.
MAX_DIFFERENCE = 0.2


class EagleWeights(TensorFile):
    """Tensors of a head, with "exit." before their published names.

    Args:
        file: The head's file.
    """

    def __init__(self, file: SafetensorsFile) -> None:
        self.path = file.path
        self.nbytes = file.nbytes
        self.shapes = {f"{EXIT}{name}": shape for name, shape in file.shapes.items()}
        self._file = file

    def read(self, name: str) -> np.ndarray:
        return self._file.read(name.removeprefix(EXIT))


@dataclass(frozen=True)
class EagleHead:
    """An EAGLE-3 head.

    Attributes:
        path: Its directory.
        config: Content of its config.json.
        weights: Its tensors.
    """

    path: Path
    config: dict[str, Any]
    weights: EagleWeights

    @property
    def sha256(self) -> str:
        """Hash of the two files, in hexadecimal."""
        both = " ".join(sha256_of(self.path / name) for name in (CONFIG, WEIGHTS))
        return hashlib.sha256(both.encode()).hexdigest()


def read_eagle_head(path: Path) -> EagleHead:
    """Open an EAGLE-3 head. Reads the configuration and the header of the weights.

    Raises:
        CheckpointError: If a file is missing, damaged, a pickle or of another layout.
    """
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} is no EAGLE-3 head: it has no {CONFIG}; name a complete one")
    config = read_json(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt"))
        reason = f"only {pickles[0][:80]}, a pickle, which is not read" if pickles else "no weights"
        raise CheckpointError(
            f"{path} has {reason}; save its tensors with safetensors as {WEIGHTS}"
        )
    weights = EagleWeights(SafetensorsFile(path / WEIGHTS))
    problem = None
    missing = [name for name in _REQUIRED if name not in weights.shapes]
    others = sorted(weights.shapes.keys() - {*_REQUIRED, *_OPTIONAL})
    layers = config.get("num_hidden_layers", 1)
    if config.get("model_type") != "llama":
        problem = f"its model_type is {str(config.get('model_type'))[:80]!r}, not 'llama'"
    elif missing or others:
        has = f"no {missing[0]}" if missing else f"also {others[0][:80]}"
        problem = f"it has {has.replace(EXIT, '', 1)}"
    elif layers != 1:
        problem = f"it has {str(layers)[:20]} layers, not 1"
    elif config.get("norm_before_residual"):
        problem = "its residual stream begins with the normed feature (norm_before_residual)"
    if problem is not None:
        raise CheckpointError(
            f"{path} is no EAGLE-3 head of the published layout: {problem}; name another"
        )
    try:
        check_config(config, _SIZES)
    except UnsupportedModelError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from None
    return EagleHead(path, config, weights)


def apply_eagle_head(base: Checkpoint, head: EagleHead) -> Checkpoint:
    """Return a checkpoint with an EAGLE-3 head as its exit, whose own exit is left out.

    Raises:
        CheckpointError: If sizes, vocabulary, or the states that the head reads do not fit.
    """
    own = {name: file for name, file in base.tensors.items() if not name.startswith(EXIT)}
    plain = replace(base, tensors=own, exit=None, exit_weights=None)
    description = describe(plain.config, plain)
    try:
        if (reason := _misfit(head.config, description)) is not None:
            raise GraphError(reason)
        checkpoint = replace(
            plain,
            tensors=own | dict.fromkeys(head.weights.shapes, head.weights),
            exit_weights=head.weights,
            ready_made=ReadyMadeExit(head.path.resolve().name, head.sha256, head.path.name),
            base=plain,
            eagle=head.config,
        )
        described = with_eagle_head(description, checkpoint, head.config)
        check_weights(described, checkpoint, (None, None))
        _check_embedding(checkpoint, description)
    except (GraphError, UnsupportedModelError) as error:
        reason = str(error).replace(f" {EXIT}", " ")
        raise CheckpointError(
            f"head {head.path} does not fit {base.name}: {reason}; name a head of this model"
        ) from None
    tokens = len(described.decoder.exit_tokens)
    exit_file = ExitFile(
        exit_layer=0,
        base_sha256=plain.sha256,
        loss="logit-kd",
        tune="exit",
        exit_layers=1,
        vocabulary=ExitVocabulary(tokens, 0.0, 0) if tokens else None,
        exit_input="eagle3",
    )
    return replace(checkpoint, exit=exit_file)


def _misfit(config: dict[str, Any], description: Description) -> str | None:
    """Return the reason why a head cannot belong to a model. None if it can."""
    if description.family != "llama" or description.decoder.embedding.scale != 1.0:
        return f"EAGLE-3 heads are read for models like Llama, and this is {description.family}"
    model = description.attention
    heads = config["num_attention_heads"]
    width = config["hidden_size"]
    pairs = {
        "hidden_size": (width, description.hidden_size),
        "target_hidden_size": (config.get("target_hidden_size", width), description.hidden_size),
        "vocab_size": (config["vocab_size"], description.vocab_size),
        # The cache of the exit has the heads of the model's.
        "num_key_value_heads": (config.get("num_key_value_heads") or heads, model.kv_heads),
        "head_dim": (config.get("head_dim") or width // heads, model.head_dim),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            return f"its {name} is {str(found)[:20]}, and the model's is {wanted}"
    return None


def _check_embedding(checkpoint: Checkpoint, description: Description) -> None:
    """Check that an embedding in the head's file is that of the model, which is read instead."""
    if EMBEDDING not in checkpoint:
        return
    table = description.decoder.embedding.table
    found = checkpoint.shape(EMBEDDING)
    if found != checkpoint.shape(table):
        raise GraphError(f"its embed_tokens is {list(found)}, of another vocabulary or size")
    wanted = checkpoint.read(table)
    difference = np.linalg.norm(checkpoint.read(EMBEDDING) - wanted) / np.linalg.norm(wanted)
    if not difference <= MAX_DIFFERENCE:
        raise GraphError(f"its embed_tokens differs by {difference:.0%} from the model's")
