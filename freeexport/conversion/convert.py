"""Convert a checkpoint to a bundle."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from freeexport import __version__
from freeexport.calibrate.beside import TracedAnswer, check_sample, read_beside
from freeexport.checkpoints.checkpoint import Checkpoint
from freeexport.checkpoints.special_tokens import forced, known_ends, speech_of
from freeexport.checkpoints.tokenizer_files import languages_of, write_tokenizer
from freeexport.conversion.convert_options import NO_PHRASES, ConvertOptions, engine_options
from freeexport.conversion.model_card import CARD, model_card
from freeexport.conversion.phrases import counted_phrases, ready_made_phrases
from freeexport.conversion.recalibrate import check_fits, with_calibration
from freeexport.costs.measured import measured_in_child
from freeexport.costs.timing import exit_gain
from freeexport.system.output import OutputError, check_output, output_directory
from freeexport.system.progress import progress
from freeexport.verification.exit_agreement import open_with_exit
from freeexport.verification.verification import VerificationError, verify_in_child
from graphs.description import Description, ForeignEncoder
from graphs.engine_options import EngineOptions
from graphs.engines import EngineBuilder, engine_names
from graphs.errors import GraphError
from graphs.quantization.panels import FLOAT_DTYPES
from graphs.tensorrt.build import Built, build
from graphs.tensorrt.self_test import SelfTest, self_test
from graphs.weights import WeightFile
from runtime import Session
from runtime.bundle.bundle import VERIFICATION, Bundle, engine_files, sha256_of
from runtime.bundle.calibration import read_calibration
from runtime.bundle.costs import recordable
from runtime.bundle.manifest import (
    FLOAT_KERNELS,
    MANIFEST,
    SCHEMA_VERSION,
    DeclaredCopy,
    File,
    Manifest,
)
from runtime.bundle.quantization import Quantization
from runtime.decoding.phrases import PHRASES
from runtime.engines.kernels import instructions
from runtime.engines.tensorrt.files import DIRECTORY
from runtime.errors import BundleError
from runtime.machine.machine import write_back

WEIGHTS = "weights.data"
VERSIONED = ("onnx", "onnx_ir", "onnxruntime", "torch", "transformers", "numpy")


def convert(model: str, out: Path, options: ConvertOptions) -> Manifest:
    """Write the bundle of `model` to `out`, and return its manifest.

    `out` appears only when complete. Options and files are checked before weights are read. A
    calibration beside the checkpoint goes into the bundle, and is compared with the engines.

    Raises:
        CheckpointError: If the checkpoint is damaged or incomplete, or the exit does not fit it.
        UnsupportedModelError: If the model is not supported.
        OptionError: If options contradict each other.
        GraphError: If an option is out of range for the model.
        CalibrationError: If the calibration is for another model.
        FreeExportError: If `out` is in the way or verification fails.
    """
    check_output(out, MANIFEST, options.overwrite)
    verified = options.verify != "none"
    unverified = _unverified_place(out) if verified else out
    calibration = None if options.calibration is None else read_calibration(options.calibration)
    if options.kernels == "freeexport" and (verified or options.measure):
        instructions()  # raises an error if the kernels cannot run here
    checkpoint = open_with_exit(model, options.exit)
    description = checkpoint.described()
    layers = len(description.decoder.layers)
    exit_layer = options.exit_layer
    if exit_layer is None and checkpoint.exit is None and layers > 1:
        exit_layer = max(1, round(layers / 3))
        click.echo(
            f"note: exit after layer {exit_layer} of {layers}, a third of them, as "
            f"{checkpoint.name} has no exit.json; --exit-layer chooses another, freeexport train "
            "trains one",
            err=True,
        )
    if ignored := _ignored(checkpoint.generation_config):
        click.echo(
            f"note: not part of the bundle, though generation_config.json says so: {ignored}",
            err=True,
        )
    engines = engine_options(description, options, checkpoint.exit_layer(layers, exit_layer))
    max_prompt_tokens = options.max_prompt_tokens(description)
    if engines.keeps_file_bits() and (others := checkpoint.rounded_kinds()):
        instead = "stored as floats" if engines.in_floats else "quantized again"
        click.echo(
            f"note: {others}: no operator reads these, so they are dequantized and {instead}",
            err=True,
        )
    _decoder_start(checkpoint, description)
    speech = speech_of(checkpoint, description)
    if speech is not None:
        if options.target != "cpu":  # sessions of speech run on a CPU
            speech = replace(speech, alignment_heads=())
        description = description.with_queries({layer for layer, _ in speech.alignment_heads})
    samples: list[TracedAnswer] = []
    if calibration is None and (found := read_beside(checkpoint)) is not None:
        calibration, samples = found
        measured = calibration.exit_layer, calibration.confidence
        if measured != (engines.exit_layer, engines.confidence):
            click.echo(
                f"note: the calibration beside {checkpoint.name} is left out: it is for an exit "
                f"after layer {measured[0]} with confidence {measured[1]}",
                err=True,
            )
            calibration, samples = None, []
    if calibration is not None:
        facts = (
            description.vocab_size,
            engines.exit_layer,
            engines.confidence,
            engines.max_pending,
        )
        # The hash reads all weights, so everything else is compared first.
        check_fits(calibration, calibration.source_sha256, *facts)
        check_fits(calibration, checkpoint.sha256, *facts)
    vocabulary = None if checkpoint.exit is None else checkpoint.exit.vocabulary
    with output_directory(out, MANIFEST, options.overwrite) as directory:

        def write_manifest() -> None:
            (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")

        write_tokenizer(checkpoint, directory)
        phrases = checkpoint.phrases
        ends = known_ends(checkpoint, description.vocab_size)
        if options.phrases == NO_PHRASES:
            phrases = None
        elif options.phrases is not None:
            phrases = counted_phrases(Path(options.phrases), directory, ends)
        elif phrases is None and description.encoder is None:
            phrases = ready_made_phrases(directory, ends)
        if phrases is not None:
            np.save(directory / PHRASES, phrases)
        written = _write_engines(
            checkpoint, description, engines, text=options.rounding_data, directory=directory
        )
        manifest = _new_manifest(
            checkpoint,
            description,
            engines,
            max_prompt_tokens=max_prompt_tokens,
            written=written,
            directory=directory,
        )
        manifest = replace(manifest, exit_vocabulary=vocabulary, speech=speech)
        if calibration is not None:
            manifest = with_calibration(manifest, calibration, directory)
        write_manifest()
        if manifest.kernels is not None:
            write_back(directory / WEIGHTS)
        if verified:
            try:
                passed = verify_in_child(
                    directory,
                    model,
                    checkpoint,
                    manifest=manifest,
                    extent=options.verify,
                    exit_file=options.exit,
                )
            except VerificationError as error:
                if not (directory / VERIFICATION).is_file():
                    raise  # no checks were made, so nothing is kept
                with output_directory(unverified, MANIFEST, overwrite=True) as beside:
                    for path in directory.iterdir():
                        path.rename(beside / path.name)
                kept = f"kept as {unverified}, with the figures in {VERIFICATION}"
                raise VerificationError(f"{error}; {kept}") from None
            manifest = replace(manifest, verified=passed)
            write_manifest()
        if samples:
            _check_calibration(directory, manifest, samples)
        # Costs on a CPU do not apply to a GPU.
        if options.measure and options.target == "cpu":
            costs = measured_in_child(directory)
            manifest = replace(manifest, costs=recordable(costs))
            write_manifest()
            prompts = checkpoint.sample_prompts
            if manifest.ready_made_exit is not None and prompts and costs.trusted:
                timed = replace(manifest.ready_made_exit, gain=exit_gain(directory, prompts))
                manifest = replace(manifest, ready_made_exit=timed)
        write_manifest()
        (directory / CARD).write_text(model_card(manifest), encoding="utf-8")
    return manifest


def _check_calibration(directory: Path, manifest: Manifest, samples: list[TracedAnswer]) -> None:
    """Compare the engines with the checkpoint's calibration, and print the result."""
    if manifest.target != "cpu":
        click.echo(
            f"note: calibration of the checkpoint, not compared with engines of target "
            f"{manifest.target}; calibrate the bundle on its device",
            err=True,
        )
        return
    with Session(directory, slots=1, prefix_cache_mb=0) as session:
        found = check_sample(session, samples, manifest.threshold)
    if found is not None:
        click.echo(f"calibration of the checkpoint, on {found}", err=True)


