"""The exit as a bundle records it, which `convert` and `inspect` give a verdict on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from freeexport.measure.exit_verdict import Basis, ExitFacts, Share, Verdict, recorded_share, verdict, why_never
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import Calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import Manifest


def bundle_verdict(bundle: Bundle) -> Verdict:
    """Whether the exit pays, as far as the bundle knows."""
    return verdict(bundle_facts(bundle))


def bundle_facts(bundle: Bundle) -> ExitFacts:
    """Facts of the exit from the manifest, the calibration and the verification. Shares have no interval, as nothing is
    recorded of sequences."""
    manifest, calibration = bundle.manifest, bundle.calibration
    seen = (bundle.verification or {}).get("exit")
    agreement = seen.get("agreement") if isinstance(seen, Mapping) else None
    facts = ExitFacts(
        name=str(bundle.path),
        exit_layer=manifest.exit_layer,
        layers=manifest.layers,
        trained=manifest.exit_trained,
        # As `freeexport verify` saw it on a few texts.
        agreement=recorded_share(agreement) if isinstance(agreement, Mapping) else None,
        break_even=None if manifest.costs is None else manifest.costs.break_even(manifest.max_pending),
        basis=_basis(manifest.costs),
    )
    if calibration is None:
        # Of a threshold that came without a calibration nothing is known.
        return replace(facts, threshold=manifest.threshold if manifest.threshold < 1 else None)
    return _calibrated(facts, manifest, calibration)


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
    agreeing = None if row.agreement is None else Share(row.agreement, round(row.exit_rate * calibration.positions))
    rate = Share(row.exit_rate, calibration.positions)
    facts = replace(facts, exit_rate=rate, exit_agreement=agreeing, measured=row.measured_speedup)
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
