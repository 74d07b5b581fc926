"""Split lines of data into training, validation, calibration and test sets.

Similar inputs share a split, so nothing is evaluated on data that it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from freeexport.checkpoints.examples import TARGETS_WANTED, DataError, read_examples
from freeexport.system.jsonl import InputLine, encoded, input_field

TRAIN = "train"
# Words per shingle, and shingles per sketch. A sketch has the shingles with the smallest hashes.
WORDS = 4
SKETCH = 48
# A shingle that occurs in more lines than both of these limits is part of the task's template. It
# is ignored.
FRAME = 0.02
FRAME_LINES = 20
# Inputs are similar if they share at least this fraction of the smaller sketch.
ALIKE = 0.5


def stable_hash(text: str) -> int:
    """Return a 64-bit hash of `text` that is the same on every machine and Python version."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def normalised(text: str) -> str:
    """Return the text without differences in case and whitespace."""
    return " ".join(text.casefold().split())


def read_lines(data: Path, least: int) -> list[InputLine]:
    """Read the lines of a JSONL file, which must all have a target."""
    lines = read_examples(data, need_target=TARGETS_WANTED)
    if len(lines) < least:
        raise DataError(
            f"{data} has {len(lines)} lines; training, calibration and evaluation each need lines "
            f"of their own: give {least} or more, or leave --data out"
        )
    return lines


def split_lines(
    lines: Sequence[InputLine], sizes: Mapping[str, int], data: Path
) -> dict[str, list[InputLine]]:
    """Split lines by size.

    Returns splits of at most the given `sizes`, in this order, and TRAIN with all other lines. The
    order within a split depends only on the inputs. Families of similar inputs stay together.
    """
    # For recordings use the transcript, since file names carry no information.
    inputs = [line.target if isinstance(line.input, Path) else line.input for line in lines]
    texts = [
        normalised(json.dumps(text) if isinstance(text, list) else str(text)) for text in inputs
    ]
    hashes = [stable_hash(text) for text in texts]
    family = families(texts)
    members: dict[int, list[int]] = {}
    for place in sorted(range(len(lines)), key=hashes.__getitem__):
        members.setdefault(int(family[place]), []).append(place)
    found: dict[str, list[InputLine]] = {name: [] for name in (*sizes, TRAIN)}
    for places in members.values():
        fits = (name for name, size in sizes.items() if len(found[name]) + len(places) <= size)
        found[next(fits, TRAIN)] += [lines[place] for place in places]
    largest = max(map(len, members.values()))
    for name, size in sizes.items():
        if len(found[name]) < size / 2 or not found[TRAIN]:
            raise DataError(
                f"{data}: {largest} of {len(lines)} inputs are alike, and there are {len(members)} "
                f"different ones: too few for a {name} split of {size} lines that is not like the "
                "others; give more different lines"
            )
    return found


def write_splits(splits: Mapping[str, Sequence[InputLine]], directory: Path) -> None:
    """Write each split to NAME.jsonl in `directory`."""
    for name, lines in splits.items():
        fields = ("target", "references", "language")
        records = [
            {**input_field(one), **{name: getattr(one, name) for name in fields}} for one in lines
        ]
        records = [
            one | ({"audio": os.path.abspath(one["audio"])} if "audio" in one else {})
            for one in records
        ]
        content = (
            encoded({key: value for key, value in one.items() if value is not None})
            for one in records
        )
        (directory / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in content))


def families(texts: Sequence[str]) -> np.ndarray:
    """Return the family number of each text, int64 [n].

    A family has equal texts, and texts that share shingles that are rare among all texts.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    unique, family = np.unique(np.array(texts, dtype=object), return_inverse=True)
    sketches = [_sketch(text) for text in unique]
    owner = np.repeat(np.arange(len(unique)), [len(one) for one in sketches])
    _, shingle, counts = np.unique(
        np.concatenate(sketches), return_inverse=True, return_counts=True
    )
    telling = (counts <= max(FRAME_LINES, FRAME * len(unique)))[shingle]
    owner = owner[telling]
    shingle = shingle[telling]
    size = np.bincount(owner, minlength=len(unique))
    order = np.lexsort((owner, shingle))
    owner = owner[order]
    shingle = shingle[order]
    # Compare only neighbours in the list of a shingle's texts. Similar texts are adjacent in most
    # of their lists.
    beside = shingle[:-1] == shingle[1:]
    pairs, shared = np.unique(
        np.stack([owner[:-1], owner[1:]])[:, beside], axis=1, return_counts=True
    )
    pairs = pairs[:, shared >= ALIKE * np.minimum(size[pairs[0]], size[pairs[1]])]
    graph = coo_array(
        (np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(len(unique), len(unique))
    )
    merged: np.ndarray = connected_components(graph, directed=False)[1][family].astype(np.int64)
    return merged


def _sketch(text: str) -> np.ndarray:
    """Return the smallest hashes of a text's shingles, uint64 [at most SKETCH].

    Empty if the text is shorter than one shingle.
    """
    words = np.array(
        [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in text.split()], np.uint64
    )
    count = len(words) - WORDS + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    mixed = np.zeros(count, np.uint64)
    for place in range(WORDS):
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) + words[
            place : place + count
        ]
    mixed ^= mixed >> np.uint64(31)
    return np.unique(mixed)[:SKETCH]
