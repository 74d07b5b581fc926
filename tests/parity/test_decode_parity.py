"""Token ids, exit flags and confidences of `runtime.Session` against a slow reference on Hugging Face modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from checkpoints import BY_NAME, CASES, PROMPTS, Bundles, Case, Model
from exit_layer_case import EXIT_CASES
from reference import Reference, assert_same_tokens, free_decode, replay, separating_threshold

from runtime import GenerationResult, Session

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 24
STANDARD = (
    *("t5-relu-tied", "t5-deep-decoder", "umt5", "llama-tied", "mistral-window", "qwen3", "llama-yarn-rope"),
    *(f"{name}-exit-layers" for name in ("t5-relu-tied", "umt5", "llama-tied", "mistral-window")),
)


def settings(case: Case) -> Iterator[Any]:
    """The first and last exit layer in the ort dialect, for some the last in the standard dialect."""
    for exit_layer in dict.fromkeys((case.exit_layers[0], case.exit_layers[-1])):
        yield pytest.param(case, exit_layer, "ort", id=f"{case.name}-{exit_layer}")
    if case.name in STANDARD:
        yield pytest.param(case, case.exit_layers[-1], "standard", id=f"{case.name}-standard")


each_setting = pytest.mark.parametrize(
    ("case", "exit_layer", "dialect"), [setting for case in (*CASES, *EXIT_CASES) for setting in settings(case)]
)
# Where exits are the same at every layer: the last one.
each_dialect = pytest.mark.parametrize(
    ("case", "exit_layer", "dialect"), [setting for case in CASES for setting in list(settings(case))[1:]]
)


@contextmanager
def opened(bundle: Bundles, case: Case, exit_layer: int, dialect: str) -> Iterator[Session]:
    with Session(bundle(case, exit_layer, dialect=dialect), slots=1, threads=1) as session:
        yield session


def assert_same_run(ours: GenerationResult, reference: Reference) -> None:
    """Equal tokens, flags and confidences, and where no tie got in the way also the same sync passes."""
    if assert_same_tokens(ours, reference) is not None:
        return
    stats = ours.stats
    assert stats.sync_sizes == Counter(reference.sync_sizes)
    assert stats.exits == sum(reference.exited)
    assert stats.forced == sum(reference.forced)
    assert stats.tokens == len(reference.token_ids)


PUBLISHED: dict[str, Any] = {"mode": "free", "drafts": "exit"}


@each_dialect
def test_threshold_one_and_mode_full_are_greedy_decoding(
    case: Case, exit_layer: int, dialect: str, bundle: Bundles, source_model: Model
) -> None:
    model = source_model(case)
    with opened(bundle, case, exit_layer, dialect) as session:
        for prompt in PROMPTS:
            free = session.generate(prompt, mode="free", threshold=1.0, output_confidence=True, max_new_tokens=TOKENS)
            full = session.generate(prompt, mode="full", max_new_tokens=TOKENS)
            assert full.token_ids == free.token_ids
            assert set(full.confidence) == {None}
            assert not any(full.exited + free.exited)
            assert_same_run(free, replay(model, prompt, free.token_ids, exit_layer, 1.0))
        # The last prompt once more without its ids as a guide: end of sequence and length are the reference's own.
        reference = free_decode(model, prompt, exit_layer, 1.0, TOKENS, expected=free.token_ids)
        assert_same_run(free, reference)
        assert free.finish_reason == reference.finish_reason


@each_setting
def test_exits_and_sync_passes_match_the_reference(
    case: Case, exit_layer: int, dialect: str, bundle: Bundles, source_model: Model
) -> None:
    model = source_model(case)
    with opened(bundle, case, exit_layer, dialect) as session:
        for prompt in PROMPTS:
            guide = session.generate(prompt, threshold=1.0, max_new_tokens=TOKENS, ignore_eos=True).token_ids
            threshold = separating_threshold(replay(model, prompt, guide, exit_layer, 1.0))
            ours = session.generate(prompt, threshold=threshold, **PUBLISHED, max_new_tokens=TOKENS, ignore_eos=True)
            reference = replay(model, prompt, ours.token_ids, exit_layer, threshold)
            assert any(reference.exited)
            assert any(size > 1 for size in reference.sync_sizes)
            assert_same_run(ours, reference)
        reference = free_decode(model, prompt, exit_layer, threshold, TOKENS, eos_ids=(), expected=ours.token_ids)
        assert_same_run(ours, reference)


@pytest.mark.parametrize("max_pending", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_full_stack_forces_the_sync_passes_of_the_reference(
    case: Case, max_pending: int, bundle: Bundles, source_model: Model
) -> None:
    model, prompt, exit_layer = source_model(case), PROMPTS[0], case.exit_layers[-1]
    with opened(bundle, case, exit_layer, "ort") as session:
        guide = session.generate(prompt, threshold=1.0, max_new_tokens=TOKENS, ignore_eos=True).token_ids
        threshold = separating_threshold(replay(model, prompt, guide, exit_layer, 1.0), quantile=0.1)
        ours = session.generate(
            prompt, threshold=threshold, max_pending=max_pending, **PUBLISHED, max_new_tokens=TOKENS, ignore_eos=True
        )
        reference = replay(model, prompt, ours.token_ids, exit_layer, threshold, max_pending)
    assert any(reference.forced)
    assert max(reference.sync_sizes) == max_pending
    assert_same_run(ours, reference)


@pytest.mark.parametrize("name", ["llama-untied-many-eos", "t5-gated-untied"])
def test_end_of_sequence_among_exits_ends_as_in_the_reference(name: str, bundle: Bundles, source_model: Model) -> None:
    case = BY_NAME[name]
    model = source_model(case)
    endings = set()
    with opened(bundle, case, 1, "ort") as session:
        for threshold in (0.0, 0.1, 0.3, 0.6):
            for prompt in PROMPTS:
                ours = session.generate(prompt, threshold=threshold, **PUBLISHED, max_new_tokens=48)
                reference = free_decode(model, prompt, 1, threshold, 48, expected=ours.token_ids)
                if assert_same_tokens(ours, reference) is None:
                    assert ours.finish_reason == reference.finish_reason
                    endings.add((ours.finish_reason, ours.exited[-1]))
                if ours.finish_reason == "eos":
                    assert ours.text == session.tokenizer.decode(ours.token_ids[:-1])
    assert ("eos", True) in endings


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verification_passes_in_fp32(case: Case, bundle: Bundles, checkpoint: Callable[[Case], Any]) -> None:
    assert_verified(bundle(case, case.exit_layers[-1]), checkpoint(case))


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("name", ["t5-relu-tied", "t5-deep-decoder", "llama-tied", "mistral-window", "qwen3"])
def test_verification_passes_in_fp16(
    name: str, dialect: str, bundle: Bundles, checkpoint: Callable[[Case], Any]
) -> None:
    case = BY_NAME[name]
    assert_verified(bundle(case, 1, dialect=dialect, precision="fp16"), checkpoint(case))


def assert_verified(path: Any, model: Any) -> None:
    from freeexport.verification.batches import QUICK
    from freeexport.verification.verification import failure, verify
    from runtime import Bundle

    report = verify(Bundle.open(path), str(model), extent=QUICK)
    assert report["passed"], failure(report)
    names = {check["name"] for check in report["checks"]}
    assert {"prefill", "stepping against prefill", "sync pass of 8"} <= names
    assert len(report["greedy"]["prompts"]) > 1


@each_dialect
def test_mode_shallow_exits_at_every_token(
    case: Case, exit_layer: int, dialect: str, bundle: Bundles, source_model: Model
) -> None:
    model = source_model(case)
    with opened(bundle, case, exit_layer, dialect) as session:
        ours = session.generate(PROMPTS[0], mode="shallow", max_new_tokens=TOKENS)
    reference = replay(model, PROMPTS[0], ours.token_ids, exit_layer, -1.0, max_pending=TOKENS + 1)
    assert_same_tokens(ours, reference)
    assert ours.exited == tuple(step >= reference.predicted for step in range(len(ours.token_ids)))
    assert not ours.stats.sync_sizes


# First tokens: an encoder-decoder decides its first like any other

T5, LLAMA = BY_NAME["t5-relu-tied"], BY_NAME["llama-tied"]


@pytest.mark.parametrize("exit_layer", [1, T5.layers - 1])
def test_encoder_decoder_in_mode_shallow_never_runs_the_deep_engine(
    exit_layer: int, bundle: Bundles, source_model: Model
) -> None:
    with opened(bundle, T5, exit_layer, "ort") as session:
        ours = session.generate(PROMPTS[2], mode="shallow", max_new_tokens=15, ignore_eos=True)
        options: dict[str, Any] = {"threshold": 0.0, "max_pending": 16, "max_new_tokens": 15, "ignore_eos": True}
        free = session.generate(PROMPTS[2], **PUBLISHED, **options)
    assert all(ours.exited)
    assert (ours.stats.exit_rate, ours.stats.deep_seconds, ours.stats.prefill_seconds) == (1, 0, 0)
    assert (free.token_ids, free.confidence) == (ours.token_ids, ours.confidence)
    assert_same_tokens(ours, replay(source_model(T5), PROMPTS[2], ours.token_ids, exit_layer, -1.0, 17))


def test_each_of_several_continuations_decides_its_first_token(bundle: Bundles) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_new_tokens": 6, "ignore_eos": True}
    with opened(bundle, T5, 1, "ort") as session:
        for way, exits in ((PUBLISHED, True), ({"mode": "full"}, False)):
            found = session.generate_best(PROMPTS[0], 3, threshold=0.0, **way, **options)
            assert len({one.token_ids for one in found}) == 3
            assert [one.exited[0] for one in found] == [exits] * 3
            alone = session.generate(PROMPTS[0], threshold=0.0, **way, **options)
            assert alone.token_ids in [one.token_ids for one in found]


@pytest.mark.parametrize(("case", "learned"), [(LLAMA, 1), (T5, 2)], ids=["decoder-only", "encoder-decoder"])
def test_adaptive_threshold_learns_from_first_tokens_that_can_exit(case: Case, learned: int, bundle: Bundles) -> None:
    with Session(bundle(case, 1), slots=1, threads=1, threshold="adaptive") as session:
        for prompt in PROMPTS:
            session.generate(prompt, max_new_tokens=2, ignore_eos=True)
        assert session.adaptive_state()["fresh"] == learned * len(PROMPTS)
