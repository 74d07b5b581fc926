"""JSON that someone else wrote, read with limits and refused in one line: for every file of JSON that is read."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from runtime.errors import BundleError, FreeExportError

# Bytes. The tokenizer.json of a vocabulary of 262,144 tokens has 33 MB; no other file comes near.
LARGEST_FILE = 256 << 20
# Objects and arrays within each other, and digits of an integer: no float overflows from one of these.
DEEPEST = 100
MOST_DIGITS = 100

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnreadableError(ValueError):
    """Why a text or a file cannot be read: one line, for the inside of a message that names the file and the remedy."""


def read_object(
    path: Path, remedy: str, error: type[FreeExportError] = BundleError, limit: int = LARGEST_FILE, **options: bool
) -> dict[str, Any]:
    """`read_json`, of a file that must hold an object."""
    value = read_json(path, remedy, error, limit, **options)
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, not an object; {remedy}")
    return value


def read_json(
    path: Path, remedy: str, error: type[FreeExportError] = BundleError, limit: int = LARGEST_FILE, **options: bool
) -> Any:
    """The JSON in a regular file of at most `limit` bytes; options are those of `parse_json`.

    Whatever is wrong with it, and that it is missing, is raised as `error`, in a line that ends with the remedy.
    """
    try:
        return parse_json(read_text(path, limit), **options)
    except UnreadableError as reason:
        raise error(f"{path} cannot be read ({reason}); {remedy}") from None


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """JSON as Python values. UnreadableError where it is none, nests more than DEEPEST deep, or holds a key twice, an
    integer of more than MOST_DIGITS digits, a number that no float can hold, half of a surrogate pair, or, without
    `nan`, NaN or infinity."""
    try:
        source = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(
            source,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=float if nan else _refuse_constant,
            object_pairs_hook=_object,
        )
        if "\\ud" in source or "\\uD" in source:
            json.dumps(value, ensure_ascii=False).encode()
    except UnreadableError:
        raise
    except UnicodeDecodeError:
        raise UnreadableError("it is not text in UTF-8") from None
    except UnicodeEncodeError:
        raise UnreadableError("it holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise UnreadableError(_too_deep()) from None
    except ValueError as error:
        raise UnreadableError(f"not JSON: {error}") from None
    _check_depth(value)
    return value


def read_text(path: Path, limit: int = LARGEST_FILE) -> str:
    """The text of a regular file of at most `limit` bytes, in UTF-8. UnreadableError, for a missing file too."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError:
        raise UnreadableError("it is not text in UTF-8") from None


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """The content of a regular file of at most `limit` bytes. UnreadableError, for a missing file too."""
    # Without O_NONBLOCK the opening of a named pipe that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError(f"it is {_kind(status.st_mode)}, not a regular file")
        if status.st_size > limit:
            raise UnreadableError(f"it has {status.st_size} bytes, at most {limit} are read")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise UnreadableError(f"it has more than the {limit} bytes that are read")
    return content


def _kind(mode: int) -> str:
    return next((name for holds, name in _KINDS if holds(mode)), "a special file")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise UnreadableError(f"it holds an integer of {len(digits)} digits, at most {MOST_DIGITS} are read")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise UnreadableError(f"it holds the number {digits[:40]}, which no float can hold")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise UnreadableError(f"it holds {name}, which is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UnreadableError(f"it holds the key {twice[:80]!r} twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise UnreadableError(_too_deep())


def _too_deep() -> str:
    return f"not JSON of at most {DEEPEST} levels"