def _ignored(generation: dict[str, Any]) -> str:
    """Return the recommended generation settings that bundles do not support.

    Requests can give some of them themselves.
    """
    plain = {
        "num_beams": 1,
        "length_penalty": 1.0,
        "min_length": 0,
        "min_new_tokens": 0,
        "no_repeat_ngram_size": 0,
    }
    named = [
        f"{name} {generation[name]}"
        for name, value in plain.items()
        if (generation.get(name) or value) != value
    ]
    longer = sum(len(words) > 1 for words in generation.get("bad_words_ids") or ())
    return ", ".join([*named, *([f"{longer} bad_words_ids of several tokens"] if longer else [])])


def _unverified_place(out: Path) -> Path:
    """Return the path for a refused bundle."""
    absolute = Path(os.path.abspath(out))
    place = absolute.with_name(f"{absolute.name}.unverified")
    check_output(place, MANIFEST, overwrite=True)
    manifest = place / MANIFEST
    with suppress(BundleError, ValueError):
        if (
            manifest.is_file()
            and Manifest.from_json(manifest.read_text(encoding="utf-8"), manifest).verified
        ):
            raise OutputError(
                f"{place} holds a verified bundle, where a refused one would go; move it away"
            )
    return place


class Written(NamedTuple):
    """Weights of new engines.

    Attributes:
        bytes: Size of the weight file.
        copies: Copies of weights in memory.
        quantization: How weights were quantized.
        formats: Number of matrices by stored format, unless they were quantized.
    """

    bytes: int
    copies: list[DeclaredCopy]
    quantization: Quantization | None
    formats: dict[str, int]


