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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import numpy as np

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.commands.doctor import examine, provider_problem
from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from freeexport.costs.timing import interleave
from freeexport.evaluate.speed import speed_prompts
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
from runtime import GenerationResult, Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import FloatType
from runtime.cuda.runner import CudaRunner
from runtime.engines.onnx import import_onnxruntime
from runtime.engines.runner import Runner
from runtime.machine.device import CUDA_PROVIDER
from runtime.options import MOST_TOP_LOGPROBS
from tools.gpu.operators import check_bundle, load_table

CAPACITY = 512
PROMPTS = 4
THRESHOLD = 0.5
# A fp32 result may differ from that of another device, because a GPU multiplies in TF32.
LEAST_COMMON = 0.5  # share of the tokens before the first difference
# Largest error of logits in nats, relative to that of torch in the same precision.
TIMES_TORCH = 3.0
GAIN = 1.03  # ratio of speeds above which another `sync_every` is recommended
PACKAGES = (
    *("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "cuda-bindings", "tensorrt"),
    *("tensorrt_rtx", "numpy", "onnx"),
)
FACTS = "name,driver_version,memory.total,memory.free,compute_cap,clocks.max.sm,persistence_mode"
FREE: dict[str, Any] = {"mode": "free", "threshold": THRESHOLD}
EVERY: dict[str, Any] = {"mode": "free", "threshold": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    f"free at {THRESHOLD}": FREE,
    "free at 0, every token exits": EVERY,
    "rollback": {"mode": "rollback", "threshold": THRESHOLD, "rollback_threshold": 2.0},
    "lossless, drafts from the text": {"mode": "lossless", "drafts": "lookup"},
    "lossless, drafts of the exit": {"mode": "lossless", "drafts": "exit"},
    "static, shallow decoder alone": {"mode": "shallow"},
}
State = Literal["done", "failed", "not applicable"]


class NotApplicable(Exception):
    """Raised by a step that cannot run on this device, with the reason."""


@dataclass(frozen=True)
class StepContext:
    """What a step works on.

    Attributes:
        device: Device of sessions and of torch: "cpu" or "cuda:0".
        work: Directory for bundles and results of earlier steps.
        tokens: Tokens per prompt.
        rounds: Rounds of a measurement.
        model: The checkpoint. Empty for steps without one.
        name: Name of the model in the report.
        precision: Precision of the bundle. Empty for steps without one.
        exit_layer: Exit layer. Default: that of the checkpoint's exit, or a third of the layers.
        exit: Name or file of a ready-made exit.
    """

    device: str
    work: str
    tokens: int
    rounds: int
    model: str = ""
    name: str = ""
    precision: str = ""
    exit_layer: int | None = None
    exit: str | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def bundle(self) -> Path:
        """The bundle that the step `conversion` writes."""
        return Path(self.work) / f"{self.name}-{self.precision}"

    @property
    def float_type(self) -> FloatType:
        """Type that the results have, also if the CPU computes them in fp32 and rounds."""
        types: dict[str, FloatType] = {"fp16": "fp16", "bf16": "bf16"}
        return types.get(self.precision, "fp32")

    def session(self, **options: Any) -> Session:
        """Open a session of the bundle on the device."""
        return Session(self.bundle, **{"device": self.device, "slots": 1, **options})

    def prompts(self, count: int = PROMPTS) -> list[list[int]]:
        """Return the token ids of the first sample texts."""
        return speed_prompts(Bundle.open(self.bundle), None, count)

    def file(self, step: str) -> Path:
        """Return where a step keeps values for later steps of the same bundle."""
        return Path(self.work) / f"{self.name}-{self.precision}-{step}.json"


@dataclass
class StepOutcome:
    """Result of a step.

    Attributes:
        state: "failed" if a check says no, "done" otherwise.
        line: The outcome as one sentence.
        columns: Columns of a table.
        rows: Rows of the table.
        values: Everything measured, for the JSON report.
    """

    line: str
    state: State = "done"
    columns: Sequence[str] = ()
    rows: list[Sequence[Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def environment(context: StepContext) -> StepOutcome:
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
        rows.append((name, f"installed, {_version_of(name)}" if found else "not installed"))
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


def cuda_graphs(context: StepContext) -> StepOutcome:
    """Compare tokens and speed with CUDA graphs on and off. Tokens must be equal."""
    lanes = {
        "without CUDA graphs": {"cuda_graphs": False},
        "with CUDA graphs": {"cuda_graphs": True},
    }
    return _lanes(context, {name: {"overlap": False, **given} for name, given in lanes.items()})


def overlap(context: StepContext) -> StepOutcome:
    """Compare overlap on and off, and count the shallow steps that run during a deep pass.

    Times are those of CUDA events in the streams. On the CPU, which has no overlap, they are the
    host's clock.
    """
    lanes: dict[str, dict[str, Any]] = {"one stream": {"overlap": False}}
    if context.on_gpu:
        lanes["overlap"] = {"overlap": True}
    outcome = _lanes(context, lanes)
    prompt = context.prompts(1)[0]
    options: dict[str, Any] = {
        **{"mode": "free", "threshold": THRESHOLD},
        **{"max_new_tokens": context.tokens, "ignore_eos": True},
    }
    with context.session(**({"overlap": True} if context.on_gpu else {})) as session:
        session.generate(prompt, **options)
        with session.decoder() as decoder:
            shallow, deep = decoder.runners
        steps, passes = _watched(shallow, deep)
        result = session.generate(prompt, **options)
    inside = sum(
        any(begin <= step[0] and step[1] <= end for begin, end in passes) for step in steps
    )
    calls = sorted([(*step, "shallow") for step in steps] + [(*call, "deep") for call in passes])
    outcome.values |= {
        "clock": "CUDA events" if context.on_gpu else "the host's clock",
        "shallow_steps": len(steps),
        "deep_passes": len(passes),
        "steps_inside_a_pass": inside,
        "step_ms": _middle(steps),
        "pass_ms": _middle(passes),
        "overlapped_ms": 1e3 * result.stats.overlapped_seconds,
        "first_calls": [
            [name, round(1e3 * begin, 3), round(1e3 * end, 3)] for begin, end, name in calls[:40]
        ],
    }
    outcome.line += (
        f"; {inside} of {len(steps)} shallow steps run during one of {len(passes)} deep passes, "
        f"by {outcome.values['clock']}"
    )
    return outcome


def eager(context: StepContext) -> StepOutcome:
    """Measure greedy decoding by eager PyTorch on the same device."""
    from freeexport.checkpoints.transformers_model import Dtype, greedy_ids, reference_model

    dtypes: dict[str, Dtype] = {"fp16": "float16", "bf16": "bfloat16"}
    checkpoint = open_checkpoint(context.model)
    model: Any = reference_model(checkpoint, context.device, dtypes[context.precision])
    runs = list[float]()
    prompts = [np.array(ids, np.int64) for ids in context.prompts()]
    for turn in range(context.rounds + 1):  # the first round allocates
        began = perf_counter()
        # Ids are copied to the host, which waits for the device.
        for ids in prompts:
            greedy_ids(model, checkpoint, [ids], context.tokens, ignore_eos=True)
        if turn:
            runs.append(len(prompts) * context.tokens / (perf_counter() - began))
    speed = median(runs)
    values = {"tokens_per_second": speed, "runs": runs}
    context.file("eager").write_text(json.dumps(values))
    return StepOutcome(f"{speed:.1f} tokens/s", values=values)


def speed(context: StepContext) -> StepOutcome:
    """Measure all modes, interleaved, relative to mode full and to eager PyTorch."""
    names = list(METHODS)
    measured: dict[str, list[list[float]]] = {name: [] for name in names}
    with context.session(draft_memory_mb=0) as session:
        for turn in _interleaved(context, session, [METHODS[name] for name in names]):
            for name, result in zip(names, turn, strict=True):
                measured[name].append([result.stats.tokens, result.stats.seconds])
    speeds = {name: _speed_of(runs) for name, runs in measured.items()}
    file = context.file("eager")
    torch = json.loads(file.read_text())["tokens_per_second"] if file.is_file() else None
    rows = [
        (
            name,
            round(value, 1),
            f"{value / speeds['full']:.2f}x",
            f"{value / torch:.2f}x" if torch else "not measured",
        )
        for name, value in speeds.items()
    ]
    against = f"{speeds['full'] / torch:.2f}x eager PyTorch" if torch else "eager was not measured"
    free = speeds[f"free at {THRESHOLD}"]
    return StepOutcome(
        f"full {speeds['full']:.1f} tokens/s, {against}; free at {THRESHOLD} "
        f"{free / speeds['full']:.2f}x full",
        columns=("method", "tokens/s", "against full", "against eager PyTorch"),
        rows=[*rows],
        values={"tokens_per_second": speeds, "eager": torch},
    )


def sync_every(context: StepContext) -> StepOutcome:
    """Measure `sync_every` 1, 2, 4 and 8 with overlap, and the paper's single pass.

    A value is recommended if it is GAIN times as fast as the default.
    """
    lanes: dict[str, dict[str, Any]] = {
        "no background pass (0), as in the paper": {"sync_every": 0},
        **{str(count): {"sync_every": count} for count in (1, 2, 4, 8)},
    }
    thresholds = {"free at 0.5": FREE, "free at 0": EVERY}
    rows = list[Sequence[Any]]()
    found = dict[str, dict[str, float]]()
    given: dict[str, Any] = {"overlap": True} if context.on_gpu else {}
    with context.session(**given) as session:
        for name, options in thresholds.items():
            ways = [{**options, **lane} for lane in lanes.values()]
            measured: dict[str, list[list[float]]] = {lane: [] for lane in lanes}
            for turn in _interleaved(context, session, ways):
                for lane, result in zip(lanes, turn, strict=True):
                    measured[lane].append([result.stats.tokens, result.stats.seconds])
            found[name] = {lane: _speed_of(runs) for lane, runs in measured.items()}
            rows.append((name, *(round(value, 1) for value in found[name].values())))
    if context.on_gpu:
        means = {
            lane: float(np.exp(np.mean([np.log(each[lane]) for each in found.values()])))
            for lane in lanes
        }
        best = max(means, key=means.__getitem__)
        advice = best if means[best] > GAIN * means["4"] else "4"
        line = f"recommended: sync_every {advice}; 4 is {means['4'] / means['1']:.2f}x as fast as 1"
    else:
        line = "no recommendation: the CPU has no overlap, and sync_every has no effect"
    return StepOutcome(line, columns=("tokens/s", *lanes), rows=rows, values=found)


def beside(context: StepContext) -> StepOutcome:
    """Decode while torch and a second session use the device from the same process.

    Their allocations may disturb the capture of CUDA graphs. Tokens must be those of one session.
    """
    import torch

    prompt = context.prompts(1)[0]
    options: dict[str, Any] = {"mode": "full", "max_new_tokens": context.tokens, "ignore_eos": True}
    with context.session() as session:
        alone = session.generate(prompt, **options).token_ids
    place = torch.device(context.device)
    with context.session() as one, context.session() as other:
        found = []
        for _ in range(3):
            matrix = torch.ones(1024, 1024, device=place)
            found += [session.generate(prompt, **options).token_ids for session in (one, other)]
            float((matrix @ matrix).sum())
    equal = sum(ids == alone for ids in found)
    return StepOutcome(
        f"{equal} of {len(found)} outputs are equal to those of one session",
        "done" if equal == len(found) else "failed",
    )


def tensorrt(context: StepContext) -> StepOutcome:
    """Build the engines with TensorRT, test them, and compare modes and speed."""
    if not context.on_gpu:
        raise NotApplicable("TensorRT engines are built for a GPU")
    if importlib.util.find_spec("tensorrt") is None:
        raise NotApplicable("TensorRT is not installed; run: pip install 'freeexport[tensorrt]'")
    path = Path(context.work) / f"{context.bundle.name}-tensorrt"
    arguments = ["convert", context.model, str(path), "--target", "tensorrt", "--overwrite"]
    arguments += ["--precision", context.precision, "--capacity", str(CAPACITY)]
    arguments += ["--verify", "none", "--build", str(max(BATCHES))]
    if context.exit_layer is not None:
        arguments += ["--exit-layer", str(context.exit_layer)]
    if context.exit is not None:
        arguments += ["--exit", context.exit]
    said = run_child("freeexport", *arguments)
    prompts = context.prompts()
    with Session(path, device=context.device, slots=max(BATCHES)) as session:
        report = compare_up_to_ties(session, prompts, context.tokens)
        ways = list(METHODS.values())
        runs = [list(turn) for turn in _interleaved(context, session, ways)]
    rows = list[Sequence[Any]]()
    for number, name in enumerate(METHODS):
        pairs = [[turn[number].stats.tokens, turn[number].stats.seconds] for turn in runs]
        rows.append((name, round(_speed_of(pairs), 1)))
    return StepOutcome(
        f"{_version_of('tensorrt')}: {report.line}",
        "done" if report.passed else "failed",
        ("method", "tokens/s"),
        rows,
        {**report.to_json(), "build": said.splitlines()[-20:]},
    )


Function = Callable[[StepContext], StepOutcome]
# Steps without a model, with a model in fp32, and with a bundle in half precision, in order.
MACHINE: dict[str, Function] = {"environment": environment, "providers": providers}
FP32: dict[str, Function] = {"conversion": conversion, "against-cpu": against_cpu}
HALF: dict[str, Function] = {
    **{"conversion": conversion, "parity": parity, "modes": modes, "batches": batches},
    **{"calibration": calibration, "cuda-graphs": cuda_graphs, "overlap": overlap},
    **{"eager": eager, "speed": speed, "sync-every": sync_every, "beside-torch": beside},
    "tensorrt": tensorrt,
}
STEPS: dict[str, Function] = {**MACHINE, **FP32, **HALF}


def _lanes(context: StepContext, lanes: dict[str, dict[str, Any]]) -> StepOutcome:
    """Measure modes with other options of the session, which must not change the tokens."""
    ways = [METHODS["full"], FREE, EVERY]
    prompt = context.prompts(1)[0]
    plain: dict[str, Any] = {"max_new_tokens": context.tokens, "ignore_eos": True}
    rows = list[Sequence[Any]]()
    tokens = list[list[Sequence[int]]]()
    for name, options in lanes.items():
        with context.session(**options) as session:
            found = []
            for way in ways:
                runs = [session.generate(prompt, **way, **plain) for _ in range(context.rounds + 2)]
                pairs = [(run.stats.tokens, run.stats.seconds) for run in runs[2:]]
                found.append((round(_speed_of(pairs), 1), runs[-1].token_ids))
        rows.append((name, *(value for value, _ in found)))
        tokens.append([ids for _, ids in found])
    same = all(each == tokens[0] for each in tokens)
    return StepOutcome(
        f"{'equal' if same else 'different'} tokens in {len(lanes)} settings",
        "done" if same else "failed",
        ("tokens/s", "full", f"free at {THRESHOLD}", "free at 0"),
        rows,
        {name: row[1:] for name, row in zip(lanes, rows, strict=True)},
    )


def _interleaved(
    context: StepContext, session: Session, ways: Sequence[dict[str, Any]]
) -> Iterator[list[GenerationResult]]:
    """Yield the results of all ways for each prompt and round."""
    plain: dict[str, Any] = {"max_new_tokens": context.tokens, "ignore_eos": True}

    def decode(way: dict[str, Any], prompt: list[int]) -> GenerationResult:
        result: GenerationResult = session.generate(prompt, **way, **plain)
        return result

    for turn in interleave(ways, context.prompts(), context.rounds, decode):
        yield turn.runs


def _speed_of(runs: Sequence[Sequence[float]]) -> float:
    """Return the median of tokens per second of pairs of tokens and seconds."""
    return median(tokens / seconds for tokens, seconds in runs)


def _middle(calls: Sequence[tuple[float, float]]) -> float:
    """Return the median duration, in milliseconds."""
    return round(1e3 * median([end - begin for begin, end in calls] or [0.0]), 3)


def _common(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the share of tokens before the first difference."""
    pairs = enumerate(zip(one, other, strict=False))
    first = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
    return first / max(1, len(one), len(other))


def _watched(shallow: Runner, deep: Runner) -> tuple[list[Any], list[Any]]:
    """Return growing lists of begin and end of both runners' calls, in seconds."""
    if isinstance(shallow, CudaRunner) and isinstance(deep, CudaRunner):
        origin = shallow.stream.cuda.event(timed=True)
        shallow.stream.record(origin)
        return shallow.watch(origin), deep.watch(origin)
    origin_seconds = perf_counter()
    seen: tuple[list[Any], list[Any]] = ([], [])
    for runner, calls in zip((shallow, deep), seen, strict=True):
        runner.run = partial(_timed, runner.run, calls, origin_seconds)  # type: ignore[method-assign]
    return seen


def _timed(run: Callable[[Any], float], calls: list[Any], origin: float, call: Any) -> float:
    began = perf_counter()
    seconds = run(call)
    calls.append((began - origin, perf_counter() - origin))
    return seconds


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


def _version_of(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a missing library raises OSError or ImportError
        return f"does not import: {str(error)[:200]}"
    return f"{name} {module.__version__}"


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
