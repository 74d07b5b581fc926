"""What engine calls cost, and from which exit rate on exits pay."""

from __future__ import annotations
from pathlib import Path


def break_even_line(bundle: Path) -> str:
    return "TODO"
