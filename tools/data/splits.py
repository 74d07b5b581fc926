"""Data sets in four splits: a stable hash places each example, and overlapping splits are refused.

    python -m tools.data.splits DIR         check that the splits of a data set share no input

A data set is a directory with train, validation, calibration and test as JSONL (`{"input", "target"}`), and
`dataset.json`, which says where it came from. It appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from freeexport.system.output import output_directory
from runtime.errors import FreeExportError

# Percent of all keys, in the order in which the hash is cut.
SHARES = {"train": 90, "validation": 2, "calibration": 3, "test": 5}
MARKER = "dataset.json"

Item = TypeVar("Item")


class DataError(FreeExportError):
    """A source of data is missing or not as expected, or the splits of a data set overlap."""


@dataclass(frozen=True)
class Example:
    """A line of a data set. `keys` name what must not occur in two splits: a word, a package's family, a question.
    `extra` are further fields of the line."""

    input: str
    target: str
    keys: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


def stable_hash(text: str) -> int:
    """64 bits of `text`, the same on every machine and release of Python."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def split_of(key: str) -> str:
    """The split that `key` belongs to, whatever else the data set holds."""
    point = stable_hash(key) % 10_000
    for name, percent in SHARES.items():
        if point < percent * 100:
            return name
        point -= percent * 100
    raise AssertionError("the shares make 100 %")


def by_split(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """The items of each split, in their order; every split is there, even if empty."""
    splits: dict[str, list[Item]] = {name: [] for name in SHARES}
    for item in items:
        splits[split_of(key(item))].append(item)
    return splits


def shuffled(items: Iterable[Item], seed: int, text: Callable[[Item], str]) -> list[Item]:
    """The items in an order that depends on `seed` and each one's `text` alone."""
    return sorted(items, key=lambda item: (stable_hash(f"{seed}/{text(item)}"), text(item)))


def limited(splits: Mapping[str, list[Example]], train: int | None, held_out: int | None, seed: int) -> dict[str, list]:
    """Each split shuffled, and cut to `train` examples, or `held_out` for the other three; None keeps all."""
    return {
        name: shuffled(examples, seed, lambda example: example.input)[: train if name == "train" else held_out]
        for name, examples in splits.items()
    }


def check_disjoint(splits: Mapping[str, Iterable[tuple[str, ...]]]) -> None:
    """Raises DataError when a key occurs in two splits; each split is given as the keys of its examples."""
    owner: dict[str, str] = {}
    for name, examples in splits.items():
        for keys in examples:
            for key in keys:
                if owner.setdefault(key, name) != name:
                    raise DataError(
                        f"splits overlap: {key[:80]!r} is in {owner[key]} and in {name}; "
                        "build the data set again with the tool that made it"
                    )


def write_data_set(
    out: Path, splits: Mapping[str, list[Example]], about: Mapping[str, Any], overwrite: bool = False
) -> dict[str, int]:
    """Write a JSONL file a split, and `about` with the sizes as dataset.json; returns the number of lines of each.

    Raises DataError when splits overlap or one is empty, OutputError when `out` exists.
    """
    check_disjoint({name: (example.keys for example in examples) for name, examples in splits.items()})
    sizes = {name: len(examples) for name, examples in splits.items()}
    for name, size in sizes.items():
        if size == 0:
            raise DataError(f"split {name} has no examples; ask for more, or check the source of the data")
    with output_directory(out, MARKER, overwrite) as directory:
        for name, examples in splits.items():
            write_lines(directory / f"{name}.jsonl", examples)
        text = json.dumps({**about, "sizes": sizes, "shares": SHARES}, indent=2, ensure_ascii=False)
        (directory / MARKER).write_text(text + "\n", encoding="utf-8")
    return sizes


def write_lines(path: Path, examples: Iterable[Example]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            line = {"input": example.input, "target": example.target, **example.extra}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def report(out: Path, sizes: Mapping[str, int]) -> None:
    click.echo(f"{out}: " + ", ".join(f"{size} {name}" for name, size in sizes.items()))


def normalised(text: str) -> str:
    """The text without differences of case and spacing."""
    return " ".join(text.casefold().split())


def check_directory(directory: Path) -> dict[str, int]:
    """Number of lines of each split of a written data set. Raises DataError when one is missing or they overlap."""
    sizes = dict.fromkeys(SHARES, 0)

    def inputs(name: str) -> Iterator[tuple[str]]:
        for number, line in enumerate(_lines(directory / f"{name}.jsonl"), start=1):
            sizes[name] += 1
            yield (normalised(_input(line, directory / f"{name}.jsonl", number)),)

    check_disjoint({name: inputs(name) for name in SHARES})
    return sizes


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); name the directory of a data set") from None


def _input(line: str, path: Path, number: int) -> str:
    try:
        return str(json.loads(line)["input"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} line {number} has no 'input'; build the data set again") from None


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def command(directory: Path) -> None:
    """Check that the splits in DIRECTORY share no input, and count their lines.

    \b
    Example:
      python -m tools.data.splits data/g2p
    """
    report(directory, check_directory(directory))


def run(tool: click.Command) -> None:
    """Run a tool as a program: an error on purpose is one line and exit code 1."""
    try:
        tool(standalone_mode=True)
    except FreeExportError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run(command)
