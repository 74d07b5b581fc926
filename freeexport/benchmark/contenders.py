"""What a benchmark compares: each contender loads in a process of its own and decodes on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from freeexport.benchmark.peers.catalog import Peer
from freeexport.benchmark.peers.environment import PeerError
from freeexport.benchmark.peers.model import Source, installed, peer_command, peer_model
from freeexport.benchmark.worker import Worker
from freeexport.system.child import PACKAGES
from runtime.machine.user_cache import user_cache

# Seconds for one answer. A compiling decoder takes minutes for its first prompt.
LOAD_LIMIT, RUN_LIMIT = 600.0, 600.0


@dataclass(frozen=True)
class Run:
    """One prompt decoded: the tokens, the seconds from the request at which each was known, and until all was done; the
    process's most resident bytes so far; the share that exited, how much of what was drafted was kept, how many deep
    passes ran over how many rows (empty for others than bundles), seconds outside the engines, and how many tokens
    were `decided`, not predicted by reading the prompt."""

    tokens: tuple[int, ...]
    times: tuple[float, ...]
    seconds: float
    peak_bytes: int
    exit_rate: float = 0.0
    acceptance: float = 1.0
    sync_sizes: dict[int, int] = field(default_factory=dict)
    overhead: float = 0.0
    decided: int = 0

    @property
    def first_seconds(self) -> float:
        """Until the first token."""
        return self.times[0]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Run:
        known = {name: answer[name] for name in ("exit_rate", "acceptance", "overhead", "decided") if name in answer}
        sizes = {int(rows): count for rows, count in answer.get("sync_sizes", {}).items()}
        tokens, times = tuple(answer["tokens"]), tuple(answer["times"])
        return cls(tokens, times, answer["seconds"], answer["peak_bytes"], sync_sizes=sizes, **known)


class Contender(Protocol):
    """Decodes greedily to exactly as many new tokens as asked for, whatever they are. `required`: without it there is
    nothing to compare with, and its failure is the command's."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def required(self) -> bool: ...
    @property
    def threads(self) -> int: ...

    def prepare(self) -> tuple[list[str], str, dict[str, Any]]:
        """The command that serves it, and the model and options to load. Raises PeerError."""
        ...


@dataclass(frozen=True)
class Ours:
    """A bundle in one mode; `threshold` for those that exit, `rollback_threshold` for rollback. `replay`: exits as in
    that trace, called `replay_name`. `drafts`: where lossless has them from; `right`: drafts of which this share is
    right. `label` tells bundles apart, where there are several."""

    bundle: Path
    threads: int
    mode: str
    threshold: float | None = None
    rollback_threshold: float | None = None
    precision: str = ""
    replay: tuple[bool, ...] | None = None
    replay_name: str = ""
    drafts: str | None = None
    right: float | None = None
    label: str = ""
    device: str = "cpu"
    required: bool = True

    @property
    def name(self) -> str:
        exits = "" if self.threshold is None else f", threshold {self.threshold:g}"
        if self.replay is not None:
            exits = f", exits replayed: {self.replay_name}"
        elif self.right is not None:
            exits = f", drafts replayed: {self.right:g} right"
        elif self.drafts is not None:
            exits = f", drafts: {self.drafts}"
        return f"{self.label + ' ' if self.label else ''}{self.mode}{exits}"

    def prepare(self) -> tuple[list[str], str, dict[str, Any]]:
        given = {
            "mode": self.mode,
            "threshold": self.threshold,
            "rollback_threshold": self.rollback_threshold,
            "drafts": self.drafts,
            "right": self.right,
            "device": self.device,
        }
        options = {name: value for name, value in given.items() if value is not None}
        return _own_server(), str(self.bundle), options if self.replay is None else {**options, "replay": self.replay}


@dataclass(frozen=True)
class Transformers:
    """transformers' generate, of this environment, with the checkpoint a bundle was made from: eager, fp32, with its
    KV cache."""

    model: str
    threads: int
    name: str = "transformers"
    precision: str = "fp32"
    required: bool = True

    def prepare(self) -> tuple[list[str], str, dict[str, Any]]:
        return _own_server(), self.model, {"checkpoint": True}


@dataclass(frozen=True)
class PeerContender:
    """A peer of the catalogue on the checkpoint that the bundle came from; `exit_layer` for those that exit early."""

    peer: Peer
    source: Source
    threads: int
    exit_layer: int
    required: bool = False

    @property
    def name(self) -> str:
        return self.peer.name

    @property
    def precision(self) -> str:
        return self.peer.precision

    def prepare(self) -> tuple[list[str], str, dict[str, Any]]:
        interpreter = installed(self.peer)
        model = peer_model(self.peer, self.source, interpreter)
        options = {**self.peer.options, "encoder_decoder": self.source.encoder_decoder}
        if "early_exit" in options:
            options["early_exit"] = self.exit_layer
        return peer_command(self.peer, interpreter), str(model), options


class Loaded:
    """A contender that is ready to decode. Raises PeerError where it cannot be had, or fails."""

    def __init__(self, contender: Contender, cpus: Sequence[int]) -> None:
        command, model, options = contender.prepare()
        self.name = contender.name
        self._worker = Worker(command, _variables(contender.threads))
        request = {"op": "load", "model": model, "threads": contender.threads, "cpus": list(cpus), "options": options}
        try:
            self.versions: dict[str, str] = self._worker.ask(request, LOAD_LIMIT).get("versions", {})
        except PeerError:
            self.close()
            raise

    def run(self, prompt: Sequence[int], count: int) -> Run:
        request = {"op": "generate", "prompt": list(prompt), "tokens": count}
        return Run.of(self._worker.ask(request, RUN_LIMIT))

    def close(self) -> None:
        self._worker.close()


def cpus_for(threads: int) -> list[int]:
    """Processors that every contender is held to, so that none gets more than `threads`; none where the system has no
    such thing, or where there are not as many."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    usable = sorted(os.sched_getaffinity(0))
    return usable[:threads] if threads <= len(usable) else []


def _own_server() -> list[str]:
    return [sys.executable, "-m", "freeexport.benchmark.server"]


def _variables(threads: int) -> dict[str, str]:
    # The packages may stand in a source tree that only this process's path knows.
    ours = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
    return {
        "PYTHONPATH": ours,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Libraries that see a GPU would use it.
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_CACHE_DIR": str(user_cache("peers", "torchinductor")),
    }
