"""The scheduler with engines that compute hashes of what their caches hold: any mix-up of rows changes tokens."""

from __future__ import annotations

import itertools
import math
import threading
import time
import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from draft_plans import LongestExits
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_runner import ThreadRunner

from runtime import OptionError, QueueFullError
from runtime.bundle.costs import Costs
from runtime.decoding import loops as decode
from runtime.decoding.decoder import Decoder
from runtime.decoding.overlapping import OverlappingDecoder
from runtime.decoding.prediction import Prediction
from runtime.decoding.response import Response
from runtime.decoding.slot_call import AT_ONCE, SlotCall, Waiting, alone
from runtime.engines.cross_cache import CrossCache
from runtime.engines.kv_cache import KVCache
from runtime.engines.runner import Runner
from runtime.errors import EngineError
from runtime.result import Token
from runtime.scheduling.batched_call import BatchedCall, grouped
from runtime.scheduling.batching import LEARNED, BatchPolicy, BatchRules, rules_of
from runtime.scheduling.leader import Leader
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.task import Task

WIDTH, VOCABULARY, ROWS, MAX_PENDING = 2, 90, 96, 8
POISON = 99  # a token that makes every call fail that reads it


@dataclass
class HashingEngine:
    """Keeps the contract to the letter: what lies behind the valid rows, and what is returned for padding, is junk.
    `calls` are the rows that each call was for."""

    name: str
    cache: KVCache
    calls: list[list[int]]

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


def slot_of(view: np.ndarray, lengths: np.ndarray) -> int:
    """Where in a cache a call's rows begin: its lengths are a view of the cache's own."""
    start, whole = (array.__array_interface__["data"][0] for array in (view, lengths))
    return (start - whole) // lengths.itemsize


def hash_of(caches: list[np.ndarray], row: int, length: int) -> int:
    """Of all that a row of every cache holds; the caches must agree."""
    contents = {cache[row, 0, :length, 0].tobytes() for cache in caches}
    assert len(contents) == 1
    return zlib.crc32(contents.pop())


class Machine:
    """A scheduler over hashing engines."""

    def __init__(self, slots: int, queue: int = 100, beside: bool = False) -> None:
        self.calls: dict[str, list[list[int]]] = {"shallow": [], "deep": []}
        runners = []
        for name, layers in (("shallow", range(2)), ("deep", range(2, 4))):
            cache = KVCache(layers, slots, 1, ROWS + MAX_PENDING, 1, np.float32)
            engine = HashingEngine(name, cache, self.calls[name])
            runner = ThreadRunner if beside and name == "deep" else Runner
            runners.append(runner(engine, cache))  # type: ignore[arg-type]
        self.runners = runners
        kind = OverlappingDecoder if beside else Decoder
        self.decoders = [kind(runners[0], runners[1], slot, WIDTH, VOCABULARY, MAX_PENDING) for slot in range(slots)]
        cross = CrossCache(slots)
        batches = {runner: BatchedCall(runner, cross, WIDTH, VOCABULARY) for runner in runners}
        self.scheduler = Scheduler(self.decoders, batches, cross, queue)

    def check_empty(self) -> None:
        assert self.scheduler.empty
        assert sorted(decoder.slot for decoder in self.scheduler._free) == list(range(len(self.decoders)))
        for runner in self.runners:
            assert not runner.cache.lengths.any()


class Turns:
    """Ready after as many turns: lets a test stop a driver anywhere."""

    def __init__(self, count: int) -> None:
        self.left = count + 1  # asked once before the first turn, and once after the last

    def ready(self, whole: bool) -> bool:
        self.left -= 1
        return self.left < 0


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
        if self.mode == "full":
            return (yield from decode.full(decoder, output))
        if self.mode == "free":
            return (yield from decode.free(decoder, output, self.threshold, self.max_pending, 2))
        if self.mode == "rollback":
            return (yield from decode.rollback(decoder, output, self.threshold, self.max_pending, 2.0))
        return (yield from decode.lossless(decoder, output, self.threshold, self.max_pending, LongestExits()))

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


