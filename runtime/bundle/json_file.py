"""Reading of JSON files with limits and one-line errors. Used for every JSON file."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from runtime.errors import BundleError, FreeExportError

# Bytes. The tokenizer.json of a vocabulary of 262,144 tokens has 33 MB. All other files are much
# smaller.
LARGEST_FILE = 256 << 20
# Maximum nesting depth, and maximum number of digits of an integer, which no float overflows.
DEEPEST = 100
MAX_DIGITS = 100

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnreadableError(ValueError):
    """A text or file cannot be read. The message is the reason, for use within another message."""


def read_object(
    path: Path,
    remedy: str,
    error: type[FreeExportError] = BundleError,
    limit: int = LARGEST_FILE,
    **options: bool,
) -> dict[str, Any]:
    """Read a JSON file that must hold an object. See `read_json`."""
    value = read_json(path, remedy, error, limit, **options)
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, not an object; {remedy}")
    return value


def read_json(
    path: Path,
    remedy: str,
    error: type[FreeExportError] = BundleError,
    limit: int = LARGEST_FILE,
    **options: bool,
) -> Any:
    """Read the JSON in a regular file of at most `limit` bytes.

    Args:
        path: The file.
        remedy: What to do about an error, the end of its message.
        error: Type of the exception.
        limit: Maximum size of the file.
        **options: Options of `parse_json`.

    Raises:
        FreeExportError: Of type `error`, if the file is missing or cannot be read.
    """
    try:
        return parse_json(read_text(path, limit), **options)
    except UnreadableError as reason:
        raise error(f"{path} cannot be read ({reason}); {remedy}") from None


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """Parse JSON.

    Args:
        text: The JSON, bytes in UTF-8.
        nan: Allow NaN and infinity.

    Raises:
        UnreadableError: If it is not JSON, is nested deeper than DEEPEST, or has a duplicate key,
            an integer of more than MAX_DIGITS digits, a number beyond float64 or a lone surrogate.
    """
    hooks: dict[str, Any] = {
        "parse_int": _integer,
        "parse_float": _float,
        "object_pairs_hook": _object,
    }
    try:
        source = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(source, parse_constant=float if nan else _refuse_constant, **hooks)
        if "\\ud" in source or "\\uD" in source:
            json.dumps(value, ensure_ascii=False).encode()
    except UnreadableError:
        raise
    except UnicodeDecodeError:
        raise UnreadableError("it is not text in UTF-8") from None
    except UnicodeEncodeError:
        raise UnreadableError("it has half of a surrogate pair, which is not a character") from None
    except RecursionError:
        raise UnreadableError(f"not JSON of at most {DEEPEST} levels") from None
    except ValueError as error:
        raise UnreadableError(f"not JSON: {error}") from None
    _check_depth(value)
    return value


def read_text(path: Path, limit: int = LARGEST_FILE) -> str:
    """Return the text of a regular UTF-8 file of at most `limit` bytes.

    Raises:
        UnreadableError: If the file is missing or cannot be read.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError:
        raise UnreadableError("it is not text in UTF-8") from None


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        UnreadableError: If the file is missing or cannot be read.
    """
    with opened(path, limit) as file:
        # Python allocates all bytes that are asked for. Files of the kernel have a size of 0.
        asked = os.fstat(file.fileno()).st_size or limit
        content = file.read(asked + 1)
    if len(content) > asked:
        raise UnreadableError(f"it has more than the {asked} bytes that are read")
    return content


@contextmanager
def opened(path: Path, limit: int) -> Iterator[BinaryIO]:
    """Context manager: open a regular file of at most `limit` bytes for reading.

    Raises:
        UnreadableError: If the file is missing, or opening or reading it fails.
    """
    # Without O_NONBLOCK, opening a named pipe without a writer would block forever.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, os.O_RDONLY | flags)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
                raise UnreadableError(f"it is {kind}, not a regular file")
            if status.st_size > limit:
                raise UnreadableError(f"it has {status.st_size} bytes, at most {limit} are read")
            yield file
    except IsADirectoryError:
        raise UnreadableError("it is a directory, not a regular file") from None
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    except ValueError as error:
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(str(error)) from None  # a null character in the path


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise UnreadableError(
            f"it holds an integer of {len(digits)} digits, at most {MAX_DIGITS} are read"
        )
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise UnreadableError(
            f"it holds the number {digits[:40]}, which is out of the range of floats"
        )
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise UnreadableError(f"it has {name}, which is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise UnreadableError(f"it has the key {name[:80]!r} twice")
        result[name] = value
    return result


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    raise UnreadableError(f"not JSON of at most {DEEPEST} levels")
