"""A bundle that its verification refused, kept beside where it was to stand, with the report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from freeexport.system.output_directory import OutputError, check_output, output_directory
from freeexport.verification.verification import VerificationError
from runtime.bundle.bundle import VERIFICATION
from runtime.bundle.manifest import MANIFEST, Manifest
from runtime.errors import BundleError


def unverified_place(out: Path) -> Path:
    """Where a refused bundle for `out` goes. Raises OutputError where something stands there that is none."""
    absolute = Path(os.path.abspath(out))
    place = absolute.with_name(f"{absolute.name}.unverified")
    check_output(place, MANIFEST, overwrite=True)
    if (place / MANIFEST).is_file() and _verified(place / MANIFEST):
        raise OutputError(f"{place} holds a verified bundle, where a refused one would go; move it away")
    return place


def _verified(manifest: Path) -> bool:
    try:
        return Manifest.from_json(manifest.read_text(encoding="utf-8"), manifest).verified
    except (BundleError, ValueError):
        return False


@contextmanager
def kept_where_refused(directory: Path, place: Path) -> Iterator[None]:
    """Where the block raises VerificationError, move what is in `directory` to `place`, instead of an earlier one, and
    raise the error with the path. Without a report nothing was judged, and nothing is kept."""
    try:
        yield
    except VerificationError as error:
        if not (directory / VERIFICATION).is_file():
            raise
        with output_directory(place, MANIFEST, overwrite=True) as beside:
            for path in directory.iterdir():
                path.rename(beside / path.name)
        raise VerificationError(f"{error}; kept as {place}, with the figures in {VERIFICATION}") from None
