"""Streams, events and memory of a CUDA device, on a stand-in that lags behind the host and watches what is used; and
calls in a runner's stream: what they wait for, what their time counts, and what a failed one leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fake_cuda import Access, FakeCuda, Misuse, Race
from hypothesis import given
from hypothesis import strategies as st

from runtime.engines.cuda.device_array import DeviceArray
from runtime.engines.cuda.driver import Cuda, CudaStream
from runtime.engines.cuda.runner import SPARE_EVENTS, CudaRunner
from runtime.errors import CapacityError, DeviceError


def device(seed: int = 0, **options: Any) -> tuple[FakeCuda, Cuda, CudaStream]:
    fake = FakeCuda(seed, **options)
    cuda = Cuda(0, fake)
    return fake, cuda, cuda.stream(urgent=True)


def upload(cuda: Cuda, array: np.ndarray, stream: Any) -> DeviceArray:
    pinned = cuda.pinned(array.nbytes)
    pinned[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
    target = cuda.empty(array.shape, array.dtype, stream)
    stream.copy(target.address, pinned.ctypes.data, array.nbytes)
    return target


def download(cuda: Cuda, array: DeviceArray) -> np.ndarray:
    stream = array.memory.stream
    dense = cuda.empty(array.shape, array.dtype, stream)
    dense.copy_from(array)
    pinned = cuda.pinned(dense.size * dense.dtype.itemsize)
    stream.copy(pinned.ctypes.data, dense.address, pinned.nbytes)
    event = cuda.event()
    stream.record(event)
    event.wait()
    return pinned.view(array.dtype).reshape(array.shape).copy()


@given(seed=st.integers(0, 10_000), data=st.data())
def test_slices_of_any_shape_are_copied_as_in_numpy(seed: int, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    parts = [
        data.draw(st.one_of(st.integers(-size, size - 1), st.builds(slice, st.integers(0, size), st.integers(0, size))))
        for size in shape[: data.draw(st.integers(0, len(shape)))]
    ]
    key = tuple(parts + [None] * data.draw(st.integers(0, 1)))
    _, cuda, stream = device(seed)
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float16)
    array, other = upload(cuda, values, stream), upload(cuda, values + 1, stream)
    assert array[key].shape == values[key].shape
    np.testing.assert_array_equal(download(cuda, array[key]), values[key])
    array[key] = other[key]
    values[key] = (values + 1)[key]
    np.testing.assert_array_equal(download(cuda, array), values)


@pytest.mark.parametrize("key", [np.s_[::2], np.s_[0, 0, 0, 0], np.s_[9], np.s_[:, -9]], ids=str)
def test_unsupported_views_of_device_memory_are_refused(key: Any) -> None:
    cuda = Cuda(0, FakeCuda())
    with pytest.raises(IndexError):
        cuda.empty((3, 4, 5), np.float32, cuda.stream(urgent=True))[key]


def test_arrays_of_different_shapes_are_not_copied() -> None:
    _, cuda, stream = device()
    array = cuda.empty((3, 4), np.float32, stream)
    for other in (cuda.empty((4, 3), np.float32, stream), cuda.empty((3, 4), np.int32, stream)):
        with pytest.raises(ValueError, match="does not fit"):
            array.copy_from(other)
    with pytest.raises(ValueError, match="cannot be read as"):
        array[:, :2].reshaped((6,))


@pytest.mark.parametrize("seed", range(20))
def test_cross_stream_copy_waits_for_the_write_of_its_source(seed: int) -> None:
    cuda = Cuda(0, FakeCuda(seed))
    one, two = cuda.stream(urgent=True), cuda.stream(urgent=False)
    values = np.arange(6, dtype=np.int64)
    there = cuda.empty((6,), np.int64, two)
    there[:] = upload(cuda, values, one)
    np.testing.assert_array_equal(download(cuda, there), values)


def test_memory_collected_while_the_device_works_is_freed_afterwards() -> None:
    """Or what comes after in the stream would be done in the middle of what is being done."""
    fake, cuda, stream = device()
    garbage, done = [cuda.empty((4,), np.uint8, stream)], list[str]()

    def work() -> None:
        garbage.clear()
        done.append("first")

    fake.enqueue(int(stream.handle), "first", [], work)
    fake.enqueue(int(stream.handle), "second", [], lambda: done.append("second"))
    stream.synchronize()
    assert done == ["first", "second"]
    assert fake.allocated == 0


def test_memory_is_not_freed_during_a_capture_but_at_the_next_allocation() -> None:
    fake, cuda, stream = device()
    garbage = [cuda.empty((64,), np.uint8, stream)]
    captures, go_on = threading.Event(), threading.Event()

    def capture() -> None:
        with cuda.undisturbed, fake.captured():
            captures.set()
            go_on.wait(10)

    thread = threading.Thread(target=capture)
    thread.start()
    captures.wait(10)
    garbage.clear()
    assert fake.allocated == 64
    go_on.set()
    thread.join()
    kept = cuda.empty((8,), np.uint8, stream)
    assert fake.allocated == kept.size


def test_threads_ignore_captures_of_other_threads() -> None:
    fake, cuda, _ = device()

    def other() -> int:
        with pytest.raises(Misuse, match="while another thread captures"):
            fake.cudaMemGetInfo()
        return int(cuda.call("cudaMemGetInfo")[0])

    with fake.captured(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(other).result() > 0


def test_close_frees_everything_once() -> None:
    fake, cuda, stream = device()
    array, pinned = cuda.zeros((8,), np.float32, stream), cuda.pinned(8)
    stream.copy(pinned.ctypes.data, array.address, 8)
    stream.record(cuda.event())
    cuda.close()
    cuda.close()
    assert fake.allocated == 0
    assert fake.alive == (0, 0)
    del array


def test_out_of_memory_names_needed_and_free_bytes_before_allocating() -> None:
    cuda = Cuda(0, FakeCuda(free_bytes=1000))
    with pytest.raises(CapacityError, match="the KV cache needs 1001 bytes of device cuda:0, and 1000 are free"):
        cuda.require(1001, "the KV cache")
    cuda.require(1000, "the KV cache")
    with pytest.raises(CapacityError, match="cudaMalloc: cudaErrorMemoryAllocation"):
        cuda.empty((1001,), np.uint8, cuda.stream(urgent=True))


@pytest.mark.parametrize(
    ("index", "driver", "refused", "message"),
    [
        (0, 0, "InsufficientDriver", "no NVIDIA driver is loaded; install one, or choose device='cpu'"),
        (
            0,
            12040,
            "InsufficientDriver",
            r"driver supports CUDA 12.4, and cuda-python needs 13.5; .*'cuda-python==12\.\*'",
        ),
        (0, 13000, "NoDevice", "device cuda:0 does not exist: this machine has 0"),
        (1, 13000, "", "device cuda:1 does not exist: this machine has 1"),
    ],
)
def test_unusable_device_error_gives_the_reason(index: int, driver: int, refused: str, message: str) -> None:
    fake = FakeCuda(driver=driver)
    if refused:
        fake.refuse("cudaGetDeviceCount", f"cudaError{refused}")
    with pytest.raises(DeviceError, match=message):
        Cuda(index, fake)


def test_lost_device_raises_at_every_use_and_can_be_closed() -> None:
    fake, cuda, stream = device()
    event = cuda.event()
    array = cuda.zeros((8,), np.float32, stream)
    fake.refuse("cudaEventRecord", "cudaErrorInvalidValue")
    with pytest.raises(DeviceError, match="refused a call"):
        stream.record(event)
    assert event.done()
    fake.refuse("cudaEventRecord", "cudaSuccess")
    fake.lose(0)
    with pytest.raises(DeviceError, match=r"cuda:0 was lost .*cudaErrorIllegalAddress"):
        stream.record(event)
    with pytest.raises(DeviceError, match="was lost"):
        stream.synchronize()
    cuda.close()
    del array


def test_missing_cuda_python_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"needs cuda-python.*freeexport\[gpu\]"):
        Cuda(0)


class FakeCall:
    def __init__(self, enqueue: Callable[[], None], *others: CudaStream) -> None:
        self.enqueue, self.others = enqueue, others

    def finish(self) -> None:
        pass


class Streams:
    """A runner on the stream `deep`, beside `shallow`; calls of the device are logged."""

    def __init__(self) -> None:
        self.fake, self.cuda, self.shallow = device(1)
        self.deep = self.cuda.stream(urgent=False)
        self.runner = CudaRunner(None, None, self.deep, beside=True)  # type: ignore[arg-type]

    def put(self, stream: CudaStream, array: Any, writes: bool = False) -> None:
        self.fake.enqueue(int(stream.handle), "use", [Access(array.address, 32, writes)], lambda: None)


@pytest.fixture
def streams() -> Iterator[Streams]:
    made = Streams()
    yield made
    made.runner.close()
    made.cuda.close()


def test_pass_waits_for_its_inputs_but_not_for_later_steps(streams: Streams) -> None:
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


def test_pass_duration_excludes_the_wait_for_another_stream(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_failed_call_raises_when_awaited_and_returns_its_events(fails_at: str, streams: Streams) -> None:
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
