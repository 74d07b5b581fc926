"""Field extraction: a package's record, as `apt show` prints it, to JSON with what a program would ask of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

MOST_DEPENDENCIES = 12
# In the order of the record; some are there to be passed over.
SHOWN = (
    "Package",
    "Source",
    "Version",
    "Installed-Size",
    "Architecture",
    "Provides",
    "Depends",
    "Description",
    "Homepage",
    "Section",
    "Priority",
    "Size",
)
# What ends the input, so that a decoder-only model knows where the answer begins.
SEPARATOR = "\nJSON: "
_UPSTREAM = re.compile(r"^(?:\d+:)?(.+?)(?:-[^-]*)?$")


def record(fields: Mapping[str, str]) -> str:
    """The fields that are shown, a line each."""
    return "\n".join(f"{name}: {fields[name]}" for name in SHOWN if name in fields)


def extracted(fields: Mapping[str, str]) -> str | None:
    """Name, upstream version, section, home page, summary and dependencies as one line of JSON.

    Of a dependency only the first alternative's name is kept. None for a record without dependencies or with very
    many.
    """
    depends = [part.split("|")[0].split()[0].split(":")[0] for part in fields.get("Depends", "").split(",") if part]
    if not 0 < len(depends) <= MOST_DEPENDENCIES or "Description" not in fields:
        return None
    upstream = _UPSTREAM.match(fields["Version"])
    found = {
        "name": fields["Package"],
        "version": upstream.group(1) if upstream else fields["Version"],
        "section": fields.get("Section"),
        "homepage": fields.get("Homepage"),
        "summary": fields["Description"],
        "depends": depends,
    }
    return json.dumps(found, ensure_ascii=False)
