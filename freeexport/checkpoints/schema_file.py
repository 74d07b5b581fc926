"""A dataclass in a file of JSON that this package wrote, with the version of its schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.bundle.schema import Reader
from runtime.errors import BundleError
from runtime.json_file import read_object


def read_schema_file(path: Path, annotation: type[Any], version: int, remedy: str) -> Any:
    """What `annotation` names. Raises BundleError where the file cannot be read, is of another `schema_version`, or
    does not hold what it must; each message ends with the remedy."""
    value = read_object(path, remedy)
    if value.get("schema_version") != version:
        found = repr(value.get("schema_version"))[:80]
        raise BundleError(
            f"{path} has schema version {found}, this freeexport reads {version}; use the "
            f"freeexport that wrote it, or {remedy}"
        )
    return Reader(remedy, finite=True).read(annotation, value, str(path))
