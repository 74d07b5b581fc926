"""Where this user's caches lie: what can be made again, but not quickly."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(*parts: str) -> Path:
    """A path under `$XDG_CACHE_HOME/freeexport`, by default ~/.cache/freeexport. Nothing is created."""
    home = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    root = Path(home) if home and os.path.isabs(home) else Path.home() / ".cache"
    return root.joinpath("freeexport", *parts)
