"""The adaptive threshold on simulated streams of known mixture, whose decisions it makes itself; then in sessions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles
from manifest_case import MANIFEST
from thread_runner import runners_beside

from runtime import Bundle, OptionError, Session
from runtime.adaptation import adaptive_threshold as adaptive
from runtime.adaptation.adaptive_threshold import AdaptiveThreshold, label_every, probe_every
from runtime.adaptation.learner import RequestLabels
from runtime.bundle.beta import Beta, BetaMixture, threshold_at
from runtime.bundle.bundle import sha256_of
from runtime.bundle.calibration import CALIBRATION, CALIBRATION_VERSION, Calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import MANIFEST as MANIFEST_NAME
from runtime.bundle.manifest import File, Manifest
from runtime.engines.backend import Backend

SHARP = BetaMixture(Beta(8.0, 0.5), Beta(1.5, 2.5), 0.85)
BROAD = BetaMixture(Beta(3.0, 1.0), Beta(1.2, 3.0), 0.6)
SURE = BetaMixture(Beta(4.0, 0.25), Beta(2.0, 1.0), 0.92)
HARD = BetaMixture(Beta(4.0, 0.4), Beta(3.0, 0.8), 0.75)


def calibration_of(manifest: Manifest, mixture: BetaMixture | None, target: float, **changes: Any) -> Calibration:
    calibration = Calibration(
        schema_version=CALIBRATION_VERSION,
        source_sha256=manifest.source_sha256,
        vocab_size=manifest.vocab_size,
        exit_layer=manifest.exit_layer,
        confidence=manifest.confidence,
        method="bmm",
        threshold=0.5 if mixture is None else threshold_at(mixture, target),
        sequences=100,
        positions=4000,
        agreement=0.9,
        target=target,
        mixture=mixture,
    )
    return replace(calibration, **changes)


def adapting(mixture: BetaMixture, target: float = 0.9, memory: int = 4000, **changes: Any) -> AdaptiveThreshold:
    return AdaptiveThreshold(MANIFEST, calibration_of(MANIFEST, mixture, target, **changes), memory)


class Requests:
    """Requests of geometric length, or of `length` tokens, decoded as mode free does: a label needs a sync pass."""

    def __init__(self, seed: int, length: int | None = None, mean: float = 8, max_pending: int = 16) -> None:
        self.random = np.random.default_rng(seed)
        self.length, self.mean, self.max_pending = length, mean, max_pending

    def run(self, threshold: AdaptiveThreshold, mixture: BetaMixture, tokens: int) -> list[float]:
        """The thresholds of the requests."""
        used: list[float] = []
        while tokens > 0:
            count = self.length or int(self.random.geometric(1 / self.mean))
            seen = threshold.begin()
            used.append(seen.threshold)
            stack: list[tuple[float, bool]] = []
            for token in self._tokens(mixture, count) if seen.learns else ():
                stack.append(token)
                if token[0] <= seen.threshold or len(stack) == self.max_pending:
                    seen.label(stack)
                    stack = []
            if seen.leave([confidence for confidence, _ in stack]):
                seen.label(stack)
            threshold.complete(seen)
            tokens -= count
        return used

    def _tokens(self, mixture: BetaMixture, count: int) -> list[tuple[float, bool]]:
        agrees = self.random.random(count) < mixture.weight_agree
        of_agreeing = self.random.beta(mixture.agree.a, mixture.agree.b, count)
        of_disagreeing = self.random.beta(mixture.disagree.a, mixture.disagree.b, count)
        return list(zip(np.where(agrees, of_agreeing, of_disagreeing).tolist(), agrees.tolist(), strict=True))


@pytest.mark.parametrize(
    ("calibrated", "true", "tolerance"),
    [(SHARP, SHARP, 0.02), (SURE, HARD, 0.005), (HARD, SURE, 0.03), (BROAD, SHARP, 0.02), (SHARP, BROAD, 0.03)],
)
@pytest.mark.parametrize("mean", [6, 40])
def test_threshold_converges_to_that_of_the_stream(
    calibrated: BetaMixture, true: BetaMixture, tolerance: float, mean: int
) -> None:
    threshold = adapting(calibrated)
    assert threshold.threshold == threshold_at(calibrated, 0.9)
    used = Requests(seed=1, mean=mean).run(threshold, true, 20_000)
    late = used[len(used) // 2 :]
    assert float(np.mean(late)) == pytest.approx(threshold_at(true, 0.9), abs=tolerance)


def test_threshold_follows_a_distribution_shift_and_returns_after_it() -> None:
    threshold, requests = adapting(SURE), Requests(seed=2, mean=30)
    for mixture in (HARD, SURE, HARD):
        requests.run(threshold, mixture, 12_000)
        assert threshold.threshold == pytest.approx(threshold_at(mixture, 0.9), abs=0.03)
        other = SURE if mixture is HARD else HARD
        assert abs(threshold.threshold - threshold_at(other, 0.9)) > 0.05


def test_unlabelled_tokens_do_not_bias_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    # A low threshold and short sequences: much is left over, and what is left over is sure.
    unbiased = adapting(SHARP, target=0.5)
    Requests(seed=3, mean=6).run(unbiased, SHARP, 20_000)
    assert unbiased.mixture.weight_agree == pytest.approx(0.85, abs=0.02)
    assert unbiased.threshold == pytest.approx(threshold_at(SHARP, 0.5), abs=0.015)
    # Were they ignored, sure tokens would look rare: this is what the correction is worth.
    monkeypatch.setattr(RequestLabels, "leave", lambda seen, confidences: False)
    naive = adapting(SHARP, target=0.5)
    Requests(seed=3, mean=6).run(naive, SHARP, 20_000)
    assert naive.mixture.weight_agree < 0.78


def test_audits_correct_a_threshold_at_which_no_token_would_be_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    everything_exits = BetaMixture(Beta(4.0, 0.4), Beta(4.0, 0.4), 0.95)
    audited = adapting(everything_exits)
    assert audited.threshold == 0.0
    Requests(seed=4, length=5).run(audited, HARD, 40_000)
    assert audited.threshold == pytest.approx(threshold_at(HARD, 0.9), abs=0.01)
    monkeypatch.setattr(adaptive, "AUDIT_TOKENS", 10**9)
    stuck = adapting(everything_exits)
    Requests(seed=4, length=5).run(stuck, HARD, 40_000)
    assert stuck.threshold < 0.5


def test_request_keeps_the_threshold_of_its_start() -> None:
    threshold = adapting(SURE)
    seen = threshold.begin()
    Requests(seed=6).run(threshold, HARD, 3000)
    assert seen.threshold == threshold_at(SURE, 0.9) != threshold.threshold


def test_restored_state_continues_identically() -> None:
    whole = adapting(SURE)
    requests = Requests(seed=7)
    requests.run(whole, HARD, 2000)
    saved = json.loads(json.dumps(whole.state()))
    restored = AdaptiveThreshold(MANIFEST, calibration_of(MANIFEST, SURE, 0.9), 4000, saved)
    assert restored.state() == whole.state()
    assert restored.threshold == threshold_at(whole.mixture, 0.9)
    again = Requests(seed=8).run(restored, HARD, 2000)
    assert again[5:] == Requests(seed=8).run(whole, HARD, 2000)[5:]
    assert restored.state() == whole.state()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"source_sha256": "cd" * 32}, "source_sha256"),
        ({"exit_layer": 3}, "exit_layer is 3"),
        ({"confidence": "entropy"}, "confidence is 'entropy'"),
        ({"schema_version": 99}, "schema_version is 99"),
        ({"requests": -1}, "requests = -1 is out of range"),
        ({"agree": [-1.0, -1.0, -1.0]}, "no tokens have"),
        ({"agree": [1.0, 1.0, -1.0]}, "no tokens have"),
        ({"disagree": [1.0]}, "no tokens have"),
        ({"unlabelled": [[1.0, -1.0, -1.0]]}, "unlabelled has shape"),
        ({"agree": [float("nan"), -1.0, -1.0]}, "agree"),
        ({"mixture": {"agree": {"a": -1.0, "b": 1.0}, "disagree": {"a": 1.0, "b": 1.0}, "weight_agree": 0.5}}, "a = "),
        ({"surprise": 1}, "unknown fields surprise"),
        ({"left": "many"}, "left"),
        ({"left": None}, "left"),
    ],
)
def test_mismatched_state_is_refused(change: dict[str, Any], problem: str) -> None:
    state = {**adapting(SURE).state(), **change}
    with pytest.raises(OptionError, match=problem):
        AdaptiveThreshold(MANIFEST, calibration_of(MANIFEST, SURE, 0.9), 4000, state)


@pytest.mark.parametrize("method", ["risk", "quality"])
def test_target_is_derived_from_a_threshold_of_another_method(method: Any) -> None:
    threshold = adapting(SHARP, target=0.99, method=method, threshold=0.8)
    assert threshold.target == pytest.approx(float(SHARP.posterior(0.8)))
    assert threshold.threshold == pytest.approx(0.8, abs=1e-6)
    assert adapting(SHARP, method=method, threshold=0.0).target == adaptive.MIN_TARGET


@pytest.mark.parametrize("calibration", [None, calibration_of(MANIFEST, None, adaptive.UNCALIBRATED_TARGET)])
@pytest.mark.parametrize(("true", "tolerance"), [(SHARP, 0.03), (BROAD, 0.05), (SURE, 0.04), (HARD, 0.01)])
@pytest.mark.parametrize("mean", [6, 40])
def test_threshold_without_a_calibration_is_learned_from_2000_tokens(
    calibration: Calibration | None, true: BetaMixture, tolerance: float, mean: int
) -> None:
    threshold = AdaptiveThreshold(MANIFEST, calibration, 4000)
    assert threshold.threshold == pytest.approx(0.942, abs=0.001)
    Requests(seed=10, mean=mean).run(threshold, true, 2000)
    assert threshold.threshold == pytest.approx(threshold_at(true, 0.95), abs=tolerance)


def test_expensive_labels_reduce_the_number_of_requests_learned_from() -> None:
    assert label_every(None) == 1
    light = Costs(4.0, 3.95, {1: 10.0, 4: 13.0})
    heavy = replace(light, shallow_without_head=1.5)
    assert label_every(light) == 1
    every = label_every(heavy)
    assert every > 2
    threshold = AdaptiveThreshold(MANIFEST, calibration_of(MANIFEST, SURE, 0.9), 4000, costs=heavy)
    learns = []
    for _ in range(3 * every):
        seen = threshold.begin()
        learns.append(seen.learns)
        threshold.complete(seen)
    assert [index for index, learned in enumerate(learns) if learned] == [0, every, 2 * every]


WRONG = BetaMixture(Beta(1.1, 3.2), Beta(0.95, 1.3), 0.045)  # an untrained exit
HEAVY = Costs(4.0, 2.0, {1: 8.0, 2: 8.5})  # 0.83x where nothing exits


def test_few_probe_requests_run_the_head_if_no_exit_occurs_until_exits_return() -> None:
    assert probe_every(None) == adaptive.PROBE_EVERY
    assert probe_every(HEAVY) == 20
    assert probe_every(replace(HEAVY, shallow_without_head=4.0)) == 1  # the head costs nothing
    threshold = adapting(WRONG)
    assert threshold.threshold == 1.0
    learned = []
    for _ in range(40):
        seen = threshold.begin()
        learned.append(seen.learns)
        threshold.complete(seen)
    assert sum(learned) == 2
    Requests(seed=21, length=30).run(threshold, SURE, 30_000)
    assert threshold.threshold == pytest.approx(threshold_at(SURE, 0.9), abs=0.03)


def test_exits_are_disabled_while_too_rare_to_pay() -> None:
    rare = BetaMixture(Beta(2.0, 2.0), Beta(2.0, 2.5), 0.5)
    assert 0 < rare.above(threshold_at(rare, 0.7)) < 0.05
    calibration = calibration_of(MANIFEST, rare, 0.7)
    assert AdaptiveThreshold(MANIFEST, calibration, 4000).threshold < 1.0  # costs are unknown
    light = replace(HEAVY, shallow_without_head=3.9)
    assert AdaptiveThreshold(MANIFEST, calibration, 4000, costs=light).threshold < 1.0
    threshold = AdaptiveThreshold(MANIFEST, calibration, 4000, costs=HEAVY)
    assert threshold.threshold == 1.0
    Requests(seed=22, length=30).run(threshold, SURE, 40_000)
    assert threshold.threshold == pytest.approx(threshold_at(SURE, 0.7), abs=0.05)


# In sessions

TARGET = 0.6
START = BetaMixture(Beta(2.0, 1.5), Beta(1.2, 2.0), 0.7)
LLAMA = BY_NAME["llama-tied"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
# A request that learns asks the exit at every token.
PUBLISHED: dict[str, Any] = {**OPTIONS, "mode": "free", "drafts": "exit"}

Open = Callable[..., Session]


@pytest.fixture(scope="module")
def calibrated(bundle: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a calibration; tests must not write into it."""
    path = Path(shutil.copytree(bundle(LLAMA, 2), tmp_path_factory.mktemp("calibrated") / "bundle"))
    manifest = Bundle.open(path).manifest
    (path / CALIBRATION).write_text(calibration_of(manifest, START, TARGET).to_json())
    file = File((path / CALIBRATION).stat().st_size, sha256_of(path / CALIBRATION))
    (path / MANIFEST_NAME).write_text(replace(manifest, files={**manifest.files, CALIBRATION: file}).to_json())
    return path


