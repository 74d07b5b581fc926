"""A decoder's end of the benchmark's protocol: a JSON object a line, requests on stdin, an answer to each on stdout.

    {"op": "convert", "source": path, "out": path, "options": {}}              -> {}
    {"op": "load", "model": path, "threads": n, "cpus": [], "options": {}}     -> {"versions": {}, ...}
    {"op": "generate", "prompt": [ids], "tokens": n}                           -> {"tokens": [ids], "times": [seconds],
                                                                                   "seconds": s, "peak_bytes": n, ...}

`times` are those at which each token was known, from the request on. What fails answers {"error": text}.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Notes the time of a token, or of several that became known at once.
Emit = Callable[..., None]
# (prompt, how many tokens, emit): exactly that many tokens, an end of sequence among them or not. May return facts.
Generate = Callable[[list[int], int, Emit], Any]
# (path of the model, threads, options): what generates, and facts about it.
Load = Callable[[str, int, dict[str, Any]], tuple[Generate, dict[str, Any]]]
# (source checkpoint, where to write, options).
Convert = Callable[[str, str, dict[str, Any]], None]


def serve(load: Load, convert: Convert | None = None) -> None:
    """Answer requests until stdin ends."""
    # Libraries print on stdout: that becomes stderr, and the answers go where it was.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    generate: Generate | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["op"] == "convert" and convert is not None:
                convert(request["source"], request["out"], request["options"])
                answer: dict[str, Any] = {}
            elif request["op"] == "load":
                if request["cpus"] and hasattr(os, "sched_setaffinity"):
                    os.sched_setaffinity(0, request["cpus"])
                generate, answer = load(request["model"], request["threads"], request["options"])
            elif request["op"] == "generate" and generate is not None:
                answer = _generate(generate, request["prompt"], request["tokens"])
            else:
                answer = {"error": f"this decoder cannot {request['op']} now"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _generate(generate: Generate, prompt: list[int], count: int) -> dict[str, Any]:
    tokens: list[int] = []
    times: list[float] = []

    def emit(*known: int) -> None:
        tokens.extend(int(token) for token in known)
        times.extend([time.perf_counter() - began] * len(known))

    began = time.perf_counter()
    facts = generate(prompt, count, emit)
    seconds = time.perf_counter() - began
    if len(tokens) != count:
        raise RuntimeError(f"it gave {len(tokens)} tokens, {count} were asked for")
    return {"tokens": tokens, "times": times, "seconds": seconds, "peak_bytes": _peak_bytes(), **(facts or {})}


def _peak_bytes() -> int:
    """The most resident memory of this process. What getrusage says begins with that of the process it came from."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
