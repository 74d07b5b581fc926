"""Checks of the paper's comparison before any work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from freeexport.calibrate.calibrate import check_sequences
from freeexport.calibrate.sources import reference_of
from freeexport.calibrate.threshold import Rule
from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.examples import DataError, read_examples
from freeexport.checkpoints.transformers_model import torch_device
from freeexport.conversion.convert_options import engine_options
from freeexport.system.jsonl import InputLine
from freeexport.system.page import human_bytes
from freeexport.task_metrics import MetricError, metric_of
from graphs.engine_options import TARGETS
from graphs.families import describe
from runtime.bundle.bundle import sha256_of
from runtime.engines.tensorrt.files import import_tensorrt
from runtime.errors import OptionError
from runtime.machine.device import Device
from runtime.machine.machine import available_memory
from runtime.requests.load_engines import check_device, require_memory
from tools.paper.compare_options import ROWS, CompareOptions, PaperRow
from tools.paper.compare_plan import bundles_of, measurements_of, trainings_of
from tools.paper.datasets import QUESTION, TRANSLATE

SPLITS = ("train", "test")
ANSWERS = ("squad-f1", "squad-em")
# Rows of `EarlyExits`, which reads the modules of a T5.
OF_T5: tuple[PaperRow, ...] = ("eager-exits", "calm", "calm-single", "copying")
# Bytes per parameter: weights, gradients and two moments of AdamW, in float32. LoRA only keeps the
# weights.
_TRAINED = 16
_LORA = 4
_CHECKPOINT = 4
_WEIGHT_BYTES: Mapping[str | None, float] = {"fp32": 4, "fp16": 2, "bf16": 2}
# Number of parameters below which eager PyTorch spends its time on calls.
TINY = 50_000_000


@dataclass(frozen=True)
class Resolved:
    """Checked options of a comparison.

    Attributes:
        options: Options, without values that are unset.
        run: Everything that results depend on, for JSON.
        notes: Rows that are left out, and doubts about others.
    """

    options: CompareOptions
    run: dict[str, Any]
    notes: tuple[str, ...]


def checked_options(options: CompareOptions) -> Resolved:
    """Check options, data, device, memory and disk, and fill in values that depend on them.

    Raises:
        DataError: If a file is missing, broken, without targets, or shares inputs with another.
        MetricError: If a metric does not fit the data.
        OptionError: If another option does not fit, or there is too little memory or disk.
        GraphError: If the engines do not support the model or the precision.
        EngineError: If a package for the device is missing.
        CheckpointError: If the checkpoint cannot be read.
        DeviceError: If there is no such device.
        CapacityError: If the device has too little memory.
    """
    device = Device.parse(options.device)
    for package in ("matplotlib", *(["peft"] if "lora" in options.rows else [])):
        if find_spec(package) is None:
            raise OptionError(
                f"{package} is not installed; run: pip install '.[train,calibrate,evaluate]'"
            )
    files, test = _check_data(options)
    metrics = _metrics(options, test[: options.lines])
    checkpoint = open_checkpoint(options.model)
    description = describe(checkpoint.config, checkpoint)
    layers = len(description.decoder.layers)
    exit_layer = options.exit_layer
    quarters = (round(layers * share / 4) for share in (1, 2, 3))
    static = options.static_depths or tuple(sorted({*quarters, exit_layer} - {0, layers}))
    near = (round(exit_layer / 2), 2 * exit_layer)
    others = options.depths or tuple(one for one in near if 1 <= one < layers)
    depths = tuple(one for one in others if one != exit_layer)
    _check_numbers(options)
    named = {
        "--exit-layer": (exit_layer,),
        "--static-depth": static,
        "--depth": depths,
        "--calm-min-layer": (options.calm_min_layer,) if "calm" in options.rows else (),
    }
    for option, values in named.items():
        for value in values:
            if not 1 <= value < layers:
                raise OptionError(
                    f"{option} {value} is outside the decoder of {layers} layers; "
                    f"choose 1 to {layers - 1}"
                )
    torch_device(options.device)
    check_device(device)
    if options.target == "tensorrt":
        import_tensorrt()
    precisions = TARGETS[options.target][1]
    precision = options.precision or ("fp32" if "fp32" in precisions else precisions[0])
    parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    rows = tuple(row for row in ROWS if row in options.rows)
    notes = []
    if description.family != "t5":
        rows = tuple(row for row in rows if row not in OF_T5)
        if left := [row for row in options.rows if row in OF_T5]:
            notes.append(f"left out for {description.family}: {', '.join(left)}, which need a T5")
    if device.index is not None:
        notes.append(f"the comparison has not yet been run on a GPU: check its figures on {device}")
    first = options.calm_min_layer
    if "calm" in rows and 2 * first > layers:
        notes.append(
            f"CALM may exit only after layer {first} of {layers}, so it exits late or never; the "
            "authors' 4 is for 24 layers, --calm-min-layer chooses another"
        )
    if parameters < TINY and any(row in rows for row in ("eager", *OF_T5)):
        notes.append(
            f"the model has {parameters / 1e6:.1f} million parameters: eager PyTorch spends its "
            "time on calls, not on products, so its columns do not apply to larger models"
        )
    found = replace(
        options,
        rows=rows,
        metrics=metrics,
        static_depths=static,
        depths=depths,
        precision=precision,
    )
    if not measurements_of(found):
        measured = ", ".join(row for row in ROWS if row not in ("eager-exits", *OF_T5))
        raise OptionError(
            f"--rows {','.join(options.rows)} measures nothing; add some of {measured}"
        )
    engine_options(description, found.conversion(description, exit_layer), exit_layer)
    _check_space(found, parameters)
    run = {
        **asdict(found),
        "output": "",
        "data": {name: sha256_of(path) for name, path in files.items()},
        "model_sha256": checkpoint.sha256,
    }
    return Resolved(found, run, tuple(notes))


def _check_numbers(options: CompareOptions) -> None:
    if not options.rows or not options.seeds or not options.thresholds:
        raise OptionError("name at least one row, one seed and one threshold")
    for row in options.rows:
        if row not in ROWS:
            raise OptionError(f"--rows {row!r} is unknown; choose from {', '.join(ROWS)}")
    for value in options.thresholds:
        if not 0 <= value < 1:
            raise OptionError(
                f"--threshold {value:g} is out of range; choose one from 0 to below 1"
            )
    if any(row in options.rows for row in ("free", "adaptive", "rollback", "lossless")):
        check_sequences(options.calibration_lines, Rule())
    if None not in (options.steps, options.epochs):
        raise OptionError("--steps and --epochs contradict each other; choose one")


def _check_data(options: CompareOptions) -> tuple[dict[str, Path], list[InputLine]]:
    """Return the files of the data set by split, and the test lines."""
    files = {name: options.data / f"{name}.jsonl" for name in SPLITS}
    files |= {"calibration": options.calibration, "validation": options.validation}
    inputs: dict[str, set[str]] = {}
    for name, path in files.items():
        if not path.is_file():
            wanted = "calibration.jsonl or validation.jsonl" if name == "calibration" else path.name
            raise DataError(
                f"{options.data} has no {wanted}; convert that split by python -m tools.paper data"
            )
        requests = read_examples(path, need_target="give every line an 'input' and a 'target'")
        inputs[name] = {str(request.input) for request in requests}
        if name == "test":
            test = requests
    for name in files:
        shared = inputs["test"] & inputs[name]
        if name != "test" and shared:
            raise DataError(
                f"{files['test']} shares {len(shared)} inputs with {files[name].name}; "
                "give disjoint splits"
            )
    return files, test


def _metrics(options: CompareOptions, test: Sequence[InputLine]) -> tuple[str, ...]:
    """Return the metrics: those given, or else those of the task."""
    texts = [str(request.input) for request in test]
    asks = all(text.startswith(QUESTION) for text in texts)
    names = options.metrics or _default_metrics(texts, asks)
    references = [reference for one in test if (reference := reference_of(one)) is not None]
    for name in names:
        if name in ANSWERS and not asks:
            raise MetricError(
                f"metric {name} is for SQuAD, whose inputs begin with {QUESTION!r}; those of "
                f"{options.data} do not; choose another --metric"
            )
        metric_of(name).table([one.texts[0] for one in references], references)
    return tuple(dict.fromkeys(names))


def _default_metrics(texts: Sequence[str], asks: bool) -> tuple[str, ...]:
    if asks:
        return ANSWERS
    rouge = ("rouge-l", "rouge-1", "rouge-2")
    translates = all(text.startswith(TRANSLATE) for text in texts)
    return ("bleu", *rouge) if translates else (*rouge, "bleu")


def training_memory(options: CompareOptions, parameters: int) -> int:
    """Estimate the bytes that a training needs at least, without activations."""
    return (_LORA if options.rows == ("lora",) else _TRAINED) * parameters


def needed_disk(options: CompareOptions, parameters: int) -> int:
    """Estimate the bytes of all checkpoints and bundles, and of one unfinished training."""
    plan = measurements_of(options)
    weights = _WEIGHT_BYTES.get(options.precision, 1)
    weights *= 2 if options.target == "tensorrt" else 1  # engines contain the weights again
    of_seed = _CHECKPOINT * len(trainings_of(plan)) + weights * len(bundles_of(plan))
    return int((len(options.seeds) * of_seed + _TRAINED) * parameters)


def _check_space(options: CompareOptions, parameters: int) -> None:
    device = Device.parse(options.device)
    needed = training_memory(options, parameters)
    if device.index is not None:
        require_memory(device.index, needed, "training")
    elif needed > available_memory():
        raise OptionError(
            f"training needs at least {human_bytes(needed)}, and "
            f"{human_bytes(available_memory())} are free; choose a smaller model"
        )
    place = options.output.absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    written = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    needed = needed_disk(options, parameters) - written
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OptionError(
            f"checkpoints and bundles need about {human_bytes(needed)} of disk, and "
            f"{human_bytes(free)} are free at {existing}; choose another --output, or fewer --rows "
            "or seeds"
        )
