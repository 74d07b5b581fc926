"""Requests are left alone by other requests, their callbacks, and other processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import tokenizers
from checkpoints import BY_NAME, Bundles, Open
from tokenizers import pre_tokenizers

from runtime import BatchError, GenerationResult, OptionError, PromptError, Session, Stream
from runtime.engines.onnx import Call
from runtime.requests.request import request_of

ROOT = Path(__file__).parents[3]
LLAMA, T5 = "llama-tied", "t5-relu-tied"


class Aside:
    """Runs `work` in a thread of its own; `result` waits for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._results: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def result(self, seconds: float = 60.0) -> Any:
        self._thread.join(seconds)
        assert self._results, "it waits for ever"
        if isinstance(self._results[0], BaseException):
            raise self._results[0]
        return self._results[0]

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._results.append(work())
        except BaseException as error:
            self._results.append(error)


def test_tokenizer_panic_fails_only_its_prompt(open_session: Open) -> None:
    session = open_session()
    assert session.tokenizer is not None
    session.tokenizer._backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    prompts = ["hello", "a" * 40 + "!", "world", "a" * 40 + "!", "hello"]
    other = Aside(lambda: session.generate("hello", max_new_tokens=100, ignore_eos=True, mode="full"))

    def listed() -> list[Any]:
        with pytest.raises(BatchError, match="2 of 5 prompts failed, first prompt 1: PromptError") as failed:
            session.generate(prompts, max_new_tokens=8)
        return failed.value.results

    kinds = [type(result) for result in Aside(listed).result()]
    assert kinds == [GenerationResult, PromptError, GenerationResult, PromptError, GenerationResult]
    assert other.result().stats.tokens == 100

    async def listed_in_a_loop() -> None:
        with pytest.raises(BatchError, match="1 of 2"):
            await session.agenerate(prompts[:2], max_new_tokens=8)

    asyncio.run(asyncio.wait_for(listed_in_a_loop(), 60))


