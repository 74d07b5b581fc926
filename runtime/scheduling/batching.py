"""Which of the engine calls that tasks wait for run next, and how many of them as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from runtime.bundle.costs import Costs
from runtime.decoding.slot_call import SlotCall
from runtime.engines.runner import Runner
from runtime.scheduling.batched_call import ROW_COST, BatchedCall, grouped
from runtime.scheduling.task import Task

# Of so many deep passes those over the fewest and over the most rows tell what a further row costs, where they are so
# many times apart.
LEARNED, OUTER, APART = 64, 8, 1.5


class BatchRules(NamedTuple):
    """A deep pass runs once the share `ready` of the tasks waits for one, or one has waited `patience` turns for others
    to join it. `row_cost`: what a further row of a call costs, as a share of the first. `packed`: of deep passes,
    padding and idle rows cost nothing. Where they are not `known` to be right for this machine, they are replaced once
    enough calls were timed."""

    ready: float = 0.5
    patience: int = 4
    row_cost: float = ROW_COST
    packed: bool = False
    known: bool = True


def rules_of(costs: Costs | None) -> BatchRules:
    """The best for costs on this machine, None where they are not known, by simulation (docs/serving.md): the cheaper a
    further row, the more pays waiting for it."""
    if costs is None:
        return BatchRules(known=False)
    return _rules(max(0.0, (costs.deep_pass(8) / costs.deep_pass(1) - 1) / 7))


def _rules(row: float) -> BatchRules:
    if row < 0.08:
        return BatchRules(1.0, 8, row)
    return BatchRules(0.5, 4, row) if row < 0.2 else BatchRules(0.25, 2, row)


class BatchPolicy:
    """`batches` for each engine that runs calls of several sequences; `shallow` is the one that goes first."""

    def __init__(self, batches: Mapping[Runner, BatchedCall], shallow: Runner, rules: BatchRules) -> None:
        self._batches, self._shallow, self.rules = batches, shallow, rules
        self._timed: list[tuple[int, float]] = []

    def choose(self, tasks: Sequence[Task], turn: int) -> list[Task]:
        """Tasks that wait for one engine. Shallow steps first, so that deep passes accumulate. Those run once enough
        tasks wait for one, or one has waited long: a task that waits does nothing, so waiting for all may lose more
        than it saves."""
        shallow, deep = list[Task](), list[Task]()
        for task in tasks:
            if isinstance(task.waits, SlotCall):
                (shallow if task.waits.runner is self._shallow else deep).append(task)
        waited = max((turn - task.since for task in deep), default=0)
        enough = len(deep) >= self.rules.ready * (len(deep) + len(shallow))
        return deep if deep and (enough or waited >= self.rules.patience) else shallow

    def run(self, calls: Sequence[SlotCall], together: bool) -> Iterator[tuple[SlotCall, Exception | None]]:
        """Run calls of one engine, as few as possible where `together`: each with its error. What a call wrote is to be
        counted before the next one, in which its slots may be idle: an engine may pad idle rows behind the counted.
        """
        for group in self._grouped(calls) if together else [[call] for call in calls]:
            failed = self._call(group)
            for call in group:
                yield call, failed.get(id(call))

    def _grouped(self, calls: Sequence[SlotCall]) -> Sequence[Sequence[SlotCall]]:
        runner = calls[0].runner
        if runner not in self._batches:
            return [[call] for call in calls]
        if self.rules.packed and runner is not self._shallow:
            return [calls]
        return grouped(calls, self.rules.row_cost)

    def _call(self, calls: Sequence[SlotCall]) -> dict[int, Exception]:
        try:
            if len(calls) == 1:
                calls[0].run()
            else:
                self._batches[calls[0].runner].run(calls)
        except Exception as error:
            if len(calls) == 1:
                return {id(calls[0]): error}
            # Whose fault it was shows when each runs alone: nothing has been counted as written.
            return {key: failure for call in calls for key, failure in self._call([call]).items()}
        if not self.rules.known and calls[0].runner is not self._shallow:
            self._learn(calls)
        return {}

    def _learn(self, calls: Sequence[SlotCall]) -> None:
        """From the rows and the seconds of a deep pass: a row costs about the same, whichever sequence it is of."""
        self._timed.append((sum(call.rows for call in calls), calls[0].seconds))
        if len(self._timed) < LEARNED:
            return
        timed, self._timed = sorted(self._timed), []
        few, short = map(median, zip(*timed[:OUTER], strict=True))
        many, long = map(median, zip(*timed[-OUTER:], strict=True))
        if many >= APART * few:
            further = max(0.0, long - short) / (many - few)
            first = short - (few - 1) * further
            self.rules = _rules(min(1.0, further / first) if first > 0 else 1.0)._replace(packed=self.rules.packed)
