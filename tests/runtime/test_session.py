"""Sessions from outside: threads, streams, ends, limits, and what is refused."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, PROMPTS, VOCAB_SIZE, Bundles, Open

from runtime import (
    CapacityError,
    EngineError,
    GenerationOptions,
    GenerationResult,
    OptionError,
    PromptError,
    Session,
    SessionOptions,
    Token,
)
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import TableRow
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import MANIFEST, Manifest
from runtime.decoding.decoder import Decoder
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call, OnnxEngine
from runtime.requests.thresholds import Thresholds

ROOT = Path(__file__).parents[2]
LLAMA, T5 = "llama-tied", "t5-relu-tied"
both = pytest.mark.parametrize("name", [LLAMA, T5])
PROMPT = PROMPTS[0]


@pytest.fixture
def open_session(open_session: Open) -> Open:
    return partial(open_session, exit_layer=2)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, or a failure where it hangs: a slot that never comes back."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, "no result: is a slot lost?"
    return results[0]


def outcome(result: GenerationResult) -> tuple[Any, ...]:
    """The parts of a result that must not depend on timing."""
    stats = result.stats
    return (
        result.text,
        result.token_ids,
        result.exited,
        result.confidence,
        result.finish_reason,
        (stats.prompt_tokens, stats.tokens, stats.exits, stats.forced, stats.sync_sizes),
    )


class Gate:
    """A logits processor that lets so many tokens pass, then waits until it is opened for more, or some `seconds`."""

    def __init__(self, tokens: int, seconds: float = 60) -> None:
        self._free, self._seconds = threading.Semaphore(tokens), seconds

    def open(self, tokens: int) -> None:
        self._free.release(tokens)

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert self._free.acquire(timeout=self._seconds) or self._seconds < 60
        return scores


def gathered(session: Session, prompt: Any, **options: Any) -> tuple[list[Token], GenerationResult]:
    with session.stream(prompt, **options) as stream:
        tokens = list(stream)
    return tokens, stream.result


# Streams


@both
def test_stream_yields_the_tokens_of_generate(name: str, open_session: Open) -> None:
    session = open_session(name)
    for options in ({"threshold": 0.3}, {"mode": "full"}, {"threshold": 0.3, "ignore_eos": True}):
        tokens, result = gathered(session, PROMPT, max_new_tokens=30, **options)
        assert outcome(result) == outcome(session.generate(PROMPT, max_new_tokens=30, **options))
        assert tuple(token.id for token in tokens) == result.token_ids
        assert tuple(token.exited for token in tokens) == result.exited
        assert tuple(token.confidence for token in tokens) == result.confidence
        assert "".join(token.text for token in tokens) == result.text


def test_closing_a_stream_early_releases_its_slot(open_session: Open) -> None:
    session = open_session()
    whole = session.generate(PROMPT, max_new_tokens=90, ignore_eos=True)
    stream = session.stream(PROMPT, max_new_tokens=90, ignore_eos=True, logits_processor=Gate(2, seconds=0.02))
    ids = (next(stream).id, next(stream).id)
    stream.close()
    stream.close()
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"
    assert ids == whole.token_ids[:2]
    assert stream.result.token_ids == whole.token_ids[: len(stream.result.token_ids)] != whole.token_ids
    assert within(20, lambda: session.generate(PROMPT, max_new_tokens=10)).token_ids == whole.token_ids[:10]


# Ends


def test_cancelled_request_ends_after_the_next_token(open_session: Open) -> None:
    session, cancel, gate = open_session(), threading.Event(), Gate(3)
    stream = session.stream(PROMPT, cancel=cancel, max_new_tokens=20, logits_processor=gate)
    for _ in range(3):
        next(stream)
    cancel.set()
    gate.open(20)
    assert len(list(stream)) == 1
    assert stream.result.finish_reason == "cancelled"
    assert session.generate(PROMPT, cancel=cancel, max_new_tokens=20).stats.tokens == 1
    # An end of its own wins over the cancellation.
    assert session.generate(PROMPT, cancel=cancel, max_new_tokens=1).finish_reason == "length"


@both
def test_a_stop_string_ends_the_text_before_it(name: str, open_session: Open) -> None:
    session = open_session(name)
    tried = 0
    for prompt in PROMPTS:
        whole = session.generate(prompt, threshold=0.3, max_new_tokens=60, ignore_eos=True)
        for start in range(3, len(whole.text) - 2, 5):
            stop = whole.text[start : start + 2]
            tokens, result = gathered(
                session, prompt, threshold=0.3, max_new_tokens=60, ignore_eos=True, stop=["never in it", stop]
            )
            assert result.finish_reason == "stop"
            assert result.text == whole.text[: whole.text.index(stop)]
            assert "".join(token.text for token in tokens) == result.text
            assert result.token_ids == whole.token_ids[: len(result.token_ids)]
            assert len(result.token_ids) < len(whole.token_ids)
            tried += 1
    assert tried > 5


# Limits


@both
@pytest.mark.parametrize("options", [{"mode": "full"}, {"threshold": 0.0}, {"threshold": 0.2, "max_pending": 2}])
def test_tokens_are_clipped_to_the_capacity(
    name: str, options: dict[str, Any], open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity, options = 20, {"ignore_eos": True, **options}
    lengths: list[int] = []
    extend = KVCache.extend

    def watched(cache: KVCache, slot: int, count: int) -> None:
        extend(cache, slot, count)
        lengths.append(int(cache.lengths[slot]))

    monkeypatch.setattr(KVCache, "extend", watched)
    roomy, tight = open_session(name), open_session(name, capacity=capacity)
    for size in (1, 9, capacity - 1, capacity):
        # The newest token needs no position. The decoder of an encoder-decoder reads one start token, not the prompt.
        room = capacity if name == T5 else capacity - size + 1
        prompt = PROMPTS[2][:size]
        lengths.clear()
        clipped = tight.generate(prompt, max_new_tokens=1000, **options)
        assert max(lengths) == capacity
        assert clipped.finish_reason == "length"
        assert len(clipped.token_ids) == room
        free = roomy.generate(prompt, max_new_tokens=room + 5, **options)
        assert free.token_ids[:room] == clipped.token_ids
        assert free.exited[:room] == clipped.exited


def test_a_prompt_of_an_encoder_decoder_is_limited_by_its_encoder(open_session: Open) -> None:
    session = open_session(T5, capacity=5)
    assert session.generate([7] * 128, max_new_tokens=2).stats.prompt_tokens == 128
    with pytest.raises(PromptError, match="129 tokens, at most 128 fit"):
        session.generate([7] * 129)


def test_a_capacity_beyond_the_bundle_is_refused(open_session: Open) -> None:
    with pytest.raises(CapacityError, match="capacity 129 is more than the 128 positions"):
        open_session(capacity=129)


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_allocated(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 slots, 128 + 16 rows, 5 layers, key and value, 4 heads of 16 floats.
    need = 3 * 144 * 5 * 2 * 4 * 16 * 4
    monkeypatch.setattr("runtime.engines.kv_cache.available_memory", lambda: need)
    open_session(slots=3, prefix_cache_mb=0)
    monkeypatch.setattr("runtime.engines.kv_cache.available_memory", lambda: need - 1)
    monkeypatch.setattr("runtime.engines.backend.KVCache", lambda *_: pytest.fail("allocated"))
    with pytest.raises(CapacityError, match=r"needs 0\.0 GB \(3 slots x 144 positions x 2560 bytes\).*lower capacity"):
        open_session(slots=3, prefix_cache_mb=0)


@pytest.mark.parametrize(
    ("slots", "positions"),
    # 128 + 16 rows of the cache, 128 positions of a prompt; with several slots the rows of common calls too.
    [(1, 144 + 128), (3, 3 * (144 + 2 * 128))],
)
def test_cross_attention_cache_counts_as_cache_memory(
    slots: int, positions: int, open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = positions * open_session(T5).manifest.kv_bytes_per_token
    monkeypatch.setattr("runtime.engines.kv_cache.available_memory", lambda: need)
    open_session(T5, slots=slots)
    monkeypatch.setattr("runtime.engines.kv_cache.available_memory", lambda: need - 1)
    with pytest.raises(CapacityError, match=r"positions of prompts\).*lower slots"):
        open_session(T5, slots=slots)


# Options


@pytest.mark.parametrize(
    ("session", "options", "mode"),
    [
        ({}, {}, "lossless"),
        ({}, {"output_confidence": True}, "full"),
        ({}, {"temperature": 1.0, "seed": 1, "min_new_tokens": 3}, "lossless"),
        ({}, {"predicted_output": [3, 4, 5]}, "lossless"),
        ({}, {"threshold": 0.3}, "free"),
        ({}, {"threshold": 1.0}, "lossless"),
        ({}, {"mode": "free"}, "lossless"),
        ({}, {"mode": "free", "drafts": "exit"}, "full"),
        ({"threshold": 0.3}, {}, "free"),
        ({"threshold": 0.3}, {"output_confidence": True}, "free"),
        ({"threshold": 0.3}, {"drafts": "exit"}, "free"),
        ({"threshold": "adaptive"}, {}, "free"),
    ],
)
def test_default_mode_is_free_if_exits_can_occur_else_lossless_from_text(
    session: dict[str, Any], options: dict[str, Any], mode: str, open_session: Open
) -> None:
    opened, given = open_session(**session), {"max_new_tokens": 8, **options}
    result = opened.generate(PROMPT, **given)
    assert result.stats.mode == mode
    if mode != "free":
        assert "exit" not in result.stats.drafts or options.get("drafts") == "exit"
        same = {name: value for name, value in given.items() if name not in ("drafts", "predicted_output", "threshold")}
        assert result.token_ids == opened.generate(PROMPT, **{**same, "mode": "full"}).token_ids
    described = opened.describe_mode(**given)
    assert described.mode == mode
    if mode != "free":
        assert "exit" not in described.drafts or options.get("drafts") == "exit"
    assert opened.default_mode.mode == ("free" if session else "lossless")
    assert str(opened.default_mode).startswith(f"mode {opened.default_mode.mode}")


def test_default_mode_describes_the_calibrated_speedup(bundle: Bundles) -> None:
    opened = Bundle.open(bundle(BY_NAME[LLAMA], 2))
    calibrated: Any = SimpleNamespace(
        manifest=replace(opened.manifest, threshold=0.8),
        calibration=SimpleNamespace(table=(TableRow(0.8, 0.6, 0.99, predicted_speedup=1.3), TableRow(0.9, 0.3))),
    )
    costs = Costs(2.0, 1.0, {1: 8.0, 16: 8.0})
    known, elsewhere, given, fresh = (
        Thresholds(calibrated, SessionOptions(), costs).describe(GenerationOptions()),
        Thresholds(calibrated, SessionOptions()).describe(GenerationOptions()),
        Thresholds(calibrated, SessionOptions(threshold=0.5)).describe(GenerationOptions()),
        Thresholds(opened, SessionOptions()).describe(GenerationOptions()),
    )
    assert known.speedup == costs.speedup(0.6, opened.manifest.max_pending)
    assert str(elsewhere) == (
        "mode free, threshold 0.8: 1.30x expected speedup over mode full, 60% of tokens exit, "
        "99.0% of exits agree with the full model, with verified drafts from the text and the exit"
    )
    assert str(given) == "mode free, threshold 0.5: speedup unknown, with verified drafts from the text and the exit"
    assert str(fresh) == "mode lossless: the tokens of mode full, with drafts from the text"


def test_calibrated_threshold_is_not_used_for_drafts(bundle: Bundles) -> None:
    manifest = replace(Bundle.open(bundle(BY_NAME[LLAMA], 2)).manifest, threshold=0.8)
    calibrated: Any = SimpleNamespace(manifest=manifest, calibration=None)
    plain, given = Thresholds(calibrated, SessionOptions()), Thresholds(calibrated, SessionOptions(threshold=0.5))
    assert [plain.decide(None, mode)[0] for mode in ("free", "rollback", "lossless")] == [0.8, 0.8, 0.0]
    assert (given.decide(None, "lossless")[0], given.decide(0.3, "lossless")[0]) == (0.5, 0.3)


def test_tuned_pass_length_applies_only_to_mode_free(bundle: Bundles, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle(BY_NAME[LLAMA], 2), tmp_path / "bundle"))
    manifest = Manifest.from_json((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(replace(manifest, tuned_max_pending=2).to_json())
    given: dict[str, Any] = {"threshold": 0.0, "max_new_tokens": 12, "ignore_eos": True}
    published: dict[str, Any] = {**given, "mode": "free", "drafts": "exit"}
    with Session(path, threads=1, slots=1) as session:
        assert set(session.generate(PROMPT, **published).stats.sync_sizes) == {2}
        assert set(session.generate(PROMPT, **published, max_pending=3).stats.sync_sizes) == {3}
        sizes = session.generate(PROMPT, **given, mode="rollback", rollback_threshold=100.0).stats.sync_sizes
    assert max(sizes) > 2


def test_invalid_requests_are_refused_before_taking_a_slot(open_session: Open) -> None:
    session = open_session()
    for options, message in (
        ({"max_tokens": 3}, "unknown option max_tokens; known are max_new_tokens, mode, "),
        ({"threshold": 2}, "threshold is 2"),
        ({"max_pending": 17}, "max_pending is 17; this bundle has room for 16"),
    ):
        with pytest.raises(OptionError, match=message):
            session.stream(PROMPT, **options)
    for prompt, message in (
        ([], "empty"),
        (
            [3, VOCAB_SIZE],
            f"token id 1 of the prompt is {VOCAB_SIZE}; the ids of this bundle are 0 to {VOCAB_SIZE - 1}",
        ),
        ("word " * 100, "501 tokens, at most 128 fit"),
        ([{"role": "user"}], "'content' of message 0 is missing"),
    ):
        with pytest.raises(PromptError, match=message):
            session.generate(prompt)
    assert within(20, lambda: session.generate(PROMPT, max_new_tokens=2)).stats.tokens == 2


def test_type_of_decoders_is_not_an_option() -> None:
    """With overlap it would be ignored."""
    given: Any = {"decoder_type": Decoder}
    with pytest.raises(OptionError, match="unknown option decoder_type; known are "):
        Session("missing", **given)


def test_session_with_untrusted_templates_accepts_only_token_ids(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = open_session()
    monkeypatch.setattr("runtime.session.Tokenizer.load", lambda path: pytest.fail("loaded"))
    session = open_session(trust_templates=False)
    assert session.tokenizer is None
    result = session.generate([1, 5, 7], max_new_tokens=8)
    assert result.token_ids == trusting.generate([1, 5, 7], max_new_tokens=8).token_ids
    assert result.text == ""
    for prompt in ("Hello", [{"role": "user", "content": "Hi"}]):
        with pytest.raises(PromptError, match=r"does not load the bundle's tokenizer \(trust_templates=False\), so it"):
            session.generate(prompt)
    with pytest.raises(OptionError, match=r"stop strings need text.*trust_templates is False"):
        session.generate([1, 5, 7], stop="x")


# Closing


def test_closed_session_leaves_no_reference_cycles(bundle: Bundles) -> None:
    gc.collect()
    gc.disable()
    try:
        session = Session(bundle(BY_NAME[T5], 2), threads=1, slots=2)
        session.generate([list(prompt) for prompt in PROMPTS], threshold=0.3, max_new_tokens=8)
        list(session.stream(PROMPT, max_new_tokens=8))
        session.close(drain=True)
        engines = [weakref.ref(runner.engine) for runner in session._runners]
        del session
        assert within(20, lambda: [engine() for engine in engines]) == [None, None]
    finally:
        gc.enable()


# Statistics


@both
def test_statistics_are_consistent(name: str, open_session: Open) -> None:
    options: dict[str, Any] = {"mode": "free", "drafts": "exit", "threshold": 0.3, "max_new_tokens": 30}
    stats = open_session(name).generate(PROMPT, ignore_eos=True, **options).stats
    assert (stats.prompt_tokens, stats.tokens) == (len(PROMPT), 30)
    decided = 30 if name == T5 else 29  # a decoder-only model's first token comes from reading the prompt
    assert (stats.candidates, stats.exit_rate) == (decided, stats.exits / decided)
    rows = sum(size * count for size, count in stats.sync_sizes.items())
    assert stats.sync_passes + stats.exits == decided
    assert rows <= decided
    phases = (stats.prefill_seconds, stats.shallow_seconds, stats.deep_seconds)
    assert min(phases[1:]) > 0
    assert (stats.encode_seconds > 0, stats.prefill_seconds > 0) == (name == T5, name != T5)
    assert stats.overhead_seconds >= 0
    assert stats.seconds == pytest.approx(sum(phases) + stats.encode_seconds + stats.overhead_seconds)
    decoding = stats.seconds - stats.prefill_seconds - stats.encode_seconds
    assert stats.tokens_per_second * decoding == pytest.approx(decided)


# Imports


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _rebound(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls that are bound from here on, again or for the first time."""
    found: list[Call] = []
    rebind = Call.rebind

    def noted(call: Call, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        found.append(call)
        rebind(call, inputs, outputs)

    monkeypatch.setattr(Call, "rebind", noted)
    return found


@both
def test_engine_calls_stay_bound_across_requests(
    name: str, open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[OnnxEngine] = []
    bind = OnnxEngine.bind

    def counted(engine: OnnxEngine, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Call:
        bound.append(engine)
        return bind(engine, inputs, outputs)

    monkeypatch.setattr(OnnxEngine, "bind", counted)
    session = open_session(name)
    options = {"threshold": 0.1, "max_new_tokens": 24, "ignore_eos": True}
    first = session.generate(PROMPT, **options)
    assert len(first.stats.sync_sizes) > 1
    bound.clear()
    rebound = _rebound(monkeypatch)
    assert session.generate(PROMPT, **options).token_ids == first.token_ids
    assert len(bound) == len(rebound) == (0 if name == T5 else 2), "a decoder-only model's prompt at both engines"


def test_prompt_is_not_affected_by_leftovers_of_a_longer_prompt(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share arrays, so that calls stay bound."""
    session, options = open_session(T5), {"threshold": 0.1, "max_new_tokens": 24, "ignore_eos": True}
    long, short = [3 + number % 50 for number in range(60)], [5, 6, 7]
    expected = open_session(T5).generate(short, **options).token_ids
    session.generate(long, **options)
    session.generate(short, **options)
    rebound = _rebound(monkeypatch)
    session.generate(long, **options)
    assert session.generate(short, **options).token_ids == expected
    assert not rebound
    wider = [3 + number % 50 for number in range(100)]
    alone = open_session(T5).generate(wider, **options).token_ids
    assert session.generate(wider, **options).token_ids == alone
    assert session.generate(short, **options).token_ids == expected


def test_onnxruntime_telemetry_is_off_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where it would, it keeps an id and a database in the user's cache directory.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    python("import runtime, onnxruntime, time; time.sleep(1)")
    assert list(tmp_path.rglob("*")) == []
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert python("import os, runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])") == "0\n"


def test_import_is_fast_and_loads_the_modules_that_requests_need() -> None:
    code = (
        "import sys; from time import process_time; began = process_time(); import runtime;"
        "print(process_time() - began, *{'torch', 'transformers', 'onnx', 'onnx_ir', 'scipy', 'jinja2', 'psutil',"
        "'statistics', 'difflib', 'freeexport', 'graphs', 'runtime.bundle.hub'} & set(sys.modules))"
    )
    seconds, *loaded = python(code).split()
    assert loaded == []
    assert float(seconds) < 1.5  # of the processor; 0.56 beside other tests on a slow day


def test_missing_onnxruntime_error_says_what_to_install(bundle: Bundles) -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
sys.meta_path.insert(0, Missing())
from runtime import EngineError, Session
try:
    Session(sys.argv[1])
except EngineError as error:
    print(error)
"""
    message = python(code, str(bundle(BY_NAME[LLAMA], 2)))
    assert "ONNX Runtime" in message
    assert "pip install 'freeexport[cpu]'" in message
    assert message.count("\n") == 1


def test_request_waiting_for_a_slot_can_be_cancelled(open_session: Open) -> None:
    session = open_session()
    with session.stream(PROMPT, max_new_tokens=8, logits_processor=Gate(1, seconds=0.05)) as holder:
        next(holder)
        cancel = threading.Event()
        cancel.set()
        waiting = session.generate(PROMPT, max_new_tokens=8, cancel=cancel)
    assert (waiting.finish_reason, waiting.token_ids) == ("cancelled", ())
    assert session.generate(PROMPT, max_new_tokens=8).token_ids


# A threshold that nothing passes


@both
@pytest.mark.parametrize("mode", ["free", "rollback"])
def test_shallow_head_is_skipped_if_no_exit_can_occur(
    name: str, mode: str, open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[bool] = []
    made = Decoder._shallow_call

    def watched(decoder: Decoder, tokens: np.ndarray, hidden: np.ndarray, head: bool) -> Any:
        heads.append(head)
        return made(decoder, tokens, hidden, head)

    monkeypatch.setattr(Decoder, "_shallow_call", watched)
    session = open_session(name)
    drafts = "exit" if mode == "free" else None
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "rollback_threshold": 3.0, "drafts": drafts}
    full = session.generate(PROMPT, max_new_tokens=12, ignore_eos=True, mode="full")
    # By the threshold given, and by that of a bundle that was not calibrated.
    for never in ({"threshold": 1.0}, {}):
        result = session.generate(PROMPT, mode=mode, **options, **never)
        assert (result.token_ids, result.exited) == (full.token_ids, (False,) * 12)
        assert result.confidence == (None,) * 12
        assert result.stats.mode == full.stats.mode == "full"
    assert heads
    assert not any(heads)
    assert session.generate(PROMPT, mode=mode, **options, threshold=0.9).stats.mode == mode
    assert any(heads)


@both
def test_mode_free_verifies_its_drafts_if_no_exit_can_occur(name: str, open_session: Open) -> None:
    session = open_session(name)
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    full = session.generate(PROMPT, mode="full", **options)
    for never in ({"threshold": 1.0}, {}):
        result = session.generate(PROMPT, mode="free", predicted_output=list(full.token_ids), **options, **never)
        assert result.token_ids == full.token_ids
        assert result.stats.mode == "lossless"
        assert result.stats.drafts


@both
def test_confidences_are_available_if_no_exit_can_occur(name: str, open_session: Open) -> None:
    session = open_session(name)
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "output_confidence": True}
    full, free = session.generate(PROMPT, mode="full", **options), session.generate(PROMPT, threshold=1.0, **options)
    assert full.token_ids == free.token_ids == session.generate(PROMPT, mode="full", max_new_tokens=12).token_ids
    assert full.confidence == pytest.approx(free.confidence, abs=1e-5)
    assert None not in full.confidence
    assert not any((*full.exited, *free.exited))
    assert (full.stats.mode, free.stats.mode) == ("full", "full")
    with pytest.raises(OptionError, match="output_confidence is True with mode lossless"):
        session.generate(PROMPT, mode="lossless", **options)


def test_damaged_onnxruntime_installation_is_named(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is left where the two wheels overwrote each other and one was removed: a package without content.
    monkeypatch.setitem(sys.modules, "onnxruntime", type(sys)("onnxruntime"))
    with pytest.raises(EngineError, match="freeexport doctor"):
        open_session()
