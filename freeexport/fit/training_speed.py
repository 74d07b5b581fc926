"""Measure the speed of training on the first lines of the data, before `freeexport fit` plans."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freeexport.checkpoints.examples import read_examples
from freeexport.fit.splits import write_splits
from freeexport.system.child import run_child
from freeexport.training.training_options import TrainingOptions

STEPS = 5  # steps that are timed. The first one is not counted.


def training_speed(
    model: str, data: Path, line_tokens: float, batch_tokens: int, **options: Any
) -> dict[str, float]:
    """Measure seconds per training step and tokens per second in a child process.

    `options` are fields of TrainingOptions. Examples have `line_tokens` tokens on average.
    """
    # Repeat two batches, since initialising the exit reads all lines, which takes as long as the
    # steps.
    lines = max(4, math.ceil(2 * batch_tokens / line_tokens))
    options |= {"batch_tokens": batch_tokens, "steps": STEPS}
    request = {"model": model, "data": str(data), "lines": lines, "options": options}
    measured: dict[str, float] = json.loads(run_child(__name__, json.dumps(request)))
    return measured


def main(arguments: Sequence[str]) -> None:
    """Time training steps on the first lines of the data, and print the result as JSON."""
    from freeexport.training.train import step_speed

    given = json.loads(arguments[0])
    with tempfile.TemporaryDirectory() as directory:
        lines = read_examples(Path(given["data"]), given["lines"])
        write_splits({"lines": lines}, Path(directory))
        data = Path(directory) / "lines.jsonl"
        step, speed = step_speed(
            given["model"], TrainingOptions(data, **given["options"]), Path(directory)
        )
        print(json.dumps({"step": step, "tokens_per_second": speed}))


if __name__ == "__main__":
    main(sys.argv[1:])
