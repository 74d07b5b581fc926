"""The decode loop on real KV caches, with engines that record positions instead of computing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import pytest
from draft_plans import PlannedDrafts
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from recording_engine import (
    DEEP_TOKEN,
    LENGTH,
    SHALLOW_TOKEN,
    START,
    WIDTH,
    Recorder,
    alone,
    cached,
    decoded,
    prompt_of,
)

from runtime.adaptation.learner import RequestLabels
from runtime.bundle.beta import NEVER_EXIT
from runtime.decoding.decoder import PREFILL_ROWS, SHARED_PREFILL_ROWS, Decoder
from runtime.decoding.drafts import ConfidentExits
from runtime.decoding.loops import Policy
from runtime.engines.kv_cache import KVCache
from runtime.engines.runner import Runner
from runtime.result import Token


def decoder_of(
    trace: Sequence[float] = (),
    max_pending: int = 16,
    rows: int = 512,
    nll: Sequence[float] = (),
    agrees: Sequence[bool] = (),
) -> tuple[Decoder, Recorder, Recorder]:
    runners = []
    for name, layers in (("shallow", range(2)), ("deep", range(2, 5))):
        cache = KVCache(layers, 1, 1, rows, 1, np.float32)
        runners.append(Runner(Recorder(cache, name, trace, nll, agrees), cache))  # type: ignore[arg-type]
    decoder = Decoder(runners[0], runners[1], slot=0, hidden_size=WIDTH, vocab_size=1, max_pending=max_pending)
    return decoder, runners[0].engine, runners[1].engine  # type: ignore[return-value]


def free(decoder: Decoder, prompt: np.ndarray, threshold: float, max_pending: int) -> Iterator[Token]:
    """Decode as published."""
    policy = Policy(threshold, max_pending=max_pending)
    return alone(decoded(decoder, prompt, 400, ConfidentExits(NEVER_EXIT), policy))


def full(decoder: Decoder, prompt: np.ndarray) -> Iterator[Token]:
    return alone(decoded(decoder, prompt, 400))


confidences = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0])


@given(
    trace=st.lists(confidences, min_size=1, max_size=60),
    threshold=confidences,
    max_pending=st.integers(1, 17),
    prompt_length=st.integers(0, 5),
)
@tries(50)
def test_cache_lengths_exit_flags_and_sync_passes_hold_at_every_step(
    trace: list[float], threshold: float, max_pending: int, prompt_length: int
) -> None:
    """A prompt of no token is an encoder-decoder's: its first token is decided like the others."""
    predicted = min(1, prompt_length)
    before = max(1, prompt_length)
    prompt = prompt_of(prompt_length) if predicted else np.array(START)
    decoder, shallow, deep = decoder_of([0.0] * (before - 1) + trace, max_pending)
    steps, pending, passes, forced = list[Token](), 0, list[int](), 0
    for step in islice(free(decoder, prompt, threshold, max_pending), len(trace)):
        index, position = len(steps), before + len(steps) - 1
        assert step.confidence == np.float32(trace[index])
        sure = index >= predicted and trace[index] > threshold
        exits = sure and pending < max_pending - 1
        if index >= predicted:
            forced += sure and not exits
            passes += [] if exits else [pending + 1]
            pending = pending + 1 if exits else 0
        assert step.exited == exits
        assert step.id == position + (SHALLOW_TOKEN if exits else DEEP_TOKEN)
        steps.append(step)
        shallow_length, deep_length = decoder.lengths()
        assert decoder.stacked == pending
        assert shallow_length == deep_length + decoder.stacked == position + 1
        read = (*prompt.tolist(), *(earlier.id for earlier in steps[:-1]))
        assert cached(shallow, shallow_length) == {read}
        assert cached(deep, deep_length) == {read[:deep_length]}
    stats = decoder.stats
    assert deep.calls[predicted:] == passes
    assert sorted(stats.sync_sizes.elements()) == sorted(passes)
    assert (stats.exits, stats.forced) == (sum(step.exited for step in steps), forced)
    assert stats.sync_sizes.total() + stats.exits == sum(passes) + decoder.stacked == len(steps) - predicted
    assert max(passes, default=1) <= max_pending


