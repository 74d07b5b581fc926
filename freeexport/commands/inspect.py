"""`freeexport inspect`: check a bundle in full and show its contents, on one page or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from freeexport.commands.verb_options import SectionedCommand
from freeexport.system.page import human_bytes, listed_formats, pairs, print_page, table
from runtime.bundle.bundle import VERIFICATION, Bundle
from runtime.bundle.hub import find_bundle
from runtime.decoding.phrases import PHRASES
from runtime.errors import BundleError

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.bundle.calibration import Calibration
    from runtime.bundle.manifest import Languages, Manifest
    from runtime.bundle.quantization import Quantization

    Rows = list[tuple[str, str]]

_DEEP_INPUTS = {
    "feature": "the deep decoder's feature",
    "fused": "the deep decoder's feature and two earlier states",
    "eagle3": "three of the deep decoder's states (EAGLE-3)",
}
_TRAINED = {True: "yes", False: "no, the checkpoint has no exit.json", None: "unknown"}


@click.command(cls=SectionedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the manifest, derived sizes and verification as JSON.",
)
def command(bundle: Path, as_json: bool) -> None:
    """Show the contents of BUNDLE, after checking the SHA-256 of every file.

    \b
    Example:
      freeexport inspect path/to/bundle
    """
    from freeexport.costs.verdict import bundle_verdict
    from runtime.requests.thresholds import default_mode

    opened = Bundle.open(find_bundle(bundle), verify="full")
    manifest = opened.manifest
    calibration = opened.calibration
    verdict = bundle_verdict(opened)
    size = sum(file.size for file in manifest.files.values())
    mode = default_mode(opened)
    if as_json:
        content = {
            "path": str(opened.path),
            "sha256": opened.sha256,
            "manifest": json.loads(manifest.to_json()),
            "calibrated": manifest.threshold < 1.0,
            "default_mode": asdict(mode),
            "bundle_bytes": size,
            "kv_bytes_per_token": manifest.kv_bytes_per_token,
            "kv_bytes_per_sequence": manifest.kv_bytes_per_sequence,
            "calibration": None if calibration is None else asdict(calibration),
            "verification": opened.verification,
            "verdict": asdict(verdict),
        }
        click.echo(json.dumps(content, indent=2))
        return
    origin = {
        "path": str(opened.path),
        "sha256": opened.sha256,
        "made from": manifest.source,
        "its sha256": manifest.source_sha256,
        "size": f"{human_bytes(size)}, weights {human_bytes(manifest.weight_bytes)}",
    }
    next_step = [("next step", verdict.next_step)] if verdict.next_step else []
    calibrated_at: list[Table] = []
    if calibration is not None:
        from freeexport.calibrate.calibration_page import calibration_tables

        calibrated_at = calibration_tables(calibration)
    cache = [
        ("capacity", f"{manifest.capacity} tokens"),
        *(
            [("longest prompt", f"{manifest.encoder_capacity} tokens")]
            if manifest.encoder_decoder
            else []
        ),
        ("keys and values", manifest.cache_type),
        ("per token", human_bytes(manifest.kv_bytes_per_token)),
        ("per sequence", human_bytes(manifest.kv_bytes_per_sequence)),
    ]
    files = [
        (name, human_bytes(file.size), file.sha256) for name, file in sorted(manifest.files.items())
    ]
    copies = [(copy.tensor, human_bytes(copy.bytes), copy.reason) for copy in manifest.copies]
    tables = [
        pairs("Bundle", origin.items()),
        pairs("Model", _model(manifest)),
        pairs("Exit", _exit(opened, calibration)),
        pairs("Verdict", [("verdict", verdict.text), *next_step]),
        *([] if manifest.quantization is None else _precision(manifest.quantization)),
        *calibrated_at,
        pairs("KV cache", cache),
        pairs("Verification", _verification(opened)),
        table("Files", ("name", "size#", "sha256"), files),
        table("Duplicated weights", ("tensor", "size#", "reason"), copies),
        pairs("Written with", sorted(manifest.versions.items())),
    ]
    click.echo(f"{mode}\n")
    print_page(tables)


def _model(manifest: Manifest) -> Rows:
    from runtime.engines.kernels import kernels_of

    def span(layers: range) -> str:  # counted from 1
        return f"{layers.start + 1}-{layers.stop}" if len(layers) > 1 else str(layers.stop)

    shallow = span(manifest.shallow_layers) if manifest.exit_layer else "none"
    deep = span(manifest.deep_layers)
    quantization = manifest.quantization
    fitted = quantization and quantization.rounding_data
    return [
        (
            "family",
            f"{manifest.family} "
            f"({'encoder-decoder' if manifest.encoder_decoder else 'decoder-only'})",
        ),
        ("decoder layers", f"{manifest.layers}: shallow {shallow}, deep {deep}"),
        ("hidden size", str(manifest.hidden_size)),
        (
            "heads",
            f"{manifest.heads} of size {manifest.head_dim}, {manifest.kv_heads} for keys and "
            "values",
        ),
        ("vocabulary", str(manifest.vocab_size)),
        ("end tokens", ", ".join(map(str, manifest.eos_token_ids)) or "none"),
        *([("languages", _languages(manifest.languages))] if manifest.languages else []),
        *((name, getattr(manifest, name)) for name in ("target", "dialect", "precision")),
        *([("weights", listed_formats(formats))] if (formats := manifest.weight_formats) else []),
        *(
            [("4-bit weights", f"fitted to {fitted.tokens} tokens of {fitted.texts} texts")]
            if fitted
            else []
        ),
        *(
            [
                ("kernels", kernels_of(manifest.kernels)),
                ("activations in products", manifest.activations or "int8"),
            ]
            if quantization and manifest.target == "cpu"
            else []
        ),
    ]


def _languages(languages: Languages) -> str:
    codes = list(languages.tokens)
    shown = ", ".join(codes[:3]) + (", ..." if len(codes) > 3 else "")
    return f"{len(codes)} ({shown}), prompts in {languages.source or 'any'}"


def _precision(quantization: Quantization) -> list[Table]:
    """Build tables of the engines, and of weights with a higher precision than their engine.

    These weights would lose too much accuracy otherwise, or are in the quantization plan.
    """
    engines = [
        (
            *(
                one.engine,
                one.linears,
                one.head or "",
                human_bytes(one.bytes),
                f"{one.largest_error:.1%}",
            ),
            f"{one.kept}" + "".join(f", {kind} {count}" for kind, count in one.kinds.items()),
        )
        for one in quantization.engines
    ]
    higher = [
        (
            one.engine,
            one.tensor,
            one.wanted,
            one.stored,
            "by plan" if one.error is None else f"{one.error:.1%}",
        )
        for one in quantization.higher
    ]
    columns = ("engine", "linear layers", "head", "weights#", "largest error#", "bits kept#")
    return [
        table("Precision", columns, engines),
        table(
            "Layers at a higher precision",
            ("engine", "tensor", "wanted", "stored", "error as wanted#"),
            higher,
        ),
    ]


def _exit(bundle: Bundle, calibration: Calibration | None) -> Rows:
    """Build the rows about the exit, with the costs measured at conversion.

    Predicted speedups are left out for an exit that is not trained.
    """
    from freeexport.costs.bytes import known_costs
    from freeexport.costs.verdict import basis_of, break_even_text

    manifest = bundle.manifest
    costs = known_costs(bundle, calibration.costs if calibration else None, manifest.costs)
    threshold = f"{manifest.threshold:.4g}"
    if manifest.threshold >= 1:
        threshold = "1 (not calibrated)" if calibration is None else "1 (calibrated: never exit)"
    vocabulary = "all tokens"
    known = manifest.exit_vocabulary
    if known is not None:
        covered = ""
        if known.text_tokens:
            covered = f", {known.covered:.2%} of the {known.text_tokens} they come from"
        others = ", trained with one class for all others" if known.trained else ""
        vocabulary = f"{known.size} of {manifest.vocab_size} tokens{covered}{others}"
    rows = [
        ("exit layer", f"{manifest.exit_layer} of {manifest.layers}"),
        *([("its own layers", str(manifest.exit_layers))] if manifest.exit_layers else []),
        *(
            [("its input", f"its layer's state and {_DEEP_INPUTS[manifest.exit_input]}")]
            if manifest.exit_engine
            else []
        ),
        *(
            [("frequent phrases", f"{human_bytes(table.size)}, drafted in lossless")]
            if (table := manifest.files.get(PHRASES)) is not None
            else []
        ),
        ("confidence", manifest.confidence),
        ("threshold", threshold),
        ("most pending tokens", str(manifest.max_pending)),
        *(
            []
            if manifest.tuned_max_pending is None
            else [("in mode free, as tuned", str(manifest.tuned_max_pending))]
        ),
        ("exit vocabulary", vocabulary),
        *(
            [("rollback threshold", f"{limit:.3g} nats")]
            if (limit := manifest.rollback_threshold) is not None
            else []
        ),
        ("trained", _TRAINED[manifest.exit_trained]),
    ]
    if costs is None:
        return [*rows, ("break-even", "not measured")]
    even = break_even_text(costs.break_even(manifest.max_pending), basis_of(costs))
    rows.append(("break-even", f"the exit {even}"))
    for share in (0.5, 0.8, 0.9) if manifest.exit_trained is not False else ():
        speedup = costs.speedup(share, manifest.max_pending)
        rows.append((f"speedup at {100 * share:.0f} % exits", f"{speedup:.2f}x (predicted)"))
    if (costs := manifest.costs) is None:
        return rows
    seconds = {
        "shallow": costs.shallow,
        "shallow without head": costs.shallow_without_head,
        **{f"deep {count}": taken for count, taken in costs.deep.items()},
        **{f"outside {name}": taken for name, taken in asdict(costs.outside).items()},
    }
    rows += [(name, f"{1e3 * taken:.2f} ms") for name, taken in seconds.items()]
    if not costs.trusted:
        rows.append(
            (
                "measured while busy",
                f"others kept {costs.busy:.1f} cores busy; convert again on an idle machine",
            )
        )
    if (host := costs.host) is not None:
        rows.append(
            (
                "measured on",
                f"{host.processor}, {host.threads} threads, onnxruntime {host.onnxruntime}",
            )
        )
    return rows


def _verification(bundle: Bundle) -> Rows:
    """Build rows for each check, for greedy decoding and for quality.

    `--json` prints all figures.
    """
    from freeexport.verification.checks import entry_of

    report = bundle.verification or {}
    rows = [
        (
            "verified",
            "yes" if bundle.manifest.verified else f"no; run: freeexport verify {bundle.path}",
        )
    ]
    try:
        rows += [("against", str(report["against"]))] if report.get("against") else []
        rows += [entry_of(check) for check in report.get("checks", [])]
        if prompts := report.get("greedy", {}).get("prompts", []):
            equal = sum(prompt["first_difference"] is None for prompt in prompts)
            rows.append(
                (
                    f"greedy ids, {report['greedy']['tokens']} tokens",
                    f"{equal} of {len(prompts)} prompts equal",
                )
            )
        if quality := report.get("quality"):
            lost = (
                f"x {quality['perplexity_ratio']:.3f}, divergence {quality['divergence']:.2g} nats"
            )
            rows.append(("same best token", f"{quality['agreement']:.1%} of {quality['tokens']}"))
            rows.append(("perplexity", lost))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        raise BundleError(
            f"{VERIFICATION} is not a valid report ({reason}); run freeexport verify again"
        ) from None
    return rows
