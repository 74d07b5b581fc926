"""What one request, its callbacks, or another process may do to the requests beside it: nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tokenizers
from checkpoints import CASES
from conftest import Bundles
from tokenizers import pre_tokenizers

from runtime import BatchError, GenerationResult, PromptError, Session

BY_NAME = {case.name: case for case in CASES}
LLAMA, T5 = "llama-tied", "t5-relu-tied"

Open = Callable[..., Session]


@pytest.fixture
def open_session(bundle: Bundles) -> Iterator[Open]:
    """Opens sessions with one thread and one slot; closes them after the test."""
    opened: list[Session] = []

    def open_(name: str = LLAMA, convert: dict[str, Any] | None = None, **options: Any) -> Session:
        path = bundle(BY_NAME[name], 1, **(convert or {}))
        opened.append(Session(path, **{"threads": 1, "slots": 1, **options}))
        return opened[-1]

    yield open_
    for session in opened:
        session.close()


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


def test_a_panic_of_the_tokenizer_is_one_prompts_error_and_hurts_nobody_else(open_session: Open) -> None:
    session = open_session()
    assert session.tokenizer is not None
    session.tokenizer._backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    prompts = ["hello", "a" * 40 + "!", "world", "a" * 40 + "!", "hello"]
    # One thread drives all of them: the other's request, and the list of which some prompts panic.
    other = Aside(lambda: session.generate("hello", max_new_tokens=100, ignore_eos=True, mode="full"))

    def listed() -> list[Any]:
        with pytest.raises(
            BatchError, match="2 of 5 prompts failed, the first of them prompt 1: PromptError"
        ) as failed:
            session.generate(prompts, max_new_tokens=8)
        return failed.value.results

    kinds = [type(result) for result in Aside(listed).result()]
    assert kinds == [GenerationResult, PromptError, GenerationResult, PromptError, GenerationResult]
    assert other.result().stats.tokens == 100

    async def both_kinds() -> None:
        with pytest.raises(BatchError, match="2 of 5"):
            await session.agenerate(prompts, max_new_tokens=8)
        with pytest.raises(PromptError):
            await session.agenerate(prompts[1])

    asyncio.run(asyncio.wait_for(both_kinds(), 60))


def test_an_interruption_while_prompts_are_read_leaves_no_list_waiting(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session()
    row = session._intake.row

    def interrupted(given: Any, cancel: Any, began: Any, prompt: Any) -> Any:
        if prompt == [99]:
            raise KeyboardInterrupt
        return row(given, cancel, began, prompt)

    monkeypatch.setattr(session._intake, "row", interrupted)

    def listed() -> list[Any]:
        with pytest.raises(KeyboardInterrupt):
            session.generate([[1], [99], [2]], max_new_tokens=4)
        return [session.generate([1], max_new_tokens=4)]

    assert len(Aside(listed).result()) == 1

    async def main() -> None:
        await session.agenerate([[1], [99], [2]], max_new_tokens=4)

    with pytest.raises(BatchError, match="interrupted by KeyboardInterrupt") as failed:
        asyncio.run(asyncio.wait_for(main(), 60))
    kinds = [type(result).__name__ for result in failed.value.results]
    assert kinds == ["GenerationResult", "EngineError", "GenerationResult"]
