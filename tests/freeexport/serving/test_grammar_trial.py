"""Constraints are compiled in a process that can be ended."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from child_processes import processes_of

from freeexport.serving import grammar_trial
from freeexport.serving.errors import ApiError
from freeexport.serving.grammar_trial import GrammarTrial
from runtime import OptionError

pytest.importorskip("llguidance")

ENDLESS = "start: A\nA: /(.*a.{30}.*)/ & ~/(.*b.{30}.*)/"


def tried(bundle: Path, use: Callable[[GrammarTrial], Awaitable[None]]) -> None:
    async def main() -> None:
        trial = GrammarTrial(bundle)
        try:
            await use(trial)
        finally:
            await trial.close()

    asyncio.run(main())


def test_valid_constraints_pass_and_invalid_ones_are_reported(chat: Path) -> None:
    async def use(trial: GrammarTrial) -> None:
        await trial.check("regex", "[a-c]{3}")
        await trial.check("choice", '["yes", "n\u00f6"]')
        with pytest.raises(OptionError, match=r"regex cannot be used: .*unclosed"):
            await trial.check("regex", "(")
        with pytest.raises(OptionError, match="it may force 6,250,000 characters at once"):
            await trial.check("regex", "(((a{50}){50}){50}){50}")
        running = processes_of(grammar_trial)
        await trial.check("json_schema", '{"type": "object"}')
        assert len(running) == 1
        assert processes_of(grammar_trial) == running

    tried(chat, use)


def test_slow_compilation_is_killed_and_the_refusal_cached(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(trial: GrammarTrial) -> None:
        await trial.check("regex", "a+")
        ended = trial._process
        assert ended is not None
        monkeypatch.setattr(grammar_trial, "LATEST_SECONDS", 0.5)
        compiled: list[str] = []
        compile_ = trial._try

        async def counted(kind: str, text: str) -> str | None:
            compiled.append(kind)
            return await compile_(kind, text)

        monkeypatch.setattr(trial, "_try", counted)
        refused = [trial.check("grammar", ENDLESS) for _ in range(4)]
        for problem in await asyncio.gather(*refused, return_exceptions=True):
            assert isinstance(problem, OptionError)
            assert "takes more than 2 s to compile" in str(problem)
        assert compiled == ["grammar"]  # one of the four
        assert ended.returncode == -signal.SIGKILL  # before its limit of processor time
        await trial.check("regex", "a+")  # is remembered too
        assert processes_of(grammar_trial) == set()
        monkeypatch.undo()
        await trial.check("regex", "b+")
        assert len(processes_of(grammar_trial)) == 1

    tried(chat, use)


def test_process_ends_at_its_processor_time_limit(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(trial: GrammarTrial) -> None:
        monkeypatch.setattr(grammar_trial, "LATEST_SECONDS", 1e6)
        await trial.check("regex", "a+")
        process = trial._process
        with pytest.raises(OptionError, match="takes more than 2 s"):
            await trial.check("grammar", ENDLESS)
        assert process is not None
        assert process.returncode == -signal.SIGXCPU

    tried(chat, use)


def test_dead_process_is_replaced(chat: Path) -> None:
    async def use(trial: GrammarTrial) -> None:
        await trial.check("regex", "a+")
        (process,) = processes_of(grammar_trial)
        os.kill(process, signal.SIGKILL)
        with pytest.raises(OptionError, match="takes more than"):
            await trial.check("regex", "b+")
        await trial.check("regex", "c+")

    tried(chat, use)


def test_constraint_waits_for_others_at_most_the_time_limit(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(trial: GrammarTrial) -> None:
        monkeypatch.setattr(grammar_trial, "WAIT_SECONDS", 0.1)
        async with trial._turn:
            with pytest.raises(ApiError, match="busy with other requests") as caught:
                await trial.check("regex", "a+")
        assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})

    tried(chat, use)


def test_failed_process_start_is_an_error_that_is_not_cached(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(trial: GrammarTrial) -> None:
        with pytest.raises(ApiError, match="did not start"):
            await trial.check("regex", "a+")
        trial._bundle = chat
        monkeypatch.setattr("sys.executable", "/missing")
        with pytest.raises(ApiError, match="No such file"):
            await trial.check("regex", "a+")
        monkeypatch.undo()
        await trial.check("regex", "a+")

    tried(tmp_path, use)
