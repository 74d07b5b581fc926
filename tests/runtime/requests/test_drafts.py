"""Drafts through a session: lossless is full, free is reproducible, and bad input is an error of its request."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, PROMPTS, VOCAB_SIZE, Bundles, Case, Model, Open, Sessions
from draft_plans import draft_exits, draft_texts
from exit_layer_case import EXIT_LAYER, with_exit_layers, with_feature
from reference import Run, assert_same_tokens, confidence_of, free_decode

from runtime import BatchError, GenerationResult, OptionError, Session
from runtime.decoding.draft_sources import Proposal
from runtime.decoding.drafts import NO_DRAFT, DraftPlan, Drafts
from runtime.decoding.response import Response

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, T5 = "llama-tied", "t5-relu-tied"
both = pytest.mark.parametrize("name", [LLAMA, T5])


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft everything that a text proposes."""
    draft_texts(monkeypatch)


def changed(tokens: tuple[int, ...], share: float = 0.1, seed: int = 0) -> list[int]:
    source = np.random.default_rng(seed)
    return [int(source.integers(3, VOCAB_SIZE)) if source.random() < share else token for token in tokens]


@both
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("drafts", ["auto", "lookup"])
def test_drafts_of_each_source_give_the_tokens_of_full(name: str, drafts: str, sessions: Sessions) -> None:
    session = sessions(name)
    for prompt in PROMPTS:
        options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
        full = session.generate(prompt, mode="full", **options)
        expected = changed(full.token_ids)
        start = 1 if name == T5 else len(prompt)
        given: dict[str, dict[str, Any]] = {
            "lookup": {},
            "predicted": {"predicted_output": expected},
            "own": {"draft_source": lambda ids, expected=expected, start=start: expected[len(ids) - start :]},
        }
        for source, more in given.items():
            ours = session.generate(prompt, mode="lossless", drafts=drafts, **options, **more)
            assert ours.token_ids == full.token_ids
            assert ours.text == full.text
            if source != "lookup":
                # What the request expects is a part of its text, too.
                texts = [counts for kind, counts in ours.stats.drafts.items() if kind != "exit"]
                assert 0 < sum(counts.accepted for counts in texts) <= sum(counts.proposed for counts in texts)
                assert ours.stats.sync_passes < 30
            assert sum(ours.exited) == ours.stats.exits
            assert [kind == "exit" for kind in ours.sources] == list(ours.exited)
            accepted = {name: counts.accepted for name, counts in ours.stats.drafts.items() if counts.accepted}
            assert Counter(ours.sources) == {**accepted, "deep": len(ours.sources) - sum(accepted.values())}
            assert 0 <= ours.stats.acceptance <= 1


CASES = [
    (BY_NAME[LLAMA], 1),
    (BY_NAME[T5], 1),
    (with_feature(LLAMA, 0), 0),
    (with_feature(LLAMA, EXIT_LAYER, "fused"), EXIT_LAYER),
    (with_exit_layers(LLAMA), EXIT_LAYER),
]


