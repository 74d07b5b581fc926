"""Steps of `tools.gpu.prove` that measure speed, or decode with TensorRT or beside torch."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.costs.timing import interleave
from freeexport.system.child import run_child
from freeexport.verification.ties import BATCHES, compare_up_to_ties
from runtime import GenerationResult, Session
from runtime.engines.cuda.runner import CudaRunner
from runtime.engines.runner import Runner
from tools.gpu.prove_context import (
    CAPACITY,
    EVERY,
    FREE,
    METHODS,
    THRESHOLD,
    NotApplicable,
    StepContext,
    StepOutcome,
    version_of,
)

GAIN = 1.03  # ratio of speeds above which another `sync_every` is recommended


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
        **FREE,
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
    with context.session(draft_memory_mb=0) as session:
        speeds = _speeds(context, session, METHODS)
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
    with context.session(**({"overlap": True} if context.on_gpu else {})) as session:
        for name, options in thresholds.items():
            ways = {lane: {**options, **given} for lane, given in lanes.items()}
            found[name] = _speeds(context, session, ways)
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
    path = Path(context.work) / "tensorrt"
    arguments = ["convert", context.model, str(path), "--target", "tensorrt", "--overwrite"]
    arguments += ["--precision", context.precision, "--capacity", str(CAPACITY)]
    arguments += ["--verify", "none", "--build", str(max(BATCHES))]
    if context.exit_layer is not None:
        arguments += ["--exit-layer", str(context.exit_layer)]
    said = run_child("freeexport", *arguments)
    prompts = context.prompts(bundle=path)
    with Session(path, device=context.device, slots=max(BATCHES)) as session:
        report = compare_up_to_ties(session, prompts, context.tokens)
        speeds = _speeds(context, session, METHODS, prompts)
    shutil.rmtree(path)
    rows: list[Sequence[Any]] = [(name, round(value, 1)) for name, value in speeds.items()]
    return StepOutcome(
        f"{version_of('tensorrt')}: {report.line}",
        "done" if report.passed else "failed",
        ("method", "tokens/s"),
        rows,
        {**report.to_json(), "build": said.splitlines()[-20:]},
    )


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
                found.append((round(_speed_of(runs[2:]), 1), runs[-1].token_ids))
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


def _speeds(
    context: StepContext,
    session: Session,
    ways: Mapping[str, dict[str, Any]],
    prompts: Sequence[list[int]] | None = None,
) -> dict[str, float]:
    """Return the tokens per second of each way, measured in turn for each prompt and round."""
    plain: dict[str, Any] = {"max_new_tokens": context.tokens, "ignore_eos": True}

    def decode(way: dict[str, Any], prompt: list[int]) -> GenerationResult:
        result: GenerationResult = session.generate(prompt, **way, **plain)
        return result

    turns = interleave(list(ways.values()), prompts or context.prompts(), context.rounds, decode)
    by_way = zip(*(turn.runs for turn in turns), strict=True)
    return {name: _speed_of(runs) for name, runs in zip(ways, by_way, strict=True)}


def _speed_of(runs: Sequence[GenerationResult]) -> float:
    """Return the median of tokens per second."""
    return median(run.stats.tokens / run.stats.seconds for run in runs)


def _middle(calls: Sequence[tuple[float, float]]) -> float:
    """Return the median duration, in milliseconds."""
    return round(1e3 * median([end - begin for begin, end in calls] or [0.0]), 3)


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
