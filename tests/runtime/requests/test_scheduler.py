"""The scheduler with engines that compute hashes of what their caches hold: any mix-up of rows changes tokens."""

from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from draft_plans import PlannedDrafts
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from recording_engine import alone
from thread_runner import ThreadRunner

from runtime import EngineError, OptionError
from runtime.adaptation.call_costs import CallCosts
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.costs import NEUTRAL, Costs
from runtime.decoding.calls import Prediction, SlotCall, Waiting
from runtime.decoding.decoder import Decoder
from runtime.decoding.drafts import ConfidentExits, Plain
from runtime.decoding.loops import Policy, decode
from runtime.decoding.overlapping import OverlappingDecoder
from runtime.decoding.response import Response
from runtime.engines.kv_cache import CrossCache, KVCache
from runtime.engines.runner import Runner
from runtime.requests import sequence as requests
from runtime.requests.batching import LEARNED, BatchedCall, BatchPolicy, grouped, rules_of
from runtime.requests.metrics import Observer
from runtime.requests.scheduler import Scheduler
from runtime.result import Token

WIDTH, VOCABULARY, ROWS, MAX_PENDING = 2, 90, 96, 8
POISON = 99  # a token that makes every call fail that reads it


@dataclass
class HashingEngine:
    """Keeps the contract to the letter: what lies behind the valid rows, and what is returned for padding, is junk.
    `calls` are the rows that each call was for; `after` runs after each."""

    name: str
    cache: KVCache
    calls: list[list[int]]
    after: Callable[[], None] = lambda: None

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> HashingCall:
        return HashingCall(self, dict(inputs), dict(outputs))


