"""Steps of `tools.gpu.prove`. Each runs in its own process.

    python -m tools.gpu.prove_steps STEP CONTEXT RESULT

CONTEXT is JSON with the fields of `StepContext`. The step writes its `StepOutcome` to the file
RESULT. Steps with a precision read the bundle that the step `conversion` wrote.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.commands.doctor import examine
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.verification.ties import BATCHES, LIMIT, compare_up_to_ties
from graphs.widen import fp32_copy
from runtime import GenerationResult, Session
from runtime.bundle.bundle import Bundle
from runtime.machine.device import CUDA_PROVIDER
from tools.gpu.operators import check_bundle, load_table
from tools.gpu.prove_commands import comparison, training
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
from tools.gpu.prove_speed import beside_torch, session_options, speed, tensorrt

# Largest error of logits in nats, relative to that of torch in the same precision.
TIMES_TORCH = 3.0
FACTS = "name,driver_version,memory.total,memory.free,compute_cap,clocks.max.sm,persistence_mode"


def machine(context: StepContext) -> StepOutcome:
    """Report the driver, the GPU and what `freeexport doctor` finds. A GPU needs its provider."""
    report = examine()
    states = {one["name"]: one["problem"] or "usable" for one in report["providers"]}
    cuda = states.get(CUDA_PROVIDER, "not in the installed ONNX Runtime")
    rows = [*states.items(), *_nvidia_smi().items()]
    problems = [*report["problems"], *report["cuda"]["problems"], report["tensorrt"]["problem"]]
    rows += [("problem", problem) for problem in problems if problem]
    return StepOutcome(
        f"CUDA provider: {cuda}; TensorRT: {report['tensorrt']['version'] or 'not installed'}",
        "failed" if context.on_gpu and cuda != "usable" else "done",
        ("what", "state"),
        [*rows],
        report,
    )


def conversion(context: StepContext) -> StepOutcome:
    """Convert the checkpoint for CUDA, without verification, and look for missing kernels.

    On the CPU, which has no bf16, the graphs are widened to fp32 and every result is rounded.
    """
    options = ConvertOptions(
        context.exit_layer,
        target="cuda",
        precision=context.precision,  # type: ignore[arg-type]
        capacity=CAPACITY,
        verify="none",
        measure=False,
        overwrite=True,
    )
    began = perf_counter()
    manifest = convert(context.model, context.bundle, options)
    seconds = perf_counter() - began
    problems = check_bundle(context.bundle, load_table())
    emulated = not context.on_gpu and context.precision == "bf16"
    if emulated:
        with fp32_copy(Bundle.open(context.bundle), rounds=True) as copy:
            rounded = Path(context.work) / f"{context.bundle.name}.rounded"
            shutil.copytree(copy.path, rounded)
        shutil.rmtree(context.bundle)
        rounded.rename(context.bundle)
    line = (
        f"{manifest.weight_bytes / 1e6:.0f} MB of weights, exit after layer {manifest.exit_layer} "
        f"of {manifest.layers}, {seconds:.0f} s, {len(problems)} nodes without a CUDA kernel"
        f"{'; emulated in fp32' if emulated else ''}"
    )
    return StepOutcome(
        line,
        "failed" if problems else "done",
        ("node without a kernel",) if problems else (),
        [(problem,) for problem in problems],
    )


def parity(context: StepContext) -> StepOutcome:
    """Compare log-probabilities with those of torch in fp32.

    The error may be TIMES_TORCH times that of torch in the same precision.
    """
    from freeexport.checkpoints.transformers_model import reference_model

    prompts = context.prompts()
    with context.session() as session:
        capacity = session.manifest.capacity
        start = session.manifest.decoder_start_token_id
        results = [session.generate(prompt, mode="full", **context.scored) for prompt in prompts]
    answers = [list(result.token_ids) for result in results]
    ours = np.concatenate([result.logprobs or () for result in results])
    checkpoint = open_checkpoint(context.model)
    found = dict[str, np.ndarray]()
    for dtype in ("float32", DTYPES[context.precision]):
        model = reference_model(checkpoint, context.device, dtype, capacity)
        found[dtype] = np.concatenate(
            [_log_probabilities(model, *pair, start) for pair in zip(prompts, answers, strict=True)]
        )
        del model
    exact, same = found.values()
    chosen = np.concatenate(answers)
    rows = np.arange(len(chosen))
    error = ours - exact[rows, chosen]
    theirs = same[rows, chosen] - exact[rows, chosen]
    ours_rms = float(np.sqrt(np.mean(error**2)))
    theirs_rms = float(np.sqrt(np.mean(theirs**2)))
    gaps = exact.max(-1) - exact[rows, chosen]
    usable = bool(np.isfinite(theirs_rms))
    limit = max(TIMES_TORCH * theirs_rms, 1e-3) if usable else LIMIT[context.float_type]
    # Both of two errors can move a pair of tokens.
    passed = ours_rms <= limit and float(gaps.max()) <= max(0.01, 2 * float(np.abs(error).max()))
    equal = int((gaps == 0).sum())
    line = (
        f"error {ours_rms:.2g} nats, torch's in {context.precision} {theirs_rms:.2g} (limit "
        f"{limit:.2g}); {equal} of {len(chosen)} tokens are torch's in fp32, the others at most "
        f"{gaps.max():.2g} nats below"
    )
    values = {
        "error": ours_rms,
        "torch": theirs_rms if usable else None,
        "limit": limit,
        "largest_error": float(np.abs(error).max()),
        "tokens": len(chosen),
        "equal": equal,
        "largest_gap": float(gaps.max()),
    }
    return StepOutcome(line, "done" if passed else "failed", values=values)


def modes(context: StepContext) -> StepOutcome:
    """Compare lossless, rollback and batches with mode full up to ties, and run all other modes."""
    prompts = context.prompts()
    with context.session(slots=max(BATCHES)) as session:
        report = compare_up_to_ties(session, prompts, context.tokens)
        # A copy for the CPU computes in fp32, but rounds to the type that it was written for.
        report = replace(report, float_type=context.float_type)
        plain = context.plain
        full = session.generate(prompts[0], mode="full", **plain)
        never = session.generate(prompts[0], mode="free", threshold=1.0, **plain)
        ran = [
            (name, session.generate(prompts[0], **options, **plain))
            for name, options in METHODS.items()
        ]
    rows: list[Sequence[Any]] = [
        (row.setting, row.tokens, len(row.ties), len(row.faults)) for row in report.rows
    ]
    rows += [(f"{name}: ran", result.stats.tokens, "", "") for name, result in ran]
    passed = report.passed and never.token_ids == full.token_ids
    line = report.line
    if never.token_ids != full.token_ids:
        line = f"free at threshold 1 gives other tokens than full; {line}"
    exits = {name: round(result.stats.exit_rate, 3) for name, result in ran}
    return StepOutcome(
        line,
        "done" if passed else "failed",
        ("setting", "tokens", "ties", "faults"),
        rows,
        {**report.to_json(), "exit_rates": exits},
    )


def against_cpu(context: StepContext) -> StepOutcome:
    """Compare the device with the same graphs on the CPU, whose results are rounded alike.

    Tokens of mode full, and of the shallow decoder alone, may differ at ties. A token may exit on
    one of the two only if its confidence is as near to the threshold as confidences move.
    """
    prompts = context.prompts()
    ways = {
        "full": {"mode": "full", **context.scored},
        "shallow": {"mode": "shallow", **context.scored},
        f"free at {THRESHOLD}": {**FREE, **context.plain},
    }
    found = list[dict[str, list[GenerationResult]]]()
    with fp32_copy(Bundle.open(context.bundle), rounds=True) as copy:
        for path, device in ((copy.path, "cpu"), (context.bundle, context.device)):
            with Session(path, device=device, slots=1) as session:
                found.append(
                    {
                        name: [session.generate(prompt, **way) for prompt in prompts]
                        for name, way in ways.items()
                    }
                )
    on_cpu, on_device = found
    reports = [
        ties_between(name, on_cpu[name], on_device[name], context.float_type)
        for name in ("full", "shallow")
    ]
    name = f"free at {THRESHOLD}"
    moved, faults = _other_exits(on_cpu[name], on_device[name])
    rows = [
        (
            row.setting,
            row.tokens,
            len(row.ties),
            len(row.faults),
            f"{report.noise.largest:.2g} nats",
        )
        for report in reports
        for row in report.rows
    ]
    rows.append((f"{name}: exits", len(prompts), 0, faults, f"{moved:.2g} of confidence"))
    passed = all(report.passed for report in reports) and not faults
    bad = [
        report.line if report.noise.positions else "no first token is that of the CPU"
        for report in reports
        if not report.passed
    ]
    tokens = sum(row.tokens for report in reports for row in report.rows)
    ties = sum(len(row.ties) for report in reports for row in report.rows)
    equal = "; ".join(bad) or f"{tokens} tokens equal, {ties} ties"
    line = f"{equal}; {faults} exits differ, confidences move by up to {moved:.2g}"
    return StepOutcome(
        line,
        "done" if passed else "failed",
        ("setting", "tokens or requests", "ties", "faults", "largest move"),
        [*rows],
        {"reports": [report.to_json() for report in reports], "confidence": moved},
    )


def _other_exits(
    expected: Sequence[GenerationResult], found: Sequence[GenerationResult]
) -> tuple[float, int]:
    """Return how far confidences move, and the number of exits that differ by more than that.

    Only the first difference of a request counts. Later ones have another context.
    """
    moved = [0.0]
    first = []
    for one, other in zip(expected, found, strict=True):
        rows = zip(one.token_ids, one.exited, one.confidence or (), strict=True)
        others = zip(other.token_ids, other.exited, other.confidence or (), strict=True)
        for (token, exited, before), (newer, exits, after) in zip(rows, others, strict=False):
            if before is not None and after is not None:
                if exited != exits:
                    first.append(abs(before - THRESHOLD))
                    break
                moved.append(abs(before - after))
            if token != newer:
                break
    return max(moved), sum(distance > max(moved) for distance in first)


STEPS: dict[str, Callable[[StepContext], StepOutcome]] = {
    "machine": machine,
    "conversion": conversion,
    "against-cpu": against_cpu,
    "parity": parity,
    "modes": modes,
    "speed": speed,
    "sessions": session_options,
    "beside-torch": beside_torch,
    "tensorrt": tensorrt,
    "training": training,
    "comparison": comparison,
}
# Steps that read no bundle, or convert what they need.
WITHOUT_BUNDLE = ("machine", "conversion", "tensorrt", "training", "comparison")
# Steps by precision, the most important first: the time may end before the last ones. A bundle is
# converted before its first step.
PLAN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("machine",)),
    ("fp32", ("against-cpu",)),
    ("fp16", ("parity", "modes", "speed", "tensorrt")),
    ("", ("training", "comparison")),
    ("int8", ("against-cpu", "modes", "speed")),
    ("int4", ("against-cpu", "modes", "speed")),
    ("fp8", ("tensorrt",)),
    ("fp16", ("sessions", "beside-torch")),
    ("bf16", ("parity", "modes")),
    ("int8", ("tensorrt",)),
    ("int4", ("tensorrt",)),
)


def _log_probabilities(
    model: Any, prompt: list[int], answer: list[int], start: int | None
) -> np.ndarray:
    """Return torch's log-probabilities float64 [n, V] at each token of an answer."""
    import torch

    def ids(values: Sequence[int | None]) -> Any:
        return torch.tensor([values], device=model.device)

    with torch.no_grad():
        if model.config.is_encoder_decoder:
            reads = {"input_ids": ids(prompt), "decoder_input_ids": ids([start, *answer[:-1]])}
            logits = model(**reads, use_cache=False).logits[0]
        else:
            read = [*prompt, *answer[:-1]]
            logits = model(input_ids=ids(read), use_cache=False).logits[0, len(prompt) - 1 :]
        found: np.ndarray = torch.log_softmax(logits.double(), -1).cpu().numpy()
    return found


def _nvidia_smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={FACTS}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": f"does not run ({type(error).__name__})"}
    if answer.returncode:
        return {"nvidia-smi": (answer.stdout + answer.stderr).strip()[:300]}
    return {f"GPU {n}": line for n, line in enumerate(answer.stdout.strip().splitlines())}


def main(name: str, context: str, result: str) -> None:
    """Run a step."""
    outcome = STEPS[name](StepContext(**json.loads(context)))
    Path(result).write_text(json.dumps(asdict(outcome), default=str), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
