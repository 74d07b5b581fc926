"""The steps of tools/gpu/check.py: each gives what it measured, as JSON can hold it, or raises why it cannot."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from runtime import Session
from runtime.cuda.runner import CudaRunner

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "cuda-bindings", "torch", "transformers", "tensorrt")
PROMPTS = ("the cat sat on the mat", "a quick brown fox", "it was the best of times", "light travels faster than sound")


class Unavailable(Exception):
    """Why a step cannot be done here."""


@dataclass
class Bench:
    """What the steps share. `model` is a checkpoint, `exit_layer` None for that of its exit.json; bundles are made in
    `work`, once each. `device` is None where there is no card that works, for the reason `no_device`."""

    model: Path
    work: Path
    tokens: int
    exit_layer: int | None = None
    device: str | None = None
    no_device: str = ""
    bundles: dict[str, Path] = field(default_factory=dict)

    def bundle(self, target: str, precision: str) -> Path:
        key = f"{target}-{precision}"
        if key not in self.bundles:
            options = ConvertOptions(
                self.exit_layer,
                target=target,  # type: ignore[arg-type]
                precision=precision,  # type: ignore[arg-type]
                capacity=256,
                verify=False,
                measure=False,
            )
            convert(str(self.model), self.work / key, options)
            self.bundles[key] = self.work / key
        return self.bundles[key]

    def card(self) -> str:
        if self.device is None:
            raise Unavailable(self.no_device)
        return self.device


def environment(bench: Bench) -> dict[str, Any]:
    """Versions, the driver's own report, and whether a CUDA device can be used through cuda-python."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "platform": platform.platform(), "packages": {}}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found["packages"][name] = importlib.metadata.version(name)
    import onnxruntime

    found["providers"] = onnxruntime.get_available_providers()
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    found["torch sees"] = torch_device()
    found["device"] = bench.device or f"none: {bench.no_device}"
    return found


def correctness(bench: Bench) -> dict[str, Any]:
    """Tokens and exits in fp32 and fp16 on the card against the CPU's in fp32; without a card, of the card's graphs on
    the CPU provider."""
    want = decoded(bench.bundle("cpu", "fp32"), "cpu")
    if bench.device is None:
        got = decoded(bench.bundle("cuda", "fp32"), "cpu")
        return {"where": "the graphs of target cuda, on the CPU provider", "fp32": equal(got, want)}
    found: dict[str, Any] = {"where": bench.device}
    for precision in ("fp32", "fp16"):
        found[precision] = equal(decoded(bench.bundle("cuda", precision), bench.device), want)
    if found["fp32"]["tokens"] < 1.0:
        raise AssertionError(f"tokens on {bench.device} in fp32 are not those of the CPU: {found}")
    return found


def lanes(bench: Bench) -> dict[str, Any]:
    """Tokens/s with overlap on and off, and CUDA graphs on and off; the tokens are those of overlap off, graphs off."""
    device = bench.card()
    path, found = bench.bundle("cuda", "fp16"), dict[str, Any]()
    first = None
    for overlap in (False, True):
        for graphs in (False, True):
            with Session(path, device=device, overlap=overlap, cuda_graphs=graphs) as session:
                name = f"overlap {'on' if overlap else 'off'}, graphs {'on' if graphs else 'off'}"
                found[name], tokens = speeds(session, bench.tokens)
            first = first or tokens
            if tokens != first:
                raise AssertionError(f"{name} gives other tokens than overlap off, graphs off")
    return found


def timeline(bench: Bench) -> dict[str, Any]:
    """By events of the device: how many shallow steps lie within a deep pass that is under way, with overlap."""
    device = bench.card()
    with Session(bench.bundle("cuda", "fp16"), device=device, overlap=True, slots=1) as session:
        options: dict[str, Any] = {"threshold": 0.3, "max_new_tokens": bench.tokens, "ignore_eos": True}
        session.generate(PROMPTS[0], **options)
        with session.decoder() as decoder:
            shallow, deep = decoder.runners
        assert isinstance(shallow, CudaRunner)
        assert isinstance(deep, CudaRunner)
        origin = shallow.stream.cuda.event(timed=True)
        shallow.stream.record(origin)
        steps, passes = shallow.watch(origin), deep.watch(origin)
        session.generate(PROMPTS[0], **options)
        shallow.watch(None)
        deep.watch(None)
    inside = [step for step in steps if any(begin <= step[0] and step[1] <= end for begin, end in passes)]
    return {
        "shallow steps": len(steps),
        "deep passes": len(passes),
        "steps inside a pass": len(inside),
        "milliseconds": {"step": _middle(steps), "pass": _middle(passes)},
        "first 40 calls": [
            [name, round(1e3 * begin, 3), round(1e3 * end, 3)]
            for begin, end, name in sorted(
                [(*step, "shallow") for step in steps] + [(*call, "deep") for call in passes]
            )[:40]
        ],
    }


