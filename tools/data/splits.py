"""Data sets in four disjoint splits. A stable hash assigns each example.

A data set is a directory with train, validation, calibration and test as JSONL (`{"input",
"target"}`), and `dataset.json`, which describes its origin. It is written atomically.

`split_of` divides the range of the hash into four fixed parts. A key whose hash is in the last 5 %
is a test key in every data set. A salt in the hash would move training lines into test, so fresh
test lines come from the test range: version 1 of a test split is all of it. Version N leaves out
the first TEST_LINES lines of each earlier version, in the order of seed 0, and all lines that share
a key with them. No measurement may read more lines of a version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from freeexport.checkpoints.examples import DataError as DataError
from freeexport.fit.splits import normalised as normalised
from freeexport.fit.splits import stable_hash
from freeexport.system.output import output_directory
from runtime.errors import FreeExportError, one_line

# Percent of all keys, in the order of hash ranges.
SHARES = {"train": 90, "validation": 2, "calibration": 3, "test": 5}
MARKER = "dataset.json"
# Most lines of a version of a test split that a measurement may read.
TEST_LINES = 400
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a data set at OUT.")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Line:
    """A line of a data set.

    Attributes:
        target: Target text. None if the line has none.
        keys: Keys that must not occur in two splits, such as a word, a family of packages or a
            normalized input.
        extra: Further fields.
    """

    input: str | list[dict[str, str]]
    target: str | None
    keys: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


def split_of(key: str) -> str:
    """Return the split of a key. It does not depend on the data set."""
    point = stable_hash(key) % 10_000
    for name, percent in SHARES.items():
        if point < percent * 100:
            return name
        point -= percent * 100
    raise AssertionError("the shares make 100 %")


def shuffled(items: Iterable[Item], seed: int, text: Callable[[Item], str]) -> list[Item]:
    """Return items in an order that depends only on `seed` and the `text` of each item."""
    return sorted(items, key=lambda item: (stable_hash(f"{seed}/{text(item)}"), text(item)))


def fresh(lines: Sequence[Line], version: int) -> list[Line]:
    """Return the lines, in the order of seed 0, that no test split of an earlier version has."""
    remaining = list(lines)
    for _ in range(version - 1):
        read = {key for line in remaining[:TEST_LINES] for key in line.keys}
        remaining = [line for line in remaining if read.isdisjoint(line.keys)]
    return remaining


def check_version(version: int, seed: int) -> None:
    """Check that a later version of the test split uses the order of seed 0."""
    if version > 1 and seed:
        raise click.UsageError(
            f"--test-version {version} counts lines in the order of seed 0; leave out --seed {seed}"
        )


def write_data_set(
    out: Path, splits: Mapping[str, list[Line]], about: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Write a data set and print the number of lines of each split.

    Args:
        about: Content of dataset.json, to which sizes and shares are added.

    Raises:
        DataError: If a key is in two splits, or a split is empty.
        OutputError: If `out` exists and cannot be replaced.
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
                    f"splits overlap: {key[:80]!r} is in {owner[key]} and in {name}; "
                    "give both one key"
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


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a JSONL file.

    Raises:
        DataError: If a line is not an object. The message names it.
    """
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({one_line(error)})") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number} is not an object")
        yield record


def run_tool(tool: click.Command) -> None:
    """Run a command as a program. FreeExportError prints one line and exits with code 1."""
    try:
        tool(standalone_mode=True)
    except FreeExportError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None
