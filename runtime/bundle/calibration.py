"""calibration.json: how a threshold was found, on which model, and what other thresholds would give."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from runtime.bundle.beta import BetaMixture
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import ConfidenceMeasure, LayerCount
from runtime.bundle.schema import Range, Reader, is_newer, parse_object
from runtime.errors import CalibrationError
from runtime.json_file import UnreadableError, read_text

CALIBRATION = "calibration.json"
CALIBRATION_VERSION, CALIBRATION_MINOR = 2, 0
REMEDY = "run freeexport calibrate again"
LARGEST_CALIBRATION = 4 << 20  # bytes

Method = Literal["bmm", "paper", "risk", "quality"]
Share = Annotated[float, Range(0, 1)]
Ratio = Annotated[float, Range(0, 1e6)]
Count = Annotated[int, Range(1, 1 << 50)]


@dataclass(frozen=True)
class TableRow:
    """Expected results of a threshold; None is not known.

    `exit_rate`: share of tokens that exit. `agreement`: share of exits that agree, None where none exits. `quality`: a
    metric as a share of the full model's, which it may exceed. Speedups over the full model.
    """

    threshold: Share
    exit_rate: Share
    agreement: Share | None = None
    quality: Ratio | None = None
    predicted_speedup: Ratio | None = None
    measured_speedup: Ratio | None = None


@dataclass(frozen=True)
class Calibration:
    """A threshold, the model it was measured on, and the results of other thresholds.

    `source_sha256`, `vocab_size`, `exit_layer` and `confidence` name the model. `method` found `threshold`: "bmm" with
    `target` P(agree | c), "paper" with `target` zeta, "risk" with `risk` and `delta`, "quality" with `delta` and
    `target` as a share of the full model's metric. 1.0 is never to exit. `rollback_threshold` in nats. `agreement`: the
    share of the `positions` of all `sequences` at which both decoders predicted the same. `costs` as in the manifest.
    `max_pending`: the most rows of a sync pass that the threshold was chosen with, where fewer than the bundle's.
    """

    schema_version: Annotated[int, Range(CALIBRATION_VERSION, CALIBRATION_VERSION)]
    source_sha256: str
    vocab_size: Count
    exit_layer: LayerCount
    confidence: ConfidenceMeasure
    method: Method
    threshold: Share
    sequences: Count
    positions: Count
    agreement: Share
    target: Share | None = None
    risk: Share | None = None
    delta: Share | None = None
    rollback_threshold: Ratio | None = None
    mixture: BetaMixture | None = None
    table: tuple[TableRow, ...] = ()
    costs: Costs | None = None
    created_with: dict[str, str] = field(default_factory=dict)
    max_pending: Annotated[int, Range(1, 4096)] | None = None
    schema_minor: Annotated[int, Range(CALIBRATION_MINOR, CALIBRATION_MINOR)] = CALIBRATION_MINOR

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = CALIBRATION) -> Calibration:
        """Parse and check. Raises BundleError naming the field that is wrong."""
        content = parse_object(text, where, REMEDY)
        newer = is_newer(content, where, (CALIBRATION_VERSION, CALIBRATION_MINOR))
        calibration: Calibration = Reader(REMEDY, skips=newer).read(cls, content, where)
        if calibration.costs is not None and not calibration.costs.sound:
            raise CalibrationError(f"{where}: costs = {repr(calibration.costs)[:80]} is out of range; {REMEDY}")
        return calibration


def read_calibration(path: Path) -> Calibration:
    """Read the calibration in a file. Raises BundleError."""
    try:
        text = read_text(path, LARGEST_CALIBRATION)
    except UnreadableError as reason:
        raise CalibrationError(f"{path} cannot be read ({reason}); {REMEDY}") from None
    return Calibration.from_json(text, str(path))


def check_calibration(
    calibration: Calibration, source_sha256: str, vocab_size: int, exit_layer: int, confidence: str
) -> None:
    """Refuse a calibration that was measured on another model. Raises CalibrationError with the reason."""
    for name, measured, wanted in (
        ("vocabulary", calibration.vocab_size, vocab_size),
        ("exit layer", calibration.exit_layer, exit_layer),
        ("confidence measure", calibration.confidence, confidence),
        ("model, by sha256,", calibration.source_sha256, source_sha256),
    ):
        if measured != wanted:
            shown, other = (f"{v[:12]!r}" if isinstance(v, str) else v for v in (measured, wanted))
            raise CalibrationError(
                f"this calibration was measured on another {name} {shown}, not {other}; calibrate this model"
            )


def is_calibration(name: str) -> bool:
    """Return whether a file of a bundle is a calibration."""
    return re.fullmatch(r"calibration(-[0-9a-f]{12})?\.json", name) is not None


def calibration_name(sha256: str) -> str:
    """The name of the calibration with this sha256."""
    return f"calibration-{sha256[:12]}.json"
