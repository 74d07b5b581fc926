"""Sessions on a GPU's streams and memory: the tokens of the CPU, in every mode, whatever the device takes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import PROMPTS, Bundles
from device_cases import EXITS, FEATURES, LLAMA, MODES, T5, both, every
from draft_plans import draft_exits
from fake_device import Machine
from fake_onnxruntime import CPU

from graphs.widen import fp32_copy
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.engines.cuda.runner import CallEvents, CudaRunner
from runtime.errors import BatchError, CapacityError, DeviceError, EngineError, OptionError

Answer = tuple[tuple[int, ...], tuple[bool, ...], tuple[float | None, ...]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def answers(session: Session, **options: Any) -> list[Answer]:
    results = [session.generate(list(prompt), max_new_tokens=20, **options) for prompt in PROMPTS]
    return [(result.token_ids, result.exited, result.confidence) for result in results]


def expected(path: Path, **options: Any) -> list[Answer]:
    with Session(path, threads=1) as session:
        return answers(session, **options)


@pytest.fixture
def target(bundle: Bundles) -> Any:
    """A bundle for CUDA in fp32, whose graphs the CPU runs too."""
    return lambda case: bundle(case, target="cuda", precision="fp32")


@every
@pytest.mark.parametrize("mode", MODES)
def test_tokens_exits_and_confidences_match_the_cpu(
    case: Any, mode: str, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "constrained lossless":
        draft_exits(monkeypatch)
    want = expected(target(case), **MODES[mode])
    for seed, (overlap, graphs) in enumerate([(False, False), (True, False), (True, True)]):
        machine = Machine(monkeypatch, seed)
        options: Any = {"overlap": overlap, "cuda_graphs": graphs}
        with Session(target(case), device="cuda:0", threads=1, **options) as session:
            got = answers(session, **MODES[mode])
        assert [ids for ids, *_ in got] == [ids for ids, *_ in want]
        for ours, theirs in zip(got, want, strict=True):
            if mode != "lossless":  # how long drafts are is a matter of timing
                assert ours[1] == theirs[1]
                mine, other = (np.array(each[2], float) for each in (ours, theirs))  # None is NaN
                np.testing.assert_allclose(mine, other, atol=1e-4)
        assert bool(machine.onnxruntime.captures) is graphs
        assert machine.onnxruntime.launches > machine.onnxruntime.captures or not graphs


@both
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "int4", "compute": "bf16"}], ids=str)
def test_bf16_matches_the_same_graphs_rounded_to_bf16(
    case: Any, options: dict[str, str], bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle(case, target="cuda", **options))
    with fp32_copy(opened, rounds=True) as copy:
        want = expected(copy.path, threshold=0.5)
    Machine(monkeypatch)
    with Session(opened.path, device="cuda:0", overlap=True, threads=1) as session:
        assert [answer[:2] for answer in answers(session, threshold=0.5)] == [answer[:2] for answer in want]


@both
@pytest.mark.parametrize("seed", range(2))
def test_concurrent_requests_share_engine_calls(
    case: Any, seed: int, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [list(prompt) for prompt in PROMPTS * 2]
    options = {"max_new_tokens": 16, "threshold": 0.5}
    with Session(target(case), threads=1) as session:
        want = [result.token_ids for result in session.generate(prompts, **options)]
    Machine(monkeypatch, seed)
    with Session(target(case), device="cuda:0", overlap=bool(seed % 2), threads=1, slots=3) as session:
        assert [result.token_ids for result in session.generate(prompts, **options)] == want


@pytest.mark.parametrize("case", [T5, EXITS[0]], ids=lambda case: case.name)
def test_beams_match_the_cpu(case: Any, target: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"num_beams": 3, "mode": "full", "max_new_tokens": 10}
    with Session(target(case), device="cuda:0", threads=1) as session:
        got = [session.generate(list(prompt), **options).token_ids for prompt in PROMPTS]
    monkeypatch.undo()
    with Session(target(case), threads=1) as session:
        assert got == [session.generate(list(prompt), **options).token_ids for prompt in PROMPTS]


def test_repeated_calls_are_launched_as_one_cuda_graph(target: Any, machine: Machine) -> None:
    # Sizes of drafts and of passes that overlap with steps would depend on the time of calls.
    with Session(target(LLAMA), device="cuda:0", threads=1, slots=1, overlap=False) as session:
        options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True, "mode": "free", "threshold": 0.5}
        for _ in range(3):  # from the second request on, the prompt's cache is reused
            session.generate(list(PROMPTS[0]), **options)
        captures = machine.onnxruntime.captures
        assert captures > 1  # a step, and sync passes of several sizes
        launches = machine.onnxruntime.launches
        threads = [
            threading.Thread(target=session.generate, args=(list(PROMPTS[0]),), kwargs=options) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Whichever thread decodes, one puts calls into the stream: graphs belong to threads.
    assert machine.onnxruntime.captures == captures
    assert machine.onnxruntime.launches > launches + 20


def test_two_sessions_can_capture_graphs_at_the_same_time(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want = expected(target(LLAMA), threshold=0.5)
    machine = Machine(monkeypatch)
    with (
        Session(target(LLAMA), device="cuda:0", threads=1) as one,
        Session(target(LLAMA), device="cuda:0", threads=1) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        got = list(pool.map(lambda session: answers(session, threshold=0.5), (one, other)))
    assert got == [want, want]
    assert machine.onnxruntime.captures > 4


def test_steps_run_without_a_graph_if_capture_fails(
    target: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine.onnxruntime.fails_to_capture = True
    with Session(target(LLAMA), device="cuda:0", threads=1) as session:
        got = answers(session, threshold=0.5)
    assert "run without a CUDA graph, which cannot be captured: CUDA failure 901" in caplog.text
    assert machine.onnxruntime.captures == machine.onnxruntime.launches == 0
    monkeypatch.undo()
    assert got == expected(target(LLAMA), threshold=0.5)


@both
def test_close_releases_all_device_resources(case: Any, target: Any, machine: Machine) -> None:
    session = Session(target(case), device="cuda:0", threads=1)
    stream = session.stream(list(PROMPTS[0]), max_new_tokens=20)
    next(stream)
    assert machine.cuda.allocated > 0
    session.close()
    session.close()
    assert machine.cuda.allocated == 0
    assert machine.cuda.alive == (0, 0)
    with pytest.raises(OptionError, match="the session is closed"):
        session.generate(list(PROMPTS[0]))
    assert list(stream) is not None


@both
@pytest.mark.parametrize(("after", "overlap"), [(5, False), (60, True), (200, False)])
def test_lost_device_fails_running_requests_and_the_session_can_be_closed(
    case: Any, after: int, overlap: bool, target: Any, machine: Machine
) -> None:
    session = Session(target(case), device="cuda:0", overlap=overlap, threads=1, slots=3)
    machine.cuda.lose(after)
    with pytest.raises(BatchError) as caught:
        session.generate([list(prompt) for prompt in PROMPTS * 2], max_new_tokens=100, ignore_eos=True, threshold=0.5)
    assert all(isinstance(result, DeviceError) for result in caught.value.results)
    with pytest.raises(DeviceError, match="was lost"):
        session.generate(list(PROMPTS[1]), max_new_tokens=5)
    session.close()


def test_step_waits_only_for_its_token_copies_little_and_names_a_failed_engine(target: Any, machine: Machine) -> None:
    copied: list[int] = []
    real = machine.cuda.cudaMemcpyAsync

    def spy(dst: int, src: int, count: int, kind: Any, stream: Any) -> Any:
        copied.append(count)
        return real(dst, src, count, kind, stream)

    machine.cuda.cudaMemcpyAsync = spy  # type: ignore[method-assign]
    with Session(target(LLAMA), device="cuda:0", threads=1) as session:
        with session.decoder() as decoder:
            decoder.prefill(np.arange(5, 9), head=True)
            decoder.step(7, head=True)
            copied.clear()
            before = dict(machine.cuda.waits)
            decoder.step(8, head=True)
            waited = {name: count - before.get(name, 0) for name, count in machine.cuda.waits.items()}
            assert waited["cudaEventSynchronize"] <= 1
            assert waited.get("cudaStreamSynchronize", 0) == 0
            assert 1 <= len(copied) <= 3  # inputs, outputs, and a hidden state onto the stack
            assert max(copied) <= 2048
            machine.onnxruntime.fails = True
            with pytest.raises(EngineError, match=r"shallow failed on device cuda:0: .*CUDA failure 700$"):
                decoder.step(8, head=True)
            machine.onnxruntime.fails = False
            decoder.step(8, head=True)  # waits, as the device may still read what the failed run was given
            assert machine.cuda.waits["cudaStreamSynchronize"] == before.get("cudaStreamSynchronize", 0) + 1
        assert session.generate(list(PROMPTS[0]), max_new_tokens=3).token_ids


def test_event_times_are_read_before_the_events_are_reused(
    target: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runner's thread records what was given back as soon as another call comes."""
    give_back = CudaRunner.give_back

    def at_once(runner: CudaRunner, events: CallEvents) -> None:
        give_back(runner, events)
        runner.stream.record(events.begin)
        runner.stream.record(events.end)

    monkeypatch.setattr(CudaRunner, "give_back", at_once)
    with Session(target(LLAMA), device="cuda:0", overlap=True, threads=1) as session:
        assert session.generate(list(PROMPTS[0]), max_new_tokens=12, threshold=0.5).stats.deep_seconds > 0


