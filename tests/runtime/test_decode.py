"""The decode loops over the real KV caches, with engines that write down positions instead of computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.decode import Step, free, full
from runtime.decoder import PREFILL_ROWS, Decoder, Lane
from runtime.errors import CapacityError
from runtime.kv_cache import KVCache

WIDTH = 4
SHALLOW_TOKEN, DEEP_TOKEN = 1000, 2000  # plus the position that predicts the token


@dataclass
class Recorder:
    """An engine that writes the token it read at each position into its cache, and checks where it is called.

    A hidden state is [position, token, ...]. The shallow confidence at position p is `trace[p]`.
    """

    cache: KVCache
    name: str
    trace: Sequence[float] = ()
    calls: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> RecordedCall:
        return RecordedCall(self, inputs, outputs)


@dataclass
class RecordedCall:
    engine: Recorder
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]

    def run(self) -> None:
        engine, inputs, outputs = self.engine, self.inputs, self.outputs
        (past,), (rows,) = inputs["past_lengths"], inputs["query_lengths"]
        positions = np.arange(past, past + rows)
        if engine.name == "shallow":
            tokens = inputs["input_ids"][0]
            outputs["hidden"][0, :, 0], outputs["hidden"][0, :, 1] = positions, tokens
        else:
            hidden = inputs["hidden"][0]
            # Absolute positions, in order, none left out: what a sync pass must get.
            assert hidden[:, 0].tolist() == positions.tolist()
            tokens = hidden[:, 1]
        assert len(tokens) == rows
        for array in engine.cache.arrays.values():
            array[0, 0, past : past + rows, 0] = tokens
        heads = positions[inputs["head_rows"]]
        outputs["token"][:] = heads + (SHALLOW_TOKEN if engine.name == "shallow" else DEEP_TOKEN)
        if engine.name == "shallow":
            outputs["confidence"][:] = [engine.trace[position] for position in heads]
        engine.calls.append(int(rows))
        engine.heads.append(len(heads))


def decoder_of(
    trace: Sequence[float] = (), max_pending: int = 16, rows: int = 512
) -> tuple[Decoder, Recorder, Recorder]:
    lanes = []
    for name, layers in (("shallow", range(2)), ("deep", range(2, 5))):
        cache = KVCache(layers, 1, 1, rows, 1, np.float32)
        lanes.append(Lane(Recorder(cache, name, trace), cache))  # type: ignore[arg-type]
    decoder = Decoder(lanes[0], lanes[1], slot=0, hidden_size=WIDTH, max_pending=max_pending)
    return decoder, lanes[0].engine, lanes[1].engine  # type: ignore[return-value]


def prompt_of(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int64) + 10


def cached(engine: Recorder, length: int) -> set[tuple[float, ...]]:
    """The valid rows of every array of a cache; one element where all layers agree."""
    return {tuple(array[0, 0, :length, 0].tolist()) for array in engine.cache.arrays.values()}


confidences = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0])


@given(
    trace=st.lists(confidences, min_size=1, max_size=60),
    threshold=confidences,
    max_pending=st.integers(1, 17),
    prompt_length=st.integers(1, 5),
)
def test_lengths_flags_and_sync_passes_hold_at_every_step(
    trace: list[float], threshold: float, max_pending: int, prompt_length: int
) -> None:
    # The first confidence of the trace belongs to the prompt's last position, which never exits.
    before = [0.0] * (prompt_length - 1)
    decoder, shallow, deep = decoder_of(before + trace, max_pending)
    prompt, steps = prompt_of(prompt_length), list[Step]()
    pending, passes, forced = 0, list[int](), 0
    for step in islice(free(decoder, prompt, threshold, max_pending), len(trace)):
        index, position = len(steps), prompt_length + len(steps) - 1
        assert step.confidence == np.float32(trace[index])
        sure = index > 0 and trace[index] > threshold
        exits = sure and pending < max_pending - 1
        if index > 0:
            forced += sure and not exits
            passes += [] if exits else [pending + 1]
            pending = pending + 1 if exits else 0
        assert step.exited == exits
        assert step.token == position + (SHALLOW_TOKEN if exits else DEEP_TOKEN)
        steps.append(step)
        shallow_length, deep_length = decoder.lengths()
        assert decoder.stacked == pending
        assert shallow_length == deep_length + decoder.stacked == position + 1
        read = (*prompt.tolist(), *(earlier.token for earlier in steps[:-1]))
        assert cached(shallow, shallow_length) == {read}
        assert cached(deep, deep_length) == {read[:deep_length]}
    stats = decoder.stats
    assert deep.calls[1:] == passes
    assert sorted(stats.sync_sizes.elements()) == sorted(passes)
    assert (stats.exits, stats.forced) == (sum(step.exited for step in steps), forced)
    assert stats.sync_sizes.total() + stats.exits == len(steps) - 1
    assert sum(passes) + decoder.stacked == len(steps) - 1
    assert max(passes, default=1) <= max_pending


def test_a_token_exits_only_above_the_threshold() -> None:
    decoder, _, _ = decoder_of([0.9, 0.5, 0.500001, 0.4])
    steps = islice(free(decoder, prompt_of(1), 0.5, 16), 4)
    assert [step.exited for step in steps] == [False, False, True, False]


def test_threshold_one_never_exits() -> None:
    decoder, _, deep = decoder_of([1.0] * 10)
    assert not any(step.exited for step in islice(free(decoder, prompt_of(1), 1.0, 16), 10))
    assert deep.calls == [1] * 10


def test_a_stack_of_one_row_never_exits_and_counts_the_tokens_as_forced() -> None:
    decoder, _, deep = decoder_of([1.0] * 10)
    assert not any(step.exited for step in islice(free(decoder, prompt_of(1), 0.0, 1), 10))
    assert deep.calls == [1] * 10
    assert decoder.stats.forced == 9


def test_a_full_stack_forces_a_pass_over_all_its_rows() -> None:
    decoder, _, deep = decoder_of([1.0] * 12, max_pending=8)
    exited = [step.exited for step in islice(free(decoder, prompt_of(1), 0.5, 4), 10)]
    assert exited == [False, True, True, True, False, True, True, True, False, True]
    assert deep.calls == [1, 4, 4]
    assert decoder.stats.forced == 2


def test_mode_full_runs_both_engines_for_every_token_and_no_shallow_head() -> None:
    decoder, shallow, deep = decoder_of()
    steps = list(islice(full(decoder, prompt_of(3)), 5))
    assert steps == [Step(DEEP_TOKEN + position, False, None) for position in range(2, 7)]
    assert (shallow.calls, deep.calls) == ([3, 1, 1, 1, 1], [3, 1, 1, 1, 1])
    assert (set(shallow.heads), set(deep.heads)) == ({0}, {1})
    assert decoder.stats.exits == decoder.stats.forced == 0


@pytest.mark.parametrize("length", [1, PREFILL_ROWS - 1, PREFILL_ROWS, PREFILL_ROWS + 1, 2 * PREFILL_ROWS + 3])
def test_a_long_prompt_is_read_in_pieces_and_only_its_last_row_gets_the_head(length: int) -> None:
    trace = np.linspace(0, 1, length, dtype=np.float32)
    decoder, shallow, deep = decoder_of(trace.tolist(), rows=2048)
    token, confidence = decoder.prefill(prompt_of(length), head=True)
    assert (token, confidence) == (DEEP_TOKEN + length - 1, trace[-1])
    assert sum(shallow.calls) == sum(deep.calls) == length
    assert max(shallow.calls) <= PREFILL_ROWS
    assert sum(shallow.heads) == sum(deep.heads) == 1
    assert decoder.lengths() == (length, length)
    assert cached(deep, length) == {tuple(prompt_of(length).tolist())}


def test_the_prompt_does_not_count_as_a_sync_pass() -> None:
    decoder, _, _ = decoder_of([0.0] * 8)
    list(islice(free(decoder, prompt_of(5), 0.5, 16), 1))
    assert decoder.stats.sync_passes == 0


def test_reset_forgets_the_sequence_the_stack_and_the_counts() -> None:
    decoder, _, deep = decoder_of([1.0] * 20)
    first = list(islice(free(decoder, prompt_of(2), 0.5, 16), 6))
    assert decoder.stacked == 5
    decoder.reset()
    assert (decoder.stacked, decoder.lengths(), decoder.stats.exits) == (0, (0, 0), 0)
    deep.calls.clear()
    assert list(islice(free(decoder, prompt_of(2), 0.5, 16), 6)) == first
    assert deep.calls == [2]


def test_a_sequence_that_outgrows_the_cache_is_stopped() -> None:
    decoder, _, _ = decoder_of([0.0] * 20, rows=8)
    with pytest.raises(CapacityError, match=r"9 positions .* 8 rows"):
        list(islice(free(decoder, prompt_of(4), 0.5, 16), 10))
