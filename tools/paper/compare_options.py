"""Options of the paper's comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from freeexport.conversion.convert_options import ConvertOptions
from graphs.description import Description
from runtime.bundle.manifest import Precision, Target
from runtime.machine.device import Device
from runtime.machine.machine import usable_cores
from tools.paper.losses import Leftover
from tools.paper.recipes import EXIT_MIN_LAYER, LEARNING_RATE

PaperRow = Literal[
    "full",
    "eager",
    "eager-exits",
    "static",
    "calm",
    "calm-single",
    "free",
    "adaptive",
    "rollback",
    "lossless",
    "mapping",
    "depth",
    "samples",
    "copying",
    "lora",
]
ROWS: tuple[PaperRow, ...] = get_args(PaperRow)
# Graphs for a GPU.
GpuTarget = Literal["cuda", "tensorrt"]
# Maximum number of rows of a sync pass. It is as long as an output if that is shorter, so FREE's
# stack is not limited, as in the authors' code.
MAX_PENDING = 256
# Minimum number of positions of a decoder's cache. The verification of a bundle needs some.
MIN_CAPACITY = 128


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
    precision: Precision | None = None

    @property
    def target(self) -> Target:
        """Target of the engines."""
        return "cpu" if Device.parse(self.device).index is None else self.engines

    def conversion(self, description: Description, depth: int) -> ConvertOptions:
        """Return the options of a model's conversion with an exit after layer `depth`."""
        decoder = self.max_new_tokens if description.encoder is not None else None
        return ConvertOptions(
            exit_layer=depth,
            precision=self.precision,
            target=self.target,
            capacity=None if decoder is None else max(MIN_CAPACITY, decoder),
            encoder_capacity=None if decoder is None else self.max_tokens,
            max_pending=min(MAX_PENDING, self.max_new_tokens),
            overwrite=True,
        )

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
