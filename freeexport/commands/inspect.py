"""`freeexport inspect`: what a bundle holds, checked in full, on one page or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from freeexport.system.page import human_bytes, pairs, print_page, table
from freeexport.verification.checks import entry_of
from runtime.bundle.bundle import VERIFICATION
from runtime.errors import BundleError

if TYPE_CHECKING:
    from rich.table import Table

    from runtime import DefaultMode
    from runtime.bundle.bundle import Bundle
    from runtime.bundle.calibration import Calibration
    from runtime.bundle.manifest import Manifest, Quantization


_TRAINED = {True: "yes", False: "no, the checkpoint has no exit.json", None: "unknown"}
NEVER = "1 (never, as calibrated)"
NOT_CALIBRATED = "1 (not calibrated)"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest, derived sizes and verification as JSON.")
def command(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds, after checking the sha256 of every file.

    \b
    Example:
      freeexport inspect path/to/bundle
    """
    from runtime.bundle.bundle import Bundle

    opened = Bundle.open(bundle, verify="full")
    if as_json:
        click.echo(json.dumps(bundle_as_dict(opened), indent=2))
    else:
        click.echo(f"{default_mode(opened)}\n")
        print_page(bundle_tables(opened))


def bundle_as_dict(bundle: Bundle) -> dict[str, Any]:
    """The manifest with what follows from it (bytes), the verification's figures, and the bundle's own hash."""
    from freeexport.conversion.bundle_verdict import bundle_verdict

    manifest, calibration = bundle.manifest, bundle.calibration
    return {
        "path": str(bundle.path),
        "sha256": bundle.sha256,
        "manifest": json.loads(manifest.to_json()),
        "calibrated": calibrated(manifest),
        "default_mode": asdict(default_mode(bundle)),
        "bundle_bytes": bundle_bytes(manifest),
        "kv_bytes_per_token": manifest.kv_bytes_per_token,
        "kv_bytes_per_sequence": manifest.kv_bytes_per_sequence,
        "calibration": None if calibration is None else asdict(calibration),
        "verification": bundle.verification,
        "verdict": asdict(bundle_verdict(bundle)),
    }


def default_mode(bundle: Bundle) -> DefaultMode:
    """How requests are decoded that give neither mode nor threshold; costs are those of the bundle."""
    from runtime.options import SessionOptions
    from runtime.thresholds import Thresholds

    return Thresholds(bundle, SessionOptions()).default()


def bundle_tables(bundle: Bundle) -> list[Table]:
    """The page: a table a topic."""
    from freeexport.conversion.bundle_verdict import bundle_verdict

    manifest, calibration, verdict = bundle.manifest, bundle.calibration, bundle_verdict(bundle)
    next_step = [("next step", verdict.next_step)] if verdict.next_step else []
    calibrated_at: list[Table] = []
    if calibration is not None:
        from freeexport.measure.calibration_page import calibration_tables

        calibrated_at = calibration_tables(calibration)
    size = f"{human_bytes(bundle_bytes(manifest))}, weights {human_bytes(manifest.weight_bytes)}"
    cache = [
        ("capacity", f"{manifest.capacity} tokens"),
        *([("longest prompt", f"{manifest.encoder_capacity} tokens")] if manifest.encoder_decoder else []),
        ("per token", human_bytes(manifest.kv_bytes_per_token)),
        ("per sequence", human_bytes(manifest.kv_bytes_per_sequence)),
    ]
    files = [(name, human_bytes(file.size), file.sha256) for name, file in sorted(manifest.files.items())]
    copies = [(copy.tensor, human_bytes(copy.bytes), copy.reason) for copy in manifest.copies]
    origin = {"path": str(bundle.path), "sha256": bundle.sha256, "made from": manifest.source}
    return [
        pairs("Bundle", {**origin, "its sha256": manifest.source_sha256, "size": size}.items()),
        pairs("Model", _model(manifest)),
        pairs("Exit", _exit(manifest, calibration)),
        pairs("Verdict", [("verdict", verdict.text), *next_step]),
        *([] if manifest.quantization is None else _precision(manifest.quantization)),
        *calibrated_at,
        pairs("KV cache", cache),
        pairs("Verification", _verification(bundle)),
        table("Files", ("name", "size#", "sha256"), files),
        table("Weights stored more than once", ("tensor", "size#", "reason"), copies),
        pairs("Written with", sorted(manifest.versions.items())),
    ]


def calibrated(manifest: Manifest) -> bool:
    """Whether any token can exit at the bundle's own threshold."""
    return manifest.threshold < 1.0


def bundle_bytes(manifest: Manifest) -> int:
    """Bytes of all files that the manifest lists."""
    return sum(file.size for file in manifest.files.values())