@pytest.fixture
def open_session(calibrated: Path) -> Iterator[Open]:
    opened: list[Session] = []

    def open_(**options: Any) -> Session:
        given = {"threads": 1, "slots": 1, "threshold": "adaptive", "adaptive_memory": 500, **options}
        opened.append(Session(calibrated, **given))
        return opened[-1]

    yield open_
    for session in opened:
        session.close()


def decoded(session: Session, count: int, first: int = 0) -> list[tuple[Any, ...]]:
    results = [session.generate([*PROMPTS[0], 40 + number], **OPTIONS) for number in range(first, first + count)]
    return [(result.token_ids, result.exited) for result in results]


def test_uncalibrated_bundle_learns_from_its_sync_passes(bundle: Bundles) -> None:
    path = bundle(LLAMA, 2)
    assert Bundle.open(path).calibration is None
    with Session(path, threshold="adaptive", threads=1, slots=1) as session:
        began = session.threshold
        assert began == pytest.approx(0.942, abs=0.001)
        decoded(session, 12)
        state, learned = session.adaptive_state(), session.threshold
    assert learned != began
    assert state["agree"][0] + state["disagree"][0] > 200
    with Session(path, threshold="adaptive", threads=1, slots=1, adaptive_state=state) as session:
        assert session.threshold == learned
        assert session.adaptive_state() == state


