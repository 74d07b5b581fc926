"""`freeexport convert`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from freeexport.commands.verb_options import CONFIDENCES, SectionedCommand, retired, section
from freeexport.conversion.bundle_verdict import bundle_verdict
from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import ConfidenceMeasure, Dialect, Manifest, Precision, Target
from runtime.bundle.precision import FloatType, HeadPrecision, Kernels
from runtime.kernels import kernels_of


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@section("The exit")
@click.option("--exit-layer", type=int, help="Exit after this layer.  [default: as trained, exit.json]")
@click.option("--confidence", type=click.Choice(get_args(ConfidenceMeasure)), default="softmax", show_default=True,
              help=CONFIDENCES)  # fmt: skip
@click.option("--exit-vocab", type=click.Path(path_type=Path),
              help="The file of freeexport exit-vocab: tokens of the shallow head; others never exit.")  # fmt: skip
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
@click.option("--head", type=click.Choice(get_args(HeadPrecision)),
              help="Weights of the head, where the others are quantized.  [default: 8 bits]")  # fmt: skip
@click.option("--kernels", type=click.Choice(get_args(Kernels)),
              help="Operators for quantized weights on a CPU. freeexport: ours. onnxruntime: its own, which other "
              "programs run too.  [default: freeexport where its library is built]")  # fmt: skip
@click.option("--rounding-data", type=click.Path(path_type=Path),
              help="JSON lines with input and target: 4-bit weights fit such text, and lose less.")  # fmt: skip
@click.option("--compute", type=click.Choice(get_args(FloatType)),
              help="The type a GPU computes in, where weights are quantized.  [default: fp16]")  # fmt: skip
@retired("--exact-rows", "with --kernels freeexport, the default, results never depend on the batch", is_flag=True)
@retired("--int8-range", "8-bit weights run on every processor")
@retired("--int8-layout", "8-bit weights are in blocks")
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
    if manifest.quantization is not None and (data := manifest.quantization.rounding_data) is not None:
        click.echo(f"4-bit weights: fitted to {data.tokens} tokens of {data.texts} texts")
    if manifest.quantization is not None and manifest.target == "cpu":
        click.echo(f"kernels: {kernels_of(manifest.kernels)}")
    if manifest.exit_vocabulary is not None:
        size, covered = manifest.exit_vocabulary.size, manifest.exit_vocabulary.covered
        known = f"{covered:.2%} of the shallow decoder's predictions"
        click.echo(f"exit vocabulary: {size} of {manifest.vocab_size} tokens, {known}")
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
