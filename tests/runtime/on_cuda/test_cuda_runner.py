"""Calls in a runner's stream: what they wait for, what their time counts, and what a failed one leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_cuda import Access, FakeCuda, Race

from runtime.cuda.driver import Cuda, Stream
from runtime.cuda.runner import SPARE_EVENTS, CudaRunner


class FakeCall:
    def __init__(self, enqueue: Callable[[], None], *others: Stream) -> None:
        self.enqueue, self.others = enqueue, others

    def finish(self) -> None:
        pass


class Streams:
    """A runner on the stream `deep`, beside `shallow`; calls of the device are logged."""

    def __init__(self) -> None:
        self.fake = FakeCuda(1)
        self.cuda = Cuda(0, self.fake)
        self.shallow, self.deep = self.cuda.stream(urgent=True), self.cuda.stream(urgent=False)
        self.runner = CudaRunner(None, None, self.deep, beside=True)  # type: ignore[arg-type]

    def put(self, stream: Stream, array: Any, writes: bool = False) -> None:
        self.fake.enqueue(int(stream.handle), "use", [Access(array.address, 32, writes)], lambda: None)


@pytest.fixture
def streams() -> Iterator[Streams]:
    made = Streams()
    yield made
    made.runner.close()
    made.cuda.close()


def test_a_pass_waits_for_its_inputs_and_not_for_steps_after_it_was_submitted(streams: Streams) -> None:
    stack, later = (streams.cuda.empty((8,), np.float32, streams.shallow) for _ in range(2))
    go_on = threading.Event()
    streams.runner._thread.submit(go_on.wait, 10)  # the thread is late
    streams.put(streams.shallow, stack, writes=True)
    event = streams.runner.submit(FakeCall(lambda: streams.put(streams.deep, stack), streams.shallow))
    streams.put(streams.shallow, later, writes=True)
    go_on.set()
    event.wait()
    with pytest.raises(Race):
        streams.put(streams.deep, later)


def test_seconds_of_a_pass_leave_out_its_wait_for_another_stream(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("cudaStreamWaitEvent", "cudaEventRecord"):
        real = getattr(streams.fake, name)

        def spy(*given: Any, name: str = name, real: Any = real) -> Any:
            if int(streams.deep.handle) in (given[0], given[1]):
                order.append(name)
            return real(*given)

        monkeypatch.setattr(streams.fake, name, spy)
    assert streams.runner.run(FakeCall(lambda: order.append("call"), streams.shallow)) > 0
    assert order == ["cudaStreamWaitEvent", "cudaEventRecord", "call", "cudaEventRecord"]


@pytest.mark.parametrize("fails_at", ["enqueue", "finish"])
def test_a_call_that_fails_is_done_raises_when_waited_for_and_gives_its_events_back(
    fails_at: str, streams: Streams
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug, not an EngineError")

    events = streams.fake.alive[1]
    for _ in range(3 * SPARE_EVENTS):
        call = FakeCall(lambda: None, streams.shallow)
        setattr(call, fails_at, fail)
        event = streams.runner.submit(call)
        with pytest.raises(RuntimeError, match="a bug"):
            event.wait()
        assert event.done()
    assert streams.fake.alive[1] == events
    assert streams.runner.run(FakeCall(lambda: None)) > 0
