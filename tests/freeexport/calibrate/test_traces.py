from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, TEXTS, Bundles, Case, Model
from exit_layer_case import with_exit_layers, with_feature
from exit_vocabulary_case import model_with_vocabulary, with_exit_vocabulary
from hypothesis import given
from hypothesis import strategies as st
from reference import Run, confidence_of
from traces import mixed, trace

from freeexport.calibrate.sources import fitting_prompts
from freeexport.calibrate.traces import TraceCache, Traces, replay, trace_of
from freeexport.costs.measured import ReplaySession
from freeexport.system.jsonl import InputLine
from runtime import Session
from runtime.bundle.costs import Costs, Outside
from runtime.errors import OptionError

T5, LLAMA = BY_NAME["t5-deep-decoder"], BY_NAME["llama-tied"]
FEATURES = tuple(with_feature(*each) for each in (("t5-relu-tied", 1), ("marian", 0), ("llama-tied", 2)))
COSTS = Costs(shallow=2.0, shallow_without_head=1.5, deep={1: 3.0, 2: 3.2, 4: 4.0, 8: 6.0})
KEY = {"model": "ab" * 32, "data": "cd" * 32, "exit_layer": 2, "confidence": "softmax", "max_new_tokens": 64}
FIRST, SECOND = trace([0.1, 1 / 3, 1.0], [True, False, True], line=3), trace([], [], line=7)


def test_exit_runs_end_in_sync_passes_and_the_last_stack_is_dropped() -> None:
    done = replay(trace([0.9, 0.9, 0.2, 0.1, 0.9, 0.9], [True, False, True, False, True, True]), 0.5, max_pending=8)
    assert done.exits.tolist() == [True, True, False, False, True, True]
    assert (done.agreeing, done.sync_sizes) == (3, {3: 1, 1: 1})


def test_speedup_is_computed_from_the_engine_calls() -> None:
    done = replay(trace([0.9, 0.9, 0.2, 0.1, 0.9, 0.9], [True] * 6), 0.5, max_pending=8)
    full = 6 * (1.5 + 3.0)
    free = 6 * 2.0 + (3.2 + 4.0) / 2 + 3.0
    assert done.speedup(COSTS) == pytest.approx(full / free)
    costs = replace(COSTS, outside=Outside(full=0.5, free=0.7, sync=0.2))
    assert done.speedup(costs) == pytest.approx((full + 6 * 0.5) / (free + 6 * 0.7 + 2 * 0.2))


def test_speedup_of_independent_exits_matches_the_analytic_model() -> None:
    traces = mixed(400, 100, seed=4)
    done = replay(traces, 0.8, max_pending=8)
    confident = float(np.mean(traces.confidence > 0.8))
    for costs in (COSTS, replace(COSTS, outside=Outside(0.5, 0.7, 0.2))):
        assert done.speedup(costs) == pytest.approx(costs.speedup(confident, 8), rel=0.02)


def test_replay_without_exits_equals_mode_full() -> None:
    done = replay(mixed(5, 20), 1.0, 8)
    assert (done.exit_rate, done.agreement, done.sync_sizes) == (0, None, {1: 100})
    assert done.speedup(COSTS) == 1
    # At a threshold that nothing passes the shallow head runs all the same.
    assert replay(mixed(5, 20), 0.9999999, 8).speedup(COSTS) < 1


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), max_size=30), max_size=5),
    st.floats(0, 1),
    st.integers(1, 6),
)
def test_replay_equals_decoding_token_by_token(
    sequences: list[list[tuple[float, bool]]], threshold: float, max_pending: int
) -> None:
    traces = Traces.joined(trace([c for c, _ in one], [a for _, a in one]) for one in sequences)
    exits, sizes = [], Counter[int]()
    for one in sequences:
        stacked = 0
        for confidence, _ in one:
            stacked += 1
            exits.append(confidence > threshold and stacked < max_pending)
            if not exits[-1]:
                sizes[stacked] += 1
                stacked = 0
    done = replay(traces, threshold, max_pending)
    assert (done.exits.tolist(), done.sync_sizes) == (exits, sizes)
    assert done.agreeing == sum(exited and agrees for exited, agrees in zip(exits, traces.agrees, strict=True))


def filled(path: Path) -> Path:
    cache = TraceCache(path, KEY)
    cache.add(FIRST)
    cache.add(SECOND)
    return path


def test_cached_traces_are_bit_identical(tmp_path: Path) -> None:
    cache = TraceCache(filled(tmp_path / "traces"), KEY)
    for one in (FIRST, SECOND):
        found = cache.get(int(one.line[0]))
        assert found is not None
        for name in ("confidence", "agrees", "nll", "token"):
            assert getattr(found, name).dtype == getattr(one, name).dtype
            np.testing.assert_array_equal(getattr(found, name), getattr(one, name))
    assert cache.get(4) is None


