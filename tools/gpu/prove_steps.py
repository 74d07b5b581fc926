"""Steps of `tools.gpu.prove`. Each runs in its own process.

    python -m tools.gpu.prove_steps STEP CONTEXT RESULT

CONTEXT is a JSON file with the fields of `StepContext`. The step writes its `StepOutcome` to
RESULT. Steps of a model read the bundle that the step `conversion` wrote.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.commands.doctor import examine, provider_problem
from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from freeexport.system.child import run_child
from freeexport.verification.ties import (
    BATCHES,
    LIMIT,
    Noise,
    ScoredTokens,
    SettingTies,
    compare_up_to_ties,
)
from graphs.widen import fp32_copy
from runtime import GenerationResult
from runtime.bundle.bundle import Bundle
from runtime.engines.onnx import import_onnxruntime
from runtime.machine.device import CUDA_PROVIDER
from runtime.options import MOST_TOP_LOGPROBS
from tools.gpu.operators import check_bundle, load_table
from tools.gpu.prove_context import (
    CAPACITY,
    METHODS,
    NotApplicable,
    StepContext,
    StepOutcome,
    version_of,
)
from tools.gpu.prove_speed import beside, cuda_graphs, eager, overlap, speed, sync_every, tensorrt

# A fp32 result may differ from that of another device, because a GPU multiplies in TF32.
LEAST_COMMON = 0.5  # share of the tokens before the first difference
# Largest error of logits in nats, relative to that of torch in the same precision.
TIMES_TORCH = 3.0
PACKAGES = (
    *("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "cuda-bindings", "tensorrt"),
    *("tensorrt_rtx", "numpy", "onnx"),
)
FACTS = "name,driver_version,memory.total,memory.free,compute_cap,clocks.max.sm,persistence_mode"


def report_environment(context: StepContext) -> StepOutcome:
    """Report driver, GPU and versions."""
    rows: list[Sequence[Any]] = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    rows += [(name, value) for name, value in _nvidia_smi().items()]
    report = examine()
    rows.append(("driver supports", f"CUDA {report['cuda']['driver'] or 'not known'}"))
    rows += [("problem", problem) for problem in report["cuda"]["problems"]]
    if importlib.util.find_spec("torch"):
        import torch

        rows.append(("torch sees", f"{torch.cuda.device_count()} GPUs, CUDA {torch.version.cuda}"))
    return StepOutcome(f"{len(rows)} facts", columns=("what", "value"), rows=rows, values=report)


def providers(context: StepContext) -> StepOutcome:
    """Run a graph on ONNX Runtime's CUDA provider, and import TensorRT."""
    ort = import_onnxruntime()
    rows = [
        (name, provider_problem(ort, name) or "usable") for name in ort.get_available_providers()
    ]
    for name in ("tensorrt", "tensorrt_rtx"):
        found = importlib.util.find_spec(name) is not None
        rows.append((name, f"installed, {version_of(name)}" if found else "not installed"))
    states = dict(rows)
    cuda = states.get(CUDA_PROVIDER, f"not in this wheel, onnxruntime {ort.__version__}")
    failed = context.on_gpu and cuda != "usable"
    return StepOutcome(
        f"CUDA provider: {cuda}; TensorRT: {states['tensorrt']}",
        "failed" if failed else "done",
        ("provider", "state"),
        [*rows],
    )