def test_a_long_prompt_is_read_in_smaller_pieces_while_others_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.decoding.decoder.PREFILL_ROWS", 6)
    monkeypatch.setattr("runtime.decoding.decoder.SHARED_PREFILL_ROWS", 2)
    machine = Machine(2)
    first, late = (Task(Ask(tuple(range(12)), "full", 14).run) for _ in range(2))
    machine.scheduler.join(first)
    machine.scheduler.wait(Turns(4), whole=True)
    assert [max(call) for call in machine.calls["shallow"] if max(call) > 1] == [6, 6]
    machine.calls["shallow"].clear()
    machine.scheduler.join(late)
    machine.scheduler.wait(late, whole=True)
    sizes = [max(call) for call in machine.calls["shallow"]]
    pieces = [place for place, size in enumerate(sizes) if size > 1]
    assert [sizes[place] for place in pieces] == [2] * 6
    # A token of the other needs two engine calls: it waits for two pieces at most.
    assert all(later - earlier > 2 for earlier, later in zip(pieces, pieces[2:], strict=False))
    assert [list(task.tokens) for task in (first, late)] == [Ask(tuple(range(12)), "full", 14).alone()[0]] * 2


@pytest.mark.parametrize("mode", ["full", "free"])
def test_a_request_that_is_alone_runs_its_calls_itself_until_another_joins(mode: str) -> None:
    machine, ask, late = Machine(2), Ask((1, 2, 3), mode, 12), Ask((4,), mode, 12)
    first, second = Task(ask.run), Task(late.run)
    machine.scheduler.join(first)
    for _ in range(3):  # token by token, as one reads a stream
        machine.scheduler.wait(first, whole=False)
        came = [first.tokens.popleft()]
    assert (list(first.tokens), first.waits) == ([], AT_ONCE)
    machine.scheduler.join(second)
    machine.scheduler.wait(first, whole=True)
    machine.scheduler.wait(second, whole=True)
    assert any(len(call) > 1 for call in machine.calls["shallow"])
    assert [*came, *first.tokens] == ask.alone()[0][2:]
    assert list(second.tokens) == late.alone()[0]
    machine.check_empty()


@pytest.mark.parametrize("mode", ["full", "free"])
def test_an_engine_that_fails_ends_the_request_that_is_alone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, ask = Machine(1), Ask((1, 2, 3), mode, 12)
    run, numbers = machine.runners[1].run, itertools.count()

    def failing(call: Any) -> float:
        if next(numbers) == 2:
            raise ZeroDivisionError
        return run(call)

    monkeypatch.setattr(machine.runners[1], "run", failing)
    row = Task(ask.run)
    machine.scheduler.join(row)
    machine.scheduler.wait(row, whole=True)
    assert isinstance(row.error, ZeroDivisionError)
    assert 0 < len(row.tokens) < 12
    assert list(row.tokens) == ask.alone()[0][: len(row.tokens)]
    machine.check_empty()


asks = st.builds(
    Ask,
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12).map(tuple),
    mode=st.sampled_from(["free", "full", "rollback", "lossless"]),
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
@settings(max_examples=100)
def test_rows_are_what_they_are_alone_whatever_comes_and_goes_beside_them(
    beside: bool, slots: int, arrivals: list[tuple[Ask, int, int | None]], borrow: bool
) -> None:
    machine = Machine(slots, beside=beside)
    scheduler, turn = machine.scheduler, 0
    rows: list[Task] = []
    leaving: list[tuple[int, Task]] = []

    def turns(count: int) -> None:
        nonlocal turn
        for _ in range(count):
            scheduler.wait(Turns(1), whole=True)
            turn += 1
            for when, row in leaving:
                row.abandoned = row.abandoned or when <= turn

    for ask, pause, stays in arrivals:
        rows.append(Task(ask.run))
        scheduler.join(rows[-1])
        if stays is not None:
            leaving.append((turn + stays, rows[-1]))
        turns(pause)
    if borrow and scheduler._free:
        with scheduler.borrowed() as decoder:
            assert decoder.prefill(np.arange(5), head=True)
            turns(3)
    scheduler.drain()
    machine.check_empty()
    for row, (ask, _, stays) in zip(rows, arrivals, strict=True):
        tokens, error = ask.alone()
        assert row.ended
        came = list(row.tokens)
        if stays is None:
            # What fails when it is run ahead on fails before the token before it is emitted.
            assert came == (tokens[: len(came)] if beside and error else tokens)
            assert (type(row.error).__name__ if row.error else None) == error
        else:
            assert came == tokens[: len(came)]


