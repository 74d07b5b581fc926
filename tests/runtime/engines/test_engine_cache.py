"""Engines from the cache compute what the bundle's own do, and what cannot be trusted there is not used."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, PROMPTS
from conftest import Bundles

from runtime import Bundle, CacheError, GenerationResult, OptionError, Session, SessionOptions
from runtime.engines.packed_cache import cache_root, clear, entries, find, write
from runtime.engines.packed_entry import ENTRY, read_entry

BY_NAME = {case.name: case for case in CASES}
LLAMA, T5 = BY_NAME["llama-tied"], BY_NAME["t5-relu-tied"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of the test's own, which sessions use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FREEEXPORT_CACHE", "use")
    return tmp_path / "cache" / "freeexport" / "engines"


@pytest.fixture
def llama(bundle: Bundles) -> Bundle:
    return Bundle.open(bundle(LLAMA))


def decode(path: Path, **options: Any) -> GenerationResult:
    """Sampled with log-probabilities, so that any other logit shows."""
    with Session(path, threads=1, slots=1, **options) as session:
        return session.generate(PROMPTS[0], max_new_tokens=12, threshold=0.3, temperature=1.0, seed=1, **LOGS)


LOGS = {"output_logprobs": True, "ignore_eos": True}


def same(first: GenerationResult, second: GenerationResult) -> bool:
    return (first.token_ids, first.confidence, first.logprobs) == (
        second.token_ids,
        second.confidence,
        second.logprobs,
    )


@pytest.mark.parametrize("precision", ["fp32", "int8", "mixed", "int4"])
@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: str(case.name))
def test_engines_from_the_cache_give_the_same_tokens_and_logits(case: Any, precision: str, bundle: Bundles) -> None:
    path = bundle(case, precision=precision)
    expected = decode(path, cache="off")
    assert find(Bundle.open(path)) is None
    assert same(decode(path, cache="write"), expected)
    assert find(Bundle.open(path)) is not None
    assert same(decode(path), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_from_the_cache(bundle: Bundles) -> None:
    path = bundle(LLAMA, precision="fp32")
    place = str(write(Bundle.open(path)))
    for cache, mapped in (("use", True), ("off", False)):
        with Session(path, threads=1, cache=cache):
            assert (place in Path("/proc/self/maps").read_text()) is mapped


def test_without_being_asked_nothing_is_written(llama: Bundle) -> None:
    decode(llama.path)
    assert not cache_root().exists()


def test_the_bundle_stays_as_it_is(llama: Bundle) -> None:
    before = sorted((file.name, file.stat().st_mtime_ns) for file in llama.path.iterdir())
    write(llama)
    assert sorted((file.name, file.stat().st_mtime_ns) for file in llama.path.iterdir()) == before
    Bundle.open(llama.path, verify="full")


def _truncate(place: Path) -> None:
    os.truncate(place / "deep.data", 100)


def _lose(place: Path) -> None:
    (place / "deep.data").unlink()


def _garble(place: Path) -> None:
    (place / ENTRY).write_text("{")


def _newer(place: Path) -> None:
    text = (place / ENTRY).read_text()
    (place / ENTRY).write_text(text.replace('"schema_version": 1', '"schema_version": 2'))


def _unlist(place: Path) -> None:
    text = (place / ENTRY).read_text()
    (place / ENTRY).write_text(text.replace('"deep.onnx"', '"other.onnx"'))
    shutil.copy2(place / "deep.onnx", place / "other.onnx")


def _change_graph(place: Path) -> None:
    """With the size and the time that it had."""
    file = place / "deep.onnx"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _open_to_others(place: Path) -> None:
    place.chmod(0o777)


def _open_file(place: Path) -> None:
    (place / "deep.data").chmod(0o666)


def _link(place: Path) -> None:
    (place / "deep.data").rename(place.parent / "elsewhere")
    (place / "deep.data").symlink_to(place.parent / "elsewhere")


@pytest.mark.parametrize(
    "harm",
    [_truncate, _lose, _garble, _newer, _unlist, _change_graph, _open_to_others, _open_file, _link],
    ids=lambda harm: harm.__name__,
)
def test_an_entry_that_is_not_as_it_was_written_is_not_used(
    harm: Callable[[Path], None], llama: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    expected = decode(llama.path, cache="off")
    harm(write(llama))
    assert find(llama) is None
    assert "freeexport cache clear" in caplog.text
    assert same(decode(llama.path), expected)
    assert same(decode(llama.path, cache="write"), expected)
    assert find(llama) is not None, "written again"


def test_damaged_packed_weights_are_found_by_onnx_runtime(bundle: Bundles, caplog: pytest.LogCaptureFixture) -> None:
    """With the size and the time that the file had: nothing else would see it."""
    import onnx

    path = bundle(LLAMA, precision="int8")
    expected = decode(path, cache="off")
    place = write(Bundle.open(path))
    graph = onnx.load(str(place / "deep.onnx"), load_external_data=False).graph
    packed = [item.value for tensor in graph.initializer for item in tensor.external_data if "prepacked" in item.key]
    offset = int(packed[0].split("|")[1].split(";")[0])
    data = place / "deep.data"
    status = data.stat()
    with data.open("r+b") as file:
        file.seek(offset + 8)
        file.write(b"\x55" * 8)
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert find(Bundle.open(path)) == place
    assert same(decode(path), expected)
    assert "the engine cache is not used" in caplog.text


def test_a_session_that_checks_everything_takes_the_bundle_alone(
    llama: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(llama)
    monkeypatch.setattr("runtime.engines.packed_cache.find", lambda _: pytest.fail("asked the cache"))
    decode(llama.path, verify="full")


def test_another_onnx_runtime_or_processor_has_an_entry_of_its_own(
    llama: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(llama)
    with monkeypatch.context() as patched:
        patched.setattr("runtime.engines.packed_cache.build_of_onnxruntime", lambda: "0.1")
        assert find(llama) is None
    monkeypatch.setattr("runtime.engines.packed_cache.cpu_features", lambda: frozenset({"abacus"}))
    assert find(llama) is None


def test_a_full_disk_is_an_error_and_a_session_goes_on(
    llama: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**12, 10**12, 1000))
    with pytest.raises(CacheError, match=r"may need .* is free at .*; free some"):
        write(llama)
    expected = decode(llama.path, cache="off")
    with caplog.at_level(logging.WARNING):
        assert same(decode(llama.path, cache="write"), expected)
    assert "is free at" in caplog.text
    assert not list(cache_root().iterdir())


def test_a_cache_that_cannot_be_written_is_an_error(llama: Bundle, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the directory should be")
    with pytest.raises(CacheError, match=r"cannot be written \(.*; free space, or go without it"):
        write(llama)


def test_a_write_that_fails_leaves_nothing(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: Path, directory: Path) -> None:
        (directory / graph.name).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.engines.packed_cache.save_packed", fail)
    with pytest.raises(CacheError, match="No space left"):
        write(llama)
    assert not list(cache_root().iterdir())


def test_what_a_killed_process_left_is_removed_once_it_is_old(llama: Bundle) -> None:
    root = cache_root()
    for name, age in ((".making-old", 7200), (".making-new", 60)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age, time.time() - age))
    write(llama)
    assert sorted(path.name for path in root.glob(".making-*")) == [".making-new"]


def test_entries_not_used_for_longest_make_room(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (Bundle.open(bundle(LLAMA, precision=name)) for name in ("fp32", "int8", "int4"))
    for age, item in ((200, first), (100, second)):
        os.utime(write(item) / ENTRY, (time.time() - age, time.time() - age))
    find(first)  # used again
    held = sum(entry.bytes for _, entry, _ in entries() if entry)
    monkeypatch.setenv("FREEEXPORT_CACHE_GB", str((held + 4 * third.manifest.weight_bytes - 1) / 1e9))
    write(third)
    assert [find(item) is not None for item in (first, second, third)] == [True, False, True]
    monkeypatch.setenv("FREEEXPORT_CACHE_GB", "0")
    with pytest.raises(CacheError, match=r"the limit is 0 GB; set FREEEXPORT_CACHE_GB"):
        write(second)


def test_two_that_write_at_once_end_with_one_entry(llama: Bundle) -> None:
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(write, [llama] * 4))
    assert len(places) == 1
    assert [path.name for path in cache_root().iterdir()] == [places.pop().name]


def test_clearing_takes_the_entries_of_one_bundle_or_all(bundle: Bundles) -> None:
    first, second = (Bundle.open(bundle(LLAMA, precision=name)) for name in ("fp32", "int8"))
    write(first)
    place = write(second)
    assert read_entry(place).bundle == str(second.path.resolve())
    assert clear(first) == 1
    assert [path for path, _, _ in entries()] == [place]
    assert clear() == 1
    assert not list(entries())


@pytest.mark.parametrize("value", ["on", "", 1, True])
def test_another_use_is_an_error(value: Any) -> None:
    with pytest.raises(OptionError, match=r"cache is .*; choose 'use', 'write' or 'off'"):
        Session("bundle", cache=value)


def test_the_environment_says_what_an_option_leaves_open(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEEXPORT_CACHE", "write")
    decode(llama.path)
    assert find(llama) is not None
    monkeypatch.delenv("FREEEXPORT_CACHE")
    assert SessionOptions().cache == "off"
    monkeypatch.setenv("FREEEXPORT_CACHE", "maybe")
    with pytest.raises(OptionError, match="FREEEXPORT_CACHE is 'maybe'"):
        decode(llama.path)
    monkeypatch.setenv("FREEEXPORT_CACHE_GB", "much")
    clear()
    with pytest.raises(CacheError, match="FREEEXPORT_CACHE_GB is 'much'"):
        write(llama)
