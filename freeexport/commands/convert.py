"""`freeexport convert`: convert a checkpoint to a bundle, optionally with TensorRT engines."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.ready_made import fitting_exits
from freeexport.commands.verb_options import CONFIDENCES, SectionedCommand, option_of, section
from freeexport.conversion.convert import build_and_test, convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.costs.verdict import bundle_verdict
from freeexport.system.page import human_bytes, listed_formats
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import is_calibration
from runtime.bundle.manifest import MANIFEST, FloatType, Manifest
from runtime.engines.kernels import kernels_of
from runtime.engines.tensorrt.files import DIRECTORY
from runtime.requests.thresholds import default_mode

option = option_of(ConvertOptions)


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@section("The exit")
@option(
    "exit_layer",
    "Layer after which tokens exit.  [default: as trained, else a third of the layers]",
)
@option(
    "exit",
    "Ready-made exit for MODEL's weights: its name (freeexport exits), a file, owner/name on the "
    "hub, or the directory of an EAGLE-3 head.",
    metavar="NAME|FILE|DIR",
)
@option(
    "calibration",
    "Calibration file for MODEL.  [default: the one that calibrate wrote beside MODEL]",
)
@option(
    "phrases",
    "JSONL file with 'input' and 'target', texts like the outputs. Mode lossless drafts the "
    "targets' frequent phrases without an engine call. none: no phrases.  [default: those of the "
    "ready-made exit, or of the answers in the package, for decoder-only models]",
    "--phrases",
    metavar="FILE",
)
@section("Engines")
@option(
    "target",
    "Device that runs the bundle. cpu: ONNX Runtime on a CPU. cuda: ONNX Runtime on a GPU. "
    "tensorrt: TensorRT (see --build).",
)
@option(
    "precision",
    "Precision of the weights. CPU: fp32, int8, int4, or mixed, with the shallow decoder in "
    "4 bits and the deep one in 8. GPU: fp16, bf16, or int8, fp8 and int4, which compute in "
    "another type (--compute).  [default: fp32; GPU: fp16]",
)
@option(
    "capacity", "Number of positions in the KV cache.  [default: the model's limit, at most 2048]"
)
@section("Result")
@option(
    "verify",
    "Comparison of the engines with the checkpoint. quick: short texts, at most a minute "
    "after the model is loaded. full: longer texts. none: skip verification and timing.",
)
@option("overwrite", "Replace an existing bundle at OUT.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the manifest, or the engines built, as JSON."
)
@section("Exits", rare=True)
@option("confidence", CONFIDENCES)
@section("Graphs and quantization", rare=True)
@option(
    "encoder_capacity", "Maximum prompt length of an encoder-decoder, in tokens.  [default: 2048]"
)
@option(
    "dialect",
    "Operators of the graphs. ort: ONNX Runtime's fused operators. standard: only those of "
    "ONNX opset 24.  [default: ort, for a GPU standard]",
)
@option("head", "Precision of the head's weights, if the others are quantized.  [default: 8 bits]")
@option(
    "kernels",
    "Operators for quantized weights on a CPU. freeexport: our own. onnxruntime: those of "
    "ONNX Runtime, which other programs can also run.  [default: freeexport if its library "
    "is built]",
)
@option(
    "kv_cache",
    "Type of keys and values with our own kernels. int8: 8 bits, and a scale for each head and "
    "position, which is about half of the memory. For decoder-only models.  [default: 16 bits]",
)
@option(
    "activations",
    "Type of activations in products with quantized weights on a CPU. int8: the fastest. int16: "
    "with our own kernels. Results are close to those of fp32 activations, and calls of several "
    "rows are slower.  [default: int8]",
)
@option(
    "rounding_data",
    "JSONL file with 'input' (and 'target') to fit 4-bit weights to.",
    "--quantization-data",
)
@option("compute", "Type in which a GPU computes with quantized weights.  [default: fp16]")
@section("TensorRT", rare=True)
@click.option(
    "--build",
    type=int,
    flag_value=8,
    is_flag=False,
    metavar="[BATCH]",
    help=(
        "Also build the engines of target tensorrt for this machine's GPU, for batches of up to "
        "8, or BATCH. Without OUT, MODEL must be a bundle."
    ),
)
def command(model: str, out: Path | None, build: int | None, as_json: bool, **options: Any) -> None:
    """Convert MODEL to a bundle of ONNX engines at OUT.

    MODEL is a Hugging Face checkpoint directory, a hub name, or a GGUF file. OUT is written
    completely or not at all.

    \b
    Example:
      freeexport convert path/to/checkpoint bundle --precision int8
      freeexport convert path/to/SmolLM2.gguf bundle --precision int8 --exit smollm2-chat
      freeexport convert path/to/checkpoint bundle --target tensorrt --build
      freeexport convert bundle --build 4
    """
    if build is not None and out is None:
        _build(Path(model), build, as_json)
        return
    if out is None:
        raise click.UsageError("OUT is missing; give the directory for the bundle")
    if (Path(model) / MANIFEST).is_file():
        raise click.UsageError(
            f"{model} is already a bundle; give a checkpoint, or omit OUT and give --build"
        )
    if build is not None and options["target"] != "tensorrt":
        raise click.UsageError("--build requires --target tensorrt")
    manifest = convert(model, out, ConvertOptions(measure=options["verify"] != "none", **options))
    if as_json and build is None:
        click.echo(manifest.to_json(), nl=False)
    if not as_json:
        # Reads the weights once more, to find ready-made exits that fit them.
        fitting = (
            fitting_exits(open_checkpoint(model))
            if options["exit"] is None and options["target"] == "cpu"
            else []
        )
        for line in _lines(
            manifest, Path(model), out, options, tuple(packed.name for packed in fitting)
        ):
            click.echo(line)
    if build is not None:
        _build(out, build, as_json)


def _lines(
    manifest: Manifest, model: Path, out: Path, options: dict[str, Any], ready_made: tuple[str, ...]
) -> Iterator[str]:
    """Describe a new bundle, one line per subject.

    `ready_made` are the names of exits that fit its weights.
    """
    yield f"{out}: {manifest.family}, exit after layer {manifest.exit_layer} of {manifest.layers}"
    on_cpu = manifest.target == "cpu"
    precision = manifest.precision
    quantization = manifest.quantization
    if on_cpu and manifest.dialect == "standard" and options["dialect"] is None:
        heads = f"heads of size {manifest.head_dim}"
        yield f"dialect: standard, as ONNX Runtime's fused attention has no kernel for {heads}"
    files = [model] if model.is_file() else [*model.glob("*.safetensors"), *model.glob("*.bin")]
    source = sum(path.stat().st_size for path in files)  # 0 for a hub name
    size = human_bytes(sum(file.size for file in manifest.files.values()))
    yield f"size: {size}{f', from {human_bytes(source)}' if source else ''}"
    advice = ""
    if on_cpu and precision == "fp16" and manifest.kernels is None:
        advice = "; note: CPUs compute in fp32, so fp16 saves space but no time"
    formats = manifest.weight_formats
    if on_cpu and precision in ("fp32", "fp16"):
        faster = ["fp16"] if precision == "fp32" and "fp32" in formats else []
        faster.append("int8" if formats.keys() <= set(get_args(FloatType)) else "int4")
        advice += f"; --precision {' or '.join(faster)} is faster on a CPU"
    yield f"weights: {human_bytes(manifest.weight_bytes)}, {precision}{advice}"
    if formats:
        yield f"stored with their exact values: {listed_formats(formats)}"
    if quantization is not None:
        if quantization.higher:
            names = ", ".join(
                dict.fromkeys(f"{item.tensor} ({item.stored})" for item in quantization.higher[:3])
            )
            more = (
                f" and {len(quantization.higher) - 3} more" if len(quantization.higher) > 3 else ""
            )
            yield f"kept at a higher precision: {names}{more} (see inspect)"
        if unchanged := {item.engine: item.kept for item in quantization.engines if item.kept}:
            each = ", ".join(f"{engine} {count}" for engine, count in unchanged.items())
            kinds = Counter[str]()
            for item in quantization.engines:
                kinds.update(item.kinds)
            known = "".join(f"; {kind} {count}" for kind, count in sorted(kinds.items()))
            yield (
                f"weights: {sum(unchanged.values())} tensors keep the checkpoint's bits "
                f"({each}{known})"
            )
        elif model.suffix == ".gguf" and precision in ("int4", "mixed"):
            yield (
                "weights: quantized again; Q4_0 and Q4_1 keep their bits, and at int4 with our "
                "kernels Q4_K to Q8_0"
            )
        if (data := quantization.rounding_data) is not None:
            yield f"4-bit weights: fitted to {data.tokens} tokens of {data.texts} texts"
        if on_cpu:
            yield f"kernels: {kernels_of(manifest.kernels)}"
            yield f"activations in products: {manifest.activations or 'int8'}"
    if (vocabulary := manifest.exit_vocabulary) is not None:
        known = (
            f", {vocabulary.covered:.2%} of the training targets" if vocabulary.text_tokens else ""
        )
        yield f"exit vocabulary: {vocabulary.size} of {manifest.vocab_size} tokens{known}"
    yield (
        f"KV cache: {human_bytes(manifest.kv_bytes_per_sequence)} per sequence of "
        f"{manifest.capacity} positions, in {manifest.cache_type}"
    )
    yield f"verified: {'yes' if manifest.verified else 'no'}"
    if not any(is_calibration(name) for name in manifest.files):
        yield "threshold: not calibrated"
    else:
        never = ": nothing exits" if manifest.threshold >= NEVER_EXIT else ""
        again = f"; it was calibrated in fp32; calibrate the bundle for a threshold in {precision}"
        yield (
            f"threshold: {manifest.threshold:.4g}, calibrated{never}{again if quantization else ''}"
        )
    bundle = Bundle.open(out)
    yield f"default: {default_mode(bundle)}"
    yield str(bundle_verdict(bundle))
    if ready_made:
        listed = shlex.join(("freeexport", "exits", str(model)))
        yield (
            f"ready-made exits for these weights: {', '.join(ready_made)}; what they gain: {listed}"
        )


def _build(bundle: Path, max_batch: int, as_json: bool) -> None:
    """Build the TensorRT engines of a bundle.

    Engines that are up to date are kept. An interrupted build keeps the engines that are finished.
    """
    built, tested = build_and_test(bundle, max_batch)
    if as_json:
        engines = [asdict(engine) | {"file": engine.plan.file} for engine in built]
        click.echo(json.dumps({"engines": engines, "self_test": asdict(tested)}, indent=2))
        return
    for engine in built:
        how = "up to date" if engine.reused else f"built in {engine.seconds:.1f} s"
        click.echo(f"{DIRECTORY}/{engine.plan.file}: {human_bytes(engine.bytes)}, {how}")
    found = ", ".join(f"{name} {difference:.2g}" for name, difference in tested.largest.items())
    passed = (
        f"passed; largest differences from the graphs, as multiples of their type's error: {found}"
    )
    click.echo(f"self-test: {passed if tested.ran else f'not run, {tested.why}'}")
