"""The labels that sync passes give to requests, and the base of thresholds that learn from them.

`AdaptiveThreshold` is the product's rule. Another rule is a subclass of `Learner`, which a session
uses if it replaces `Thresholds.adaptive` (tools/paper/threshold.py).
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from runtime.bundle.manifest import ConfidenceMeasure, Manifest
from runtime.bundle.schema import Range, Reader
from runtime.errors import BundleError, CalibrationError, OptionError, shown

STATE_VERSION = 1

StateT = TypeVar("StateT", bound="LearnedState")
Count = Annotated[int, Range(0, 1 << 62)]


class RequestLabels:
    """Labels that one request collects. Used by one thread.

    Args:
        threshold: Threshold at the start of the request.
        learns: The request's labels are used.
        audits: Check the rows that remain stacked at the end.
    """

    def __init__(self, threshold: float, learns: bool, audits: bool) -> None:
        self.threshold = threshold
        self.learns = learns
        self._audits = audits
        self.labelled: list[tuple[float, bool]] = []
        self.unlabelled: list[float] = []
        self.audited = False

    def label(self, rows: Sequence[tuple[float, bool]]) -> None:
        """Add rows of a sync pass: confidence, and whether both decoders predict the same token."""
        self.labelled.extend(rows)

    def leave(self, confidences: Sequence[float], at_rest: bool = True) -> bool:
        """Add rows with these confidences, which remain stacked when the sequence ends.

        Return True to request an audit: a pass over them, which needs that no engine call is
        running (`at_rest`). They are then added by `label`.
        """
        if self._audits and at_rest and confidences:
            self.audited = True
            return True
        self.unlabelled.extend(confidences)
        return False


@dataclass(frozen=True)
class LearnedState:
    """A saved state in JSON types. These fields identify the model."""

    schema_version: int
    source_sha256: str
    exit_layer: int
    confidence: ConfidenceMeasure


class Learner:
    """Base of adaptive thresholds, shared by the requests of a session. Thread-safe.

    `threshold` is the current threshold, used by requests that begin now.
    """

    threshold: float

    def __init__(self, manifest: Manifest) -> None:
        # Reentrant: garbage collection inside `complete` may complete a stream that was not closed.
        self._lock = threading.RLock()
        self._model: dict[str, Any] = {
            "schema_version": STATE_VERSION,
            "source_sha256": manifest.source_sha256,
            "exit_layer": manifest.exit_layer,
            "confidence": manifest.confidence,
        }

    def begin(self) -> RequestLabels:
        """Begin a request."""
        raise NotImplementedError

    def complete(self, labels: RequestLabels) -> None:
        """Learn from a request that has ended."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return the learned state in JSON types."""
        with self._lock:
            return dataclasses.asdict(self._state())

    def _state(self) -> LearnedState:
        raise NotImplementedError

    def _read(self, given: Mapping[str, Any], kind: type[StateT]) -> StateT:
        """Parse a saved state."""
        try:
            listed = {name: _listed(value) for name, value in dict(given).items()}
            state: StateT = Reader("start without a state").read(kind, listed, "adaptive_state")
        except (BundleError, CalibrationError, TypeError, ValueError) as error:
            raise OptionError(str(error)) from None
        for name, expected in self._model.items():
            value = getattr(state, name)
            if value != expected:
                raise OptionError(
                    f"adaptive_state: {name} is {shown(value)}, this bundle has {expected!r}; "
                    "start without a state"
                )
        return state


def check_sums(sums: Iterable[Sequence[float]], max_sum: float = math.inf) -> None:
    """Check that each row is a weight of at least 0 and two sums of at most `most`."""
    if not all(len(row) == 3 and row[0] >= 0 and max(row[1:]) <= max_sum for row in sums):
        raise OptionError("adaptive_state holds sums that no tokens have; start without a state")


def _listed(value: Any) -> Any:
    """Convert tuples to lists, recursively, as in JSON."""
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