@pytest.mark.parametrize(("case", "exit_layer"), CASES, ids=["llama", "t5", "embeds", "fused", "exit-layers"])
def test_alternating_drafts_give_the_tokens_of_full_with_and_without_logits(
    case: Case, exit_layer: int, open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain tokens, drafts of the exit and drafts from text."""
    session = open_session(case, exit_layer)
    draft_exits(monkeypatch)
    expected: list[int] = []

    def plan(self: Drafts, response: Response, room: int, sequences: int = 1) -> DraftPlan:
        made = len(response.tokens)
        kind = made % 4
        if kind < 2:
            return NO_DRAFT if kind == 0 else DraftPlan(exits=min(3, room))
        tokens = response.within(expected[made : made + 2 * kind - 3][:room])
        count = len(tokens)
        return DraftPlan(Proposal("own", tokens, [0.5] * count, [("own", 0)] * count)) if tokens else NO_DRAFT

    monkeypatch.setattr(Drafts, "plan", plan)
    options: dict[str, Any] = {"max_new_tokens": 40, "threshold": 0.0, "mode": "lossless", "drafts": "exit"}
    for prompt in PROMPTS:
        full = session.generate(prompt, mode="full", max_new_tokens=40)
        expected[:] = changed(full.token_ids)
        plain, scored = (session.generate(prompt, output_logprobs=each, **options) for each in (False, True))
        assert plain.token_ids == full.token_ids
        assert (plain.text, plain.sources, plain.confidence) == (scored.text, scored.sources, scored.confidence)
        counts = [(r.stats.drafts, r.stats.rejected, r.stats.exits, r.stats.sync_sizes) for r in (plain, scored)]
        assert counts[0] == counts[1]
        assert "own" in plain.stats.drafts


# Mode free


@both
def test_free_drafts_do_not_depend_on_other_requests_or_batching(name: str, open_session: Open) -> None:
    """Which tokens are verified does not depend on times, on other requests, or on their outputs."""
    options: dict[str, Any] = {"mode": "free", "max_new_tokens": 24, "ignore_eos": True}
    with open_session(name, slots=4) as session:
        wanted = session.generate(PROMPTS[0], **{**options, "mode": "full"}).token_ids
        ways: list[dict[str, Any]] = [
            {},
            {"temperature": 0.8, "seed": 3},
            {"predicted_output": changed(wanted)},
            {"predicted_output": wanted},
        ]
        asked = [{"threshold": threshold, **way} for threshold in (0.05, 0.6) for way in ways]

        def ask(place: int) -> GenerationResult:
            return session.generate(PROMPTS[0], **asked[place], **options)

        first = [ask(place) for place in range(len(asked))]
        for prompt in PROMPTS:
            session.generate(prompt, mode="lossless", max_new_tokens=24)
        again = [ask(place) for place in reversed(range(len(asked)))][::-1]
        with ThreadPoolExecutor(8) as pool:
            together = [*pool.map(ask, range(len(asked)))]
    assert any(set(result.sources) - {"deep", "exit"} for result in first)
    for results in (again, together):
        for one, other in zip(first, results, strict=True):
            assert (one.token_ids, one.sources, one.exited) == (other.token_ids, other.sources, other.exited)


@both
@pytest.mark.parametrize("draft", [draft_exits, draft_texts])
def test_free_tokens_are_confident_exit_predictions_or_deep_predictions(
    name: str, draft: Any, sessions: Sessions, source_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft(monkeypatch)
    model = source_model(BY_NAME[name])
    session = sessions(name)
    threshold = 0.4
    verified = 0
    for prompt in PROMPTS:
        full = session.generate(prompt, mode="full", max_new_tokens=30, ignore_eos=True)
        ours = session.generate(
            prompt,
            mode="free",
            threshold=threshold,
            predicted_output=changed(full.token_ids),
            max_new_tokens=30,
            ignore_eos=True,
        )
        shallow, deep = Run(model, prompt, 2).logits(ours.token_ids[:-1])
        for place, (token, exited) in enumerate(zip(ours.token_ids, ours.exited, strict=True)):
            final = exited and confidence_of(shallow[place], VOCAB_SIZE) > threshold
            verified += exited and not final
            assert token == int((shallow if final else deep)[place].argmax())
        assert [source == "exit" for source in ours.sources] == list(ours.exited)
    assert verified or draft is draft_texts


def test_mode_free_without_text_drafts_matches_the_published_algorithm(sessions: Sessions, source_model: Model) -> None:
    model = source_model(BY_NAME[LLAMA])
    for prompt in PROMPTS:
        ours = sessions(LLAMA).generate(prompt, mode="free", drafts="exit", threshold=0.1, max_new_tokens=30)
        reference = free_decode(model, prompt, 2, 0.1, 30, expected=ours.token_ids)
        if assert_same_tokens(ours, reference) is None:
            assert ours.stats.sync_sizes == Counter(reference.sync_sizes)
        assert ours.stats.drafts == {}


# Batches, streams and options


@pytest.mark.usefixtures("eager")
def test_encoder_decoder_drafts_from_its_source_text(sessions: Sessions) -> None:
    """Its output becomes its prompt, and so the only text with the phrases that it repeats."""
    session, source, proposed = sessions(T5), list(PROMPTS[0]), 0
    options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
    for _ in range(4):
        full = session.generate(source, mode="full", **options)
        session.forget_drafts()  # otherwise the memory has this output
        ours = session.generate(source, mode="lossless", drafts="lookup", **options)
        assert ours.token_ids == full.token_ids
        source = [*full.token_ids, *source][:100]
        proposed += ours.stats.drafts["lookup"].proposed if "lookup" in ours.stats.drafts else 0
    assert proposed


@pytest.mark.usefixtures("eager")
@both
def test_drafts_of_different_lengths_share_one_engine_call(
    name: str, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter ones are padded."""
    widths = list[set[int]]()

    def together(works: Any, row_cost: float = 0.0) -> Any:
        widths.append({work.rows for work in works})
        return [works]

    monkeypatch.setattr("runtime.requests.batching.grouped", together)
    options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
    with Session(bundle(BY_NAME[name], 2), threads=1, slots=4) as session:
        wanted = [session.generate(prompt, mode="full", **options).token_ids for prompt in PROMPTS]

        def ask(number: int) -> bool:
            tokens = wanted[number % 3]
            ours = session.generate(
                PROMPTS[number % 3], mode="lossless", predicted_output=changed(tokens, 0.2, number), **options
            )
            return ours.token_ids == tokens

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(24)))
    assert any(len(rows) > 1 for rows in widths)


