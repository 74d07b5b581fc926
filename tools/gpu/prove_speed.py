"""Steps of `tools.gpu.prove` that measure speed, or decode with TensorRT or beside torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.costs.timing import speeds_by_round
from freeexport.system.child import run_child
from freeexport.verification.ties import BATCHES, compare_up_to_ties
from runtime import Session
from tools.gpu.prove_context import (
    CAPACITY,
    DTYPES,
    FREE,
    METHODS,
    THRESHOLD,
    StepContext,
    StepOutcome,
    ties_between,
)

EAGER = "eager PyTorch"
# 0 is the paper's single pass, without passes in the background. The default is 4.
SYNC_EVERY = {
    f"free at {THRESHOLD}, sync_every {count}": {**FREE, "sync_every": count}
    for count in (0, 1, 2, 8)
}
SESSIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "overlap=False": {"overlap": False},
    "cuda_graphs=False": {"cuda_graphs": False},
}


def speed(context: StepContext) -> StepOutcome:
    """Measure all modes and eager PyTorch, interleaved."""
    from freeexport.checkpoints.transformers_model import greedy_ids, reference_model

    checkpoint = open_checkpoint(context.model)
    dtype = DTYPES.get(context.precision, "float32")
    model: Any = reference_model(checkpoint, context.device, dtype)

    def eager(prompt: list[int]) -> None:
        # Ids are copied to the host, which waits for the device.
        ids = [np.array(prompt, np.int64)]
        greedy_ids(model, checkpoint, ids, context.tokens, ignore_eos=True)

    with context.session(draft_memory_mb=0) as session:
        ways = {**METHODS, **SYNC_EVERY, EAGER: eager}
        speeds = _speeds(context, session, ways, context.prompts())
    rows = [
        (name, round(value, 1), f"{value / speeds['full']:.2f}x", f"{value / speeds[EAGER]:.2f}x")
        for name, value in speeds.items()
    ]
    full = speeds["full"]
    free = speeds[f"free at {THRESHOLD}"]
    return StepOutcome(
        f"full {full:.1f} tokens/s, {full / speeds[EAGER]:.2f}x {EAGER}; free at {THRESHOLD} "
        f"{free / full:.2f}x full",
        columns=("method", "tokens/s", "against full", f"against {EAGER}"),
        rows=[*rows],
    )


def session_options(context: StepContext) -> StepOutcome:
    """Compare tokens up to ties, and speed, without overlap and without CUDA graphs."""
    prompts = context.prompts()
    ways = dict(list(METHODS.items())[:3])
    rows: list[Sequence[Any]] = []
    results = []
    reports = []
    for name, options in SESSIONS.items():
        with context.session(**options) as session:
            results.append(
                [session.generate(prompt, mode="full", **context.scored) for prompt in prompts]
            )
            speeds = _speeds(context, session, ways, prompts[:1])
        reports.append(ties_between(name, results[0], results[-1], context.float_type))
        rows.append((name, *(round(value, 1) for value in speeds.values())))
    failed = [report.line for report in reports if not report.passed]
    return StepOutcome(
        "; ".join(failed) or f"tokens of {len(SESSIONS)} sessions are equal up to ties",
        "failed" if failed else "done",
        ("tokens/s", *ways),
        rows,
        {"reports": [report.to_json() for report in reports]},
    )


def beside_torch(context: StepContext) -> StepOutcome:
    """Decode while torch and a second session use the device from the same process.

    Their allocations may disturb the capture of CUDA graphs. Tokens must be those of one session.
    """
    import torch

    prompt = context.prompts()[0]
    options = {"mode": "full", **context.plain}
    with context.session() as session:
        expected = session.generate(prompt, **options).token_ids
    place = torch.device(context.device)
    with context.session() as one, context.session() as other:
        found = []
        for _ in range(3):
            matrix = torch.ones(1024, 1024, device=place)
            found += [session.generate(prompt, **options).token_ids for session in (one, other)]
            float((matrix @ matrix).sum())
    equal = sum(ids == expected for ids in found)
    return StepOutcome(
        f"{equal} of {len(found)} outputs are equal to those of one session",
        "done" if equal == len(found) else "failed",
    )


def tensorrt(context: StepContext) -> StepOutcome:
    """Build the engines with TensorRT, test them, and compare modes and speed."""
    if not context.on_gpu:
        return StepOutcome("TensorRT engines are built for a GPU", "not applicable")
    if find_spec("tensorrt") is None:
        missing = "TensorRT is not installed; run: pip install 'freeexport[tensorrt]'"
        return StepOutcome(missing, "not applicable")
    path = Path(context.work) / "tensorrt"
    arguments = ["convert", context.model, str(path), "--target", "tensorrt", "--overwrite"]
    arguments += ["--precision", context.precision, "--capacity", str(CAPACITY)]
    arguments += ["--verify", "none", "--build", str(max(BATCHES))]
    if context.exit_layer is not None:
        arguments += ["--exit-layer", str(context.exit_layer)]
    said = run_child("freeexport", *arguments)
    prompts = context.prompts(path)
    with Session(path, device=context.device, slots=max(BATCHES)) as session:
        report = compare_up_to_ties(session, prompts, context.tokens)
        speeds = _speeds(context, session, METHODS, prompts)
    shutil.rmtree(path)
    return StepOutcome(
        report.line,
        "done" if report.passed else "failed",
        ("method", "tokens/s"),
        [(name, round(value, 1)) for name, value in speeds.items()],
        {**report.to_json(), "build": said.splitlines()[-20:]},
    )


def _speeds(
    context: StepContext, session: Session, ways: Mapping[str, Any], prompts: Sequence[list[int]]
) -> dict[str, float]:
    """Return tokens per second, medians over rounds.

    Args:
        ways: Options of a request, or a function that decodes a prompt, by name.
    """

    def decode(way: Any, prompt: list[int]) -> tuple[int, float]:
        began = perf_counter()
        if callable(way):
            way(prompt)
        else:
            session.generate(prompt, **way, **context.plain)
        return context.tokens, perf_counter() - began

    rounds = speeds_by_round(list(ways.values()), prompts, context.rounds, decode)
    return dict(zip(ways, np.median(rounds, axis=0).tolist(), strict=True))
