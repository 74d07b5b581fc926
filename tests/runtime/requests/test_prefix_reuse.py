"""Requests that reuse what earlier ones read: answers are those of a session that reads every prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, LONG, Bundles
from draft_plans import draft_exits
from exit_layer_case import EXIT_CASES, EXIT_LAYER, with_feature

from runtime import CapacityError, GenerationResult, OptionError, RequestEvent, Session, SessionOptions
from runtime.decoding import decoder
from runtime.engines.prefix_store import BLOCK, DEFAULT_MB, default_limit_mb
from runtime.engines.runner import Encoder

FEATURES = with_feature("llama-tied", 0), with_feature("llama-tied", EXIT_LAYER, "fused")
BY_NAME = {case.name: case for case in [*CASES, LONG, *EXIT_CASES, *FEATURES]}
LLAMA, T5, EXIT_LAYERS = "llama-tied", "t5-relu-tied", "llama-tied-exit-layers"
SYSTEM = [3 + (29 * step + 7) % 250 for step in range(41)]
MODES: list[dict[str, Any]] = [
    {"mode": "free", "threshold": 0.3},
    {"mode": "free", "threshold": 0.0, "max_pending": 6},
    {"mode": "full"},
    {"mode": "full", "output_confidence": True},
    {"mode": "lossless", "threshold": 0.1, "drafts": "exit"},
    {"mode": "rollback", "threshold": 0.1, "rollback_threshold": 3.0},
    {"mode": "shallow"},
    {"mode": "free", "threshold": 0.2, "temperature": 0.8, "seed": 3},
]

Open = Callable[..., Session]


KERNELS = "", "scalar-bf16"


def with_kernels(*cases: tuple[str, str]) -> pytest.MarkDecorator:
    """Parametrize a test with names, precisions and kernels."""
    settings = [
        pytest.param(*case, kernels, id="-".join((*case, kernels or "own"))) for case in cases for kernels in KERNELS
    ]
    return pytest.mark.parametrize(("name", "precision", "kernels"), settings, indirect=["kernels"])


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The processor's own kernels, and those that read a prompt with other bits than steps have, as AMX does."""
    if request.param:
        monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", request.param)
    return str(request.param)


