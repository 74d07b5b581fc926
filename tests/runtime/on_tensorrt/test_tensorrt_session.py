"""Sessions on TensorRT engines, on the fakes: the tokens of the CPU on the same graphs, whatever the device takes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_device
import pytest
from checkpoints import PROMPTS, Bundles
from device_cases import BY_NAME, LLAMA, MODES, T5, both

from graphs.tensorrt.build import BuildOptions, build
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.errors import CapacityError, DeviceError, EngineError, OptionError
from runtime.tensorrt.files import DIRECTORY

Built = Callable[..., Path]


@pytest.fixture
def built(bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    """A bundle with its engines."""

    def make(case: Any, max_batch: int = 4, **options: Any) -> Path:
        path = bundle(case, target="tensorrt", **options)
        copy = shutil.copytree(path, tmp_path / "bundle")
        with monkeypatch.context() as patched:
            fake_device.install(patched)
            build(Bundle.open(copy), BuildOptions(max_batch=max_batch))
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


@both
@pytest.mark.parametrize("mode", MODES)
def test_tokens_exits_and_confidences_are_those_of_the_cpu(
    case: Any, mode: str, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(case)
    want = expected(path, **MODES[mode])
    for seed, (overlap, graphs) in enumerate([(False, False), (True, False), (True, True)]):
        fake = fake_device.install(monkeypatch, seed)
        with Session(path, device="cuda:0", overlap=overlap, cuda_graphs=graphs, threads=1) as session:
            assert answers(session, **MODES[mode]) == want
        assert bool(fake.launches) is graphs
        assert {name for name, *_ in sys.modules["tensorrt"].runs} >= (
            {"shallow"} if mode == "shallow" else {"shallow", "deep"}
        )
        assert (fake.allocated, fake.graphs, fake.alive) == (0, 0, (0, 0))


@both
def test_lanes_have_streams_of_their_own(case: Any, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device.install(monkeypatch)
    with Session(built(case), device="cuda:0") as session:
        session.generate(list(PROMPTS[0]), max_new_tokens=8, threshold=0.5)
    streams = {(name, stream) for name, _, stream in sys.modules["tensorrt"].runs}
    assert len({stream for name, stream in streams if name == "shallow"}) == 1
    assert len({stream for name, stream in streams if name in ("shallow", "deep")}) == 2


@both
@pytest.mark.parametrize("seed", range(2))
def test_several_requests_share_calls(case: Any, seed: int, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path, prompts = built(case), [list(prompt) for prompt in PROMPTS * 2]
    options: dict[str, Any] = {"max_new_tokens": 16, "threshold": 0.5}
    with Session(path, threads=1) as session:
        want = [result.token_ids for result in session.generate(prompts, **options)]
    fake_device.install(monkeypatch, seed)
    with Session(path, device="cuda:0", overlap=bool(seed), slots=3) as session:
        assert [result.token_ids for result in session.generate(prompts, **options)] == want


def test_beams_are_those_of_the_cpu(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(T5)
    options: dict[str, Any] = {"num_beams": 3, "mode": "full", "max_new_tokens": 10}
    with Session(path, threads=1) as session:
        want = [session.generate(list(prompt), **options).token_ids for prompt in PROMPTS]
    fake_device.install(monkeypatch)
    with Session(path, device="cuda:0") as session:
        assert [session.generate(list(prompt), **options).token_ids for prompt in PROMPTS] == want


def test_a_bundle_whose_engines_are_not_built_says_what_to_run(
    bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(LLAMA, target="tensorrt")
    fake_device.install(monkeypatch)
    with pytest.raises(
        EngineError, match=rf"shallow of this bundle is not built; run: freeexport convert {path} --build"
    ):
        Session(path, device="cuda:0")


def test_engines_of_another_gpu_or_version_are_errors(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(LLAMA)
    fake_device.install(monkeypatch, architecture=(8, 9))
    with pytest.raises(EngineError, match=r"was built for sm90, this GPU is sm89; run: freeexport convert"):
        Session(path, device="cuda:0")
    fake_device.install(monkeypatch, version="11.5.0")
    with pytest.raises(EngineError, match=r"was built by version 11.4.0.106, here is 11.5.0; run: freeexport convert"):
        Session(path, device="cuda:0")


def test_no_driver_is_an_error(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(LLAMA)
    fake_device.install(monkeypatch, driver=0)
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        Session(path, device="cuda:0")


def test_without_the_package_it_says_what_to_install(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(LLAMA)
    fake_device.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"pip install 'freeexport\[tensorrt\]'"):
        Session(path, device="cuda:0")


def test_too_little_memory_names_needed_and_free_bytes_and_leaves_nothing(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(LLAMA)
    fake = fake_device.install(monkeypatch, free_bytes=100_000)
    with pytest.raises(CapacityError, match=r"needs \d+ bytes of device cuda:0, and 100000 are free"):
        Session(path, device="cuda:0")
    assert fake.allocated == 0


def test_more_slots_than_a_call_takes_are_refused_with_both_ways_out(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(LLAMA, max_batch=2)
    fake_device.install(monkeypatch)
    with pytest.raises(OptionError, match=r"slots is 3, .* take 2 sequences a call; choose slots=2, .*--build 3"):
        Session(path, device="cuda:0", slots=3)


def test_a_slot_that_does_not_end_where_tensorrt_wants_it_is_refused_for_several(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(BY_NAME["llama-tied"], capacity=127, max_pending=4)
    fake_device.install(monkeypatch)
    with pytest.raises(CapacityError, match=r"no multiple of 256 .*slots=1"):
        Session(path, device="cuda:0", slots=2)
    with Session(path, device="cuda:0", slots=1) as session:
        assert session.generate([5, 6], max_new_tokens=3).token_ids


def test_a_lost_device_ends_the_request_and_the_session_can_be_closed(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(LLAMA)
    fake = fake_device.install(monkeypatch)
    with Session(path, device="cuda:0") as session:
        session.generate([5, 6], max_new_tokens=3)
        fake.lose(after=20)
        with pytest.raises(DeviceError, match="lost"):
            session.generate([5, 6], max_new_tokens=50, ignore_eos=True)
        with pytest.raises(DeviceError, match="close the session"):
            session.generate([5, 6], max_new_tokens=3)


def test_a_damaged_engine_is_found_by_full_verification(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(LLAMA)
    (file,) = (path / DIRECTORY).glob("deep-*.engine")
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    fake_device.install(monkeypatch)
    with pytest.raises(EngineError, match="is not the file that was built"):
        Session(path, device="cuda:0", verify="full")