@given(ask=asks, late=asks, when=st.integers(0, 8))
@settings(max_examples=30)
def test_a_row_that_is_waited_for_is_the_same_alone_and_once_another_comes(ask: Ask, late: Ask, when: int) -> None:
    """Alone it runs its deep passes itself."""
    machine, tokens = Machine(2), list[Token]()
    rows = [Task(ask.run), Task(late.run)]
    machine.scheduler.join(rows[0])
    while len(tokens) < when and not rows[0].ended:
        machine.scheduler.wait(rows[0], whole=False)
        tokens += rows[0].tokens
        rows[0].tokens.clear()
    machine.scheduler.join(rows[1])
    for row in rows:
        machine.scheduler.wait(row, whole=True)
    machine.check_empty()
    came = tokens + list(rows[0].tokens), list(rows[1].tokens)
    errors = [type(row.error).__name__ if row.error else None for row in rows]
    assert list(zip(came, errors, strict=True)) == [ask.alone(), late.alone()]


def test_an_interrupt_in_a_pass_ends_no_request_that_another_thread_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, good = Machine(2), Ask((1, 2), "full", 10)
    row = Task(good.run)
    machine.scheduler.join(row)
    machine.scheduler.wait(Turns(4), whole=True)
    run = HashingCall.run

    def interrupted(call: HashingCall) -> None:
        run(call)
        if call.engine.name == "deep":
            raise KeyboardInterrupt

    monkeypatch.setattr(HashingCall, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine.scheduler.drain()
    monkeypatch.setattr(HashingCall, "run", run)
    machine.scheduler.drain()
    machine.check_empty()
    assert (list(row.tokens), row.error) == (good.alone()[0], None)


def test_rows_share_calls_and_deep_passes_collect() -> None:
    machine = Machine(8)
    rows = [Task(Ask((number,), tokens=12, threshold=0.4).run) for number in range(8)]
    for row in rows:
        machine.scheduler.join(row)
    machine.scheduler.drain()
    alone_calls = Machine(1)
    for number in range(8):
        list(alone(Ask((number,), tokens=12, threshold=0.4).run(alone_calls.decoders[0])))
    for name in ("shallow", "deep"):
        assert len(machine.calls[name]) < 0.5 * len(alone_calls.calls[name])


def test_a_row_with_a_call_of_its_own_keeps_what_that_wrote_where_it_is_idle_in_the_next() -> None:
    machine = Machine(3)
    asks = [Ask((5,), "full", 40), Ask((6,), "free", 40, 0.0, 8), Ask((7,), "full", 40)]
    rows = [Task(ask.run) for ask in asks]
    for row in rows:
        machine.scheduler.join(row)
    machine.scheduler.drain()
    assert [1, 0, 1] in machine.calls["deep"]
    assert any(len(call) == 1 and call[0] > 4 for call in machine.calls["deep"])
    assert [list(row.tokens) for row in rows] == [ask.alone()[0] for ask in asks]


def test_a_row_alone_makes_the_calls_that_it_makes_without_a_scheduler() -> None:
    machine, bare = Machine(4), Machine(4)
    machine.scheduler.join(Task(Ask((1, 2, 3), tokens=14).run))
    machine.scheduler.drain()
    list(alone(Ask((1, 2, 3), tokens=14).run(bare.decoders[0])))
    assert machine.calls == bare.calls
    assert all(len(call) == 1 for call in machine.calls["shallow"])


def test_a_sequence_knows_how_many_share_its_calls() -> None:
    machine = Machine(3)
    for number in range(3):
        machine.scheduler.join(Task(Ask((number,), tokens=8 + 6 * (number == 2), mode="full").run))
    machine.scheduler.wait(Turns(12), whole=True)
    assert [decoder.batch_size for decoder in machine.decoders] == [3, 3, 3]
    machine.scheduler.drain()
    # The longest had the engines to itself in the end.
    assert min(decoder.batch_size for decoder in machine.decoders) == 1


def test_an_engine_that_fails_for_one_row_fails_no_other() -> None:
    machine = Machine(3)
    good, bad = Ask((1, 2), tokens=10), Ask((3,), tokens=10, poisons=2)
    rows = [Task(ask.run) for ask in (good, bad, good)]
    for row in rows:
        machine.scheduler.join(row)
    machine.scheduler.drain()
    machine.check_empty()
    assert [type(row.error) for row in rows] == [type(None), AssertionError, type(None)]
    assert list(rows[0].tokens) == list(rows[2].tokens) == good.alone()[0]


def test_no_request_waits_for_long_beside_others_without_end() -> None:
    """Twenty requests, two slots: they end in the order in which they came, but for those in the slots together."""
    machine, ended = Machine(2), list[int]()
    for number in range(20):
        row = Task(Ask((number,), tokens=6, mode="full").run)
        row.told = lambda row=row, number=number: ended.append(number) if row.ended else None  # type: ignore[misc]
        machine.scheduler.join(row)
    machine.scheduler.drain()
    assert all(abs(place - number) <= 2 for place, number in enumerate(ended))


def test_a_deep_pass_is_not_kept_waiting_by_rows_that_exit_for_ever() -> None:
    machine = Machine(4)
    for number in range(3):
        machine.scheduler.join(Task(Ask((number,), tokens=60, threshold=0.0, max_pending=8).run))
    lonely = Task(Ask((50,), tokens=10, mode="full").run)
    machine.scheduler.join(lonely)
    turns = 0
    while not lonely.ended:
        machine.scheduler.wait(Turns(1), whole=True)
        turns += 1
    assert turns < 10 * 8


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    machine = Machine(1, queue=2)
    rows = [Task(Ask((1,), tokens=2).run) for _ in range(4)]
    for row in rows[:3]:
        machine.scheduler.join(row)
    with pytest.raises(QueueFullError, match="2 requests wait for a slot already; ask again later"):
        machine.scheduler.join(rows[3])
    machine.scheduler.wait(rows[0], whole=True)
    machine.scheduler.wait(Turns(1), whole=True)
    machine.scheduler.join(rows[3])
    machine.scheduler.drain()
    assert all(len(row.tokens) == 2 for row in rows)


def test_a_callback_that_asks_its_own_session_is_told_so() -> None:
    machine = Machine(2)

    def run(decoder: Decoder) -> Generator[Token | Waiting, None, None]:
        machine.scheduler.drain()
        yield None

    row = Task(run)
    machine.scheduler.join(row)
    machine.scheduler.drain()
    assert isinstance(row.error, OptionError)
    assert "callback" in str(row.error)


def test_an_interrupted_driver_leaves_the_others_sound() -> None:
    machine, good = Machine(3), Ask((1, 2), tokens=10)

    def run(decoder: Decoder) -> Generator[Token | Waiting, None, None]:
        yield None
        raise KeyboardInterrupt

    rows = [Task(good.run), Task(run)]
    for row in rows:
        machine.scheduler.join(row)
    with pytest.raises(KeyboardInterrupt):
        machine.scheduler.drain()
    machine.scheduler.drain()
    machine.check_empty()
    assert isinstance(rows[1].error, EngineError)
    assert list(rows[0].tokens) == good.alone()[0]


def test_many_threads_drive_in_turn_and_all_get_what_they_wait_for() -> None:
    machine = Machine(3)
    requests = [Ask((number % 7, number), tokens=3 + number % 9) for number in range(24)]
    outcomes: list[Any] = [None] * len(requests)

    def reader(number: int) -> None:
        row, tokens = Task(requests[number].run), list[Token]()
        machine.scheduler.join(row)
        while not row.ended or row.tokens:
            machine.scheduler.wait(row, whole=bool(number % 2))
            while row.tokens:
                tokens.append(row.tokens.popleft())
        outcomes[number] = tokens

    threads = [threading.Thread(target=reader, args=(number,), daemon=True) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == [ask.alone()[0] for ask in requests]
    machine.check_empty()


@dataclass
class Flag:
    up: bool = False

    def ready(self, whole: bool) -> bool:
        return self.up


def test_who_leaves_the_wheel_hands_it_to_one_that_still_waits() -> None:
    """One that has what it waited for would go without driving, and the others would sleep for ever."""
    wheel, flags, awake = Leader(threading.Lock()), [Flag(), Flag(), Flag()], list[int]()

    def follow(number: int) -> None:
        follower = wheel.take(flags[number], True)
        assert follower is not None
        wheel.sleep(follower)
        awake.append(number)

    assert wheel.take(Flag(), True) is None
    threads = []
    for number in range(3):
        threads.append(threading.Thread(target=follow, args=(number,), daemon=True))
        threads[-1].start()
        while len(wheel.followers) <= number:
            time.sleep(0.001)
    flags[0].up = True  # as when a sweep ends its request
    wheel.leave()
    for thread in threads[:2]:
        thread.join(5)
    assert sorted(awake) == [0, 1]
    assert len(wheel.followers) == 1


def works(*asked: tuple[int, int]) -> list[SlotCall]:
    """Slots with the rows that they want."""
    machine = Machine(16)
    runner = machine.runners[1]
    return [SlotCall(machine.decoders[slot], runner, {}, {}, rows, 1) for slot, rows in asked]


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ([(0, 1), (1, 1), (2, 1)], [3]),
        ([(0, 1), (1, 16), (2, 1), (3, 1)], [1, 3]),  # padding all to 16 rows costs more than a call
        ([(0, 1), (15, 1)], [1, 1]),  # so do fourteen idle rows
        ([(0, 8), (1, 8)], [2]),
    ],
)
def test_rows_are_grouped_where_that_costs_less(asked: list[tuple[int, int]], sizes: list[int]) -> None:
    assert sorted(len(group) for group in grouped(works(*asked))) == sizes


