"""`freeexport convert`: a checkpoint becomes a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.tokenizer_files import write_tokenizer
from freeexport.commands.verb_options import CONFIDENCES, SectionedCommand, section
from freeexport.conversion.bundle_verdict import bundle_verdict
from freeexport.conversion.exit_vocabulary_file import read_exit_vocabulary
from freeexport.conversion.manifest import Written, decoder_start, head_copies, new_manifest
from freeexport.conversion.options import ConvertOptions, engine_options
from freeexport.conversion.recalibrate import check_room, with_calibration
from freeexport.conversion.unverified import kept_where_refused, unverified_place
from freeexport.costs.measured import measured_in_child
from freeexport.system.output_directory import check_output, output_directory
from freeexport.system.progress import progress
from freeexport.verification.verification import verify_in_child
from graphs.description import Description, ForeignEncoder
from graphs.engines import EngineBuilder, EngineOptions, engine_names
from graphs.errors import GraphError
from graphs.exit_head import with_exit_head
from graphs.families import describe
from graphs.weights import WeightFile
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import Calibration, check_calibration, read_calibration
from runtime.bundle.costs import recordable
from runtime.bundle.manifest import MANIFEST, ConfidenceMeasure, DeclaredCopy, Dialect, Manifest, Precision, Target
from runtime.bundle.precision import ExitVocabulary, FloatType, HeadPrecision, Int8Layout, Int8Range, Kernels
from runtime.kernels import instructions, kernels_of

WEIGHTS = "weights.data"


def convert(model: str, out: Path, options: ConvertOptions) -> Manifest:
    """Write the bundle of `model` to `out`, complete or not at all, and return its manifest.

    Raises CheckpointError, UnsupportedModelError, GraphError, CalibrationError where the calibration is of another
    model, and FreeExportError where `out` is in the way or verification fails.
    """
    check_output(out, MANIFEST, options.overwrite)
    unverified = unverified_place(out) if options.verify else out
    checkpoint = open_checkpoint(model)
    description = with_exit_head(describe(checkpoint.config, checkpoint), checkpoint)
    exit_layer = _exit_layer(checkpoint, description, options.exit_layer)
    engines = engine_options(description, options, exit_layer)
    engines.check(description)
    decoder_start(checkpoint, description)
    if options.kernels == "freeexport" and (options.verify or options.measure):
        instructions()  # what cannot be run here, cannot be verified: better known before the long work
    calibration = _calibration(checkpoint, description, engines, options.calibration)
    engines, vocabulary = _with_exit_vocabulary(checkpoint, description, engines, options)
    with output_directory(out, MANIFEST, options.overwrite) as directory:
        write_tokenizer(checkpoint, directory)
        written = _write_engines(checkpoint, description, engines, directory)
        manifest = new_manifest(checkpoint, description, engines, options, written, directory)
        manifest = replace(manifest, exit_vocabulary=vocabulary)
        if calibration is not None:
            manifest = with_calibration(manifest, calibration, directory)
        _write_manifest(manifest, directory)
        if options.verify:
            with kept_where_refused(directory, unverified):
                manifest = replace(manifest, verified=verify_in_child(directory, model, checkpoint, manifest))
        # What a processor takes says nothing about a GPU.
        if options.measure and options.target == "cpu":
            manifest = replace(manifest, costs=recordable(measured_in_child(directory)))
        _write_manifest(manifest, directory)
    return manifest


def _exit_layer(checkpoint: Checkpoint, description: Description, asked: int | None) -> int:
    """Where the exit stands: as trained, if the checkpoint was trained for one."""
    trained = None if checkpoint.exit is None else checkpoint.exit.exit_layer
    if trained is not None and asked not in (None, trained):
        raise GraphError(f"{checkpoint.name} was trained to exit after layer {trained}, not {asked}; leave it out")
    chosen = trained if asked is None else asked
    if chosen is None:
        last = len(description.decoder.layers) - 1
        raise GraphError(f"{checkpoint.name} has no exit.json; choose --exit-layer, from 1 to {last}")
    return chosen


def _calibration(
    checkpoint: Checkpoint, description: Description, engines: EngineOptions, path: Path | None
) -> Calibration | None:
    """The file, if any, checked before the long work."""
    if path is None:
        return None
    calibration = read_calibration(path)
    check_room(calibration, engines.max_pending)
    # The hash reads every weight, so all else is compared first.
    check_calibration(
        calibration, calibration.source_sha256, description.vocab_size, engines.exit_layer, engines.confidence
    )
    check_calibration(calibration, checkpoint.sha256, description.vocab_size, engines.exit_layer, engines.confidence)
    return calibration


def _with_exit_vocabulary(
    checkpoint: Checkpoint, description: Description, engines: EngineOptions, options: ConvertOptions
) -> tuple[EngineOptions, ExitVocabulary | None]:
    if isinstance(options.exit_vocab, Path):
        chosen = read_exit_vocabulary(options.exit_vocab, checkpoint.sha256, description.vocab_size, engines.exit_layer)
        return replace(engines, exit_tokens=chosen.tokens), chosen.facts
    if options.exit_vocab_text is None or options.exit_vocab == "all":
        return engines, None
    from freeexport.conversion.exit_vocabulary import exit_vocabulary

    size = None if options.exit_vocab == "auto" else options.exit_vocab
    tokens, vocabulary = exit_vocabulary(checkpoint, description, size, options.exit_vocab_text)
    return replace(engines, exit_tokens=tokens), vocabulary


def _write_engines(
    checkpoint: Checkpoint, description: Description, options: EngineOptions, directory: Path
) -> Written:
    copies: list[DeclaredCopy] = []
    names = engine_names(description)
    with WeightFile(directory / WEIGHTS) as weights, progress("building engines", len(names)) as advance:
        builder = EngineBuilder(description, options, checkpoint, weights, directory)
        for name in names:
            if name == "encoder" and isinstance(description.encoder, ForeignEncoder):
                copies += _export_encoder(checkpoint, description.encoder, weights, directory, options.precision)
            else:
                getattr(builder, name)()
            advance()
        quantization = builder.quantization
        return Written(weights.bytes, (*head_copies(description, options, quantization), *copies), quantization)


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


class ExitVocabularyType(click.ParamType):
    """A number of tokens, "auto", "all" or a file."""

    name = "vocabulary"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int | str | Path:
        if isinstance(value, (int, Path)) or value in ("auto", "all"):
            return value  # type: ignore[no-any-return]
        try:
            return int(value)
        except ValueError:
            if not Path(value).is_file():
                self.fail(f"{value!r} is not a number, auto, all or a file", parameter, context)
            return Path(value)


# Bytes of fp32 weights: those of smaller models stay in a processor's cache, and quantized ones are no faster.
ROUNDING_PAYS = 64 << 20


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@section("The exit")
@click.option("--exit-layer", type=int, help="Exit after this layer.  [default: as trained, exit.json]")
@click.option("--confidence", type=click.Choice(get_args(ConfidenceMeasure)), default="softmax", show_default=True,
              help=CONFIDENCES)  # fmt: skip
@click.option(
    "--exit-vocab",
    type=ExitVocabularyType(),
    default="all",
    show_default=True,
    metavar="N|auto|all|FILE",
    help="Tokens of the shallow head; others never exit. A number, or the file of exit-vocab.",
)
@click.option("--exit-vocab-text", type=click.Path(path_type=Path),
              help="JSON lines to choose them from: text like the model's output.")  # fmt: skip
@click.option("--max-pending", type=int, default=16, show_default=True, help="Maximum tokens in a sync pass.")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="The calibration file of freeexport calibrate for MODEL."
)
@section("Engines")
@click.option("--target", type=click.Choice(get_args(Target)), default="cpu", show_default=True,
              help="The device: cpu, cuda (ONNX Runtime on a GPU), or tensorrt (then freeexport build).")  # fmt: skip
@click.option("--precision", type=click.Choice(get_args(Precision)),
              help="Of the weights. CPU: fp32; int8; int4; mixed, a shallow decoder in 4 bits and a deep one in 8. "
              "GPU: fp16; bf16; int8, fp8, int4, which compute in --compute.  [default: fp32; GPU: fp16]")  # fmt: skip
@click.option("--dialect", type=click.Choice(get_args(Dialect)),
              help="ort: ONNX Runtime's fused operators. standard: ONNX opset 24 only.  "
              "[default: ort, for a GPU standard]")  # fmt: skip
@click.option("--capacity", type=int, help="Positions of the KV cache.  [default: the model's limit, at most 2048]")
@click.option("--encoder-capacity", type=int, help="Longest prompt of an encoder-decoder.  [default: 2048]")
@section("Quantized weights")
@click.option(
    "--int8-range",
    type=click.Choice(["auto", *get_args(Int8Range)]),
    default="auto",
    show_default=True,
    help="Of 8-bit weights. full: -127 to 127. reduced: half, for processors without 8-bit dot products (VNNI). auto: "
    "for this processor.",
)
@click.option(
    "--int8-layout",
    type=click.Choice(["auto", *get_args(Int8Layout)]),
    default="auto",
    show_default=True,
    help="Of 8-bit decoders: blocks for one token at a time, rows for long prompts and batches. auto: by --int8-range.",
)
@click.option("--head", type=click.Choice(get_args(HeadPrecision)),
              help="Weights of the head, where the others are quantized.  [default: 8 bits]")  # fmt: skip
@click.option("--exact-rows", is_flag=True, help="Quantized for a CPU: results do not depend on the batch, so lossless "
              "equals full bit for bit. 2 % to 27 % slower.")  # fmt: skip
@click.option("--kernels", type=click.Choice(get_args(Kernels)), default="onnxruntime", show_default=True,
              help="Operators for quantized weights on a CPU. onnxruntime: its own. freeexport: ours.")  # fmt: skip
@click.option("--compute", type=click.Choice(get_args(FloatType)),
              help="The type a GPU computes in, where weights are quantized.  [default: fp16]")  # fmt: skip
@section("Result")
@click.option("--no-verify", is_flag=True, help="Do not compare the engines with the checkpoint.")
@click.option("--no-measure", is_flag=True, help="Do not time the engines for the break-even exit rate.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(model: str, out: Path, no_verify: bool, no_measure: bool, as_json: bool, **options: Any) -> None:
    """Convert MODEL to a bundle of ONNX engines at OUT.

    MODEL is a Hugging Face checkpoint directory, a hub name, or a GGUF file. OUT is written complete or not at all.

    \b
    Example:
      freeexport convert path/to/checkpoint bundle --exit-layer 10
    """
    manifest = convert(model, out, ConvertOptions(verify=not no_verify, measure=not no_measure, **options))
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    click.echo(f"{out}: {manifest.family}, exit after layer {manifest.exit_layer} of {manifest.layers}")
    if manifest.target == "cpu" and manifest.dialect == "standard" and options["dialect"] is None:
        click.echo(
            f"dialect: standard, as ONNX Runtime's fused attention has no kernel for heads of size {manifest.head_dim}"
        )
    faster = (
        "; --precision int8 is faster on a CPU" if manifest.target == "cpu" and manifest.precision == "fp32" else ""
    )
    click.echo(f"weights: {manifest.weight_bytes / 1e6:.1f} MB, {manifest.precision}{faster}")
    if manifest.quantization is not None and manifest.quantization.higher:
        click.echo(f"kept at a higher precision: {len(manifest.quantization.higher)} tensors (see inspect)")
    if manifest.quantization is not None and manifest.target == "cpu":
        click.echo(f"kernels: {kernels_of(manifest.kernels)}")
    if manifest.exit_vocabulary is not None:
        size, covered = manifest.exit_vocabulary.size, manifest.exit_vocabulary.covered
        known = "of the text" if options["exit_vocab_text"] else "of the shallow decoder's predictions"
        click.echo(f"exit vocabulary: {size} of {manifest.vocab_size} tokens, {covered:.2%} {known}")
    click.echo(f"KV cache: {manifest.kv_bytes_per_sequence / 1e6:.1f} MB per sequence of {manifest.capacity} positions")
    click.echo(f"verified: {'yes' if manifest.verified else 'no'}")
    click.echo(_threshold(manifest, options["calibration"]))
    click.echo(str(bundle_verdict(Bundle.open(out))))


def _threshold(manifest: Manifest, calibration: Path | None) -> str:
    if calibration is None:
        return "threshold: 1.0, not calibrated: nothing exits until you calibrate or pass a threshold"
    rounded = (
        ""
        if manifest.quantization is None
        else (f"; it was calibrated in fp32; calibrate the bundle for a threshold in {manifest.precision}")
    )
    never = ": nothing exits" if manifest.threshold >= NEVER_EXIT else ""
    return f"threshold: {manifest.threshold:.4g}, calibrated{never}{rounded}"