def test_mode_full_runs_both_engines_per_token_without_the_shallow_head() -> None:
    decoder, shallow, deep = decoder_of()
    steps = list(islice(full(decoder, prompt_of(3)), 5))
    assert steps == [Token(DEEP_TOKEN + position, "", False, None) for position in range(2, 7)]
    assert (shallow.calls, deep.calls) == ([3, 1, 1, 1, 1], [3, 1, 1, 1, 1])
    assert (set(shallow.heads), set(deep.heads)) == ({0}, {1})
    assert decoder.stats.exits == decoder.stats.forced == 0


@pytest.mark.parametrize("length", [1, PREFILL_ROWS - 1, PREFILL_ROWS, PREFILL_ROWS + 1, 2 * PREFILL_ROWS + 3])
def test_long_prompt_is_read_in_pieces_with_the_head_on_its_last_row(length: int) -> None:
    trace = np.linspace(0, 1, length, dtype=np.float32)
    decoder, shallow, deep = decoder_of(trace.tolist(), rows=2048)
    said = decoder.prefill(prompt_of(length), head=True)
    assert (said.token, said.confidence) == (DEEP_TOKEN + length - 1, trace[-1])
    assert sum(shallow.calls) == sum(deep.calls) == length
    assert max(shallow.calls) <= PREFILL_ROWS
    assert sum(shallow.heads) == sum(deep.heads) == 1
    assert decoder.lengths() == (length, length)
    assert cached(deep, length) == {tuple(prompt_of(length).tolist())}


