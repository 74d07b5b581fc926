"""A dataclass in a file of JSON that this package wrote, with the version of its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from freeexport.weight_files import one_line
from runtime.errors import BundleError
from runtime.schema import Reader


def read_schema_file(path: Path, annotation: type[Any], version: int, remedy: str) -> Any:
    """What `annotation` names. Raises BundleError where the file cannot be read, is of another `schema_version`, or
    does not hold what it must; each message ends with the remedy."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({one_line(error)}); {remedy}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path} holds {type(value).__name__}, not an object; {remedy}")
    if value.get("schema_version") != version:
        raise BundleError(
            f"{path} has schema version {value.get('schema_version')!r}, this freeexport reads {version}; use the "
            f"freeexport that wrote it, or {remedy}"
        )
    return Reader(remedy, finite=True).read(annotation, value, str(path))
