"""What of `runtime` one exited token passes: files, functions, calls, and how deep generators stand.

    python tools/speed/token_path.py BUNDLE

A token is what lies between two runs of the shallow engine, one request alone, every token exiting. The kind of slice
that comes most often is counted; calls into C and into other packages are not.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import click

from runtime import Session
from runtime.engines.onnx import Call

TOKENS = 64
ROOT = Path(inspect.getfile(Session)).parent


class Entry(NamedTuple):
    """One call of a function, or a generator that goes on; `generators` of the stack are open around it."""

    file: str
    function: str
    generators: int


def token_path(bundle: Path) -> list[Entry]:
    """The calls of the most frequent kind of exited token, in order."""
    paths: Counter[tuple[Entry, ...]] = Counter()
    entries: list[Entry] = []
    last: list[Any] = [None]

    def watch(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(f"{ROOT}/"):
            return
        generators, outer = 0, frame
        while outer is not None:
            generators += bool(outer.f_code.co_flags & inspect.CO_GENERATOR)
            outer = outer.f_back  # type: ignore[assignment]
        entries.append(Entry(str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname, generators))
        if code is Call.run.__code__:
            if frame.f_locals["self"] is last[0]:
                paths[tuple(entries)] += 1
            last[0] = frame.f_locals["self"]
            entries.clear()

    with Session(bundle, slots=1, overlap=False) as session:
        options: dict[str, Any] = {"mode": "free", "threshold": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True}
        session.generate([5] * 4, **options)
        sys.setprofile(watch)
        session.generate([5] * 4, **options)
        sys.setprofile(None)
    return list(paths.most_common(1)[0][0])


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
def main(bundle: Path) -> None:
    path = token_path(bundle)
    for entry in path:
        click.echo(f"{'  ' * entry.generators}{entry.file}: {entry.function}")
    files, functions = ({part(entry) for entry in path} for part in (lambda e: e.file, lambda e: e[:2]))
    deepest = max(entry.generators for entry in path)
    click.echo(f"{len(files)} files, {len(functions)} functions, {len(path)} calls, generators {deepest} deep")


if __name__ == "__main__":
    main()
