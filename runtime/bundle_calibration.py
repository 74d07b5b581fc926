"""Where a bundle keeps its calibration: a file named by its content, so that replacing the manifest replaces both."""

from __future__ import annotations

import re

_NAME = re.compile(r"calibration(-[0-9a-f]{12})?\.json")


def is_calibration(name: str) -> bool:
    """Whether a file of a bundle is a calibration."""
    return _NAME.fullmatch(name) is not None


def calibration_name(sha256: str) -> str:
    """The name of the calibration with this sha256."""
    return f"calibration-{sha256[:12]}.json"