def test_requests_without_exits_decode_as_mode_full_except_for_probes(bundle: Bundles) -> None:
    path = bundle(LLAMA, 2)
    with Session(path, threshold="adaptive", threads=1, slots=1, adaptive_target=0.999) as session:
        requests = 0
        while session.threshold < 1.0 and requests < 60:  # random weights: the two decoders disagree
            decoded(session, 1, requests)
            requests += 1
        assert session.threshold == 1.0
        assert "0% of tokens exit" in str(session.default_mode)
        modes = []
        for number in range(2 * adaptive.PROBE_EVERY):
            prompt = [*PROMPTS[0], 40 + number]
            ours = session.generate(prompt, **OPTIONS)
            modes.append(ours.stats.mode)
            assert ours.token_ids == session.generate(prompt, mode="full", **OPTIONS).token_ids
            assert ours.stats.exits == 0
        assert sorted(modes) == ["free"] * 2 + ["full"] * (len(modes) - 2)


def test_state_requires_an_adaptive_session(open_session: Open) -> None:
    state = open_session().adaptive_state()
    with pytest.raises(OptionError, match="choose 'adaptive'"):
        open_session(threshold=0.5, adaptive_state=state)
    with pytest.raises(OptionError, match="adaptive_target is given, but threshold is None; choose 'adaptive'"):
        open_session(threshold=None, adaptive_target=0.9)
    with pytest.raises(OptionError, match="only an 'adaptive' one has a state"):
        open_session(threshold=None).adaptive_state()
    with pytest.raises(OptionError, match="adaptive_state is 'x'"):
        open_session(adaptive_state="x")