def test_complete_lines_survive_a_kill_at_any_byte(tmp_path: Path) -> None:
    content = filled(tmp_path / "whole").read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content)):
        path = tmp_path / "cut"
        path.write_bytes(content[:cut])
        cache = TraceCache(path, KEY)
        assert (cache.get(3) is not None) == (cut >= ends[1])
        assert cache.get(7) is None
        cache.add(SECOND)
        assert TraceCache(path, KEY).get(7) is not None


@pytest.mark.parametrize("change", [{"model": "ef" * 32}, {"exit_layer": 3}])
def test_traces_of_another_run_are_ignored_and_replaced(tmp_path: Path, change: dict[str, object]) -> None:
    path = filled(tmp_path / "traces")
    before = path.read_bytes()
    other = {**KEY, **change}
    cache = TraceCache(path, other)
    assert cache.get(3) is None
    assert path.read_bytes() == before
    cache.add(SECOND)
    assert TraceCache(path, KEY).get(3) is None
    assert TraceCache(path, other).get(7) is not None


GOOD = '{"line": 1, "confidence": [0.5], "agrees": [1], "nll": [0.1], "token": [3]}'


@pytest.mark.parametrize(
    "content",
    [
        "hello\n",
        "hello",
        '{"input": "a"}\n',
        "[1]\n",
        '{"kinds',
        GOOD.replace("[0.5]", "[0.5, 0.5]"),
        GOOD.replace("[3]", "[3e400]"),
        GOOD.replace("[3]", "[99999999999]"),
        GOOD.replace("[0.5]", '["a"]'),
        GOOD.replace('"line": 1', '"line": "1"'),
    ],
)
def test_file_without_traces_is_not_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes"
    if content.startswith('{"line"'):  # a damaged line of a file of ours
        content = f"{filled(path).read_text()}{content}\n"
    path.write_text(content)
    with pytest.raises(OptionError, match="holds no traces"):
        TraceCache(path, KEY)
    assert path.read_text() == content


KNOWN = with_exit_vocabulary("llama-tied"), with_exit_vocabulary("t5-relu-tied", layers=True)
EXITS = with_exit_layers("llama-tied"), *(replace(case, model=model_with_vocabulary) for case in KNOWN)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", [T5, LLAMA, *EXITS], ids=lambda case: case.name)
def test_traces_match_transformers(case: Case, bundle: Bundles, source_model: Model) -> None:
    requests = [InputLine(number, text) for number, text in enumerate(TEXTS[:10], start=1)]
    layer, model = case.exit_layers[0], source_model(case)
    with ReplaySession(bundle(case, layer)) as session:
        first, ends = int(not session.manifest.encoder_decoder), session.manifest.eos_token_ids
        prompts = [ids for _, ids in fitting_prompts(session, requests)]
        traces = [trace_of(session, 1, ids, 9) for ids in prompts]
    for found, prompt in zip(traces, prompts, strict=True):
        run, ids = Run(model, prompt.tolist(), layer), list[int]()
        while len(ids) < 9 and not (ids and ids[-1] in ends):
            ids.append(int(run.logits(ids)[1][-1].argmax()))
        # Of a decoder the first token never exits.
        shallow, deep = (logits[first : len(ids)] for logits in run.logits(ids))
        vocabulary = deep.shape[-1]
        tokens = shallow[:, :vocabulary].argmax(-1)
        confidence = [confidence_of(row, vocabulary) for row in shallow]
        nll = -deep.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        np.testing.assert_array_equal(found.token, tokens)
        np.testing.assert_array_equal(found.agrees, tokens == deep.argmax(-1))
        np.testing.assert_allclose(found.confidence, confidence, atol=2e-4)
        np.testing.assert_allclose(found.nll, nll, atol=2e-3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", [T5, LLAMA, *FEATURES], ids=lambda case: case.name)
def test_trace_contains_what_decoding_sees_at_each_token(
    case: Case, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "freeexport.calibrate.traces.DRAFTED", 1
    )  # a sync pass after each token, as where nothing exits
    with Session(bundle(case, case.exit_layers[0]), slots=1) as session:
        prompt = np.array(session.tokenizer.encode("one two three"), np.int64)  # type: ignore[union-attr]
        trace = trace_of(session, 1, prompt, 15)
        # Just below 1 nothing exits, and every token has a confidence.
        options: dict[str, Any] = {"drafts": "exit", "threshold": np.nextafter(1.0, 0)}
        free = session.generate(prompt, mode="free", max_new_tokens=15, **options)
        decided = [one for one in free.confidence or () if one is not None]
        if not session.manifest.encoder_decoder:
            decided = list(free.confidence or ())[1:]
        np.testing.assert_allclose(trace.confidence, np.array(decided, np.float32), atol=1e-6)
        full = np.array(free.token_ids[len(free.token_ids) - trace.tokens :])
        np.testing.assert_array_equal(trace.token == full, trace.agrees)
        # What the deep decoder chose itself has the highest probability: at most ln V nats.
        assert (trace.nll[trace.agrees] <= np.log(session.manifest.vocab_size) + 1e-4).all()
