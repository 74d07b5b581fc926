"""The manifest of engines that were just written."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from freeexport import __version__
from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.examples import known_ends
from freeexport.conversion.options import ConvertOptions
from graphs.description import Description
from graphs.engine_options import EngineOptions
from graphs.errors import GraphError
from runtime.bundle.bundle import VERIFICATION, sha256_of
from runtime.bundle.manifest import MANIFEST, SCHEMA_VERSION, DeclaredCopy, File, Manifest, Quantization
from runtime.kernels import VERSION as KERNELS_VERSION

VERSIONED = ("onnx", "onnx_ir", "onnxruntime", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Written:
    """Sizes of the engines: bytes of weights, what stands in memory a second time, and how weights were
    quantized."""

    bytes: int
    copies: tuple[DeclaredCopy, ...]
    quantization: Quantization | None


def new_manifest(
    checkpoint: Checkpoint,
    description: Description,
    engines: EngineOptions,
    options: ConvertOptions,
    written: Written,
    directory: Path,
) -> Manifest:
    """The manifest of the engines that stand in `directory`, not yet verified, measured or calibrated. Raises
    GraphError where the checkpoint does not say how decoding starts."""
    generation, attention = checkpoint.generation_config, description.attention
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family=description.family,
        dialect=engines.dialect,
        packed=engines.packed,
        precision=engines.precision,
        layers=len(description.decoder.layers),
        exit_layer=engines.exit_layer,
        exit_layers=len(description.decoder.exit_layers),
        hidden_size=description.hidden_size,
        vocab_size=description.vocab_size,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        capacity=engines.capacity,
        max_pending=engines.max_pending,
        encoder_capacity=options.longest_prompt if description.encoder else 0,
        confidence=engines.confidence,
        threshold=1.0,
        # Ids that the model has no row for never come, so they end nothing.
        eos_token_ids=known_ends(checkpoint, description.vocab_size),
        bos_token_id=generation.get("bos_token_id"),
        pad_token_id=generation.get("pad_token_id"),
        decoder_start_token_id=decoder_start(checkpoint, description),
        verified=False,
        source=checkpoint.name,
        source_sha256=checkpoint.sha256,
        weight_bytes=written.bytes,
        files=_files(directory),
        versions=_versions(),
        copies=written.copies,
        quantization=written.quantization,
        target=engines.target,
        exit_trained=checkpoint.exit is not None,
        kernels=KERNELS_VERSION if engines.kernels == "freeexport" else None,
        compute=None if engines.target == "cpu" or written.quantization is None else engines.float_type,
    )


def decoder_start(checkpoint: Checkpoint, description: Description) -> int | None:
    """The token that an encoder-decoder starts from; None for a decoder-only model. Raises GraphError where the
    checkpoint names none."""
    if description.encoder is None:
        return None
    start: int | None = checkpoint.generation_config.get("decoder_start_token_id")
    if start is None:
        raise GraphError(f"{checkpoint.name} names no decoder_start_token_id; add it to its generation_config.json")
    return start


def head_copies(
    description: Description, engines: EngineOptions, quantization: Quantization | None
) -> list[DeclaredCopy]:
    """The head's weights a second time: packed or on a device, and those of an exit vocabulary."""
    head = description.decoder.head.weight
    row = description.hidden_size * _head_bits(engines, quantization) // 8
    whole = description.vocab_size * row
    copies = []
    if engines.kernels == "freeexport":
        if head == description.decoder.embedding and engines.head == "int4":
            copies.append(
                DeclaredCopy(head, whole, "head, packed for freeexport's kernels, beside the embedding table")
            )
    elif engines.target != "cpu":
        if not engines.exit_tokens:
            copies.append(DeclaredCopy(head, whole, "head, for the deep engine (in the memory of the device)"))
    elif quantization is None:
        copies.append(DeclaredCopy(head, whole, "head, packed by ONNX Runtime for the deep engine (in memory)"))
    elif not engines.exit_tokens:
        copies.append(DeclaredCopy(head, whole, "head, packed by ONNX Runtime for each of the two engines (in memory)"))
    if engines.exit_tokens:
        copies.append(DeclaredCopy(head, len(engines.exit_tokens) * row, "head rows of the exit vocabulary"))
    return copies


def _head_bits(engines: EngineOptions, quantization: Quantization | None) -> int:
    if quantization is None:
        return 32 if engines.float_type == "fp32" else 16
    return 4 if any(engine.head == "int4" for engine in quantization.engines) else 8


def _files(directory: Path) -> dict[str, File]:
    """Every file but the manifest, and the report about these files."""
    paths = sorted(p for p in directory.iterdir() if p.name not in (MANIFEST, VERIFICATION))
    return {path.name: File(path.stat().st_size, sha256_of(path)) for path in paths}


def _versions() -> dict[str, str]:
    found = {"freeexport": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