@pytest.mark.usefixtures("eager")
def test_streams_stop_strings_and_end_tokens_match_full(sessions: Sessions, bundle: Bundles) -> None:
    session = sessions(LLAMA)
    full = session.generate(PROMPTS[0], mode="full", max_new_tokens=40, ignore_eos=True)
    stop = full.text[10:12]
    wanted = session.generate(PROMPTS[0], mode="full", max_new_tokens=40, ignore_eos=True, stop=[stop])
    with session.stream(
        PROMPTS[0],
        mode="lossless",
        predicted_output=full.token_ids,
        max_new_tokens=40,
        ignore_eos=True,
        stop=[stop],
    ) as stream:
        text = "".join(token.text for token in stream)
    assert (text, stream.result.token_ids, stream.result.finish_reason) == (wanted.text, wanted.token_ids, "stop")
    with Session(bundle(BY_NAME["llama-untied-many-eos"], 1), threads=1, slots=1) as other:
        for prompt in PROMPTS:
            until = other.generate(prompt, mode="full", max_new_tokens=60)
            beyond = other.generate(prompt, mode="full", max_new_tokens=60, ignore_eos=True).token_ids
            ours = other.generate(prompt, mode="lossless", predicted_output=beyond, max_new_tokens=60)
            assert (ours.token_ids, ours.finish_reason) == (until.token_ids, until.finish_reason)


