"""calibration.json: how a threshold was found, on which model, and what other thresholds would give."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.bundle.beta import BetaMixture
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import ConfidenceMeasure
from runtime.bundle.schema import Reader, is_newer
from runtime.errors import CalibrationError
from runtime.json_file import UnreadableError, parse_json, read_text

CALIBRATION = "calibration.json"
CALIBRATION_VERSION, CALIBRATION_MINOR = 2, 0
REMEDY = "run freeexport calibrate again"

# Limits of what is read: bytes of the file, entries of its table, and figures that no calibration has.
LARGEST_CALIBRATION = 4 << 20
MOST_ENTRIES = 10_000
MOST_TOKENS, MOST_ROWS, MOST_SPEEDUP = 1 << 50, 4096, 1e6

Method = Literal["bmm", "paper", "risk", "quality"]

# Of a row of the table, by their ranges: a quality may exceed the full model's.
SHARES = ("threshold", "exit_rate", "agreement")
RATIOS = ("quality", "predicted_speedup", "measured_speedup")


@dataclass(frozen=True)
class TableRow:
    """Expected results of a threshold. `exit_rate`: share of tokens that exit. `agreement`: share of those that agree,
    None where none exits. `quality`: of the metric, as a share of the full model's. Speedups over the full model. None
    is not known."""

    threshold: float
    exit_rate: float
    agreement: float | None = None
    quality: float | None = None
    predicted_speedup: float | None = None
    measured_speedup: float | None = None


@dataclass(frozen=True)
class Calibration:
    """`source_sha256`, `vocab_size`, `exit_layer` and `confidence` say which model was measured.

    `method` found `threshold`: "bmm" with `target` P(agree | c), "paper" with `target` zeta, "risk" with `risk` and
    `delta`, "quality" with `delta` and `target` as a share of the full model's metric. 1.0 is never to exit.
    `rollback_threshold` in nats. `agreement`: of the `positions` of all `sequences`, the share at which both decoders
    predicted the same. `costs` as in the manifest. `max_pending`: the most rows of a sync pass that the threshold was
    chosen with, where fewer than the bundle's.
    """

    schema_version: int
    source_sha256: str
    vocab_size: int
    exit_layer: int
    confidence: ConfidenceMeasure
    method: Method
    threshold: float
    sequences: int
    positions: int
    agreement: float
    target: float | None = None
    risk: float | None = None
    delta: float | None = None
    rollback_threshold: float | None = None
    mixture: BetaMixture | None = None
    table: tuple[TableRow, ...] = ()
    costs: Costs | None = None
    created_with: dict[str, str] = field(default_factory=dict)
    max_pending: int | None = None
    schema_minor: int = CALIBRATION_MINOR

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path | str = CALIBRATION) -> Calibration:
        """Parse and check. Raises CalibrationError or BundleError naming the field that is wrong."""
        try:
            raw = parse_json(text, nan=True)
        except UnreadableError as reason:
            raise CalibrationError(f"{where} cannot be read ({reason}); {REMEDY}") from None
        newer = isinstance(raw, dict) and is_newer(raw, str(where), (CALIBRATION_VERSION, CALIBRATION_MINOR))
        calibration: Calibration = Reader(REMEDY, True, MOST_ENTRIES, skips=newer).read(cls, raw, str(where))
        calibration._check(str(where))
        return calibration

    def _check(self, where: str) -> None:
        rules = [
            (self.schema_version == CALIBRATION_VERSION, "schema_version", self.schema_version),
            (self.schema_minor == CALIBRATION_MINOR, "schema_minor", self.schema_minor),
            (self.costs is None or self.costs.sound, "costs", self.costs),
            (0 < self.vocab_size <= MOST_TOKENS, "vocab_size", self.vocab_size),
            (1 <= self.exit_layer <= MOST_TOKENS, "exit_layer", self.exit_layer),
            (_share(self.threshold), "threshold", self.threshold),
            (1 <= self.sequences <= MOST_TOKENS, "sequences", self.sequences),
            (1 <= self.positions <= MOST_TOKENS, "positions", self.positions),
            (_share(self.agreement), "agreement", self.agreement),
            (_share(self.target), "target", self.target),
            (_share(self.risk), "risk", self.risk),
            (_share(self.delta), "delta", self.delta),
            (1 <= (self.max_pending or 1) <= MOST_ROWS, "max_pending", self.max_pending),
            (_not_negative(self.rollback_threshold), "rollback_threshold", self.rollback_threshold),
        ]
        for index, row in enumerate(self.table):
            rules += [(_share(getattr(row, name)), f"table[{index}]: {name}", getattr(row, name)) for name in SHARES]
            rules += [
                (_not_negative(getattr(row, name)), f"table[{index}]: {name}", getattr(row, name)) for name in RATIOS
            ]
        for holds, name, value in rules:
            if not holds:
                raise CalibrationError(f"{where}: {name} = {repr(value)[:80]} is out of range; {REMEDY}")


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file. Raises CalibrationError or BundleError."""
    try:
        text = read_text(path, LARGEST_CALIBRATION)
    except UnreadableError as reason:
        raise CalibrationError(f"{path} cannot be read ({reason}); {REMEDY}") from None
    return Calibration.from_json(text, path)


def check_calibration(
    calibration: Calibration, source_sha256: str, vocab_size: int, exit_layer: int, confidence: str
) -> None:
    """Refuse a calibration that was measured on another model. Raises CalibrationError with the reason."""
    pairs: list[tuple[str, int | str, int | str]] = [
        ("vocabulary", calibration.vocab_size, vocab_size),
        ("exit layer", calibration.exit_layer, exit_layer),
        ("confidence measure", calibration.confidence, confidence),
        ("model, by sha256,", calibration.source_sha256, source_sha256),
    ]
    for what, measured, wanted in pairs:
        if measured != wanted:
            raise CalibrationError(
                f"this calibration was measured on another {what} {_shown(measured)}, not {_shown(wanted)}; "
                "calibrate this model"
            )


def _share(value: float | None) -> bool:
    return value is None or 0.0 <= value <= 1.0


def _not_negative(value: float | None) -> bool:
    return value is None or 0.0 <= value <= MOST_SPEEDUP


def _shown(value: int | str) -> str:
    return str(value) if isinstance(value, int) else f"{value[:12]!r}"


_NAME = re.compile(r"calibration(-[0-9a-f]{12})?\.json")


def is_calibration(name: str) -> bool:
    """Whether a file of a bundle is a calibration."""
    return _NAME.fullmatch(name) is not None


def calibration_name(sha256: str) -> str:
    """The name of the calibration with this sha256."""
    return f"calibration-{sha256[:12]}.json"
