"""A checkpoint becomes a bundle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.tokenizer_files import write_tokenizer
from freeexport.conversion.manifest import Written, decoder_start, head_copies, new_manifest
from freeexport.conversion.options import ConvertOptions, check_rounding_data, engine_options
from freeexport.conversion.recalibrate import check_room, with_calibration
from freeexport.measure.costs import measured_in_child
from freeexport.system.output import OutputError, check_output, output_directory
from freeexport.system.progress import progress
from freeexport.verification.verification import VerificationError, verify_in_child
from graphs.description import Description, ForeignEncoder
from graphs.engine_options import EngineOptions
from graphs.engines import EngineBuilder, engine_names
from graphs.exit_head import with_exit
from graphs.families import describe
from graphs.tensorrt.build import BuildOptions, Built, build
from graphs.tensorrt.self_test import SelfTest, self_test
from graphs.weights import WeightFile
from runtime.bundle.bundle import VERIFICATION, Bundle, engine_files
from runtime.bundle.calibration import Calibration, check_calibration, read_calibration
from runtime.bundle.costs import recordable
from runtime.bundle.manifest import MANIFEST, DeclaredCopy, ExitVocabulary, Manifest, Precision
from runtime.errors import BundleError
from runtime.kernels import instructions
from runtime.machine.machine import write_back
from runtime.tensorrt.files import DIRECTORY

if TYPE_CHECKING:
    from freeexport.conversion.rounding_data import RoundedWeights

WEIGHTS = "weights.data"


def convert(model: str, out: Path, options: ConvertOptions) -> Manifest:
    """Write the bundle of `model` to `out`, complete or not at all, and return its manifest.

    What can be refused is refused before weights are read. Raises CheckpointError, UnsupportedModelError, OptionError,
    GraphError, CalibrationError where the calibration is of another model, and FreeExportError where `out` is in the
    way or verification fails.
    """
    check_output(out, MANIFEST, options.overwrite)
    verified = options.verify != "none"
    unverified = unverified_place(out) if verified else out
    calibration = None if options.calibration is None else read_calibration(options.calibration)
    if options.kernels == "freeexport" and (verified or options.measure):
        instructions()  # what cannot be run here, cannot be verified
    checkpoint = open_checkpoint(model)
    description = with_exit(describe(checkpoint.config, checkpoint), checkpoint)
    exit_layer = _exit_layer(checkpoint, len(description.decoder.layers), options.exit_layer)
    engines = engine_options(description, options, exit_layer)
    engines.check(description)
    check_rounding_data(engines, options.rounding_data)
    decoder_start(checkpoint, description)
    if calibration is not None:
        _check_calibration(calibration, checkpoint, description, engines)
    engines, vocabulary = _with_exit_vocabulary(model, checkpoint, out, engines, options)
    with output_directory(out, MANIFEST, options.overwrite) as directory:
        write_tokenizer(checkpoint, directory)
        written = _write_engines(checkpoint, description, engines, options.rounding_data, directory)
        manifest = new_manifest(checkpoint, description, engines, options, written, directory)
        manifest = replace(manifest, exit_vocabulary=vocabulary)
        if calibration is not None:
            manifest = with_calibration(manifest, calibration, directory)
        _write_manifest(manifest, directory)
        if manifest.kernels is not None:
            write_back(directory / WEIGHTS)
        if verified:
            with kept_where_refused(directory, unverified):
                passed = verify_in_child(directory, model, checkpoint, manifest, options.verify, options.threads)
            manifest = replace(manifest, verified=passed)
        # What a processor takes says nothing about a GPU.
        if options.measure and options.target == "cpu":
            manifest = replace(manifest, costs=recordable(measured_in_child(directory)))
        _write_manifest(manifest, directory)
    return manifest


def _exit_layer(checkpoint: Checkpoint, layers: int, given: int | None) -> int:
    """As trained or given, else a third of the layers."""
    if given is None and checkpoint.exit is None and layers > 1:
        given = max(1, round(layers / 3))
        click.echo(
            f"note: exit after layer {given} of {layers}, a third of them, as {checkpoint.name} has no exit.json; "
            "--exit-layer chooses another, freeexport train trains one",
            err=True,
        )
    return checkpoint.exit_layer(layers, given)


def unverified_place(out: Path) -> Path:
    """The place of a refused bundle for `out`. Raises OutputError where something stands there that is none."""
    absolute = Path(os.path.abspath(out))
    place = absolute.with_name(f"{absolute.name}.unverified")
    check_output(place, MANIFEST, overwrite=True)
    manifest = place / MANIFEST
    with suppress(BundleError, ValueError):
        if manifest.is_file() and Manifest.from_json(manifest.read_text(encoding="utf-8"), manifest).verified:
            raise OutputError(f"{place} holds a verified bundle, where a refused one would go; move it away")
    return place


@contextmanager
def kept_where_refused(directory: Path, place: Path) -> Iterator[None]:
    """If the block raises VerificationError, move the contents of `directory` to `place`, instead of an earlier one,
    and raise the error with the path. Without a report nothing was judged, and nothing is kept."""
    try:
        yield
    except VerificationError as error:
        if not (directory / VERIFICATION).is_file():
            raise
        with output_directory(place, MANIFEST, overwrite=True) as beside:
            for path in directory.iterdir():
                path.rename(beside / path.name)
        raise VerificationError(f"{error}; kept as {place}, with the figures in {VERIFICATION}") from None


def _check_calibration(
    calibration: Calibration, checkpoint: Checkpoint, description: Description, engines: EngineOptions
) -> None:
    check_room(calibration, engines.max_pending)
    facts = (description.vocab_size, engines.exit_layer, engines.confidence)
    # The hash reads every weight, so all else is compared first.
    check_calibration(calibration, calibration.source_sha256, *facts)
    check_calibration(calibration, checkpoint.sha256, *facts)


def _with_exit_vocabulary(
    model: str, checkpoint: Checkpoint, out: Path, engines: EngineOptions, options: ConvertOptions
) -> tuple[EngineOptions, ExitVocabulary | None]:
    if options.exit_vocab is None or options.data is None:
        return engines, None if checkpoint.exit is None else checkpoint.exit.vocabulary
    # torch, which decodes the data.
    from freeexport.measure.exit_vocabulary import choose_exit_vocabulary

    chosen = choose_exit_vocabulary(model, options.data, options.exit_vocab, out, engines.exit_layer)
    return replace(engines, exit_tokens=chosen.tokens), chosen.facts


def _write_engines(
    checkpoint: Checkpoint, description: Description, options: EngineOptions, text: Path | None, directory: Path
) -> Written:
    copies: list[DeclaredCopy] = []
    rounded = None if text is None else _rounded(checkpoint, description, options, text)
    names = engine_names(description)
    with WeightFile(directory / WEIGHTS) as weights, progress("building engines", len(names)) as advance:
        given = {} if rounded is None else rounded.weights
        builder = EngineBuilder(description, options, checkpoint, weights, directory, given)
        for name in names:
            if name == "encoder" and isinstance(description.encoder, ForeignEncoder):
                copies += _export_encoder(checkpoint, description.encoder, weights, directory, options.precision)
            else:
                getattr(builder, name)()
            advance()
        quantization = builder.quantization
        if quantization is not None and rounded is not None:
            quantization = replace(quantization, rounding_data=rounded.data)
        return Written(weights.bytes, (*head_copies(description, options, quantization), *copies), quantization)


def _rounded(checkpoint: Checkpoint, description: Description, engines: EngineOptions, text: Path) -> RoundedWeights:
    # torch takes a second to import.
    from freeexport.conversion.rounding_data import round_for_text

    return round_for_text(checkpoint, description, engines, text)


def _export_encoder(
    checkpoint: Checkpoint, encoder: ForeignEncoder, weights: WeightFile, directory: Path, precision: Precision
) -> list[DeclaredCopy]:
    # torch takes a second to import, and only these encoders need it here.
    from freeexport.conversion.encoder_export import export_encoder

    widened = export_encoder(checkpoint, encoder, weights, directory, precision)
    reason = "encoder weights, widened to fp32 by ONNX Runtime (in memory)"
    return [DeclaredCopy("encoder", widened, reason)] if widened else []


def _write_manifest(manifest: Manifest, directory: Path) -> None:
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def build_and_test(path: Path, options: BuildOptions) -> tuple[list[Built], SelfTest]:
    """Build the TensorRT engines of the bundle at `path`, and run them where there is a GPU. Raises BundleError and
    BuildError."""
    bundle = Bundle.open(path)
    done: dict[str, float] = {}
    with progress("building TensorRT engines", len(engine_files(bundle.manifest))) as advance:

        def report(engine: str, fraction: float) -> None:
            advance(fraction - done.get(engine, 0.0))
            done[engine] = fraction

        built = build(bundle, options, report)
    files = {engine.plan.engine: path / DIRECTORY / engine.plan.file for engine in built}
    return built, self_test(Bundle.open(path), files, options.max_batch)