@dataclass
class HashingCall:
    engine: HashingEngine
    inputs: dict[str, Any]
    outputs: dict[str, Any]

    def rebind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self.inputs.update(inputs)
        self.outputs.update(outputs)

    def run(self) -> None:
        inputs, deep = self.inputs, self.engine.name == "deep"
        read = inputs["hidden"][:, :, 0] if deep else inputs["input_ids"]
        lengths, past = inputs["query_lengths"], inputs["past_lengths"]
        assert all(POISON not in row[:length] for row, length in zip(read, lengths, strict=True)), "poison"
        first = slot_of(past, self.engine.cache.lengths)
        caches = [array[first : first + len(read)] for array in self.engine.cache.arrays.values()]
        hashes = np.zeros(read.shape, np.int64)
        for row in range(len(read)):
            start, end = int(past[row]), int(past[row] + lengths[row])
            for cache in caches:
                cache[row, 0, start : start + read.shape[1], 0] = -7
                cache[row, 0, start:end, 0] = read[row, : lengths[row]]
            if deep:
                assert inputs["hidden"][row, : lengths[row], 1].tolist() == list(range(start, end))
            for query in range(int(lengths[row])):
                hashes[row, query] = hash_of(caches, row, start + query + 1)
        if not deep:
            self.outputs["hidden"][:] = np.nan
            self.outputs["hidden"][:, :, 0] = read
            self.outputs["hidden"][:, :, 1] = past[:, None] + np.arange(read.shape[1])
        chosen = hashes.reshape(-1)[inputs["head_rows"]]
        # The decoders disagree on a quarter of what they have read.
        self.outputs["token"][:] = (chosen + (not deep) * (chosen // 1000 % 4 == 0)) % VOCABULARY
        if deep:
            self.outputs["nll"][:] = chosen // 7 % 50 / 10
        else:
            self.outputs["confidence"][:] = chosen // 100000 % 100 / 100
        self.engine.calls.append(lengths.tolist())
        self.engine.after()


def slot_of(view: np.ndarray, lengths: np.ndarray) -> int:
    """The cache row at which a call's rows begin: its lengths are a view of the cache's own."""
    start, whole = (array.__array_interface__["data"][0] for array in (view, lengths))
    return (start - whole) // lengths.itemsize


def hash_of(caches: list[np.ndarray], row: int, length: int) -> int:
    """Hash all that a row of every cache holds; the caches must agree."""
    contents = {cache[row, 0, :length, 0].tobytes() for cache in caches}
    assert len(contents) == 1
    return zlib.crc32(contents.pop())


class ByHand(Scheduler):
    """Without a worker: the test takes the turns."""

    def _start(self) -> None:
        pass

    def drain(self) -> None:
        while not self.empty:
            self.turn()


class Machine:
    """A scheduler over hashing engines; `ask` submits what runs in its slots."""

    def __init__(self, slots: int, queue: int = 100, beside: bool = False, kind: type[Scheduler] = ByHand) -> None:
        self.calls: dict[str, list[list[int]]] = {"shallow": [], "deep": []}
        self.engines, self.runners = [], []
        for name, layers in (("shallow", range(2)), ("deep", range(2, 4))):
            cache = KVCache(layers, slots, 1, ROWS + MAX_PENDING, 1, np.float32)
            self.engines.append(HashingEngine(name, cache, self.calls[name]))
            runner = ThreadRunner if beside and name == "deep" else Runner
            self.runners.append(runner(self.engines[-1], cache))  # type: ignore[arg-type]
        decoder = OverlappingDecoder if beside else Decoder
        sizes = WIDTH, VOCABULARY, MAX_PENDING
        self.decoders = [decoder(*self.runners, slot, *sizes) for slot in range(slots)]
        cross = CrossCache(slots)
        batches = {runner: BatchedCall(runner, cross, WIDTH, VOCABULARY) for runner in self.runners}
        self.scheduler = kind(self.decoders, batches, cross, queue)

    def ask(self, ask: Ask, **fields: Any) -> Job:
        job = Job(ask)
        for name, value in fields.items():
            setattr(job, name, value)
        self.scheduler.submit(job)
        return job

    def take_turns(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.turn()

    def check_empty(self) -> None:
        assert self.scheduler.empty
        assert sorted(decoder.slot for decoder in self.scheduler._free) == list(range(len(self.decoders)))
        for runner in self.runners:
            assert not runner.cache.lengths.any()


class Job(requests.Sequence):
    """A request that decodes as an Ask says; `came` are the tokens that were delivered."""

    def __init__(self, ask: Ask) -> None:
        self.response = Response(np.array(ask.prompt, np.int64), ask.tokens)
        self.observer = Observer(None)
        self.number = self.observer.next_number()
        self.results = []
        self.token_times = []
        self._run = ask.run  # type: ignore[method-assign]
        self.came: list[Token] = []
        self.deliver = self.came.append


class Failing(Response):
    """Its callback raises at the token `fails`, or gives out poison at the token `poisons`."""

    fails = poisons = -1

    def choose(self, said: Prediction, drafts: Any = ()) -> int:
        number = self._length + len(drafts) - self.start
        if number == self.fails:
            raise ZeroDivisionError("callback")
        return POISON if number == self.poisons else super().choose(said, drafts)

    start = 0


@dataclass(frozen=True)
class Ask:
    """A request of the tests: its prompt, how it is decoded, and how it goes wrong."""

    prompt: tuple[int, ...]
    mode: str = "free"
    tokens: int = 8
    threshold: float = 0.5
    max_pending: int = 4
    fails: int = -1
    poisons: int = -1

    def steps(self, decoder: Decoder) -> Generator[Token | Waiting, None, None]:
        prompt = np.array(self.prompt, np.int64)
        first = yield from decoder.prefilling(prompt, head=True)
        output = Failing(prompt, self.tokens)
        output.start, output.fails, output.poisons = len(prompt), self.fails, self.poisons
        output.greedy = max(self.fails, self.poisons) < 0  # else it is to choose
        yield output.add(output.choose(first), False, first.confidence, first)
        policy = Policy(max_pending=self.max_pending)
        drafts = Plain()
        if self.mode == "published":
            policy = policy._replace(threshold=self.threshold, sync_every=2)
            drafts = ConfidentExits(NEVER_EXIT)
        elif self.mode == "free":
            policy = policy._replace(threshold=self.threshold)
            drafts = PlannedDrafts(threshold=self.threshold / 2)
        elif self.mode == "rollback":
            policy = policy._replace(limit=2.0)
            drafts = ConfidentExits(self.threshold)
        elif self.mode == "lossless":
            drafts = PlannedDrafts(threshold=self.threshold)
        yield from decode(decoder, output, drafts, policy)

    def run(self, decoder: Decoder) -> Generator[Token | Waiting, None, None]:
        decoder.reset()
        count = 0
        for item in self.steps(decoder):
            if isinstance(item, Token):
                count += 1
                yield item
                if count == self.tokens:
                    return
            else:
                yield item

    def alone(self) -> tuple[list[Token], str | None]:
        """The tokens, and the name of the error after them."""
        tokens: list[Token] = []
        try:
            tokens.extend(alone(self.run(Machine(1).decoders[0])))
        except (ZeroDivisionError, AssertionError) as error:
            return tokens, type(error).__name__
        return tokens, None


def test_long_prompt_is_read_in_smaller_pieces_while_others_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.decoding.decoder.PREFILL_ROWS", 6)
    monkeypatch.setattr("runtime.decoding.decoder.SHARED_PREFILL_ROWS", 2)
    machine, late, ask = Machine(2), list[Job](), Ask(tuple(range(12)), "full", 14)
    first = machine.ask(ask)
    machine.take_turns(2)
    assert [max(call) for call in machine.calls["shallow"]][:2] == [6, 6]
    machine.calls["shallow"].clear()
    machine.engines[0].after = lambda: None if late else late.append(machine.ask(ask))
    machine.scheduler.drain()
    sizes = [max(call) for call in machine.calls["shallow"]]
    pieces = [place for place, size in enumerate(sizes) if size > 1]
    assert [sizes[place] for place in pieces] == [2] * 6
    # A token of the other needs two engine calls: it waits for two pieces at most.
    assert all(later - earlier > 2 for earlier, later in zip(pieces, pieces[2:], strict=False))
    assert [job.came for job in (first, *late)] == [ask.alone()[0]] * 2


@pytest.mark.parametrize("mode", ["full", "free"])
def test_engine_failure_of_a_single_request_ends_it(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, ask = Machine(1), Ask((1, 2, 3), mode, 12)
    run, numbers = machine.runners[1].run, itertools.count()

    def failing(call: Any) -> float:
        if next(numbers) == 2:
            raise ZeroDivisionError
        return run(call)

    monkeypatch.setattr(machine.runners[1], "run", failing)
    job = machine.ask(ask)
    machine.scheduler.drain()
    assert isinstance(job.error, ZeroDivisionError)
    assert 0 < len(job.came) < 12
    assert job.came == ask.alone()[0][: len(job.came)]
    machine.check_empty()


asks = st.builds(
    Ask,
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12).map(tuple),
    mode=st.sampled_from(["published", "free", "full", "rollback", "lossless"]),
    tokens=st.integers(1, 14),
    threshold=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    max_pending=st.integers(1, MAX_PENDING),
    fails=st.sampled_from([-1, -1, -1, 0, 3]),
    poisons=st.sampled_from([-1, -1, -1, 0, 3]),
)


@pytest.mark.parametrize("beside", [False, True])
@given(
    slots=st.integers(1, 6),
    arrivals=st.lists(
        st.tuples(asks, st.integers(0, 6), st.sampled_from([None, None, None, 0, 2, 9])), min_size=1, max_size=14
    ),
    borrow=st.booleans(),
)
@tries(40)
def test_results_do_not_depend_on_concurrent_requests(
    beside: bool, slots: int, arrivals: list[tuple[Ask, int, int | None]], borrow: bool
) -> None:
    """They come and go during engine calls, as from other threads."""
    machine = Machine(slots + borrow, beside=beside)
    jobs, coming = list[Job](), list(arrivals)
    calls = itertools.count()
    leaving: list[tuple[int, Job]] = []
    due = 0

    def come(now: int) -> None:
        nonlocal due
        while coming and due + coming[0][1] <= now:
            ask, pause, stays = coming.pop(0)
            due += pause
            jobs.append(machine.ask(ask))
            if stays is not None:
                leaving.append((now + stays, jobs[-1]))
        for when, job in leaving:
            job.abandoned = job.abandoned or when <= now

    machine.engines[0].after = lambda: come(next(calls))
    with ExitStack() as stack:
        lent = stack.enter_context(machine.scheduler.borrowed()) if borrow else None
        first = lent.prefill(np.arange(5), head=True) if lent is not None else None
        while coming or not machine.scheduler.empty:
            if machine.scheduler.empty:
                due = -sum(pause for _, pause, _ in coming[:1])
                come(0)
            machine.scheduler.turn()
        if lent is not None:
            assert first == Machine(1).decoders[0].prefill(np.arange(5), head=True)
            assert lent.lengths() == (5, 5)
    machine.check_empty()
    for job, (ask, _, stays) in zip(jobs, arrivals, strict=True):
        tokens, error = ask.alone()
        assert job.ended
        if stays is None:
            assert job.came == tokens
            assert (type(job.error).__name__ if job.error else None) == error
        else:
            assert job.came == tokens[: len(job.came)]


def test_requests_share_calls_and_deep_passes_are_batched() -> None:
    machine, bare = Machine(8), Machine(1)
    asks = [Ask((number,), tokens=12, threshold=0.4) for number in range(8)]
    for ask in asks:
        machine.ask(ask)
        list(alone(ask.run(bare.decoders[0])))
    machine.scheduler.drain()
    for name in ("shallow", "deep"):
        assert len(machine.calls[name]) < 0.5 * len(bare.calls[name])


def test_request_with_its_own_call_keeps_its_cache_rows_in_later_shared_calls() -> None:
    machine = Machine(3)
    asks = [Ask((5,), "full", 40), Ask((6,), "free", 40, 0.0, 8), Ask((7,), "full", 40)]
    jobs = [machine.ask(ask) for ask in asks]
    machine.scheduler.drain()
    assert [1, 0, 1] in machine.calls["deep"]
    assert any(len(call) == 1 and call[0] > 4 for call in machine.calls["deep"])
    assert [job.came for job in jobs] == [ask.alone()[0] for ask in asks]


def test_no_request_starves_beside_a_stream_of_others() -> None:
    """Twenty requests, two slots: they end in the order in which they came, but for those in the slots together."""
    machine, ended = Machine(2), list[int]()
    for number in range(20):
        machine.ask(Ask((number,), tokens=6, mode="full"), on_end=partial(ended.append, number))
    machine.scheduler.drain()
    assert all(abs(place - number) <= 2 for place, number in enumerate(ended))


def test_deep_pass_is_not_starved_by_requests_that_always_exit() -> None:
    machine, turns = Machine(4), 0
    for number in range(3):
        machine.ask(Ask((number,), tokens=60, threshold=0.0, max_pending=8))
    lonely = machine.ask(Ask((50,), tokens=10, mode="full"))
    while not lonely.ended:
        machine.take_turns(1)
        turns += 1
    assert turns < 10 * 8


# With the worker


def test_worker_serves_many_threads_and_sleeps_when_idle() -> None:
    machine = Machine(3, queue=1000, kind=Scheduler)
    asks = [Ask((number % 7, number), tokens=3 + number % 9) for number in range(24)]
    outcomes: list[Any] = [None] * len(asks)

    def reader(number: int) -> None:
        ended = threading.Event()
        job = machine.ask(asks[number], on_end=ended.set)
        assert ended.wait(30)
        outcomes[number] = job.came

    for _ in range(6):
        threads = [threading.Thread(target=reader, args=(number,), daemon=True) for number in range(len(asks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert outcomes == [ask.alone()[0] for ask in asks]
        machine.scheduler.drain()
        machine.check_empty()
    machine.scheduler.close()
    with pytest.raises(OptionError, match="closed"):
        machine.ask(asks[0])


def test_worker_fault_ends_its_requests_but_not_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, ended = Machine(2, kind=Scheduler), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(machine.scheduler, "_resume", lambda: 1 / 0)
        failed = machine.ask(Ask((1,)), on_end=ended.set)
        assert ended.wait(30)
    assert isinstance(failed.error, EngineError)
    assert "ZeroDivisionError in the worker" in str(failed.error)
    ended.clear()
    assert machine.ask(Ask((1,)), on_end=ended.set).came is not None
    assert ended.wait(30)
    machine.scheduler.drain()
    machine.check_empty()


def works(*asked: tuple[int, int]) -> list[SlotCall]:
    """Slots with the rows that they want."""
    machine = Machine(16)
    runner = machine.runners[1]
    return [
        SlotCall(machine.decoders[slot], runner, {"input_ids": np.zeros((1, rows), np.int64)}, {}, heads=1)
        for slot, rows in asked
    ]


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ([(0, 1), (1, 1), (2, 1)], [3]),
        ([(0, 1), (1, 16), (2, 1), (3, 1)], [1, 3]),  # padding all to 16 rows costs more than a call
        ([(0, 1), (15, 1)], [1, 1]),  # so do fourteen idle rows
        ([(0, 8), (1, 8)], [2]),
    ],
)
def test_rows_are_grouped_if_that_is_cheaper(asked: list[tuple[int, int]], sizes: list[int]) -> None:
    assert sorted(len(group) for group in grouped(works(*asked), 0.1)) == sizes


def policy_of(asked: Sequence[SlotCall], batch: Any, packed: bool = False, base: Costs = NEUTRAL) -> BatchPolicy:
    deep, shallow = asked[0].runner, asked[0].owner._shallow
    return BatchPolicy(dict.fromkeys((deep, shallow), batch), shallow, CallCosts(base), packed)


def test_packed_deep_passes_of_any_rows_are_one_call() -> None:
    asked = works((0, 1), (1, 16), (15, 1))
    sizes = [[len(group) for group in policy_of(asked, None, packed)._grouped(asked)] for packed in (True, False)]
    assert sizes == [[3], [1, 1, 1]]


@pytest.mark.parametrize(("eight", "calls", "patience"), [(4.0, 3, 2), (1.7, 3, 4), (1.01, 1, 8)])
def test_free_rows_are_awaited_and_run_as_one_call(eight: float, calls: int, patience: int) -> None:
    asked = works((0, 1), (1, 16), (15, 1))
    policy = policy_of(asked, None, base=Costs(1.0, 1.0, {1: 1.0, 8: eight}))
    assert (len(policy._grouped(asked)), policy.rules.patience) == (calls, patience)


class Timed:
    """A batch of which a call takes `first` seconds, and `further` for each row but the first."""

    def __init__(self, first: float, further: float) -> None:
        self.first, self.further = first, further

    def run(self, asked: Sequence[SlotCall]) -> None:
        for work in asked:
            work.seconds = self.first + (sum(work.rows for work in asked) - 1) * self.further


@pytest.mark.parametrize(("further", "patience"), [(0.01, 8), (0.1, 4), (0.5, 2)])
def test_grouping_rules_are_learned_from_calls_of_several_sizes(further: float, patience: int) -> None:
    few, many = works((0, 1), (1, 1)), works((0, 4), (1, 4))
    for work in many:
        work.runner = few[0].runner
    policy, one_size = (policy_of(few, Timed(1.0, further), packed=True) for _ in range(2))
    for turn in range(2 * LEARNED):
        assert [error for _, error in policy.run(few if turn % 2 else many, together=True)] == [None, None]
        list(one_size.run(few, together=True))
    assert policy.rules.patience == patience
    assert policy.rules.row_cost == pytest.approx(further, rel=0.1)
    assert one_size.rules == rules_of(one_size.rules.row_cost) == rules_of(CallCosts().further_row())
