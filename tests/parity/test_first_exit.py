"""The first token exits, too: tokens, flags and deep passes against a slow reference that recomputes everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, PROMPTS, Case
from conftest import Bundles
from exit_layer_case import EXIT_LAYER, model_with_exit, with_exit_layers
from reference import Reference, assert_same_tokens, draft_decode, free_decode, replay, unlikely_goes

from runtime import GenerationResult, Session
from runtime.decoding import decoder as decoding
from runtime.engines.runner import Runner

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 16
BY_NAME = {case.name: case for case in CASES}
OWN = with_exit_layers("llama-tied")
T5, LLAMA, WINDOW = (BY_NAME[name] for name in ("t5-relu-tied", "llama-tied", "mistral-window"))
each_case = pytest.mark.parametrize("case", [T5, LLAMA, WINDOW, OWN], ids=lambda case: case.name)

Model = Callable[[Case], Any]


@pytest.fixture(scope="session")
def model(source_model: Model, checkpoint: Callable[[Case], Path]) -> Model:
    return lambda case: model_with_exit(checkpoint(case)) if case is OWN else source_model(case)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Session]:
    with Session(path, **{"slots": 1, "threads": 1, **options}) as session:
        yield session


def passes(case: Case, prompt: tuple[int, ...], reference: Reference) -> Counter[int]:
    """Sync passes: a deep call that also reads a prompt is none, but a prompt of one row is only on the stack."""
    deferred = not case.name.startswith("t5") and len(prompt) > 1
    return Counter(reference.sync_sizes[deferred:])


def around(confidences: list[float]) -> list[float]:
    """Thresholds between those of the first tokens, so that some of them exit and others do not."""
    known = sorted(confidences)
    return [(low + high) / 2 for low, high in pairwise(known) if high - low > 1e-4]


def first_confidences(session: Session) -> list[float]:
    found = [session.generate(one, threshold=1.0, output_confidence=True, max_new_tokens=1) for one in PROMPTS]
    return [one.confidence[0] or 0.0 for one in found]


@each_case
def test_tokens_flags_and_passes_are_those_of_the_reference(case: Case, bundle: Bundles, model: Model) -> None:
    whole, firsts = model(case), set()
    with opened(bundle(case, EXIT_LAYER)) as session:
        for threshold in around(first_confidences(session)):
            for prompt in PROMPTS:
                ours = session.generate(
                    prompt, threshold=threshold, first_exit=True, max_new_tokens=TOKENS, ignore_eos=True
                )
                reference = replay(whole, prompt, ours.token_ids, EXIT_LAYER, threshold, first_exit=True)
                firsts.add(ours.exited[0])
                if assert_same_tokens(ours, reference) is None:
                    assert ours.stats.sync_sizes == passes(case, prompt, reference)
                    assert ours.stats.exits == sum(reference.exited)
                    assert ours.stats.exit_rate == sum(reference.exited) / TOKENS
        slow = free_decode(whole, prompt, EXIT_LAYER, threshold, TOKENS, eos_ids=(), first_exit=True)
        assert_same_tokens(ours, slow)
    assert firsts == {True, False}


@each_case
def test_a_full_stack_forces_the_passes_of_the_reference(case: Case, bundle: Bundles, model: Model) -> None:
    whole = model(case)
    with opened(bundle(case, EXIT_LAYER)) as session:
        for max_pending in (1, 2, 3):
            options: dict[str, Any] = {"threshold": 0.0, "max_pending": max_pending, "first_exit": True}
            ours = session.generate(PROMPTS[1], max_new_tokens=TOKENS, ignore_eos=True, **options)
            reference = replay(whole, PROMPTS[1], ours.token_ids, EXIT_LAYER, 0.0, max_pending, first_exit=True)
            assert ours.exited[0] == (max_pending > 1)
            if assert_same_tokens(ours, reference) is None:
                assert ours.stats.sync_sizes == passes(case, PROMPTS[1], reference)
                assert ours.stats.forced == sum(reference.forced)


@each_case
def test_where_every_token_exits_the_deep_engine_never_runs(
    case: Case, bundle: Bundles, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Runner] = []
    run = Runner.run

    def recorded(self: Runner, call: Any) -> float:
        ran.append(self)
        return run(self, call)

    with opened(bundle(case, EXIT_LAYER)) as session:
        monkeypatch.setattr(Runner, "run", recorded)
        deep, answers = session._runners[1], []
        for mode in ("free", "shallow"):
            options: dict[str, Any] = {} if mode == "shallow" else {"threshold": 0.0, "max_pending": 16}
            ours = session.generate(
                PROMPTS[2], mode=mode, first_exit=True, max_new_tokens=15, ignore_eos=True, **options
            )
            assert all(ours.exited)
            assert ours.stats.exit_rate == 1
            assert (ours.stats.deep_seconds, ours.stats.sync_passes) == (0, 0)
            answers.append(ours)
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].confidence == answers[1].confidence
        assert ran
        assert deep not in ran
        static = session.generate(PROMPTS[2], mode="shallow", max_new_tokens=15, ignore_eos=True)
        assert not static.exited[0]
        assert deep in ran
    reference = replay(model(case), PROMPTS[2], ours.token_ids, EXIT_LAYER, -1.0, 17, first_exit=True)
    assert_same_tokens(ours, reference)


@each_case
def test_at_threshold_one_and_in_other_modes_the_tokens_are_those_of_full(case: Case, bundle: Bundles) -> None:
    with opened(bundle(case, EXIT_LAYER), first_exit=True) as session:
        for prompt in PROMPTS:
            options: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
            full = session.generate(prompt, mode="full", **options)
            plain = session.generate(prompt, threshold=1.0, **options)
            asked = session.generate(prompt, threshold=1.0, output_confidence=True, **options)
            lossless = session.generate(prompt, mode="lossless", threshold=0.2, **options)
            for one in (plain, asked, lossless):
                assert one.token_ids == full.token_ids
            assert [one.stats.first_exit for one in (full, plain, asked, lossless)] == [False, False, True, False]
            assert not any(asked.exited)


@each_case
def test_rollback_takes_back_a_first_token_as_the_reference_does(case: Case, bundle: Bundles, model: Model) -> None:
    whole, firsts, rejected = model(case), set(), 0
    with opened(bundle(case, EXIT_LAYER)) as session:
        for limit in (0.5, 3.0, 100.0):
            for prompt in PROMPTS:
                ours = session.generate(
                    prompt,
                    mode="rollback",
                    threshold=0.02,
                    rollback_threshold=limit,
                    first_exit=True,
                    max_new_tokens=TOKENS,
                    ignore_eos=True,
                )
                wanted = draft_decode(whole, prompt, EXIT_LAYER, 0.02, unlikely_goes(limit), TOKENS, first_exit=True)
                assert_same_tokens(ours, wanted)
                firsts.add(ours.exited[0])
                rejected += ours.stats.rejected
    assert firsts == {True, False}
    assert rejected


@pytest.mark.parametrize("case", [T5, LLAMA, OWN], ids=lambda case: case.name)
def test_requests_beside_each_other_give_what_each_gives_alone(
    case: Case, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some defer the deep pass over their prompts, in several pieces, others read theirs at once or never exit."""
    monkeypatch.setattr(decoding, "PREFILL_ROWS", 7)
    monkeypatch.setattr(decoding, "SHARED_PREFILL_ROWS", 3)
    path = bundle(case, EXIT_LAYER)
    with opened(path) as session:
        threshold = sorted(first_confidences(session))[1] - 1e-3
    requests: list[tuple[Any, dict[str, Any]]] = [
        (prompt, {"threshold": value, "first_exit": first, "max_new_tokens": count, "ignore_eos": True})
        for prompt in PROMPTS
        for value, first, count in ((threshold, True, 24), (0.0, True, 3), (threshold, False, 12), (1.0, True, 9))
    ]

    def key(result: GenerationResult) -> Any:
        return result.token_ids, result.exited, result.stats.exits, result.stats.sync_sizes

    with opened(path) as session:
        alone = [key(session.generate(prompt, **options)) for prompt, options in requests]
    with opened(path, slots=4) as session, ThreadPoolExecutor(len(requests)) as pool:
        for _ in range(3):
            pending = [pool.submit(session.generate, prompt, **options) for prompt, options in requests]
            assert [key(one.result()) for one in pending] == alone
    exited = [flags[0] for _, flags, *_ in alone]
    assert set(exited) == {True, False}