def _write_engines(
    checkpoint: Checkpoint,
    description: Description,
    options: EngineOptions,
    text: Path | None,
    directory: Path,
) -> Written:
    """Write the engines.

    torch takes a second to import, so it is imported only if needed.
    """
    copies = list[DeclaredCopy]()
    fitted = None
    if text is not None:
        from freeexport.conversion.rounding_data import round_for_text

        fitted = round_for_text(checkpoint, description, options, text)
    names = engine_names(description)
    with (
        WeightFile(directory / WEIGHTS) as weights,
        progress("building engines", len(names)) as advance,
    ):
        given = {} if fitted is None else fitted.weights
        builder = EngineBuilder(
            description,
            options,
            checkpoint,
            weights=weights,
            directory=directory,
            rounded=given,
            in_file=checkpoint.in_file,
        )
        for name in names:
            if name == "encoder" and isinstance(description.encoder, ForeignEncoder):
                from freeexport.conversion.encoder_export import export_encoder

                reason = "encoder weights, widened to fp32 by ONNX Runtime (in memory)"
                widened = export_encoder(
                    checkpoint, description.encoder, weights, directory=directory, options=options
                )
                copies += [DeclaredCopy("encoder", widened, reason)] if widened else []
            else:
                getattr(builder, name)()
            advance()
        quantization = builder.quantization
        if quantization is not None and fitted is not None:
            quantization = replace(quantization, rounding_data=fitted.data)
        return Written(
            weights.bytes,
            [*_head_copies(description, options, quantization), *copies],
            quantization,
            builder.weight_formats,
        )


