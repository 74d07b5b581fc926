"""What rows wait for at the engines: which of them go next, and as how many calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.batch import Batch, grouped
from runtime.lane import Lane
from runtime.row import Row
from runtime.work import Work

# Turns that a deep pass waits for others to join it, unless half of the rows wait already.
PATIENCE = 4


class SharedCalls:
    """`batches` for each lane that runs calls of several sequences; `shallow` is the lane that goes first."""

    def __init__(self, batches: Mapping[Lane, Batch], shallow: Lane) -> None:
        self._batches, self._shallow = batches, shallow

    def choose(self, rows: Sequence[Row], turn: int) -> list[Row]:
        """Rows that wait for one lane. Shallow steps first, so that deep passes collect. Those run once half of all
        wait for one, or one has waited long: a row that waits does nothing, so waiting for all would lose more than it
        saves."""
        shallow, deep = list[Row](), list[Row]()
        for row in rows:
            if isinstance(row.waits, Work):
                (shallow if row.waits.lane is self._shallow else deep).append(row)
        waited = max((turn - row.since for row in deep), default=0)
        return deep if deep and (len(deep) >= len(shallow) or waited >= PATIENCE) else shallow

    def run(self, works: Sequence[Work], together: bool) -> dict[int, Exception]:
        """Run works of one lane, as few calls where `together`: the errors, by the id of the work."""
        shared = together and len(works) > 1 and works[0].lane in self._batches
        failed: dict[int, Exception] = {}
        for group in grouped(works) if shared else [[work] for work in works]:
            failed.update(self._call(group))
        return failed

    def _call(self, works: Sequence[Work]) -> dict[int, Exception]:
        try:
            if len(works) == 1:
                works[0].run()
            else:
                self._batches[works[0].lane].run(works)
        except Exception as error:
            if len(works) == 1:
                return {id(works[0]): error}
            # Whose fault it was shows when each runs alone: nothing has been counted as written.
            return {key: failure for work in works for key, failure in self._call([work]).items()}
        return {}
