"""The exit as a bundle records it, which `convert` and `inspect` give a verdict on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from freeexport.measure.exit_verdict import Basis, ExitFacts, Share, Verdict, recorded_share, verdict, why_never
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import Calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import Manifest


def bundle_verdict(bundle: Bundle) -> Verdict:
    """Whether the exit pays, as far as the bundle knows."""
    return verdict(bundle_facts(bundle))


def bundle_facts(bundle: Bundle) -> ExitFacts:
    """From the manifest, the calibration and the verification. Of sequences nothing is recorded, so shares have no
    interval."""
    manifest, calibration = bundle.manifest, bundle.calibration
    facts = ExitFacts(
        name=str(bundle.path),
        exit_layer=manifest.exit_layer,
        layers=manifest.layers,
        trained=manifest.exit_trained,
        agreement=_agreement(bundle.verification or {}),
        break_even=None if manifest.costs is None else manifest.costs.break_even(manifest.max_pending),
        basis=_basis(manifest.costs),
    )
    if calibration is not None:
        return _calibrated(facts, manifest, calibration)
    # Of a threshold that came without a calibration nothing is known.
    return replace(facts, threshold=manifest.threshold if manifest.threshold < 1 else None)


def _calibrated(facts: ExitFacts, manifest: Manifest, calibration: Calibration) -> ExitFacts:
    facts = replace(
        facts,
        threshold=calibration.threshold,
        why_never=why_never(calibration),
        agreement=Share(calibration.agreement, calibration.positions),
    )
    row = next((row for row in calibration.table if row.threshold == calibration.threshold), None)
    if row is None:
        return facts
    exits = round(row.exit_rate * calibration.positions)
    agreeing = None if row.agreement is None else Share(row.agreement, exits)
    facts = replace(facts, exit_rate=Share(row.exit_rate, calibration.positions), exit_agreement=agreeing)
    facts = replace(facts, measured=row.measured_speedup)
    costs = calibration.costs or manifest.costs
    if costs is None:
        return facts
    most = calibration.max_pending or manifest.max_pending
    # Where the engines were not timed at calibration, the table goes by the sizes of layers.
    predicted = row.predicted_speedup if calibration.costs else None
    speedup = costs.speedup(row.exit_rate, most) if predicted is None else predicted
    return replace(facts, break_even=costs.break_even(most), speedup=speedup, basis=_basis(costs))


def _basis(costs: Costs | None) -> Basis:
    if costs is None:
        return "unknown"
    return "measured" if costs.trusted else "busy"


def _agreement(verification: Mapping[str, Any]) -> Share | None:
    """As `freeexport verify` saw it on a few texts."""
    seen = verification.get("exit")
    found = seen.get("agreement") if isinstance(seen, Mapping) else None
    return recorded_share(found) if isinstance(found, Mapping) else None