def _model(manifest: Manifest) -> list[tuple[str, str]]:
    from runtime.kernels import kernels_of

    def span(layers: range) -> str:  # as people count them, from 1
        return f"{layers.start + 1}-{layers.stop}" if len(layers) > 1 else str(layers.stop)

    shallow, deep, quantization = span(manifest.shallow_layers), span(manifest.deep_layers), manifest.quantization
    fitted = quantization and quantization.rounding_data
    return [
        ("family", f"{manifest.family} ({'encoder-decoder' if manifest.encoder_decoder else 'decoder-only'})"),
        ("decoder layers", f"{manifest.layers}: shallow {shallow}, deep {deep}"),
        ("hidden size", str(manifest.hidden_size)),
        ("heads", f"{manifest.heads} of size {manifest.head_dim}, {manifest.kv_heads} for keys and values"),
        ("vocabulary", str(manifest.vocab_size)),
        ("end tokens", ", ".join(map(str, manifest.eos_token_ids)) or "none"),
        ("target", manifest.target),
        ("dialect", manifest.dialect),
        ("precision", manifest.precision),
        *([("4-bit weights", f"fitted to {fitted.tokens} tokens of {fitted.texts} texts")] if fitted else []),
        *([("kernels", kernels_of(manifest.kernels))] if quantization and manifest.target == "cpu" else []),
    ]


def _precision(quantization: Quantization) -> list[Table]:
    """A row an engine; and a row a weight with a higher precision than its engine: it would lose too much, or the plan
    says so."""
    engines = [
        (one.engine, one.linears, one.head or "", human_bytes(one.bytes), f"{one.largest_error:.1%}", f"{one.kept}")
        for one in quantization.engines
    ]
    higher = [
        (one.engine, one.tensor, one.wanted, one.stored, "by plan" if one.error is None else f"{one.error:.1%}")
        for one in quantization.higher
    ]
    columns = ("engine", "linear layers", "head", "weights#", "largest error#", "4 bits as they were#")
    return [
        table("Precision", columns, engines),
        table("Kept at a higher precision", ("engine", "tensor", "wanted", "stored", "error as wanted#"), higher),
    ]


def _exit(manifest: Manifest, calibration: Calibration | None) -> list[tuple[str, str]]:
    threshold = f"{manifest.threshold:.4g}"
    if not calibrated(manifest):
        threshold = NOT_CALIBRATED if calibration is None else NEVER
    vocabulary, known = "all tokens", manifest.exit_vocabulary
    if known is not None:
        covered = f"{known.covered:.2%} of the {known.text_tokens} they come from"
        vocabulary = f"{known.size} of {manifest.vocab_size} tokens, {covered}"
    return [
        ("exit layer", f"{manifest.exit_layer} of {manifest.layers}"),
        *([("its own layers", str(manifest.exit_layers))] if manifest.exit_layers else []),
        ("confidence", manifest.confidence),
        ("threshold", threshold),
        ("most pending tokens", str(manifest.max_pending)),
        *([] if manifest.tuned_max_pending is None else [("in mode free, as tuned", str(manifest.tuned_max_pending))]),
        ("exit vocabulary", vocabulary),
        *([("rollback threshold", f"{limit:.3g} nats")] if (limit := manifest.rollback_threshold) is not None else []),
        ("trained", _TRAINED[manifest.exit_trained]),
        *_break_even(manifest),
    ]


def _break_even(manifest: Manifest) -> list[tuple[str, str]]:
    """The costs measured at convert, on the machine that converted. What 80 % exits would give says nothing of an exit
    that is not trained."""
    costs, most = manifest.costs, manifest.max_pending
    if costs is None:
        return [("break-even", "not measured")]
    rate = costs.break_even(most)
    rows = [("break-even exit rate", "none: exits do not pay" if rate is None else f"{rate:.1%}")]
    if manifest.exit_trained is not False:
        for percent in (50, 80, 90):
            rows.append((f"speedup at {percent} % exits", f"{costs.speedup(percent / 100, most):.2f}x (predicted)"))
    outside = costs.outside
    seconds = {
        "shallow": costs.shallow,
        "shallow without head": costs.shallow_without_head,
        **{f"deep {rows}": taken for rows, taken in costs.deep.items()},
        **{"outside full": outside.full, "outside free": outside.free, "outside sync": outside.sync},
    }
    rows += [(name, f"{1e3 * taken:.2f} ms") for name, taken in seconds.items()]
    if not costs.trusted:
        rows.append(("measured while busy", f"others kept {costs.busy:.1f} cores busy; calibrate measures again"))
    if costs.host is not None:
        host = costs.host
        rows.append(("measured on", f"{host.processor}, {host.threads} threads, onnxruntime {host.onnxruntime}"))
    return rows


def _verification(bundle: Bundle) -> list[tuple[str, str]]:
    """A line for each check, and one for greedy decoding; `--json` has all figures."""
    try:
        return _checks(bundle, bundle.verification or {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        raise BundleError(f"{VERIFICATION} is no report ({reason}); run freeexport verify again") from None


def _checks(bundle: Bundle, report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("verified", "yes" if bundle.manifest.verified else f"no; run: freeexport verify {bundle.path}")]
    rows += [("against", str(report["against"]))] if report.get("against") else []
    rows += [entry_of(check) for check in report.get("checks", [])]
    prompts = report.get("greedy", {}).get("prompts", [])
    if prompts:
        equal = sum(prompt["first_difference"] is None for prompt in prompts)
        rows.append((f"greedy ids, {report['greedy']['tokens']} tokens", f"{equal} of {len(prompts)} prompts equal"))
    if quality := report.get("quality"):
        rows.append(("same best token", f"{quality['agreement']:.1%} of {quality['tokens']}"))
        rows.append(("perplexity", f"x {quality['perplexity_ratio']:.3f}, divergence {quality['divergence']:.2g} nats"))
    return rows