def _new_manifest(
    checkpoint: Checkpoint,
    description: Description,
    engines: EngineOptions,
    max_prompt_tokens: int,
    written: Written,
    directory: Path,
) -> Manifest:
    """Return the manifest of the engines in `directory`.

    It has no verification, costs or calibration yet.
    """
    quantization = written.quantization
    versions = {"freeexport": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    # All files except the manifest and the verification report.
    files = sorted(
        path for path in directory.iterdir() if path.name not in (MANIFEST, VERIFICATION)
    )
    generation = checkpoint.generation_config
    attention = description.attention
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family=description.family,
        dialect=engines.dialect,
        packed=engines.packed,
        precision=engines.precision,
        layers=len(description.decoder.layers),
        exit_layer=engines.exit_layer,
        exit_layers=len(description.decoder.exit_layers),
        exit_input=description.exit_input,
        hidden_size=description.hidden_size,
        vocab_size=description.vocab_size,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        capacity=engines.capacity,
        max_pending=engines.max_pending,
        encoder_capacity=max_prompt_tokens,
        confidence=engines.confidence,
        threshold=1.0,
        # Ids without a row in the model are never generated, so they end nothing.
        eos_token_ids=known_ends(checkpoint, description.vocab_size),
        bos_token_id=generation.get("bos_token_id"),
        pad_token_id=generation.get("pad_token_id"),
        decoder_start_token_id=_decoder_start(checkpoint, description),
        verified=False,
        source=checkpoint.name,
        source_sha256=checkpoint.sha256,
        weight_bytes=written.bytes,
        files={path.name: File(path.stat().st_size, sha256_of(path)) for path in files},
        versions=versions,
        copies=tuple(written.copies),
        quantization=quantization,
        weight_formats=written.formats,
        target=engines.target,
        exit_trained=checkpoint.exit is not None and checkpoint.exit.trained,
        kernels=_kernels_version(engines, description, quantization),
        kv_cache=cache
        if (cache := engines.cache_type(description)) != engines.float_type
        else None,
        activations=None if engines.activations == "int8" else engines.activations,
        compute=None if engines.target == "cpu" or quantization is None else engines.float_type,
        forced_first_token_id=forced(generation, "forced_bos_token_id")
        if description.encoder
        else None,
        forced_last_token_id=forced(generation, "forced_eos_token_id")
        if description.encoder
        else None,
        languages=languages_of(checkpoint, directory),
        ready_made_exit=checkpoint.ready_made,
    )


def _kernels_version(
    engines: EngineOptions, description: Description, quantization: Quantization | None
) -> int | None:
    """Return the version of our operators that the bundle needs. None: only ONNX Runtime's."""
    version = engines.kernels_version(description)
    if version is None or quantization is None:
        return version
    floats = any(weight.stored in FLOAT_DTYPES for weight in quantization.higher)
    return max(version, FLOAT_KERNELS) if floats else version


def _decoder_start(checkpoint: Checkpoint, description: Description) -> int | None:
    """Return the first decoder token of an encoder-decoder. None for a decoder-only model."""
    if description.encoder is None:
        return None
    start: int | None = checkpoint.generation_config.get("decoder_start_token_id")
    if start is None:
        raise GraphError(
            f"{checkpoint.name} names no decoder_start_token_id; add it to its "
            "generation_config.json"
        )
    return start


def _head_copies(
    description: Description, engines: EngineOptions, quantization: Quantization | None
) -> list[DeclaredCopy]:
    """Return the copies of the head's weights.

    These are packed or on a device, or the rows of an exit vocabulary.
    """
    head = description.decoder.head.weight
    copies = list[DeclaredCopy]()
    known = description.decoder.exit_tokens
    if quantization is None:
        bits = 32 if engines.float_type == "fp32" else 16
    else:
        bits = 4 if any(engine.head == "int4" for engine in quantization.engines) else 8
    row = description.hidden_size * bits // 8
    whole = description.vocab_size * row
    reason = ""
    if engines.kernels == "freeexport":
        if head == description.decoder.embedding.table and engines.head == "int4":
            reason = "head, packed for freeexport's kernels, beside the embedding table"
    elif engines.target == "cpu" and quantization is None:
        reason = "head, packed by ONNX Runtime for the deep engine (in memory)"
    elif not known:
        reason = "head, packed by ONNX Runtime for each of the two engines (in memory)"
        if engines.target != "cpu":
            reason = "head, for the deep engine (in the memory of the device)"
    if reason:
        copies.append(DeclaredCopy(head, whole, reason))
    own = description.decoder.exit_head
    if known and (own is None or own.weight == head):
        copies.append(DeclaredCopy(head, len(known) * row, "head rows of the exit vocabulary"))
    return copies


def build_and_test(path: Path, max_batch: int) -> tuple[list[Built], SelfTest]:
    """Build the TensorRT engines of the bundle at `path`, and test them if there is a GPU.

    Raises:
        BundleError: If the bundle is damaged.
        BuildError: If the build fails.
    """
    bundle = Bundle.open(path)
    done: dict[str, float] = {}
    with progress("building TensorRT engines", len(engine_files(bundle.manifest))) as advance:

        def report(engine: str, fraction: float) -> None:
            advance(fraction - done.get(engine, 0.0))
            done[engine] = fraction

        built = build(bundle, max_batch, report)
    files = {engine.plan.engine: path / DIRECTORY / engine.plan.file for engine in built}
    return built, self_test(Bundle.open(path), files, max_batch)