@pytest.mark.parametrize(
    ("fixed", "each", "least", "most"),
    [(0.01, 0.001, 0.042, 0.058), (0.05, 0.01, 0.21, 0.21), (0.001, 1e-5, 0.002, 0.003)],
    ids=["as many rows as fit", "at least 16", "at most 128"],
)
def test_prefill_pieces_delay_other_requests_by_a_bounded_time(
    fixed: float, each: float, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is one in which a piece takes `fixed` seconds, and `each` for a row."""
    decoder, shallow, deep = decoder_of(rows=2048)
    decoder.others = True

    def clock() -> float:
        return fixed / 2 * (len(shallow.calls) + len(deep.calls)) + each / 2 * (sum(shallow.calls) + sum(deep.calls))

    monkeypatch.setattr("runtime.decoding.decoder.perf_counter", clock)
    for length in (40, 16, 20, 1500):  # the end of a prompt may be a single row, and says little
        shallow.calls.clear()
        decoder.reset()
        decoder.prefill(prompt_of(length), head=False)
    assert sum(shallow.calls) == 1500
    settled = [fixed + each * rows for rows in shallow.calls[3:-1]]
    assert len(settled) > 5
    assert least <= min(settled) <= max(settled) <= most + 1e-9
    assert max(shallow.calls) <= SHARED_PREFILL_ROWS


# Drafts

traces = st.lists(confidences, min_size=LENGTH, max_size=LENGTH)
flags = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)


def drafted(
    tokens: Iterator[Token], decoder: Decoder, shallow: Recorder, deep: Recorder, prompt: np.ndarray
) -> list[Token]:
    """Return the tokens. After each, both caches must hold only final tokens."""
    steps = list[Token]()
    for step in tokens:
        steps.append(step)
        final = (*prompt.tolist(), *(earlier.id for earlier in steps))
        shallow_length, deep_length = decoder.lengths()
        assert shallow_length == deep_length + decoder.stacked
        for engine in (shallow, deep):
            # Accepted tokens of a draft are read before they are added to the output.
            ((*rows,),) = cached(engine, min(deep_length, len(final)))
            assert tuple(rows) == final[: len(rows)]
    assert sum(step.exited for step in steps) == decoder.stats.exits
    return steps


@given(
    trace=traces,
    nll=st.lists(st.floats(0, 4, width=32), min_size=LENGTH, max_size=LENGTH),
    threshold=confidences,
    limit=st.floats(0, 4, width=32),
    max_pending=st.integers(1, 8),
    tokens=st.integers(1, 40),
    starts=st.booleans(),
)
@tries(50)
def test_rollback_accepts_exits_before_the_first_unlikely_one(
    trace: list[float],
    nll: list[float],
    threshold: float,
    limit: float,
    max_pending: int,
    tokens: int,
    starts: bool,
) -> None:
    decoder, shallow, deep = decoder_of(trace, max_pending, nll=nll)
    prompt, predicted = (np.array(START), 0) if starts else (prompt_of(3), 1)
    policy = Policy(limit=limit, max_pending=max_pending)
    loop = alone(decoded(decoder, prompt, tokens, ConfidentExits(threshold), policy))
    pending = 0
    for index, step in enumerate(drafted(loop, decoder, shallow, deep, prompt)):
        position = index + len(prompt) - 1
        confident = index >= predicted and trace[position] > threshold
        # The last token of the request is verified even if it fills the stack.
        room = pending < max_pending - 1
        assert step.exited == (confident and room and nll[position] <= limit)
        assert step.id == position + (SHALLOW_TOKEN if step.exited else DEEP_TOKEN)
        assert step.confidence == np.float32(trace[position])
        pending = pending + 1 if step.exited else 0
    assert max(deep.calls[predicted:], default=1) <= max_pending


def test_drafts_stop_at_the_token_limit_of_the_request() -> None:
    decoder, shallow, _ = decoder_of([1.0] * 20)
    list(alone(decoded(decoder, prompt_of(3), 5, ConfidentExits(0.5), Policy(limit=1.0))))
    assert shallow.calls == [3, 1, 1, 1, 1]  # the prompt, then one step for each of four drafts


plans = st.lists(st.integers(0, 7), min_size=1, max_size=20)


@given(
    trace=traces,
    agrees=flags,
    threshold=confidences,
    lengths=plans,
    max_pending=st.integers(1, 8),
    tokens=st.integers(1, 40),
    starts=st.booleans(),
)
@tries(50)
def test_verified_drafts_give_the_tokens_of_full(
    trace: list[float],
    agrees: list[bool],
    threshold: float,
    lengths: list[int],
    max_pending: int,
    tokens: int,
    starts: bool,
) -> None:
    prompt = np.array(START) if starts else prompt_of(3)
    before = len(prompt) - 1
    whole, _, _ = decoder_of(trace, max_pending, agrees=agrees)
    decoder, shallow, deep = decoder_of(trace, max_pending, agrees=agrees)
    drafts = PlannedDrafts(*((0, length) for length in lengths), threshold=threshold)
    loop = alone(decoded(decoder, prompt, tokens, drafts, Policy(max_pending=max_pending)))
    steps = drafted(loop, decoder, shallow, deep, prompt)
    assert decoder.stacked == 0
    assert [step.id for step in steps] == [step.id for step in islice(full(whole, prompt), tokens)]
    for index, step in enumerate(steps):
        assert not step.exited or (agrees[index + before] and trace[index + before] > threshold)
        assert step.confidence in (None, np.float32(trace[index + before]))
    assert max(deep.calls[not starts :], default=1) <= max_pending


@given(
    trace=traces,
    agrees=flags,
    threshold=confidences,
    least=confidences,
    lengths=plans,
    max_pending=st.integers(1, 8),
    tokens=st.integers(1, 40),
    starts=st.booleans(),
)
@tries(50)
def test_mode_free_finalizes_only_confident_exits_without_verification(
    trace: list[float],
    agrees: list[bool],
    threshold: float,
    least: float,
    lengths: list[int],
    max_pending: int,
    tokens: int,
    starts: bool,
) -> None:
    """Predictions with a confidence above `least` are drafted, those above `threshold` are final."""
    prompt = np.array(START) if starts else prompt_of(3)
    decoder, shallow, deep = decoder_of(trace, max_pending, agrees=agrees)
    drafts = PlannedDrafts(*((0, length) for length in lengths), threshold=least)
    loop = alone(decoded(decoder, prompt, tokens, drafts, Policy(threshold, max_pending=max_pending)))
    for index, step in enumerate(drafted(loop, decoder, shallow, deep, prompt)):
        position = index + len(prompt) - 1
        confident = trace[position] > threshold
        if step.exited and confident:
            assert step.id == position + SHALLOW_TOKEN
        else:
            assert step.id == deep.token(position)
            assert not step.exited or trace[position] > least
    assert max(deep.calls[not starts :], default=1) <= max_pending


@given(trace=traces, agrees=flags, threshold=confidences, lengths=plans, tokens=st.integers(1, 40))
@tries(25)
def test_exclusive_and_shared_sequences_make_the_same_engine_calls(
    trace: list[float], agrees: list[bool], threshold: float, lengths: list[int], tokens: int
) -> None:
    nll = [0.0 if agree else 4.0 for agree in agrees]
    for policy in (Policy(), Policy(threshold), Policy(limit=2.0)):
        outcomes = []
        for alone_with_engines in (False, True):
            decoder, shallow, deep = decoder_of(trace, nll=nll, agrees=agrees)
            decoder.only_sequence = alone_with_engines
            drafts = PlannedDrafts(*((0, length) for length in lengths), threshold=0.3)
            steps = list(alone(decoded(decoder, prompt_of(3), tokens, drafts, policy)))
            stats = decoder.stats
            outcomes.append((steps, stats.exits, stats.forced, stats.rejected, stats.drafts, shallow.calls, deep.calls))
        assert outcomes[0] == outcomes[1]


def test_draft_cost_includes_python_time_between_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _, _ = decoder_of([1.0] * 20)
    decoder.only_sequence = True
    seconds = list[float]()
    monkeypatch.setattr(
        PlannedDrafts, "observe", lambda self, plan, outcome, shallow, deep, shared: seconds.append(shallow)
    )
    assert len(list(alone(decoded(decoder, prompt_of(3), 12, PlannedDrafts((0, 3)))))) == 12
    assert sum(seconds) > decoder.stats.shallow_seconds > 0


@pytest.mark.parametrize("audit", [True, False])
def test_pending_rows_are_reported_and_labelled_by_an_audit(audit: bool) -> None:
    trace = [0, 0, 0.9, 0.2, 0.8, 0.7, 0.9]
    decoder, _, deep = decoder_of(trace, agrees=[False, False, True, False, True, False, True])
    seen = RequestLabels(0.5, learns=True, audits=audit)
    loop = alone(decoded(decoder, prompt_of(2), 400, ConfidentExits(NEVER_EXIT), Policy(0.5), labels=seen))
    steps = list(islice(loop, 5))
    loop.close()
    assert [step.exited for step in steps] == [False, True, False, True, True]
    assert seen.unlabelled == [np.float32(0.8), np.float32(0.7)] * (not audit)
    of_passes = [(np.float32(0.9), True), (np.float32(0.2), False)]
    assert seen.labelled == of_passes + [(np.float32(0.8), True), (np.float32(0.7), False)] * audit
    assert deep.calls == [2, 2] + [2] * audit


def test_sequence_that_ends_during_a_call_is_not_audited() -> None:
    trace = [0, 0, 0.9, 0.2, 0.9]
    observation = RequestLabels(0.5, learns=True, audits=True)
    for calls, left in ((1, []), (2, [0.9]), (3, [0.9, 0.2])):
        decoder, _, deep = decoder_of(trace)
        observation.unlabelled.clear()
        loop = decoded(decoder, prompt_of(2), 400, ConfidentExits(NEVER_EXIT), Policy(0.5), labels=observation)
        while calls:  # up to a step, the next step, and the sync pass, none of which is run
            item = next(loop)
            calls -= not isinstance(item, Token)
            if calls and not isinstance(item, Token):
                item.run()
        loop.close()
        assert observation.unlabelled == pytest.approx(left)
        assert (observation.labelled, observation.audited, deep.calls) == ([], False, [2])


def test_reset_clears_the_sequence_the_stack_and_the_counts() -> None:
    decoder, _, deep = decoder_of([1.0] * 20)
    first = list(islice(free(decoder, prompt_of(2), 0.5, 16), 6))
    assert decoder.stacked == 5
    decoder.reset()
    assert (decoder.stacked, decoder.lengths(), decoder.stats.exits) == (0, (0, 0), 0)
    deep.calls.clear()
    assert list(islice(free(decoder, prompt_of(2), 0.5, 16), 6)) == first
    assert deep.calls == [2]