def test_packed_deep_passes_are_one_call_whatever_rows_they_have() -> None:
    asked = works((0, 1), (1, 16), (15, 1))
    deep, shallow = asked[0].runner, asked[0].owner._shallow
    batches = {runner: BatchedCall(runner, CrossCache(16), WIDTH, VOCABULARY) for runner in (deep, shallow)}
    sizes = [[len(group) for group in BatchPolicy(batches, shallow, BatchRules(packed=packed))._grouped(asked)]
             for packed in (True, False)]  # fmt: skip
    assert sizes == [[3], [1, 1, 1]]


def test_rows_that_cost_nothing_are_one_call_and_waited_for() -> None:
    costly, cheap = (Costs(1.0, 1.0, {1: 1.0, 8: eight}) for eight in (4.0, 1.01))
    asked = works((0, 1), (1, 16), (15, 1))
    assert len(grouped(asked, rules_of(cheap).row_cost)) == 1
    assert len(grouped(asked, rules_of(costly).row_cost)) == 3
    assert rules_of(cheap).patience > rules_of(None).patience > rules_of(costly).patience
    assert rules_of(None) == BatchRules(known=False)


class Timed:
    """A batch of which a call takes `first` seconds, and `further` for each row but the first."""

    def __init__(self, first: float, further: float) -> None:
        self.first, self.further = first, further

    def run(self, asked: Sequence[SlotCall]) -> None:
        for work in asked:
            work.seconds = self.first + (sum(work.rows for work in asked) - 1) * self.further


