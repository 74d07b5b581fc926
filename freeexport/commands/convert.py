"""`freeexport convert`, `build` and `verify`: a checkpoint becomes a bundle, with TensorRT engines, and is checked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.commands.verb_options import CONFIDENCES, SectionedCommand, retired, section
from freeexport.conversion.bundle_verdict import bundle_verdict
from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from freeexport.conversion.tensorrt_build import build_and_test
from freeexport.verification.checks import line_of
from freeexport.verification.verification import VerificationError, failure, verify, write_report
from graphs.tensorrt.build import BuildOptions
from graphs.tensorrt.self_test import SelfTest
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import ConfidenceMeasure, Dialect, Manifest, Precision, Target
from runtime.bundle.precision import FloatType, HeadPrecision, Kernels
from runtime.kernels import kernels_of
from runtime.tensorrt.files import DIRECTORY


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@section("The exit")
@click.option("--exit-layer", type=int, help="Exit after this layer.  [default: as trained, exit.json]")
@click.option("--confidence", type=click.Choice(get_args(ConfidenceMeasure)), default="softmax", help=CONFIDENCES)
@click.option("--exit-vocab", type=click.IntRange(0), metavar="N",
              help="Tokens that the shallow head knows, chosen on --data; others never exit. 0: as many as are fastest."
              "  [default: all]")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), help="JSONL with 'input' (and 'target') for --exit-vocab.")
@click.option("--max-pending", type=int, default=16, help="Maximum tokens in a sync pass.")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="The calibration file of freeexport calibrate for MODEL."
)
@section("Engines")
@click.option("--target", type=click.Choice(get_args(Target)), default="cpu",
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
    if manifest.quantization is not None and (kept := sum(item.kept for item in manifest.quantization.engines)):
        click.echo(f"4-bit weights: {kept} tensors as the checkpoint has them")
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


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--max-batch", type=int, default=8, help="Maximum batch size.")
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False),
              help="Kernel timings to share between bundles.  [default: in the bundle]")  # fmt: skip
@click.option(
    "--version-compatible", is_flag=True, help="Engines that later TensorRTs of this major version can run, too."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def build_command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Build the TensorRT engines of BUNDLE, which `convert --target tensorrt` made.

    Engines are built for this machine's GPU and TensorRT version. Engines that are up to date are kept; an interrupted
    build keeps the finished ones.

    \b
    Example:
      freeexport convert path/to/checkpoint bundle --target tensorrt
      freeexport build bundle --max-batch 4
    """
    built, tested = build_and_test(bundle, BuildOptions(**options))
    if as_json:
        engines = [asdict(engine) | {"file": engine.plan.file} for engine in built]
        click.echo(json.dumps({"engines": engines, "self_test": asdict(tested)}, indent=2))
        return
    for engine in built:
        how = "up to date" if engine.reused else f"built in {engine.seconds:.1f} s"
        click.echo(f"{DIRECTORY}/{engine.plan.file}: {engine.bytes / 1e6:.1f} MB, {how}")
    click.echo(f"self-test: {_self_test(tested)}")


def _self_test(tested: SelfTest) -> str:
    if not tested.ran:
        return f"not run, {tested.why}"
    found = ", ".join(f"{name} {difference:.2g}" for name, difference in tested.largest.items())
    return f"passed; largest differences from the graphs, as multiples of the rounding error of their type: {found}"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="The checkpoint that the bundle was made from.")
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines to measure the quality on, with --against.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify_command(bundle: Path, against: str | None, data: Path | None, as_json: bool) -> None:
    """Check every byte of BUNDLE, and its engines: against the checkpoint, and one token at a time against one pass.

    With --against the report is written to verification.json in the bundle. Exit code 1 where a check fails.

    \b
    Example:
      freeexport verify bundle --against path/to/checkpoint
    """
    if data is not None and against is None:
        raise click.UsageError("--data is measured against the checkpoint; give --against MODEL")
    opened = Bundle.open(bundle, verify="full")
    report = verify(opened, against, data)
    if against is not None:
        write_report(opened, report)
    if as_json:
        click.echo(json.dumps(report))
    if not report["passed"]:
        raise VerificationError(failure(report))
    if not as_json:
        _print_report(report)


def _print_report(report: dict) -> None:
    for check in report["checks"]:
        click.echo(f"ok  {line_of(check)}")
    if "greedy" in report:
        prompts = report["greedy"]["prompts"]
        same = sum(prompt["first_difference"] is None for prompt in prompts)
        rest = "" if same == len(prompts) or report["greedy"]["tie"] is None else ", the others first differ at a tie"
        click.echo(f"ok  greedy decoding: ids of {same} of {len(prompts)} prompts equal{rest}")
    if "quality" in report:
        click.echo(f"ok  {_quality_line(report['quality'])}")


def _quality_line(quality: dict) -> str:
    """The quality measured on text, as people read it."""
    return (
        f"quality on {quality['tokens']} tokens: same best token {quality['agreement']:.1%}, "
        f"perplexity x {quality['perplexity_ratio']:.3f}, divergence {quality['divergence']:.2g} nats"
    )