def cpu_speed(bench: Bench) -> dict[str, Any]:
    """Tokens/s of the same checkpoint on this machine's CPU, fp32, to compare with."""
    with Session(bench.bundle("cpu", "fp32")) as session:
        return speeds(session, bench.tokens)[0]


def peers(bench: Bench) -> dict[str, Any]:
    """Tokens/s of transformers' generate, and of the same compiled, greedy, one prompt at a time."""
    import torch
    import transformers

    device = torch_device()
    where = "cpu" if device.startswith("none") else "cuda"
    config = transformers.AutoConfig.from_pretrained(bench.model)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    dtype = torch.float16 if where == "cuda" else torch.float32
    model = kind.from_pretrained(bench.model, dtype=dtype).eval().to(where)
    inputs = torch.tensor([list(range(5, 25))], device=where)
    # transformers' own cache fails where a T5 decoder is deeper than its encoder.
    deeper = getattr(config, "num_decoder_layers", 0) or 0
    model.generation_config.use_cache = deeper <= getattr(config, "num_layers", deeper)
    found: dict[str, Any] = {"device": device, "type": str(dtype), "cache": model.generation_config.use_cache}
    found["transformers"] = torch_speed(model, inputs, bench.tokens)
    if where == "cpu":
        found["torch.compile"] = "not measured: only where torch sees a GPU"
        return found
    try:
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward, mode="reduce-overhead")
        found["torch.compile"] = torch_speed(model, inputs, bench.tokens)
    except Exception as error:  # whatever a compiler raises is what there is to report
        found["torch.compile"] = f"failed: {str(error).splitlines()[0][:200]}"
    return found


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "environment": environment,
    "correctness": correctness,
    "lanes": lanes,
    "timeline": timeline,
    "cpu": cpu_speed,
    "peers": peers,
}


def decoded(path: Path, device: str) -> list[tuple[Sequence[int], Sequence[bool]]]:
    with Session(path, device=device) as session:
        results = [session.generate(prompt, max_new_tokens=48, threshold=0.5) for prompt in PROMPTS]
    return [(result.token_ids, result.exited) for result in results]


def equal(got: Sequence[Any], want: Sequence[Any]) -> dict[str, float]:
    """Shares of prompts with the same tokens, and with the same exits."""
    pairs = list(zip(got, want, strict=True))
    return {
        "tokens": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
        "exits": sum(a[1] == b[1] for a, b in pairs) / len(pairs),
    }


def speeds(session: Session, tokens: int) -> tuple[dict[str, float], list[Sequence[int]]]:
    """Tokens/s by mode, the median of three runs after one, and the tokens of mode free."""
    modes: dict[str, dict[str, Any]] = {
        "full": {"mode": "full"},
        "free": {"threshold": 0.5},
        "exits": {"threshold": 0.0},
    }
    found, tokens_of = {}, list[Sequence[int]]()
    for name, options in modes.items():
        times = []
        for _ in range(4):
            began = time.perf_counter()
            result = session.generate(PROMPTS[0], max_new_tokens=tokens, ignore_eos=True, **options)
            times.append(time.perf_counter() - began)
        found[f"{name}, tokens/s"] = round(len(result.token_ids) / median(times[1:]), 1)
        tokens_of.append(result.token_ids)
    return found, tokens_of


def torch_speed(model: Any, inputs: Any, tokens: int) -> float:
    """Tokens/s, the median of three runs after two."""
    import torch

    times = []
    for _ in range(5):
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1)
        if inputs.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return round(tokens / median(times[2:]), 1)


def torch_device() -> str:
    """The card that torch sees, or why none."""
    try:
        import torch
    except ImportError as error:
        return f"none: {error}"
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none: torch.cuda.is_available() is False"


def _middle(calls: Sequence[tuple[float, float]]) -> float:
    return round(1e3 * median(end - begin for begin, end in calls), 3) if calls else 0.0