@pytest.mark.parametrize(("further", "patience"), [(0.01, 8), (0.1, 4), (0.5, 2)])
def test_rules_that_are_not_known_are_learned_from_calls(further: float, patience: int) -> None:
    few, many = works((0, 1), (1, 1)), works((0, 4), (1, 4))
    deep, shallow = few[0].runner, few[0].owner._shallow
    for work in many:
        work.runner = deep
    batches: dict[Any, Any] = dict.fromkeys((deep, shallow), Timed(1.0, further))
    policies = {known: BatchPolicy(batches, shallow, BatchRules(packed=True, known=known)) for known in (True, False)}
    for known, policy in policies.items():
        for turn in range(LEARNED):
            assert policy.rules.known == known
            assert [error for _, error in policy.run(few if turn % 2 else many, together=True)] == [None, None]
    assert policies[True].rules == BatchRules(packed=True)
    learned = policies[False].rules
    assert (learned.patience, learned.packed, learned.known) == (patience, True, True)
    assert learned.row_cost == pytest.approx(further)


def test_rules_are_not_learned_from_calls_of_one_size() -> None:
    asked = works((0, 1), (1, 1))
    deep, shallow = asked[0].runner, asked[0].owner._shallow
    batches: dict[Any, Any] = dict.fromkeys((deep, shallow), Timed(1.0, 0.1))
    policy = BatchPolicy(batches, shallow, BatchRules(packed=True, known=False))
    for _ in range(3 * LEARNED):
        list(policy.run(asked, together=True))
    assert policy.rules == BatchRules(packed=True, known=False)


