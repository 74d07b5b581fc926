"""Sessions on TensorRT engines, on the fakes: the tokens of the CPU on the same graphs, whatever the device takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_device
import pytest
from checkpoints import PROMPTS, Bundles
from device_cases import BY_NAME, FEATURES, LLAMA, MODES, T5, both, every

from graphs.tensorrt.build import build
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.errors import CapacityError, DeviceError, EngineError, OptionError

Built = Callable[..., Path]


@pytest.fixture
def built(copied: Bundles, monkeypatch: pytest.MonkeyPatch) -> Built:
    """A bundle with its engines."""

    def make(case: Any, max_batch: int = 4, **options: Any) -> Path:
        copy = copied(case, target="tensorrt", **options)
        with monkeypatch.context() as patched:
            fake_device.install(patched)
            build(Bundle.open(copy), max_batch)
        return copy

    return make


def answers(session: Session, **options: Any) -> list[Any]:
    results = [session.generate(list(prompt), max_new_tokens=20, **options) for prompt in PROMPTS]
    # How long drafts are is a matter of timing.
    lossless = options["mode"] == "lossless"
    return [(r.token_ids,) if lossless else (r.token_ids, r.exited, r.confidence) for r in results]


def expected(path: Path, **options: Any) -> list[Any]:
    with Session(path, threads=1) as session:
        return answers(session, **options)


@every
@pytest.mark.parametrize("mode", MODES)
def test_tokens_exits_and_confidences_match_the_cpu(
    case: Any, mode: str, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(case)
    want = expected(path, **MODES[mode])
    for seed, (overlap, graphs) in enumerate([(False, False), (True, False), (True, True)]):
        fake = fake_device.install(monkeypatch, seed)
        with Session(
            path, device="cuda:0", overlap=overlap, cuda_graphs=graphs, threads=1, draft_memory_mb=0
        ) as session:
            assert answers(session, **MODES[mode]) == want
        assert bool(fake.launches) is graphs
        assert {name for name, *_ in sys.modules["tensorrt"].runs} >= (
            {"shallow"} if mode == "shallow" else {"shallow", "deep"}
        )
        assert (fake.allocated, fake.graphs, fake.alive) == (0, 0, (0, 0))


@pytest.mark.parametrize("case", FEATURES, ids=lambda case: case.name)
def test_feature_reading_exits_match_the_cpu(case: Any, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(case, exit_layer=case.exit_layers[0])
    options: dict[str, Any] = {"max_new_tokens": 16, "threshold": 0.1}
    with Session(path, threads=1) as session:
        want = [session.generate(list(prompt), **options) for prompt in PROMPTS]
    fake = fake_device.install(monkeypatch)
    with Session(path, device="cuda:0", threads=1, slots=3) as session:
        got = session.generate([list(prompt) for prompt in PROMPTS], **options)
    assert [(each.token_ids, each.exited) for each in got] == [(each.token_ids, each.exited) for each in want]
    assert {name for name, *_ in sys.modules["tensorrt"].runs} >= {"shallow", "exit", "deep"}
    assert (fake.allocated, fake.graphs, fake.alive) == (0, 0, (0, 0))


@both
def test_concurrent_requests_and_beams_share_engine_calls(
    case: Any, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prompts = built(case), [list(prompt) for prompt in PROMPTS * 2]
    options: dict[str, Any] = {"max_new_tokens": 16, "threshold": 0.5}
    beams: dict[str, Any] = {"num_beams": 3, "mode": "full", "max_new_tokens": 10}
    with Session(path, threads=1) as session:
        want = [result.token_ids for result in session.generate(prompts, **options)]
        best = session.generate(prompts[0], **beams).token_ids if case is T5 else ()
    for seed in range(2):
        fake_device.install(monkeypatch, seed)
        with Session(path, device="cuda:0", overlap=bool(seed), slots=3) as session:
            assert [result.token_ids for result in session.generate(prompts, **options)] == want
            assert case is not T5 or session.generate(prompts[0], **beams).token_ids == best


def test_session_without_a_matching_engine_is_refused_and_leaves_nothing(
    built: Built, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, refused = built(LLAMA), list[str]()

    def refuse(error: type[Exception], place: Path = path) -> None:
        with pytest.raises(error) as caught:
            Session(place, device="cuda:0")
        refused.append(str(caught.value))

    fake_device.install(monkeypatch)
    plain = bundle(LLAMA, target="tensorrt")
    refuse(EngineError, plain)
    assert f"shallow of this bundle is not built; run: freeexport convert {plain} --build" in refused[-1]
    for options, error, message in (
        ({"architecture": (8, 9)}, EngineError, "was built for sm90, this GPU is sm89; run: freeexport convert"),
        ({"driver": 0}, DeviceError, "no NVIDIA driver"),
        ({"free_bytes": 100_000}, CapacityError, "bytes of device cuda:0, and 100000 are free"),
    ):
        fake = fake_device.install(monkeypatch, **options)  # type: ignore[arg-type]
        refuse(error)
        assert message in refused[-1]
        assert fake.allocated == 0
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refuse(EngineError)
    assert "pip install 'freeexport[tensorrt]'" in refused[-1]


def test_more_slots_than_the_engine_batch_are_refused_with_both_remedies(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(LLAMA, max_batch=2)
    fake_device.install(monkeypatch)
    with pytest.raises(OptionError, match=r"slots is 3, .* take 2 sequences per call; choose slots=2, .*--build 3"):
        Session(path, device="cuda:0", slots=3)


def test_unaligned_slot_size_is_refused_for_several_slots(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(BY_NAME["llama-tied"], capacity=127, max_pending=4)
    fake_device.install(monkeypatch)
    with pytest.raises(CapacityError, match=r"needs a multiple of 256 .*slots=1"):
        Session(path, device="cuda:0", slots=2)
    with Session(path, device="cuda:0", slots=1) as session:
        assert session.generate([5, 6], max_new_tokens=3).token_ids
