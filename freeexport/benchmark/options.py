"""What a user decides about a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from freeexport.benchmark.peers.catalog import find_peer
from freeexport.measure.forced import exit_trace
from runtime.errors import OptionError
from runtime.machine.device import Device
from runtime.machine.machine import usable_cores


@dataclass(frozen=True)
class BenchOptions:
    """Meanings and defaults are those of `freeexport bench --help`. Raises OptionError for what does not go together,
    for names that are no peer, and for traces that cannot be read."""

    bundle: Path
    data: Path | None = None
    against: tuple[str, ...] = ()
    model: str | None = None
    also: tuple[Path, ...] = ()
    threshold: tuple[float, ...] = ()
    mode: tuple[str, ...] = ("free",)
    drafts: tuple[str, ...] = ()
    rollback_threshold: float | None = None
    replay: tuple[str, ...] = ()
    replay_drafts: tuple[float, ...] = ()
    tokens: int = 64
    samples: int = 4
    rounds: int = 5
    device: str = "cpu"
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        Device.parse(self.device)
        for name in ("against", "replay", "drafts"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise OptionError(f"--{name} names {max(values, key=values.count)} twice; name it once")
        for what in self.replay:
            exit_trace(what)
        for rate in self.replay_drafts:
            if not 0 <= rate <= 1:
                raise OptionError(f"--replay-drafts {rate:g} is no share of right drafts; choose one from 0 to 1")
        for threshold in self.threshold:
            if not 0 <= threshold <= 1:
                raise OptionError(f"--threshold {threshold:g} is out of range; choose one from 0 to 1")

    @property
    def source(self) -> str | None:
        """The checkpoint, as far as the options name it: also what of `against` is no peer's name."""
        return self.model or next((name for name in self.against if find_peer(name) is None), None)

    @property
    def count(self) -> int:
        """Threads of each contender."""
        return self.threads or usable_cores()
