"""How much longer a tokenizer may make a text: what can be seen in its steps without running them.

A chain of replacements multiplies: eight that write a hundred characters for one end the process for want of memory.
What a regular expression costs, or a table of characters, cannot be seen: a bundle's tokenizer is trusted input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import tokenizers

MOST_STEPS = 64
MOST_GROWTH = 1000


def growth_problem(backend: tokenizers.Tokenizer) -> str | None:
    """What a tokenizer's normalizers, decoders or post-processors would do too much of; None where they are modest."""
    for kind, part in (("normalizers", backend.normalizer), ("decoders", backend.decoder)):
        steps = list(_steps(_state(part)))
        if len(steps) > MOST_STEPS:
            return f"it has {len(steps)} {kind}, at most {MOST_STEPS} are run"
        growth = 1.0
        for step in steps:
            growth *= _growth(step)
        if growth > MOST_GROWTH:
            return f"its {kind} can make a text {growth:.0f} times as long, at most {MOST_GROWTH} times is allowed"
    copies = 1
    for step in _steps(_state(backend.post_processor)):
        copies *= max(1, sum("Sequence" in piece for piece in step.get("single") or ()))
    return f"its post-processor repeats a text {copies} times" if copies > 2 else None


def _state(part: Any) -> dict[str, Any]:
    return dict(json.loads(part.__getstate__())) if part is not None else {}


def _steps(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps in order; a sequence is flat."""
    inner = next((state[name] for name in ("normalizers", "decoders", "processors") if name in state), None)
    if inner is None:
        yield state
        return
    for step in inner:
        yield from _steps(step)


def _growth(step: dict[str, Any]) -> float:
    """Characters of the result for each of the text, at most."""
    if step.get("type") != "Replace":
        return 1.0
    content = len(step["content"])
    pattern = step["pattern"].get("String")
    # A regular expression may match nothing, and so between any two characters.
    return max(1.0, content / len(pattern)) if pattern else content + 1.0
