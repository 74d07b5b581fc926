"""`freeexport build`: TensorRT engines for a bundle, on the machine that will run them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from freeexport.conversion.tensorrt_build import build_and_test
from graphs.tensorrt.build import BuildOptions
from graphs.tensorrt.self_test import SelfTest
from runtime.tensorrt.files import DIRECTORY


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--max-batch", type=int, default=8, show_default=True, help="Maximum batch size.")
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False),
              help="Kernel timings to share between bundles.  [default: in the bundle]")  # fmt: skip
@click.option(
    "--version-compatible", is_flag=True, help="Engines that later TensorRTs of this major version can run, too."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Build the TensorRT engines of BUNDLE, which `convert --target tensorrt` made.

    Engines are built for this machine's GPU and TensorRT version. Engines that are up to date are kept; an interrupted
    build keeps the finished ones.

    \b
    Example:
      freeexport convert path/to/checkpoint bundle --target tensorrt
      freeexport build bundle --max-batch 4
    """
    built, tested = build_and_test(bundle, BuildOptions(**options))
    if as_json:
        engines = [asdict(engine) | {"file": engine.plan.file} for engine in built]
        click.echo(json.dumps({"engines": engines, "self_test": asdict(tested)}, indent=2))
        return
    for engine in built:
        how = "up to date" if engine.reused else f"built in {engine.seconds:.1f} s"
        click.echo(f"{DIRECTORY}/{engine.plan.file}: {engine.bytes / 1e6:.1f} MB, {how}")
    click.echo(f"self-test: {_text(tested)}")


def _text(tested: SelfTest) -> str:
    if not tested.ran:
        return f"not run, {tested.why}"
    found = ", ".join(f"{name} {difference:.2g}" for name, difference in tested.largest.items())
    return f"passed; largest differences from the graphs, as multiples of the rounding error of their type: {found}"