def conversion(context: StepContext) -> StepOutcome:
    """Convert the checkpoint for CUDA, without verification, and look for missing kernels.

    On the CPU, which has no bf16, the graphs are widened to fp32 and every result is rounded.
    """
    options = ConvertOptions(
        context.exit_layer,
        exit=context.exit,
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
    from freeexport.checkpoints.transformers_model import Dtype, reference_model

    prompts = context.prompts()
    with context.session() as session:
        capacity = session.manifest.capacity
        start = session.manifest.decoder_start_token_id
        plain: dict[str, Any] = {
            "max_new_tokens": context.tokens,
            "ignore_eos": True,
            "output_logprobs": True,
        }
        results = [session.generate(prompt, mode="full", **plain) for prompt in prompts]
    answers = [list(result.token_ids) for result in results]
    ours = np.concatenate([result.logprobs or () for result in results])
    checkpoint = open_checkpoint(context.model)
    dtypes: dict[str, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}
    found = dict[str, np.ndarray]()
    for dtype in ("float32", dtypes[context.precision]):
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
        plain: dict[str, Any] = {"max_new_tokens": context.tokens, "ignore_eos": True}
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
    """Compare tokens and exits with the same fp32 graphs on the CPU."""
    plain: dict[str, Any] = {"max_new_tokens": context.tokens, "ignore_eos": True}
    prompts = context.prompts()
    found = list[dict[str, list[GenerationResult]]]()
    for device in (context.device, "cpu"):
        with context.session(device=device) as session:
            found.append(
                {
                    name: [session.generate(prompt, **METHODS[name], **plain) for prompt in prompts]
                    for name in list(METHODS)[:4]
                }
            )
    rows = list[Sequence[Any]]()
    for name, results in found[0].items():
        pairs = list(zip(results, found[1][name], strict=True))
        common = [_common(one.token_ids, other.token_ids) for one, other in pairs]
        exits = sum(one.exited == other.exited for one, other in pairs)
        rows.append((name, round(float(np.mean(common)), 3), f"{exits} of {len(pairs)}"))
    least = min(row[1] for row in rows)
    return StepOutcome(
        f"at least {least:.0%} of the tokens before the first difference",
        "done" if least >= LEAST_COMMON else "failed",
        ("method", "tokens before the first difference", "prompts with equal exits"),
        rows,
    )


def batches(context: StepContext) -> StepOutcome:
    """Compare 8 requests at once with the same requests alone, and measure batches of 1 to 8."""
    prompts = [ids[cut:] for cut in (0, 1) for ids in context.prompts()]
    plain: dict[str, Any] = {"max_new_tokens": context.tokens, "ignore_eos": True}
    scored = plain | {"output_logprobs": True, "top_logprobs": MOST_TOP_LOGPROBS}
    rows = list[Sequence[Any]]()
    with context.session(slots=len(prompts)) as session:
        alone = [ScoredTokens.of(session.generate(ids, mode="full", **scored)) for ids in prompts]
        together = [
            ScoredTokens.of(result) for result in session.generate(prompts, mode="full", **scored)
        ]
        noise = Noise.between(zip(alone, together, strict=True))
        found = SettingTies("full, batch 8")
        for request, (expected, other) in enumerate(zip(alone, together, strict=True)):
            found.add(request, expected, other.ids, noise)
        for name, options in list(METHODS.items())[:2]:
            speeds = []
            for size in (1, 2, 4, 8):
                runs = []
                for _ in range(context.rounds + 1):  # the first run binds buffers
                    began = perf_counter()
                    results = session.generate(prompts[:size], **options, **plain)
                    seconds = perf_counter() - began
                    runs.append(sum(one.stats.tokens for one in results) / seconds)
                speeds.append(round(median(runs[1:]), 1))
            rows.append((name, *speeds))
    passed = not found.faults and noise.plausible(context.float_type)
    line = (
        f"{found.tokens} tokens in a batch of 8, {len(found.ties)} ties, {len(found.faults)} "
        f"faults, noise {noise.largest:.2g} nats"
    )
    columns = ("tokens/s", "batch 1", "2", "4", "8")
    return StepOutcome(
        line, "done" if passed else "failed", columns, rows, {"noise": asdict(noise)}
    )


def calibration(context: StepContext) -> StepOutcome:
    """Calibrate a copy of the bundle on the sample texts."""
    copy = Path(context.work) / f"{context.bundle.name}.calibrated"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(context.bundle, copy)
    data = Path(context.work) / "calibration.jsonl"
    texts = files("freeexport").joinpath("data/verify.txt").read_text(encoding="utf-8").splitlines()
    words = [text.split() for text in texts if text.strip()]
    # Many short prompts, because the rule needs a number of sequences.
    lines = [" ".join(one[start : start + 8]) for one in words for start in range(len(one))]
    step = max(1, len(lines) // 48)
    data.write_text("".join(json.dumps({"input": line}) + "\n" for line in lines[::step]))
    answer = run_child(
        "freeexport",
        *("calibrate", str(copy), "--data", str(data), "--device", context.device),
        *("--max-new-tokens", str(min(16, context.tokens)), "--rounds", "1", "--json"),
    )
    shutil.rmtree(copy)
    values = json.loads(answer)
    threshold = values.get("threshold", values.get("calibration", {}).get("threshold"))
    return StepOutcome(f"threshold {threshold}", values=values)


Function = Callable[[StepContext], StepOutcome]
# Steps without a model, with a model in fp32, and with a bundle in half precision, in order.
MACHINE: dict[str, Function] = {"environment": report_environment, "providers": providers}
FP32: dict[str, Function] = {"conversion": conversion, "against-cpu": against_cpu}
HALF: dict[str, Function] = {
    **{"conversion": conversion, "parity": parity, "modes": modes, "batches": batches},
    **{"calibration": calibration, "cuda-graphs": cuda_graphs, "overlap": overlap},
    **{"eager": eager, "speed": speed, "sync-every": sync_every, "beside-torch": beside},
    "tensorrt": tensorrt,
}
STEPS: dict[str, Function] = {**MACHINE, **FP32, **HALF}


def _common(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the share of tokens before the first difference."""
    pairs = enumerate(zip(one, other, strict=False))
    first = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    return first / max(1, len(one), len(other))


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
    given = StepContext(**json.loads(Path(context).read_text(encoding="utf-8")))
    try:
        outcome = STEPS[name](given)
    except NotApplicable as reason:
        outcome = StepOutcome(str(reason), "not applicable")
    Path(result).write_text(json.dumps(asdict(outcome), default=str), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