def test_requests_update_the_threshold_and_decode_with_that_of_their_start(open_session: Open) -> None:
    session, plain = open_session(), open_session(threshold=None)
    assert session.threshold == threshold_at(START, TARGET)
    thresholds = []
    for number in range(12):
        thresholds.append(session.threshold)
        (ours,) = decoded(session, 1, number)
        result = plain.generate([*PROMPTS[0], 40 + number], threshold=thresholds[-1], **PUBLISHED)
        assert ours == (result.token_ids, result.exited)
    assert len(set(thresholds)) > 3


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.3},
        {"mode": "full"},
        {"mode": "shallow"},
        {"mode": "lossless"},
        {"mode": "rollback", "rollback_threshold": 2.0},
    ],
)
def test_exempt_requests_do_not_update_the_state_and_decode_normally(
    open_session: Open, options: dict[str, Any]
) -> None:
    session, plain = open_session(), open_session(threshold=None)
    decoded(session, 6)
    before = session.adaptive_state()
    ours, theirs = (each.generate(PROMPTS[0], **OPTIONS, **options) for each in (session, plain))
    assert ours.token_ids == theirs.token_ids
    assert ours.stats.sync_sizes == theirs.stats.sync_sizes or options["mode"] == "lossless"
    assert session.adaptive_state() == before


