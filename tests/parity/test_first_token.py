"""The first token against a slow reference that recomputes everything: an encoder-decoder decides it like any other; of
a decoder-only model it is the deep prediction after the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, PROMPTS, Bundles, Case, Model
from reference import assert_same_tokens, replay

from runtime import Session
from runtime.engines.runner import Runner

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 16
T5, LLAMA = (next(case for case in CASES if case.name == name) for name in ("t5-relu-tied", "llama-tied"))


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Session]:
    with Session(path, **{"slots": 1, "threads": 1, **options}) as session:
        yield session


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


@pytest.mark.parametrize(("case", "learned"), [(LLAMA, 1), (T5, 2)], ids=["decoder-only", "encoder-decoder"])
def test_an_adaptive_threshold_learns_from_first_tokens_that_may_exit(
    case: Case, learned: int, bundle: Bundles
) -> None:
    with opened(bundle(case, 1), threshold="adaptive") as session:
        for prompt in PROMPTS:
            session.generate(prompt, max_new_tokens=2, ignore_eos=True)
        assert session.adaptive_state()["fresh"] == learned * len(PROMPTS)
