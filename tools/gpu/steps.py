"""The steps of tools/gpu/check.py: each gives what it measured, as JSON can hold it, or raises why it cannot."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
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
from tools.gpu.speeds import PROMPTS, decoded, equal, speeds, torch_device, transformers_speeds

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "cuda-bindings", "torch", "transformers", "tensorrt")


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
                verify="none",
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
    """Tokens/s of transformers on the card that torch sees, or on this CPU."""
    return transformers_speeds(bench.model, bench.tokens)


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "environment": environment,
    "correctness": correctness,
    "lanes": lanes,
    "timeline": timeline,
    "cpu": cpu_speed,
    "peers": peers,
}


def _middle(calls: Sequence[tuple[float, float]]) -> float:
    return round(1e3 * median(end - begin for begin, end in calls), 3) if calls else 0.0
