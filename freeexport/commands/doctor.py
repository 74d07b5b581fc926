"""`freeexport doctor`: what is installed, what of it works, what the machine offers, and what to install."""

from __future__ import annotations

import json

import click

from freeexport.system.installation.gpu import cuda_rows, tensorrt_rows
from freeexport.system.installation.report import Provider, Report, examine, report_as_dict
from freeexport.system.machine import Machine
from freeexport.system.page import human_bytes, pairs, print_page


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check this installation and machine; exit code 1 where decoding cannot work.

    \b
    Example:
      freeexport doctor
    """
    report = examine()
    if as_json:
        click.echo(json.dumps(report_as_dict(report), indent=2))
    else:
        show(report)
    ctx.exit(0 if report.ok else 1)


def show(report: Report) -> None:
    """Print the report as a page of tables."""
    versions = {**report.wheels, **report.packages}
    tables = [
        pairs("Versions", [("freeexport", report.freeexport), ("python", report.python), ("system", report.platform)]),
        pairs("Packages", [(name, version or "not installed") for name, version in versions.items()]),
        pairs("Providers", [(item.name, _provider_text(item)) for item in report.providers]),
        *([pairs("CUDA", rows)] if (rows := cuda_rows(report.cuda)) else []),
        pairs("TensorRT", tensorrt_rows(report.tensorrt)),
        pairs("Machine", [*_machine_rows(report.machine), ("freeexport's kernels", report.kernels)]),
    ]
    print_page(tables)
    if report.without_kernels:
        click.echo(f"slow: {report.kernels}")
    for item in report.missing:
        click.echo(f"optional: to {item.purpose}, run: {item.command}")
    for problem in report.problems:
        click.echo(f"problem: {problem}")
    if report.ok:
        click.echo("This installation can decode.")


def _provider_text(provider: Provider) -> str:
    return "usable" if provider.usable else f"not usable: {provider.problem}"


def _machine_rows(machine: Machine) -> list[tuple[str, str]]:
    affinity = "all" if machine.affinity is None else " ".join(map(str, machine.affinity))
    quota = "none" if machine.cpu_quota is None else f"{machine.cpu_quota:g} processors"
    limit = "none" if machine.memory_limit is None else human_bytes(machine.memory_limit)
    return [
        ("processor", machine.cpu),
        ("features", " ".join(machine.features) or "none known"),
        ("cores, threads", f"{machine.cores or 'unknown'}, {machine.threads or 'unknown'}"),
        ("may run on", affinity),
        ("control group's limit", quota),
        ("threads of a session", str(machine.usable_cores)),
        ("memory", f"{human_bytes(machine.memory)}, {human_bytes(machine.memory_available)} available"),
        ("control group's memory", limit),
    ]
