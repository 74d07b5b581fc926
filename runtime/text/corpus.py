"""Reads the file of texts that a session's draft memory begins with (option `draft_corpus`)."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.errors import OptionError, shown

# Keys of the text in an object, the first one that is there. "target": data sets of examples.
KEYS = ("text", "target")


def read_corpus(path: Path, limit: int) -> list[str]:
    """Return the texts of a file: one text, or of JSON lines (*.jsonl) one per line.

    Args:
        path: The file.
        limit: Maximum size of the file, in bytes.

    Raises:
        OptionError: If the file is missing, too large or not text, or a line has no text.
    """
    name = shown(str(path))
    try:
        if not path.is_file():
            path.stat()  # raises the reason if there is nothing
            raise OptionError(f"draft_corpus is {name}, which is not a file; give a text file")
        if path.stat().st_size > limit:
            raise OptionError(
                f"draft_corpus is {name}, which has {path.stat().st_size:,} bytes, more than "
                f"draft_memory_mb allows, {limit:,}; shorten it or raise draft_memory_mb"
            )
        content = path.read_text("utf-8-sig")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OptionError(
            f"draft_corpus is {name}, which cannot be read ({reason}); give a text file"
        ) from None
    except ValueError:  # of the name or of the content
        content = "\0"
    if "\0" in content:
        raise OptionError(
            f"draft_corpus is {name}, which is not text in UTF-8; give a text file or JSON lines"
        )
    if path.suffix != ".jsonl":
        return [content]
    lines = enumerate(content.split("\n"), 1)
    return [_text_of(line, f"{name}, line {number}") for number, line in lines if line.strip()]


def _text_of(line: str, where: str) -> str:
    found: Any = None
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
    if isinstance(found, dict):
        found = next((found[key] for key in KEYS if key in found), None)
    if isinstance(found, str):
        with suppress(UnicodeEncodeError):  # half of a surrogate pair
            found.encode()
            return found
    raise OptionError(
        f"draft_corpus is {where}, which is {shown(line[:100])}; give a JSON string or an object "
        'with a "text"'
    )