@pytest.fixture
def open_session(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens sessions with one thread; closes them after the test. How long lossless drafts are depends on timing, as
    does whose they are."""
    draft_exits(monkeypatch)
    opened: list[Session] = []

    def open_(name: str = LLAMA, precision: str = "int8", capacity: int = 128, **options: Any) -> Session:
        exit_layer = 0 if name == FEATURES[0].name else EXIT_LAYER
        with monkeypatch.context() as patch:  # `convert` chooses kernels by the processor's instructions
            patch.delenv("FREEEXPORT_INSTRUCTIONS", raising=False)
            path = bundle(BY_NAME[name], exit_layer, precision=precision, capacity=capacity)
        opened.append(Session(path, **{"threads": 1, "slots": 4, "prefix_cache_mb": 64, **options}))
        return opened[-1]

    yield open_
    for session in opened:
        session.close()


def same(ours: GenerationResult, alone: GenerationResult) -> None:
    assert (ours.token_ids, ours.exited, ours.text) == (alone.token_ids, alone.exited, alone.text)
    assert (ours.confidence, ours.logprobs) == (alone.confidence, alone.logprobs)
    counts = [(r.stats.tokens, r.stats.exits, r.stats.rejected, r.stats.sync_sizes) for r in (ours, alone)]
    assert counts[0] == counts[1]


def talk(session: Session, plain: Session, turns: int, **options: Any) -> list[int]:
    """A conversation whose turns begin with all that was said before: how many tokens each turn reused."""
    history, reused = list(SYSTEM), []
    for turn in range(turns):
        history += [60 + turn, 9, 8, 7]
        asked: dict[str, Any] = {"max_new_tokens": 14, "ignore_eos": True, "output_logprobs": True, **options}
        ours = session.generate(history, **asked)
        alone = plain.generate(history, **asked)
        same(ours, alone)
        assert alone.stats.cached_tokens == 0
        reused.append(ours.stats.cached_tokens)
        history += ours.token_ids
    return reused


@with_kernels(
    (LLAMA, "int8"),
    (LLAMA, "fp32"),
    ("qwen3", "int4"),
    ("mistral-window", "int8"),
    ("qwen3-exit-layers", "int8"),
    (EXIT_LAYERS, "fp32"),
)
def test_conversations_match_those_without_prefix_reuse(
    name: str, precision: str, kernels: str, open_session: Open
) -> None:
    """All modes in one session, in any order: each goes on from what the others left."""
    session, plain = open_session(name, precision), open_session(name, precision, prefix_cache_mb=0)
    for number, place in enumerate(np.random.default_rng(0).permutation(len(MODES))):
        reused = talk(session, plain, turns=3, **MODES[place])
        for turn, tokens in enumerate(reused):
            before = len(SYSTEM) + 18 * turn
            # Up to the last whole block of the turns before; less where rows were still to be verified.
            least = 0 if not (number or turn) else len(SYSTEM) // BLOCK * BLOCK
            if "exit-layers" not in name:  # where what an exit's own layers read is stored apart
                assert tokens >= least
            assert tokens % BLOCK == 0
            assert tokens <= before + 4
    assert session.metrics().prefix_cache_hits > session.metrics().prefix_cache_queries / 2


@with_kernels(
    (LLAMA, "int8"), ("mistral-window", "int4"), (EXIT_LAYERS, "int8"), *((case.name, "int8") for case in FEATURES)
)
def test_full_and_lossless_answers_do_not_depend_on_which_mode_cached_the_prefix(
    name: str, precision: str, kernels: str, open_session: Open
) -> None:
    """Ids and log-probabilities, bit for bit, of later turns of a conversation that modes share in any order."""
    session, plain = open_session(name, precision), open_session(name, precision, prefix_cache_mb=0)
    options: dict[str, Any] = {"max_new_tokens": 14, "ignore_eos": True, "output_logprobs": True}
    modes: list[dict[str, Any]] = [
        {"mode": "full"},
        *({"mode": "lossless", "drafts": each} for each in ("exit", "auto")),
    ]
    history = list(SYSTEM)
    for turn in range(3):
        history += [60 + turn, 9, 8, 7]
        alone = plain.generate(history, mode="full", **options)
        for mode in (*modes[turn % 3 :], *modes[: turn % 3]):
            ours = session.generate(history, **mode, **options)
            assert (ours.token_ids, ours.logprobs) == (alone.token_ids, alone.logprobs), (turn, mode)
        if turn:  # a prompt before was read, in this mode or another
            assert session.generate(history, mode="full", **options).stats.cached_tokens >= len(history) - 18 - BLOCK
        history += alone.token_ids


def test_lossless_reuses_prefixes_of_full_except_with_exit_layers(open_session: Open) -> None:
    for name, shared in ((LLAMA, True), (EXIT_LAYERS, False)):
        session = open_session(name)
        session.generate(SYSTEM, mode="full", max_new_tokens=1)
        lossless = session.generate(SYSTEM, mode="lossless", drafts="exit", max_new_tokens=1)
        assert lossless.stats.cached_tokens == (2 * BLOCK if shared else 0)
    session = open_session(EXIT_LAYERS)
    session.generate(SYSTEM, mode="lossless", drafts="exit", max_new_tokens=1)
    for options in ({"mode": "full"}, {"mode": "lossless", "drafts": "exit"}):
        assert session.generate(SYSTEM, max_new_tokens=1, **options).stats.cached_tokens == 2 * BLOCK


@pytest.mark.parametrize(
    ("precision", "instructions", "alike"),
    [("int8", "scalar", True), ("int8", "scalar-bf16", False), ("fp32", "scalar-bf16", True)],
)
def test_generated_tokens_are_cached_if_prefill_is_bit_identical(
    precision: str, instructions: str, alike: bool, open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", instructions)
    session = open_session(precision=precision)
    result = session.generate(SYSTEM, max_new_tokens=40, ignore_eos=True, mode="full")
    again = session.generate([*SYSTEM, *result.token_ids, 5], max_new_tokens=1, mode="full")
    assert again.stats.cached_tokens == (5 * BLOCK if alike else 2 * BLOCK)


@with_kernels((LLAMA, "int8"), (LLAMA, "fp32"), (EXIT_LAYERS, "int8"))
@pytest.mark.parametrize("options", MODES, ids=str)
def test_cached_rows_are_bit_identical_to_prefill(
    name: str, precision: str, options: dict[str, Any], kernels: str, open_session: Open
) -> None:
    """Keys and values of all layers of both caches, and of generated tokens where they are stored, bit for bit."""
    session, other = open_session(name, precision), open_session(name, precision)
    result = session.generate(SYSTEM, max_new_tokens=60, ignore_eos=True, **options)
    other.generate([*SYSTEM, *result.token_ids], **{**options, "max_new_tokens": 1})
    ours, theirs = stored(session), stored(other)
    assert ours.keys() <= theirs.keys()
    generated = session._state.generated_limit >= len(SYSTEM) + 60 and options["mode"] != "shallow"
    read = len(SYSTEM) + (60 - decoder_lag(options) if generated else 0)
    assert len(ours) >= read // BLOCK
    for key, (blocks, size) in ours.items():
        assert sum(rows.nbytes for rows in blocks) == size
        for mine, whole in zip(blocks, theirs[key][0], strict=True):
            np.testing.assert_array_equal(mine, whole)


def decoder_lag(options: dict[str, Any]) -> int:
    """Most tokens that the deep decoder may not have read at the end."""
    return int(options.get("max_pending", 16)) + 1


def stored(session: Session) -> dict[bytes, Any]:
    assert session._state.prefixes is not None
    return dict(session._state.prefixes._entries)


def test_deep_cache_of_a_free_request_is_reused_up_to_the_last_sync(open_session: Open) -> None:
    session = open_session()
    ended = session.generate(SYSTEM, threshold=0.0, max_pending=16, max_new_tokens=16, ignore_eos=True)
    assert ended.stats.sync_passes == 0  # all that was generated is in the shallow cache alone
    again = session.generate([*SYSTEM, *ended.token_ids], max_new_tokens=2, threshold=0.0)
    assert again.stats.cached_tokens == len(SYSTEM) // BLOCK * BLOCK


def test_last_prompt_token_is_always_computed(open_session: Open) -> None:
    session = open_session()
    prompt = SYSTEM[: 2 * BLOCK]
    first = session.generate(prompt, max_new_tokens=5, mode="full")
    again = session.generate(prompt, max_new_tokens=5, mode="full")
    same(again, first)
    assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, BLOCK)
    longer = session.generate([*prompt, 5], max_new_tokens=5, mode="full")
    assert longer.stats.cached_tokens == 2 * BLOCK


@pytest.mark.parametrize("precision", ["int8", "fp32", "fp16"])
def test_batches_sharing_a_prefix_give_the_results_of_single_requests(precision: str, open_session: Open) -> None:
    """In a store that is too small, so that blocks come and go while others use them."""
    plain = open_session(precision=precision, prefix_cache_mb=0)
    session = open_session(precision=precision, prefix_cache_mb=1)
    draw = np.random.default_rng(0)
    beginnings = [SYSTEM, SYSTEM[:20], [5] * 50]
    store, seen = session._state.prefixes, set[bytes]()
    assert store is not None
    for _ in range(4):
        prompts = [
            [*beginnings[draw.integers(3)], *draw.integers(3, 250, draw.integers(1, 40)).tolist()] for _ in range(12)
        ]
        options: dict[str, Any] = {**MODES[draw.integers(len(MODES))], "max_new_tokens": 12, "ignore_eos": True}
        together = session.generate(prompts, **options)
        for ours, prompt in zip(together, prompts, strict=True):
            same(ours, plain.generate(prompt, **options))
        seen |= stored(session).keys()
        assert store.used == sum(sum(rows.nbytes for rows in blocks) for blocks, _ in stored(session).values()) <= 1e6
    assert len(seen) > len(store)  # some went
    assert session.metrics().prefix_cache_hits > 0


def test_prefix_read_by_a_cancelled_request_is_reused(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "PREFILL_ROWS", 2 * BLOCK)
    cancel = threading.Event()

    def hook(event: RequestEvent) -> None:
        if event.kind == "started":
            cancel.set()

    prompt = [*SYSTEM, *SYSTEM[:39]]
    with open_session(on_event=hook) as session:
        cut = session.generate(prompt, cancel=cancel, max_new_tokens=8, mode="full")
        assert (cut.finish_reason, cut.token_ids) == ("cancelled", ())
        again = session.generate(prompt, max_new_tokens=8, mode="full")
    assert again.stats.cached_tokens == 2 * BLOCK
    same(again, open_session(prefix_cache_mb=0).generate(prompt, max_new_tokens=8, mode="full"))


@pytest.mark.parametrize("name", [LLAMA, T5])
def test_prefixes_are_not_shared_between_salts(name: str, open_session: Open) -> None:
    session = open_session(name)
    salts = [None, "a", "b", "None", "a "]
    for turn in range(2):
        for salt in salts:
            result = session.generate(SYSTEM, max_new_tokens=2, mode="full", cache_salt=salt)
            assert bool(result.stats.cached_tokens) == (turn == 1), salt


def test_repeated_encoder_prompt_is_encoded_once(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    run = Encoder.run
    monkeypatch.setattr(
        Encoder, "run", lambda self, tokens, reader=None: encoded.append(len(tokens)) or run(self, tokens)
    )
    session, plain = open_session(T5, "fp32"), open_session(T5, "fp32", prefix_cache_mb=0)
    options: list[dict[str, Any]] = [*MODES, {"mode": "full", "num_beams": 3}]
    for asked in options:
        for prompt in (SYSTEM, SYSTEM[:-1]):
            ours = session.generate(prompt, max_new_tokens=12, ignore_eos=True, **asked)
            same(ours, plain.generate(prompt, max_new_tokens=12, ignore_eos=True, **asked))
            assert ours.stats.cached_tokens == (0 if asked is options[0] else len(prompt))
    assert len(encoded) == 2 + 2 * len(options)
    together = session.generate([SYSTEM, SYSTEM[:-1]] * 3, max_new_tokens=12, threshold=0.3)
    for number, result in enumerate(together):
        assert result.token_ids == plain.generate(SYSTEM[: 41 - number % 2], max_new_tokens=12, threshold=0.3).token_ids


def test_cached_encodings_respect_the_memory_limit(open_session: Open) -> None:
    session = open_session(T5, "fp32", prefix_cache_mb=1)
    store = session._state.prefixes
    assert store is not None
    for number in range(12):
        session.generate([7 + number] * 100, max_new_tokens=2)
        assert store.used == sum(sum(each.nbytes for each in cross.values()) for cross, _ in stored(session).values())
        assert store.used <= 1e6
    assert 0 < len(store) < 12
    assert session.generate([18] * 100, max_new_tokens=2).stats.cached_tokens == 100
    assert session.generate([7] * 100, max_new_tokens=2).stats.cached_tokens == 0


def test_looked_up_and_reused_tokens_are_counted(open_session: Open) -> None:
    session, off = open_session(), open_session(prefix_cache_mb=0)
    for each in (session, off):
        each.generate(SYSTEM, max_new_tokens=2)
        each.generate([*SYSTEM, 5, 6], max_new_tokens=2)
    found = [(each.metrics().prefix_cache_queries, each.metrics().prefix_cache_hits) for each in (session, off)]
    assert found == [(84, 32), (0, 0)]


def test_prefix_cache_is_refused_on_a_gpu() -> None:
    with pytest.raises(OptionError, match=r"prefix_cache_mb is 5 with device 'cuda:0'.* CPU only; leave it out"):
        SessionOptions(device="cuda:0", prefix_cache_mb=5)
    assert SessionOptions(device="cuda:0").prefix_cache_bytes == 0


@pytest.mark.parametrize(
    ("name", "limit"),
    [(LLAMA, DEFAULT_MB), (FEATURES[0].name, DEFAULT_MB), (T5, 0), (EXIT_LAYERS, 0)],
)
def test_prefix_cache_is_on_by_default_if_results_do_not_depend_on_it(
    name: str, limit: int, open_session: Open
) -> None:
    session = open_session(name, prefix_cache_mb=None)
    assert session.options.prefix_cache_mb == limit
    plain = replace(session.manifest, kernels=None)
    assert default_limit_mb(plain) == 0
    assert open_session(name, prefix_cache_mb=0).options.prefix_cache_mb == 0


def test_prefix_cache_beyond_memory_is_refused_at_open(open_session: Open) -> None:
    with pytest.raises(CapacityError, match=r"and 100000000000000 MB of prefixes.* lower prefix_cache_mb, capacity"):
        open_session(prefix_cache_mb=10**14)