def test_keyboard_interrupt_while_reading_prompts_leaves_no_list_waiting(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session()
    make = request_of

    def interrupted(state: Any, prompt: Any, *arguments: Any, **keywords: Any) -> Any:
        if prompt == [99]:
            raise KeyboardInterrupt
        return make(state, prompt, *arguments, **keywords)

    monkeypatch.setattr("runtime.requests.request_factory.request_of", interrupted)

    def listed() -> list[Any]:
        with pytest.raises(KeyboardInterrupt):
            session.generate([[1], [99], [2]], max_new_tokens=4)
        return [session.generate([1], max_new_tokens=4)]

    assert len(Aside(listed).result()) == 1
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(session.agenerate([[1], [99], [2]], max_new_tokens=4))
    session._scheduler.drain()


# Callbacks that wait for their own session, or for ever

Ask = Callable[[Session], Any]


def in_a_thread(session: Session) -> Any:
    return Aside(lambda: session.generate([5], max_new_tokens=2, deadline=0.3)).result()


def in_a_loop(session: Session) -> Any:
    return asyncio.run(session.agenerate([5], max_new_tokens=2))


def in_a_thread_of_a_loop(session: Session) -> Any:
    return asyncio.run(asyncio.to_thread(session.generate, [5], max_new_tokens=2))  # type: ignore[arg-type]


REFUSED: dict[str, Ask] = {
    "generate": lambda session: session.generate([5], max_new_tokens=2),
    "a list": lambda session: session.generate([[5], [6]], max_new_tokens=2),
    "stream": lambda session: session.stream([5], max_new_tokens=2),
    "best": lambda session: session.generate_best([5], 2, temperature=1.0, max_new_tokens=2),
    "loop": in_a_loop,
    "list in a loop": lambda session: asyncio.run(session.agenerate([[5], [6]], max_new_tokens=2)),
    "thread of a loop": in_a_thread_of_a_loop,
    "slot": lambda session: session.decoder().__enter__(),
}


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("outer", ["thread", "loop"])
def test_callback_that_calls_its_own_session_is_refused(way: str, outer: str, open_session: Open) -> None:
    session = open_session(slots=4)

    def asking(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        REFUSED[way](session)
        return scores

    def ask() -> Any:
        if outer == "thread":
            return session.generate([7], max_new_tokens=3, logits_processor=asking)
        return asyncio.run(session.agenerate([7], max_new_tokens=3, logits_processor=asking))

    with pytest.raises(OptionError, match="a callback called its own session"):
        Aside(ask).result()
    assert Aside(lambda: session.generate([7], max_new_tokens=3)).result().stats.tokens == 3


def test_callback_waiting_for_a_nested_request_ends_at_that_requests_deadline(open_session: Open) -> None:
    session, inner = open_session(slots=2), list[GenerationResult]()

    def asking(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        inner.append(in_a_thread(session))
        return scores

    outer = Aside(lambda: session.generate([7], max_new_tokens=2, logits_processor=asking)).result()
    assert outer.stats.tokens == 2
    assert [(result.finish_reason, result.token_ids) for result in inner] == [("deadline", ())] * 2


class Blocking:
    """A processor that blocks at its third token, until it is let go."""

    def __init__(self) -> None:
        self.calls, self.blocks, self.free = 0, threading.Event(), threading.Event()

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.calls == 3:
            self.blocks.set()
            assert self.free.wait(60)
        return scores


@pytest.fixture
def blocking() -> Iterator[Blocking]:
    processor = Blocking()
    yield processor
    processor.free.set()


KINDS: dict[str, Callable[[Session, dict[str, Any]], list[GenerationResult]]] = {
    "one": lambda session, options: [session.generate([8], **options)],
    "list": lambda session, options: session.generate([[8], [9], [10]], **options),
    "stream": lambda session, options: [read(session.stream([8], **options))],
    "one in a loop": lambda session, options: [asyncio.run(session.agenerate([8], **options))],
    "list in a loop": lambda session, options: asyncio.run(session.agenerate([[8], [9], [10]], **options)),
}


def read(stream: Stream) -> GenerationResult:
    tokens = list(stream)
    assert tuple(token.id for token in tokens) == stream.result.token_ids
    assert "".join(token.text for token in tokens) == stream.result.text
    return stream.result


@pytest.mark.parametrize("kind", KINDS)
def test_deadlines_of_other_requests_hold_while_a_callback_blocks(
    kind: str, open_session: Open, blocking: Blocking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of a request that was decoded when the callback's request came."""
    session, stack = open_session(slots=3), ExitStack()
    whole = session.generate([8], max_new_tokens=100, ignore_eos=True)
    options: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True, "deadline": 1.0}
    run, began_early = Call.run, threading.Event()

    def slowly(call: Call) -> None:
        began_early.set()
        threading.Event().wait(0.02)
        run(call)

    patch = stack.enter_context(monkeypatch.context())
    patch.setattr(Call, "run", slowly)
    early = Aside(lambda: session.generate([8], mode="full", **options))
    assert began_early.wait(30)
    blocked = Aside(lambda: session.generate([7], max_new_tokens=5, ignore_eos=True, logits_processor=blocking))
    assert blocking.blocks.wait(30)
    began = monotonic()
    results = [*KINDS[kind](session, options), early.result()]
    assert monotonic() - began < 10, "the deadline is one second"
    assert [result.finish_reason for result in results] == ["deadline"] * len(results)
    for result in (results[0], results[-1]):
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        assert result.stats.tokens == len(result.token_ids) < 100
    stack.close()
    blocking.free.set()
    assert blocked.result().stats.tokens == 5
    assert (
        Aside(lambda: session.generate([8], max_new_tokens=100, ignore_eos=True)).result().token_ids == whole.token_ids
    )


class Slowly:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        threading.Event().wait(self._seconds)
        return scores


def test_deadline_of_a_request_holds_while_its_own_callback_blocks(open_session: Open, blocking: Blocking) -> None:
    session = open_session(draft_memory_mb=0)  # the processor is called once a token
    whole = session.generate([7], max_new_tokens=5, ignore_eos=True)
    result = Aside(
        lambda: session.generate([7], max_new_tokens=5, ignore_eos=True, logits_processor=blocking, deadline=0.5)
    ).result(20)
    assert (result.finish_reason, result.token_ids) == ("deadline", whole.token_ids[:2])
    blocking.free.set()
    assert Aside(lambda: session.generate([7], max_new_tokens=5)).result().stats.tokens == 5


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_callback_exception_reaches_only_its_caller(interruption: type[BaseException], open_session: Open) -> None:
    session = open_session(slots=2)

    def raising(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        raise interruption

    other = Aside(lambda: session.generate([8], max_new_tokens=60, ignore_eos=True, logits_processor=Slowly(0.005)))
    for prompt in ([7], [[7], [9]]):
        with pytest.raises(interruption):
            Aside(lambda prompt=prompt: session.generate(prompt, max_new_tokens=3, logits_processor=raising)).result()
    assert other.result().stats.tokens == 60


class Interrupting(Slowly):
    """Presses Ctrl-C at the fifth token, when the main thread waits."""

    _left = 5

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(ids, scores)


@pytest.mark.parametrize("prompt", [[7], [[7], [8], [9]]], ids=["one", "list"])
def test_keyboard_interrupt_cancels_only_the_requests_of_the_waiting_thread(prompt: Any, open_session: Open) -> None:
    assert threading.current_thread() is threading.main_thread()
    session, before = open_session(slots=2), signal.getsignal(signal.SIGINT)
    options: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True, "logits_processor": Slowly(0.02)}
    other = Aside(lambda: session.generate([8], **options))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            session.generate(prompt, **{**options, "max_new_tokens": 100, "logits_processor": Interrupting(0.02)})
    finally:
        signal.signal(signal.SIGINT, before)
    assert other.result().stats.tokens == 60
    session._scheduler.drain()
    assert session.metrics().finished["cancelled"] >= 1


LEAVING = """
import sys, time
from runtime import Session

def slowly(ids, scores):
    time.sleep(0.2)
    return scores

session = Session(sys.argv[1], threads=1, slots=1)
streams = [session.stream([5], max_new_tokens=100, ignore_eos=True, logits_processor=slowly) for _ in range(3)]
next(streams[0])
print(time.time())
"""


def test_abandoned_requests_do_not_block_interpreter_exit(bundle: Bundles) -> None:
    command = [sys.executable, "-c", LEAVING, str(bundle(BY_NAME[LLAMA], 1))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout) < 10, "a request takes 20 seconds"


# Forks

FORKED = """
import os, sys, threading, time
from runtime import OptionError, Session

session, stop = Session(sys.argv[1], threads=2, slots=2), threading.Event()
unread = session.stream([4], max_new_tokens=5)

def work():
    while not stop.is_set():
        session.generate([5, 6, 7], max_new_tokens=50, ignore_eos=True)

def refuses(ask):
    try:
        ask()
    except OptionError as error:
        return "before process" in str(error) and "was forked" in str(error)
    return False

def child():
    asks = [lambda: session.generate([5]), lambda: session.generate([[5]]), lambda: session.stream([5]),
            lambda: session.astream([5]), lambda: session.generate_best([5], 1, temperature=1.0),
            lambda: session.decoder().__enter__(), lambda: session.threshold, session.adaptive_state]
    wrong = sum(not refuses(ask) for ask in asks)
    unread.close()
    session.close()
    session.close(drain=True)
    with Session(sys.argv[1], threads=1, slots=1) as own:
        wrong += own.generate([5], max_new_tokens=3).stats.tokens != 3
    return wrong

threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
time.sleep(0.3)
for _ in range(6):
    pid = os.fork()
    if pid == 0:
        os._exit(child())
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
stop.set()
for thread in threads:
    thread.join()
session.generate([5], max_new_tokens=2)
session.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_use_after_fork_is_refused_with_a_remedy(bundle: Bundles) -> None:
    path = bundle(BY_NAME[LLAMA], 1)
    command = [sys.executable, "-c", FORKED, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout.split(), done.returncode) == (["0"] * 6, 0), done.stderr