def test_a_deferred_prompt_in_pieces_is_read_as_in_one(
    bundle: Bundles, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tuple(int(token) for token in np.random.default_rng(1).integers(3, 200, 41))
    whole = model(LLAMA)
    for rows in (1, 2, 8, 40, 41, 512):
        monkeypatch.setattr(decoding, "PREFILL_ROWS", rows)
        with opened(bundle(LLAMA, 2)) as session:
            for threshold in (0.0, 0.05, 0.3):
                ours = session.generate(
                    prompt, threshold=threshold, first_exit=True, max_pending=4, max_new_tokens=8, ignore_eos=True
                )
                reference = replay(whole, prompt, ours.token_ids, 2, threshold, 4, first_exit=True)
                assert_same_tokens(ours, reference)


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
def test_a_slot_that_was_left_in_the_middle_begins_anew(case: Case, after: int, bundle: Bundles) -> None:
    with opened(bundle(case, EXIT_LAYER)) as session:
        options: dict[str, Any] = {"threshold": 0.0, "max_new_tokens": 12, "ignore_eos": True}
        wanted = session.generate(PROMPTS[1], mode="full", max_new_tokens=12, ignore_eos=True)
        with session.stream(PROMPTS[0], first_exit=True, **options) as stream:
            for _ in range(after):
                next(stream)
        assert stream.result.finish_reason == "cancelled"
        again = session.generate(PROMPTS[1], mode="full", max_new_tokens=12, ignore_eos=True)
        assert again.token_ids == wanted.token_ids
        stopped = session.generate(PROMPTS[0], first_exit=True, **{**options, "max_new_tokens": 1})
        assert (stopped.exited, stopped.finish_reason) == ((True,), "length")


def test_prefixes_are_reused_and_kept_where_the_deep_decoder_read_them(bundle: Bundles) -> None:
    prompt = tuple(int(token) for token in np.random.default_rng(2).integers(3, 200, 45))
    options: dict[str, Any] = {"first_exit": True, "max_new_tokens": 6, "ignore_eos": True}
    path = bundle(LLAMA, EXIT_LAYER)
    with opened(path) as session:
        wanted = [session.generate(prompt, threshold=value, **options).token_ids for value in (0.0, 0.2, 0.0)]
    with opened(path, prefix_cache_mb=4) as session:
        found = [session.generate(prompt, threshold=value, **options) for value in (0.0, 0.2, 0.0)]
    assert [one.token_ids for one in found] == wanted
    assert all(found[0].exited)
    assert not all(found[1].exited)
    # Nothing is kept of a prompt that the deep decoder did not read.
    assert [one.stats.cached_tokens for one in found] == [0, 0, 32]


def test_an_adaptive_threshold_learns_from_first_tokens(bundle: Bundles) -> None:
    path = bundle(LLAMA, EXIT_LAYER)
    learned = []
    for first_exit in (False, True):
        with opened(path, threshold="adaptive", first_exit=first_exit) as session:
            results = [session.generate(prompt, max_new_tokens=2, ignore_eos=True) for prompt in PROMPTS]
            state = session.adaptive_state()
            assert state is not None
            learned.append(state["fresh"])
            assert [one.stats.candidates for one in results] == [1 + first_exit] * len(PROMPTS)
    assert learned == [len(PROMPTS), 2 * len(PROMPTS)]
