"""How far a build has come: TensorRT reports nested phases of steps, a person wants one fraction."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Phase:
    """A phase under way: its parent's name, how many steps it has, and how many are done."""

    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The fraction of a build that is done, from its phases: never less than before."""

    def __init__(self) -> None:
        self._phases: dict[str, Phase] = {}
        self._reached = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._phases[name] = Phase(parent, max(1, steps))

    def step(self, name: str, step: int) -> float:
        phase = self._phases.get(name)
        if phase is not None:
            phase.done = max(phase.done, min(phase.steps, step + 1))
        self._reached = max(self._reached, self._fraction())
        return self._reached

    def finish(self, name: str) -> float:
        self._phases.pop(name, None)
        if not self._phases:
            self._reached = 1.0
        return self._reached

    def _fraction(self) -> float:
        """Each phase adds a share of the step of its parent that is under way."""
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        return max((self._of(name) for name in roots), default=0.0)

    def _of(self, name: str) -> float:
        phase = self._phases[name]
        inner = [self._of(child) for child, other in self._phases.items() if other.parent == name]
        return min(1.0, (phase.done + max(inner, default=0.0)) / phase.steps)


def monitor_of(trt: Any, report: Callable[[float], None]) -> Any:
    """A monitor for a build that calls `report` with the fraction that is done. What `report` raises, an interrupt
    for one, stops the build; it is kept as `error`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._phases, self._lock = Phases(), threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(lambda: self._phases.step(phase_name, step))

        def phase_finish(self, phase_name: str) -> None:
            self._tell(lambda: self._phases.finish(phase_name))

        def _tell(self, change: Callable[[], float]) -> bool:
            # An exception must not pass through TensorRT's own frames.
            try:
                with self._lock:
                    report(change())
            except BaseException as error:
                self.error = self.error or error
            return self.error is None

    return Monitor()
