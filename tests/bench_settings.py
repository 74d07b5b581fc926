"""The settings of a run of `freeexport bench`, as its report has them."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, Any] = {
    "freeexport": "0.2.0",
    "model": "tiny",
    "exit_layer": "1 of 4",
    "threads": 2,
    "batch": 1,
    "prompts": 2,
    "tokens": 4,
    "rounds": 1,
    "decoding": "greedy",
    "compared_with": "one",
    "cpu": "some CPU",
    "cpu_features": ["avx2"],
    "cores": 2,
    "memory": 8 << 30,
    "idle": True,
}