@pytest.mark.parametrize("aside", [(5,), (0, 7, 14, 21), range(24)])
def test_requests_that_the_own_thread_drives_are_waited_for_beside_others(aside: Sequence[int]) -> None:
    """Readers token by token and of the whole, and waits that the own thread has beside them."""
    machine = Machine(3)
    requests = [Ask((number % 7, number), tokens=3 + number % 9) for number in range(24)]
    outcomes: list[Any] = [None] * len(requests)
    drivers: dict[bool, set[str]] = {True: set(), False: set()}

    def reader(number: int) -> None:
        def run(decoder: Decoder) -> Generator[Token | Waiting, None, None]:
            for item in requests[number].run(decoder):
                drivers[number in aside].add(threading.current_thread().name[:7])
                yield item

        row, tokens = Task(run, aside=number in aside), list[Token]()
        machine.scheduler.join(row)
        if number % 4 == 3:
            machine.scheduler.attend(row, True)
        while not row.ended or row.tokens:
            assert machine.scheduler.wait(row, whole=bool(number % 2), until=time.monotonic() + 30)
            while row.tokens:
                tokens.append(row.tokens.popleft())
        outcomes[number] = tokens

    for _ in range(20):
        threads = [threading.Thread(target=reader, args=(number,), daemon=True) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert outcomes == [ask.alone()[0] for ask in requests]
        outcomes = [None] * len(requests)
    machine.scheduler.drain()
    machine.check_empty()
    assert machine.scheduler._aside == 0
    assert drivers[True] == {"session"}
    machine.scheduler.release()


def test_a_thread_that_was_to_drive_and_must_not_any_more_leaves_it_to_the_own_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, entered, gate = Machine(4), threading.Event(), threading.Event()
    scheduler, sleep = machine.scheduler, Leader.sleep

    def gated(decoder: Decoder) -> Generator[Token | Waiting, None, None]:
        entered.set()
        gate.wait(20)
        yield from Ask((1,), tokens=1).run(decoder)

    first, second, third = Task(gated), Task(Ask((2,), tokens=40).run), Task(Ask((3,), tokens=40).run)
    late, joined = Task(Ask((4,), tokens=2).run, aside=True), list[Task]()

    def slept(leader: Leader, follower: Any, until: float = math.inf) -> bool:
        woken = sleep(leader, follower, until)
        if threading.current_thread() is threads[1] and not joined:
            joined.append(late)
            scheduler.join(late)  # after it was woken to drive, and before it does
        return woken

    monkeypatch.setattr(Leader, "sleep", slept)

    def others_wait(count: int) -> None:
        while len(scheduler._wheel.followers) < count:
            time.sleep(0.001)

    for row in (first, second, third):
        scheduler.join(row)
    threads = [threading.Thread(target=scheduler.wait, args=(row, True), daemon=True) for row in (first, second)]
    threads[0].start()
    assert entered.wait(20)
    threads[1].start()
    others_wait(1)
    scheduler.attend(third, True)
    others_wait(2)
    gate.set()
    threads[1].join(5)
    assert second.ended
    assert joined
    scheduler.drain()
    scheduler.release()
