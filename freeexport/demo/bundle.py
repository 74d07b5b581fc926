"""The bundle of a demo: that of an earlier run, or a new one."""

from __future__ import annotations

import time
from pathlib import Path

import click

from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from runtime import Bundle, BundleError


def demo_bundle(checkpoint: Path, path: Path, options: ConvertOptions) -> Path:
    """The verified bundle of `checkpoint` at `path`; made again where what stands there is another or not whole."""
    exit_at = "" if options.exit_layer is None else f", exit after layer {options.exit_layer}"
    if _usable(path, checkpoint):
        click.echo(f"bundle: {path}, from an earlier run")
        return path
    began = time.monotonic()
    click.echo(f"converting {checkpoint.name}{exit_at}, and checking it against transformers ...")
    manifest = convert(str(checkpoint), path, options)
    click.echo(f"bundle: {path}, {manifest.weight_bytes / 1e6:.0f} MB, {time.monotonic() - began:.0f} s")
    return path


def _usable(path: Path, checkpoint: Path) -> bool:
    from freeexport.checkpoints.checkpoint import open_checkpoint

    try:
        manifest = Bundle.open(path, verify="full").manifest
    except BundleError:
        return False
    return bool(manifest.verified) and manifest.source_sha256 == open_checkpoint(str(checkpoint)).sha256