def test_equal_sessions_learn_equally_with_and_without_overlap(
    open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [open_session(), open_session()]
    monkeypatch.setattr(Backend, "runners", runners_beside)
    sessions.append(open_session())
    outcomes = [decoded(session, 10) for session in sessions]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    first, second, overlapped = (session.adaptive_state() for session in sessions)
    assert first == second
    assert overlapped["agree"] == pytest.approx(first["agree"], rel=1e-4)
    assert sessions[2].threshold == pytest.approx(sessions[0].threshold, abs=1e-4)


def test_audit_changes_no_token_and_leaves_the_slot_usable(open_session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "AUDIT_TOKENS", 0)
    session, plain = open_session(), open_session(threshold=None)
    audited = 0
    for number in range(8):
        threshold, prompt = session.threshold, [*PROMPTS[0], 40 + number]
        ours = session.generate(prompt, **OPTIONS)
        theirs = plain.generate(prompt, threshold=threshold, **PUBLISHED)
        assert (ours.token_ids, ours.exited, ours.stats.exits) == (theirs.token_ids, theirs.exited, theirs.stats.exits)
        audited += ours.stats.sync_passes - theirs.stats.sync_passes
        assert sum(size * times for size, times in ours.stats.sync_sizes.items()) == 29
        assert ours.stats.overhead_seconds >= 0
    assert audited > 2
    assert sum(row[0] for row in session.adaptive_state()["unlabelled"]) == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_closing_a_stream_with_an_audit_due_leaves_the_slot_usable(
    overlap: bool, open_session: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive, "AUDIT_TOKENS", 0)
    plain = open_session(threshold=None)
    if overlap:
        monkeypatch.setattr(Backend, "runners", runners_beside)
    session = open_session()
    for count in range(1, 14):
        threshold = session.threshold
        expected = plain.generate(PROMPTS[0], threshold=threshold, **PUBLISHED).token_ids
        with session.stream(PROMPTS[0], **OPTIONS) as stream:
            assert tuple(token.id for token in islice(stream, count)) == expected[:count]
        threshold = session.threshold
        expected = plain.generate(PROMPTS[1], threshold=threshold, **PUBLISHED).token_ids
        assert session.generate(PROMPTS[1], **OPTIONS).token_ids == expected


def test_threads_lose_no_request_and_several_samples_count_as_one(open_session: Open) -> None:
    session = open_session(slots=4)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: decoded(session, 3, 3 * number), range(8)))
    state = session.adaptive_state()
    assert state["requests"] == 24
    weight = state["agree"][0] + state["disagree"][0] + sum(row[0] for row in state["unlabelled"])
    # 29 tokens of each request, fading over 500.
    assert weight == pytest.approx(29 / (1 - np.exp(-29 / 500)), rel=0.1)
    session.generate_best(PROMPTS[0], 3, temperature=0.8, seed=3, **OPTIONS)
    assert session.adaptive_state()["requests"] == 25
