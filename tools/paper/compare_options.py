"""Options of the paper's comparison, and checks before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from freeexport.calibrate.sources import reference_of
from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.examples import DataError, read_examples
from freeexport.checkpoints.transformers_model import torch_device
from freeexport.system.jsonl import Request
from freeexport.system.page import human_bytes
from freeexport.task_metrics import MetricError, metric_of
from graphs.families import describe
from runtime.bundle.bundle import sha256_of
from runtime.bundle.manifest import Precision
from runtime.errors import OptionError
from runtime.machine.device import Device
from runtime.machine.machine import available_memory, usable_cores
from runtime.placement import require_memory
from tools.paper.datasets import QUESTION, TRANSLATE
from tools.paper.losses import Leftover
from tools.paper.recipes import EXIT_MIN_LAYER, LEARNING_RATE

PaperRow = Literal[
    "full",
    "eager",
    "static",
    "calm",
    "calm-single",
    "free",
    "adaptive",
    "rollback",
    "mapping",
    "depth",
    "samples",
    "copying",
    "lora",
]
ROWS: tuple[PaperRow, ...] = get_args(PaperRow)
# Graphs for a GPU.
GpuTarget = Literal["cuda", "tensorrt"]
# Rows whose decoder has engines for CPUs only.
ON_CPU: tuple[PaperRow, ...] = ("calm", "calm-single", "copying")
SPLITS = ("train", "test")
ANSWERS = ("squad-f1", "squad-em")
# Bytes per parameter: weights, gradients and two moments of AdamW, in float32. LoRA only keeps the
# weights.
_TRAINED = 16
_LORA = 4
_WEIGHT_BYTES: Mapping[str, float] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison, which tools/paper/__main__.py describes."""

    model: str
    data: Path
    exit_layer: int
    output: Path
    device: str = "cpu"
    engines: GpuTarget = "cuda"
    rows: tuple[PaperRow, ...] = ROWS
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch_tokens: int = 4096
    max_tokens: int | None = None
    learning_rate: float = LEARNING_RATE
    bf16: bool = False
    leftover: Leftover = "reuse"
    lines: int = 300
    calibration_lines: int = 300
    samples: tuple[int, ...] = (10, 30, 100)
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    static_depths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    calm_min_layer: int = EXIT_MIN_LAYER
    metrics: tuple[str, ...] = ()
    max_new_tokens: int = 128
    rounds: int = 1
    threads: int | None = None
    precision: Precision = "fp32"

    @property
    def count(self) -> int:
        """Threads per engine call and of PyTorch."""
        return self.threads or usable_cores()

    @property
    def calibration(self) -> Path:
        """File of calibration data."""
        own = self.data / "calibration.jsonl"
        return own if own.exists() else self.data / "validation.jsonl"

    @property
    def validation(self) -> Path:
        """File of validation data."""
        own = self.data / "validation.jsonl"
        return own if own.exists() else self.calibration


@dataclass(frozen=True)
class Resolved:
    """Checked options of a comparison.

    Attributes:
        options: Options, without values that are unset.
        run: Everything that results depend on, for JSON.
        notes: Rows that are left out, and why.
    """

    options: CompareOptions
    run: dict[str, Any]
    notes: tuple[str, ...]


def checked_options(options: CompareOptions) -> Resolved:
    """Check options, data, device and memory, and fill in the values that depend on them.

    Raises:
        DataError: If a file is missing, broken, without targets, or shares inputs with another.
        MetricError: If a metric does not fit the data.
        OptionError: If another option does not fit, or there is too little memory.
        CheckpointError: If the checkpoint cannot be read.
        DeviceError: If there is no such device.
        CapacityError: If the device has too little memory.
    """
    device = Device.parse(options.device)
    files, test = _check_data(options)
    metrics = _metrics(options, test[: options.lines])
    checkpoint = open_checkpoint(options.model)
    layers = len(describe(checkpoint.config, checkpoint).decoder.layers)
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
    rows = options.rows
    notes = []
    if device.index is not None:
        rows = tuple(row for row in rows if row not in ON_CPU)
        if left := [row for row in options.rows if row in ON_CPU]:
            notes.append(f"left out on {device}: {', '.join(left)}; CALM has engines for CPUs only")
        notes.append(f"the comparison has not yet been run on a GPU: check its figures on {device}")
    found = replace(options, rows=rows, metrics=metrics, static_depths=static, depths=depths)
    parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    _check_memory(found, parameters)
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
    if unknown := [row for row in options.rows if row not in ROWS]:
        raise OptionError(f"--rows {unknown[0]!r} is unknown; choose from {', '.join(ROWS)}")
    for value in options.thresholds:
        if not 0 <= value < 1:
            raise OptionError(
                f"--threshold {value:g} is out of range; choose one from 0 to below 1"
            )
    if None not in (options.steps, options.epochs):
        raise OptionError("--steps and --epochs contradict each other; choose one")


def _check_data(options: CompareOptions) -> tuple[dict[str, Path], list[Request]]:
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


def _metrics(options: CompareOptions, test: Sequence[Request]) -> tuple[str, ...]:
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


def needed_memory(options: CompareOptions, parameters: int) -> dict[str, int]:
    """Estimate the bytes that training and measurement need at least, without activations."""
    weights = _WEIGHT_BYTES.get(options.precision, 1)
    # The largest measurement has the bundles of the full model, of static, FREE and CALM's single
    # exit, and the model of PyTorch.
    main = {"full", "static", "calm", "calm-single", "free", "adaptive", "rollback", "copying"}
    shared = {"calm": "static", "adaptive": "free", "rollback": "free", "copying": "free"}
    bundles = {"full"} | {shared.get(row, row) for row in options.rows if row in main}
    eager = 4 if "eager" in options.rows else 0
    return {
        "training": (_LORA if options.rows == ("lora",) else _TRAINED) * parameters,
        "the measurement": int((len(bundles) * weights + eager) * parameters),
    }


def _check_memory(options: CompareOptions, parameters: int) -> None:
    device = Device.parse(options.device)
    for what, needed in needed_memory(options, parameters).items():
        if device.index is not None:
            require_memory(device.index, needed, what)
        elif needed > available_memory():
            raise OptionError(
                f"{what} needs at least {human_bytes(needed)}, and "
                f"{human_bytes(available_memory())} are free; choose a smaller model, or fewer "
                "--rows"
            )
