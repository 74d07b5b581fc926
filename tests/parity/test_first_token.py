"""The first token against a slow reference that recomputes everything: an encoder-decoder decides it like any other; of
a decoder-only model it is the deep prediction after the prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, PROMPTS, Bundles, Case
from reference import assert_same_tokens, draft_decode, free_decode, replay, unlikely_goes

from runtime import GenerationResult, Session
from runtime.engines.runner import Runner

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 16
T5, LLAMA = (next(case for case in CASES if case.name == name) for name in ("t5-relu-tied", "llama-tied"))
each_case = pytest.mark.parametrize(
    ("case", "exit_layer"),
    [(case, layer) for case in (T5, LLAMA) for layer in (1, case.layers - 1)],
    ids=lambda value: getattr(value, "name", value),
)
Model = Callable[[Case], Any]


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Session]:
    with Session(path, **{"slots": 1, "threads": 1, **options}) as session:
        yield session


def around_first(session: Session) -> list[float]:
    """Thresholds below, between and above the confidences of first tokens."""
    found = [session.generate(one, threshold=1.0, output_confidence=True, max_new_tokens=1) for one in PROMPTS]
    known = sorted([0.0, 1.0, *(one.confidence[0] or 0.0 for one in found)])
    return [(low + high) / 2 for low, high in pairwise(known) if high - low > 1e-4]


@each_case
def test_tokens_flags_and_passes_are_those_of_the_reference(
    case: Case, exit_layer: int, bundle: Bundles, source_model: Model
) -> None:
    whole, firsts, predicted = source_model(case), set(), int(case is LLAMA)
    with opened(bundle(case, exit_layer)) as session:
        for threshold in around_first(session):
            for prompt in PROMPTS:
                ours = session.generate(prompt, threshold=threshold, max_new_tokens=TOKENS, ignore_eos=True)
                reference = replay(whole, prompt, ours.token_ids, exit_layer, threshold)
                firsts.add(ours.exited[0])
                if assert_same_tokens(ours, reference) is None:
                    assert ours.stats.sync_sizes == Counter(reference.sync_sizes)
                    assert ours.stats.exits == sum(reference.exited)
                    assert ours.stats.candidates == TOKENS - predicted
                    assert ours.stats.exit_rate == sum(reference.exited) / (TOKENS - predicted)
        assert_same_tokens(ours, free_decode(whole, prompt, exit_layer, threshold, TOKENS, eos_ids=()))
    assert firsts == ({False} if predicted else {True, False})


@each_case
def test_a_stack_of_one_row_forces_a_first_token_too(
    case: Case, exit_layer: int, bundle: Bundles, source_model: Model
) -> None:
    with opened(bundle(case, exit_layer)) as session:
        for max_pending in (1, 2):
            ours = session.generate(
                PROMPTS[1], threshold=0.0, max_pending=max_pending, max_new_tokens=TOKENS, ignore_eos=True
            )
            reference = replay(source_model(case), PROMPTS[1], ours.token_ids, exit_layer, 0.0, max_pending)
            assert ours.exited[0] == (case is T5 and max_pending > 1)
            if assert_same_tokens(ours, reference) is None:
                assert ours.stats.forced == sum(reference.forced)


@each_case
def test_rollback_takes_back_a_first_token_as_the_reference_does(
    case: Case, exit_layer: int, bundle: Bundles, source_model: Model
) -> None:
    firsts, rejected = set(), 0
    with opened(bundle(case, exit_layer)) as session:
        for limit in (0.5, 3.0, 100.0):
            for prompt in PROMPTS:
                options: dict[str, Any] = {"threshold": 0.02, "rollback_threshold": limit, "ignore_eos": True}
                ours = session.generate(prompt, mode="rollback", max_new_tokens=TOKENS, **options)
                keeps = unlikely_goes(limit)
                assert_same_tokens(ours, draft_decode(source_model(case), prompt, exit_layer, 0.02, keeps, TOKENS))
                firsts.add(ours.exited[0])
                rejected += ours.stats.rejected
    assert firsts == ({True, False} if case is T5 else {False})
    assert rejected


@each_case
def test_lossless_and_threshold_one_give_the_tokens_of_full(case: Case, exit_layer: int, bundle: Bundles) -> None:
    with opened(bundle(case, exit_layer)) as session:
        for prompt in PROMPTS:
            options: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
            full = session.generate(prompt, mode="full", **options)
            others = [
                session.generate(prompt, threshold=1.0, **options),
                session.generate(prompt, threshold=1.0, output_confidence=True, **options),
                session.generate(prompt, mode="lossless", threshold=0.2, **options),
                session.generate(prompt, mode="lossless", predicted_output=full.token_ids, **options),
            ]
            assert [one.token_ids for one in others] == [full.token_ids] * len(others)
            assert not any(others[1].exited)


@pytest.mark.parametrize("exit_layer", [1, T5.layers - 1])
def test_an_encoder_decoder_in_mode_shallow_never_runs_the_deep_engine(
    exit_layer: int, bundle: Bundles, source_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Runner] = []
    run = Runner.run

    def recorded(self: Runner, call: Any) -> float:
        ran.append(self)
        return run(self, call)

    with opened(bundle(T5, exit_layer)) as session:
        monkeypatch.setattr(Runner, "run", recorded)
        ours = session.generate(PROMPTS[2], mode="shallow", max_new_tokens=15, ignore_eos=True)
        free = session.generate(PROMPTS[2], threshold=0.0, max_pending=16, max_new_tokens=15, ignore_eos=True)
        assert session._runners[0] in ran
        assert session._runners[1] not in ran
    assert all(ours.exited)
    assert (ours.stats.exit_rate, ours.stats.deep_seconds, ours.stats.prefill_seconds) == (1, 0, 0)
    assert (free.token_ids, free.confidence) == (ours.token_ids, ours.confidence)
    assert_same_tokens(ours, replay(source_model(T5), PROMPTS[2], ours.token_ids, exit_layer, -1.0, 17))


def test_each_of_several_continuations_decides_its_first_token(bundle: Bundles) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_new_tokens": 6, "ignore_eos": True}
    with opened(bundle(T5, 1)) as session:
        for mode, exits in (("free", True), ("full", False)):
            found = session.generate_best(PROMPTS[0], 3, mode=mode, threshold=0.0, **options)
            assert len({one.token_ids for one in found}) == 3
            assert [one.exited[0] for one in found] == [exits] * 3
            alone = session.generate(PROMPTS[0], mode=mode, threshold=0.0, **options)
            assert alone.token_ids in [one.token_ids for one in found]


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
def test_requests_beside_each_other_give_what_each_gives_alone(case: Case, bundle: Bundles) -> None:
    path = bundle(case, 1)
    with opened(path) as session:
        threshold = around_first(session)[1]
        requests: list[tuple[Any, dict[str, Any]]] = [
            (prompt, {"threshold": value, "mode": mode, "max_new_tokens": count, "ignore_eos": True})
            for prompt in PROMPTS
            for value, mode, count in ((threshold, "free", 24), (0.0, "free", 3), (1.0, "full", 9), (0.0, "shallow", 5))
        ]

        def key(result: GenerationResult) -> Any:
            return result.token_ids, result.exited, result.stats.exits, result.stats.sync_sizes

        alone = [key(session.generate(prompt, **options)) for prompt, options in requests]
    with opened(path, slots=4) as session, ThreadPoolExecutor(len(requests)) as pool:
        for _ in range(3):
            pending = [pool.submit(session.generate, prompt, **options) for prompt, options in requests]
            assert [key(one.result()) for one in pending] == alone
    assert {flags[0] for _, flags, *_ in alone} == ({True, False} if case is T5 else {False})


@pytest.mark.parametrize(("case", "learned"), [(LLAMA, 1), (T5, 2)], ids=["decoder-only", "encoder-decoder"])
def test_an_adaptive_threshold_learns_from_first_tokens_that_may_exit(
    case: Case, learned: int, bundle: Bundles
) -> None:
    with opened(bundle(case, 1), threshold="adaptive") as session:
        for prompt in PROMPTS:
            session.generate(prompt, max_new_tokens=2, ignore_eos=True)
        assert session.adaptive_state()["fresh"] == learned * len(PROMPTS)
