"""`freeexport verify`: does a bundle compute what its checkpoint computes?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from freeexport.verification.checks import line_of
from freeexport.verification.verification import VerificationError, failure, verify, write_report
from runtime.bundle.bundle import Bundle


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="The checkpoint that the bundle was made from.")
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines to measure the quality on, with --against.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(bundle: Path, against: str | None, data: Path | None, as_json: bool) -> None:
    """Check every byte of BUNDLE, and its engines: against the checkpoint, and one token at a time against one pass.

    With --against the report is written to verification.json in the bundle. Exit code 1 where a check fails.

    \b
    Example:
      freeexport verify bundle --against path/to/checkpoint
    """
    if data is not None and against is None:
        raise click.UsageError("--data is measured against the checkpoint; give --against MODEL")
    opened = Bundle.open(bundle, verify="full")
    report = verify(opened, against, data)
    if against is not None:
        write_report(opened, report)
    if as_json:
        click.echo(json.dumps(report))
    if not report["passed"]:
        raise VerificationError(failure(report))
    if not as_json:
        _print(report)


def _print(report: dict) -> None:
    for check in report["checks"]:
        click.echo(f"ok  {line_of(check)}")
    if "greedy" in report:
        prompts = report["greedy"]["prompts"]
        same = sum(prompt["first_difference"] is None for prompt in prompts)
        rest = "" if same == len(prompts) or report["greedy"]["tie"] is None else ", the others first differ at a tie"
        click.echo(f"ok  greedy decoding: ids of {same} of {len(prompts)} prompts equal{rest}")
    if "quality" in report:
        click.echo(f"ok  {quality_line(report['quality'])}")


def quality_line(quality: dict) -> str:
    """The quality measured on text, as people read it."""
    return (
        f"quality on {quality['tokens']} tokens: same best token {quality['agreement']:.1%}, "
        f"perplexity x {quality['perplexity_ratio']:.3f}, divergence {quality['divergence']:.2g} nats"
    )
