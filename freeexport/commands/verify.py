"""`freeexport verify`: check a bundle against its checkpoint, or against itself."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import astuple
from pathlib import Path
from typing import Any

import click

from freeexport.commands.verb_options import DEVICE, SectionedCommand, section
from freeexport.system.child import PACKAGES
from freeexport.system.environment import environment
from freeexport.system.page import print_page, table
from freeexport.verification.batches import FULL, QUICK
from freeexport.verification.checks import greedy_line, quality_line, sentence_of
from freeexport.verification.equality import Equality, all_settings, check_equality, prompt_ids
from freeexport.verification.ties import BATCHES
from freeexport.verification.verification import VerificationError, failure, verify, write_report
from runtime.bundle.bundle import Bundle
from runtime.bundle.hub import find_bundle
from runtime.engines.kernels import supported
from runtime.machine.device import Device
from runtime.requests.load_engines import check_bundles


def _sets(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Parse names of instruction sets, all of which this processor must support."""
    names = tuple(dict.fromkeys(filter(None, (value or "").split(","))))
    for name in names:
        if not supported(name):
            raise click.BadParameter(
                f"{name} is not supported by this processor or the kernels; see freeexport doctor"
            )
    return names


@click.command(cls=SectionedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@section("Against the checkpoint")
@click.option("--against", metavar="MODEL", help="Checkpoint that the bundle was converted from.")
@click.option(
    "--exit",
    "exit_file",
    metavar="NAME",
    help=(
        "Ready-made exit that the bundle was converted with, its file, or the directory of an "
        "EAGLE-3 head.  [default: as the bundle records]"
    ),
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help=(
        "JSONL file: with --against, lines on which quality is measured; with --equal, prompts.  "
        "[default of --equal: built-in prompts]"
    ),
)
@click.option(
    "--quick",
    is_flag=True,
    help=("Compare short texts only, for at most a minute after the model is loaded."),
)
@click.option("--device", default="cpu", help=DEVICE)
@section("Against itself")
@click.option(
    "--equal",
    type=click.IntRange(min=1),
    metavar="N",
    help=(
        "Compare N tokens in total, spread evenly over settings: modes, drafts, batches of 1 to "
        "8, threads, prefix cache, prompts in pieces. Ids and log-probabilities of each are "
        "compared bit for bit with mode full, alone and without a cache."
    ),
)
@click.option(
    "--instructions",
    callback=_sets,
    metavar="NAMES",
    help=(
        "Instruction sets to compare with --equal, such as avx2,scalar. Each runs in its own "
        "process."
    ),
)
@section("Result")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    bundle: Path,
    against: str | None,
    exit_file: str | None,
    data: Path | None,
    quick: bool,
    device: str,
    equal: int | None,
    instructions: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check every byte of BUNDLE, and its engines.

    Engines are compared with the checkpoint, and decoding one token at a time with a single pass.
    With --against the report is written to verification.json in the bundle. A ready-made exit that
    was given to convert is applied to the checkpoint again. On a GPU, tokens of several modes and
    batches are also compared, up to ties. Exits with code 1 if a check fails.

    With --device cuda:0, that device decodes the tokens. Tensors are compared on the CPU.

    With --equal the bundle is compared with itself instead. Our own kernels produce the same bits
    in every setting. Bundles with ONNX Runtime's kernels differ in the last bits of
    log-probabilities. Instruction sets are also compared with each other, except amx, whose
    results for prompts have other bits.

    \b
    Example:
      freeexport verify bundle --against path/to/checkpoint
    """
    if data is not None and against is None and equal is None:
        raise click.UsageError("--data requires --against MODEL or --equal N")
    if exit_file is not None and against is None:
        raise click.UsageError("--exit requires --against MODEL")
    if instructions and equal is None:
        raise click.UsageError("--instructions requires --equal N")
    if equal is not None and (against is not None or quick):
        raise click.UsageError(
            "--equal compares the bundle with itself; omit --against and --quick"
        )
    place = Device.parse(device)
    if equal is not None and place.index is not None:
        raise click.UsageError(
            "--equal compares bits, which passes over several rows do not keep on a GPU; leave it "
            "out, and --device compares tokens up to ties"
        )
    path = find_bundle(bundle)
    if place.index is not None:
        check_bundles([Bundle.open(path)], place, slots=max(BATCHES))
    opened = Bundle.open(path, verify="full")
    if equal is not None:
        _compare(opened, equal, data, sets=instructions, as_json=as_json)
        return
    report = verify(
        opened,
        against,
        data,
        extent=QUICK if quick else FULL,
        device=str(place),
        exit_file=exit_file,
    )
    if against is not None:
        write_report(opened, report)
    if as_json:
        click.echo(json.dumps(report))
    if not report["passed"]:
        raise VerificationError(failure(report))
    if as_json:
        return
    for check in report["checks"]:
        click.echo(f"ok       {sentence_of(check)}")
    if "quality" in report:
        click.echo(f"ok       {quality_line(report['quality'])}")
    if "greedy" in report:
        same, line = greedy_line(report["greedy"])
        click.echo(f"{'ok     ' if same else 'warning'}  {line}")
    if "device" in report:
        click.echo(f"ok       device {report['device']['device']}: {report['device']['line']}")
    if report["left_out"]:
        click.echo(f"warning  skipped, out of time: {', '.join(report['left_out'])}")


def _compare(
    bundle: Bundle,
    tokens: int,
    file: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare the bundle with itself, and show the result.

    After an interrupt the partial result is shown.
    """
    prompts = prompt_ids(bundle, file)
    settings = len(all_settings()) * max(1, len(sets))
    outcome = Equality(tokens, 0)
    try:
        for outcome in check_equality(bundle, tokens, prompts, sets=sets, file=file):  # noqa: B007
            pass
    except KeyboardInterrupt:
        if not as_json:
            _show(outcome, settings)
        raise
    if not as_json:
        _show(outcome, settings)
    if as_json:
        certificate = {**environment(), **_identity(bundle, file), **outcome.to_json()}
        click.echo(json.dumps(certificate, indent=2))
    if not outcome.equal:
        first = next(row for row in outcome.rows if not row.equal)
        raise VerificationError(
            f"answers differ, the first of {first.setting}: {first.first_difference}"
        )


def _show(outcome: Equality, settings: int) -> None:
    columns = (
        "setting",
        "instructions",
        "tokens#",
        "differing tokens#",
        "differing log-probabilities#",
        "cached#",
    )
    rows = []
    for row in outcome.rows:
        name, *counts, first = astuple(row)
        rows.append(
            [
                name,
                *("not compared" if count is None else str(count) for count in counts),
                first or "",
            ]
        )
    print_page(
        [
            table(
                "Compared with mode full, alone, without a cache",
                (*columns, "first difference"),
                rows,
            )
        ]
    )
    if outcome.complete:
        click.echo(
            f"{outcome.compared} tokens compared: "
            f"{'all equal' if outcome.equal else 'not all equal'}"
        )
    else:
        click.echo(
            f"not complete: {outcome.compared} of {outcome.tokens} tokens compared, of {settings} "
            "settings"
        )


def _identity(bundle: Bundle, file: Path | None) -> dict[str, Any]:
    """Describe what was compared.

    Includes the bundle, its weights and kernels, the prompts, and the commit of a checkout.
    """
    manifest = bundle.manifest
    git = ["git", "-C", PACKAGES, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        completed = subprocess.run(git, capture_output=True, text=True, timeout=10)
        commit = completed.stdout.strip() if completed.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "commit": commit,
        "bundle": {
            "sha256": bundle.sha256,
            "source": manifest.source,
            "source_sha256": manifest.source_sha256,
            "precision": manifest.precision,
            "kernels": manifest.kernels,
            "weights": {
                name: item.sha256 for name, item in manifest.files.items() if name.endswith(".data")
            },
        },
        "prompts": "built-in" if file is None else hashlib.sha256(file.read_bytes()).hexdigest(),
    }
