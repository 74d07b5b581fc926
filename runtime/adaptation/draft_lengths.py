"""What the requests of a session have learned of lossless drafts."""

from __future__ import annotations

from functools import cached_property

from runtime.adaptation.draft_costs import DraftCosts
from runtime.adaptation.draft_length import DraftLength, Expected
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import TableRow

# Thresholds for which a session remembers how long drafts should be.
MOST = 64


class DraftLengths:
    """One for requests that draft at one threshold, sampling or not; what drafts cost is the same for all. Before
    anything was drafted, `costs` and shares are what the bundle records."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.costs = DraftCosts(bundle.manifest.max_pending, bundle.manifest.break_even)
        self._paces: dict[tuple[float, bool], DraftLength] = {}

    def of(self, threshold: float, samples: bool) -> DraftLength:
        """Raises BundleError where the bundle's calibration cannot be read."""
        key = threshold, samples
        pace = self._paces.get(key)
        if pace is None:
            if len(self._paces) >= MOST:
                self._paces.pop(next(iter(self._paces)), None)
            pace = self._paces.setdefault(key, DraftLength(self.costs, self._expected(threshold)))
        return pace

    def _expected(self, threshold: float) -> Expected | None:
        """What the calibration found at the nearest threshold."""
        nearest = min(self._table, key=lambda row: abs(row.threshold - threshold), default=None)
        return None if nearest is None else Expected(nearest.exit_rate, nearest.agreement or 0.0)

    @cached_property
    def _table(self) -> tuple[TableRow, ...]:
        calibration = self._bundle.calibration
        return () if calibration is None else calibration.table