@pytest.mark.usefixtures("eager")
def test_processors_biases_and_log_probabilities_match_full(sessions: Sessions) -> None:
    session = sessions(LLAMA)

    def odd(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return np.where(np.arange(VOCAB_SIZE) % 2 == ids.shape[1] % 2, scores, scores - 2).astype(np.float32)

    options: dict[str, Any] = {
        "max_new_tokens": 40,
        "ignore_eos": True,
        "logits_processor": odd,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
        "presence_penalty": -0.1,
        "sequence_bias": {(7,): 1.0},
        "output_logprobs": True,
    }
    full = session.generate(PROMPTS[0], mode="full", **options)
    ours = session.generate(PROMPTS[0], mode="lossless", predicted_output=changed(full.token_ids), **options)
    assert ours.token_ids == full.token_ids
    assert ours.logprobs == pytest.approx(full.logprobs, abs=1e-4)
    assert any(counts.accepted for kind, counts in ours.stats.drafts.items() if kind != "exit")


@pytest.mark.usefixtures("eager")
def test_every_one_of_several_samples_uses_drafts(sessions: Sessions) -> None:
    session = sessions(LLAMA)
    options: dict[str, Any] = {"temperature": 0.9, "seed": 3, "max_new_tokens": 20, "ignore_eos": True}
    full = session.generate_best(PROMPTS[0], 12, mode="full", **options)
    ours = session.generate_best(
        PROMPTS[0], 12, mode="lossless", predicted_output=full[1].token_ids, drafts="lookup", **options
    )
    assert [one.token_ids for one in ours] == [one.token_ids for one in full]
    assert any(one.stats.drafts for one in ours)


def test_lossless_without_drafts_is_full(sessions: Sessions) -> None:
    ours = sessions(LLAMA).generate(PROMPTS[0], mode="lossless", drafts="none", max_new_tokens=20, ignore_eos=True)
    assert (ours.stats.mode, ours.stats.drafts, ours.stats.sync_sizes) == ("full", {}, {1: 19})


@pytest.mark.usefixtures("eager")
def test_draft_source_error_fails_only_its_request(sessions: Sessions) -> None:
    session = sessions(LLAMA)

    def broken(ids: np.ndarray) -> list[int]:
        raise KeyError("nothing retrieved")

    with pytest.raises(KeyError, match="nothing retrieved"):
        session.generate(PROMPTS[0], mode="lossless", draft_source=broken, max_new_tokens=20)
    with pytest.raises(BatchError) as caught:
        session.generate([PROMPTS[0], PROMPTS[1]], mode="lossless", draft_source=broken, max_new_tokens=20)
    assert all(isinstance(result, KeyError) for result in caught.value.results)
    bad_tokens = (None, "text", [VOCAB_SIZE], [-1], [0.5], ([VOCAB_SIZE], [0.5]))
    bad_probabilities = (([1, 2], [0.5]), ([1], [1.5]), ([1], [-0.5]), ([1], ["1"]), ([1], 0.5))
    for mode in ("lossless", "free"):
        for given in (*bad_tokens, *bad_probabilities):
            with pytest.raises(OptionError, match="draft_source returned"):
                session.generate(PROMPTS[0], mode=mode, threshold=0.3, draft_source=lambda ids, given=given: given)


@pytest.mark.usefixtures("eager")
def test_draft_source_may_return_probabilities_nothing_or_too_many_tokens(sessions: Sessions) -> None:
    session = sessions(LLAMA)
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
    full = session.generate(PROMPTS[0], mode="full", **options)
    expected = changed(full.token_ids)
    start = len(PROMPTS[0])
    sources: dict[str, Any] = {
        "likely": lambda ids: (expected[len(ids) - start :], [0.9] * 40),
        "unlikely": lambda ids: (expected[len(ids) - start :], [0.1] * 40),
        "nothing": lambda ids: [],
        "too many": lambda ids: expected[len(ids) - start :] + [7] * 1000,
    }
    for name, source in sources.items():
        session.forget_drafts()
        ours = session.generate(PROMPTS[0], mode="lossless", draft_source=source, **options)
        assert ours.token_ids == full.token_ids
        assert ("own" in ours.stats.drafts) == (name != "nothing")


@pytest.mark.usefixtures("eager")
def test_draft_source_that_calls_its_own_session_is_refused(sessions: Sessions) -> None:
    session = sessions(LLAMA)

    def nested(ids: np.ndarray) -> list[int]:
        return list(session.generate(PROMPTS[1], max_new_tokens=2).token_ids)

    with pytest.raises(OptionError):
        session.generate(PROMPTS[0], mode="lossless", draft_source=nested, max_new_tokens=20, ignore_eos=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("x" * 10_000_000, "predicted_output: it has 10000000 bytes or more, too many for the 128 tokens"),
        ([VOCAB_SIZE], "predicted_output: token id 0 of it is 288; the ids of this bundle are 0 to 287"),
        ([-1], "predicted_output: token id 0 of it is -1"),
        (["a"], "predicted_output: token id 0 of it is 'a', not an integer"),
        (5, "predicted_output is 5; give text or a list of token ids"),
        (b"abc", "predicted_output is b'abc'; give text or a list of token ids"),
        ({1: 2}, "predicted_output is {1: 2}; give text"),
        (np.zeros((2, 2)), "predicted_output"),
        ("\ud800", "predicted_output: it has a lone surrogate"),
    ],
)
def test_invalid_predicted_output_is_refused(given: Any, message: str, sessions: Sessions) -> None:
    with pytest.raises(OptionError, match=message):
        sessions(LLAMA).generate(PROMPTS[0], mode="lossless", predicted_output=given, max_new_tokens=4)


def test_predicted_output_may_be_empty_or_overlong(sessions: Sessions) -> None:
    session = sessions(LLAMA)
    full = session.generate(PROMPTS[0], mode="full", max_new_tokens=20, ignore_eos=True)
    for given in ("", [], full.text, list(full.token_ids) * 100, np.array(full.token_ids)):
        ours = session.generate(PROMPTS[0], mode="lossless", predicted_output=given, max_new_tokens=20, ignore_eos=True)
        assert ours.token_ids == full.token_ids