def test_out_of_memory_names_needed_and_free_bytes_before_allocating(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, free_bytes=100_000)
    with pytest.raises(CapacityError, match=r"MB of KV cache .* MB of weights needs \d+ bytes of .* 100000 are free"):
        Session(target(LLAMA), device="cuda:0", threads=1)
    assert machine.cuda.allocated == 0


def test_session_never_falls_back_to_another_device(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch).onnxruntime.active = [CPU]
    with pytest.raises(EngineError, match=r"would run .* on CPUExecutionProvider"):
        Session(target(LLAMA), device="cuda:0")
    Machine(monkeypatch, devices=0)
    with pytest.raises(DeviceError, match="cuda:0 does not exist: this machine has 0 CUDA devices"):
        Session(target(LLAMA), device="cuda:0")


@pytest.mark.parametrize(("mode", "slots"), [("free", 3), ("lossless", 1)])
@pytest.mark.parametrize("case", FEATURES, ids=lambda case: case.name)
def test_feature_reading_exits_run_on_a_gpu(
    case: Any, mode: str, slots: int, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(case, case.exit_layers[0], target="cuda", precision="fp32")
    options = {**MODES[mode], "threshold": 0.1}
    with Session(path, threads=1) as session:
        want = [session.generate(list(prompt), max_new_tokens=16, **options) for prompt in PROMPTS]
    Machine(monkeypatch)
    draft_exits(monkeypatch)
    with Session(path, device="cuda:0", threads=1, slots=slots) as session:
        assert not session.overlap
        got = session.generate([list(prompt) for prompt in PROMPTS], max_new_tokens=16, **options)
    assert [result.token_ids for result in got] == [result.token_ids for result in want]
    if mode != "lossless":
        assert [result.exited for result in got] == [result.exited for result in want]
    assert sum(result.stats.exits + result.stats.rejected for result in got) > 5


def test_overlap_is_refused_for_feature_reading_exits(bundle: Bundles, machine: Machine) -> None:
    path = bundle(FEATURES[0], FEATURES[0].exit_layers[0], target="cuda", precision="fp32")
    with pytest.raises(OptionError, match="overlap is True, but the exit of this bundle reads features"):
        Session(path, device="cuda:0", overlap=True)
