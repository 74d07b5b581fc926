"""calibration.json: a threshold, how it was found, and the expected results of other thresholds."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from runtime.bundle.beta import BetaMixture
from runtime.bundle.costs import Costs
from runtime.bundle.json_file import UnreadableError, read_text
from runtime.bundle.manifest import ConfidenceMeasure, LayerCount
from runtime.bundle.schema import Range, Reader, is_newer, parse_object
from runtime.errors import CalibrationError

CALIBRATION = "calibration.json"
CALIBRATION_VERSION = 2
CALIBRATION_MINOR = 0
REMEDY = "run freeexport calibrate again"
LARGEST_CALIBRATION = 4 << 20  # bytes

Method = Literal["bmm", "paper", "risk", "quality"]
Share = Annotated[float, Range(0, 1)]
Ratio = Annotated[float, Range(0, 1e6)]
Count = Annotated[int, Range(1, 1 << 50)]


@dataclass(frozen=True)
class TableRow:
    """Expected results of a threshold. None if unknown.

    Attributes:
        threshold: The threshold.
        exit_rate: Share of tokens that exit.
        agreement: Share of exits that agree. None if nothing exits.
        quality: Metric relative to the full model's. It may exceed 1.
        predicted_speedup: Predicted speedup over the full model.
        measured_speedup: Measured speedup over the full model.
    """

    threshold: Share
    exit_rate: Share
    agreement: Share | None = None
    quality: Ratio | None = None
    predicted_speedup: Ratio | None = None
    measured_speedup: Ratio | None = None


@dataclass(frozen=True)
class Calibration:
    """A threshold and the model it was measured on.

    Attributes:
        source_sha256: Hash of the checkpoint, which with the next three fields identifies the
            model.
        method: How `threshold` was found. "bmm": Beta mixture with `target` P(agree | c). "paper":
            the authors' rule with `target` zeta. "risk": with `risk` and `delta`. "quality": with
            `delta` and `target`, the metric relative to the full model's.
        threshold: Tokens with a higher confidence exit. 1.0: none.
        sequences: Number of calibration sequences.
        positions: Number of tokens in them.
        agreement: Share of `positions` at which both decoders predicted the same token.
        rollback_threshold: Limit for mode rollback, in nats.
        table: Expected results of other thresholds.
        costs: As in the manifest.
        max_pending: Most rows of a sync pass that the threshold was chosen for. Default: the
            bundle's.
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
        content = dataclasses.asdict(self)
        return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = CALIBRATION) -> Calibration:
        """Parse and check a calibration.

        Raises:
            BundleError: Names the field that is wrong.
        """
        content = parse_object(text, where, REMEDY)
        newer = is_newer(content, where, (CALIBRATION_VERSION, CALIBRATION_MINOR))
        calibration: Calibration = Reader(REMEDY, skips=newer).read(cls, content, where)
        if calibration.costs is not None and not calibration.costs.sound:
            shown = repr(calibration.costs)[:80]
            raise CalibrationError(f"{where}: costs = {shown} is out of range; {REMEDY}")
        return calibration


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        BundleError: If it cannot be read or is invalid.
    """
    try:
        text = read_text(path, LARGEST_CALIBRATION)
    except UnreadableError as reason:
        raise CalibrationError(f"{path} cannot be read ({reason}); {REMEDY}") from None
    return Calibration.from_json(text, str(path))


def check_calibration(
    calibration: Calibration, source_sha256: str, vocab_size: int, exit_layer: int, confidence: str
) -> None:
    """Check that a calibration was measured on this model.

    Raises:
        CalibrationError: If it was not. The message states the difference.
    """
    for name, measured, wanted in (
        ("vocabulary", calibration.vocab_size, vocab_size),
        ("exit layer", calibration.exit_layer, exit_layer),
        ("confidence measure", calibration.confidence, confidence),
        ("model, by sha256,", calibration.source_sha256, source_sha256),
    ):
        if measured != wanted:
            shown, other = (f"{v[:12]!r}" if isinstance(v, str) else v for v in (measured, wanted))
            raise CalibrationError(
                f"this calibration was measured on another {name} {shown}, not {other}; "
                "calibrate this model"
            )


def is_calibration(name: str) -> bool:
    """Return True if a file of a bundle is a calibration, by its name."""
    return re.fullmatch(r"calibration(-[0-9a-f]{12})?\.json", name) is not None


def calibration_name(sha256: str) -> str:
    """Return the file name of the calibration with this sha256."""
    return f"calibration-{sha256[:12]}.json"
