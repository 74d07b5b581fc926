"""`freeexport cache`: the engine cache, from which sessions start faster and processes share packed weights."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from freeexport.system.page import human_bytes, pairs, print_page, table


@click.group()
def command() -> None:
    """Show, fill and clear the cache of engines with packed weights.

    It is in $XDG_CACHE_HOME/freeexport/engines (default ~/.cache). FREEEXPORT_CACHE_GB limits its size.
    Provisional: sessions use it with cache="use", or FREEEXPORT_CACHE=use in the environment.

    \b
    Example:
      freeexport cache add path/to/bundle
      freeexport cache list
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the entries as JSON.")
def list_entries(as_json: bool) -> None:
    """List the entries, most recently used first."""
    from runtime.engines.packed_cache import cache_root, most_bytes

    rows = _entries()
    if as_json:
        click.echo(json.dumps({"path": str(cache_root()), "limit": most_bytes(), "entries": rows}, indent=2))
        return
    total = sum(row["bytes"] for row in rows)
    size = f"{human_bytes(total)} of at most {human_bytes(most_bytes())}"
    cells = [
        (row["bundle"], human_bytes(row["bytes"]), row["onnxruntime"], row["used"], row["directory"]) for row in rows
    ]
    columns = ("bundle", "size#", "ONNX Runtime", "last used", "directory")
    print_page([pairs("Engine cache", [("path", str(cache_root())), ("size", size)]), table("", columns, cells)])


@command.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def add(bundle: Path) -> None:
    """Add the engines of BUNDLE, optimized and packed for this processor, unless they are cached already.

    Takes 2 to 3 times the disk space of the bundle's weights.
    """
    from runtime.bundle.bundle import Bundle
    from runtime.engines.packed_cache import write
    from runtime.engines.packed_entry import read_entry

    began = time.monotonic()
    place = write(Bundle.open(bundle))
    click.echo(f"{place}: {human_bytes(read_entry(place).bytes)}, {time.monotonic() - began:.1f} s")


@command.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
def clear(bundle: Path | None) -> None:
    """Remove all entries, or only those of BUNDLE. Open sessions continue."""
    from runtime.bundle.bundle import Bundle
    from runtime.engines.packed_cache import clear as clear_entries

    gone = clear_entries(None if bundle is None else Bundle.open(bundle))
    click.echo(f"{gone} {'entry' if gone == 1 else 'entries'} removed")


def _entries() -> list[dict[str, Any]]:
    from runtime.engines.packed_cache import entries

    return [
        {
            "directory": path.name,
            "bundle": "cannot be read" if entry is None else entry.bundle,
            "bytes": 0 if entry is None else entry.bytes,
            "onnxruntime": "" if entry is None else entry.onnxruntime.partition(" ")[0],
            "used": datetime.fromtimestamp(used).isoformat(" ", "minutes"),
        }
        for path, entry, used in entries()
    ]
