"""Data sets in four splits: a stable hash places each example, and overlapping splits are refused.

A data set is a directory with train, validation, calibration and test as JSONL (`{"input", "target"}`), and
`dataset.json`, which says where it came from. It appears complete or not at all.

`split_of` cuts the range of the hash into four parts, and a part belongs to one split for ever: a key whose hash lies
in the last 5 % is a test key in every data set ever built. A salt in that hash would move keys between splits, and
lines that models were trained on into test. Fresh test lines therefore come from inside the test range: version 1 of
a test split is all of it, and version N leaves out the first TEST_LINES lines of each version before, in the order of
seed 0, with everything that shares a key with them. No measurement read more than that of a version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from freeexport.checkpoints.examples import DataError as DataError
from freeexport.fit.splits import normalised as normalised
from freeexport.fit.splits import stable_hash
from freeexport.system.output import output_directory
from runtime.errors import FreeExportError

# Percent of all keys, in the order in which the hash is cut.
SHARES = {"train": 90, "validation": 2, "calibration": 3, "test": 5}
MARKER = "dataset.json"
# Lines that a measurement may read of one version of a test split.
TEST_LINES = 400

Item = TypeVar("Item")


@dataclass(frozen=True)
class Line:
    """One line of a data set. `keys` must not occur in two splits: a word, a package's family, a normalised input.
    `extra` are further fields of the line, which may have no target."""

    input: str | list[dict[str, str]]
    target: str | None
    keys: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


def split_of(key: str) -> str:
    """The split that `key` belongs to, whatever else the data set holds."""
    point = stable_hash(key) % 10_000
    for name, percent in SHARES.items():
        if point < percent * 100:
            return name
        point -= percent * 100
    raise AssertionError("the shares make 100 %")


def shuffled(items: Iterable[Item], seed: int, text: Callable[[Item], str]) -> list[Item]:
    """The items in an order that depends on `seed` and each one's `text` alone."""
    return sorted(items, key=lambda item: (stable_hash(f"{seed}/{text(item)}"), text(item)))


def fresh(lines: Sequence[Line], version: int) -> list[Line]:
    """Lines of a test split, in the order of seed 0, that no measurement of an earlier version read."""
    remaining = list(lines)
    for _ in range(version - 1):
        read = {key for line in remaining[:TEST_LINES] for key in line.keys}
        remaining = [line for line in remaining if read.isdisjoint(line.keys)]
    return remaining


def check_version(version: int, seed: int) -> None:
    """Raise UsageError where a later version of the test split is wanted in another order than that of seed 0."""
    if version > 1 and seed:
        raise click.UsageError(
            f"--test-version {version} counts lines in the order of seed 0; leave out --seed {seed}"
        )


def write_data_set(
    out: Path, splits: Mapping[str, list[Line]], about: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Write a JSONL file a split, and `about` with the sizes as dataset.json; print the number of lines of each.

    Raises DataError when a key is in two splits or one is empty, OutputError when `out` exists.
    """
    owner: dict[str, str] = {}
    for name, examples in splits.items():
        if not examples:
            raise DataError(
                f"split {name} has no examples; ask for more, or check the source of the data"
            )
        for key in (key for example in examples for key in example.keys):
            if owner.setdefault(key, name) != name:
                raise DataError(
                    f"splits overlap: {key[:80]!r} is in {owner[key]} and in {name}; give both one key"
                )
    sizes = {name: len(examples) for name, examples in splits.items()}
    with output_directory(out, MARKER, overwrite) as directory:
        for name, examples in splits.items():
            with (directory / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                for example in examples:
                    target = {} if example.target is None else {"target": example.target}
                    line = {"input": example.input, **target, **example.extra}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        text = json.dumps({**about, "sizes": sizes, "shares": SHARES}, indent=2, ensure_ascii=False)
        (directory / MARKER).write_text(text + "\n", encoding="utf-8")
    click.echo(f"{out}: " + ", ".join(f"{size} {name}" for name, size in sizes.items()))


def run(tool: click.Command) -> None:
    """Run a tool as a program: an error on purpose is one line and exit code 1."""
    try:
        tool(standalone_mode=True)
    except FreeExportError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None
