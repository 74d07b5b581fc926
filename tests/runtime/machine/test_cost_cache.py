"""A session where the bundle records no costs learns them from its requests, and later sessions act on them."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import CASES, PROMPTS
from conftest import Bundles
from manifest_case import MANIFEST as A_MANIFEST

from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import MANIFEST, File
from runtime.errors import OptionError
from runtime.machine.cost_cache import LEAST, MOST_FILES, OLDEST, VARIABLE, CostCache, costs_for
from runtime.machine.machine import host
from runtime.scheduling.batching import rules_of

LLAMA = next(case for case in CASES if case.name == "llama-tied")
HERE = host(threads=1)
ELSEWHERE = replace(A_MANIFEST, costs=Costs(0.002, 0.001, {1: 0.01, 8: 0.01}, host=replace(HERE, processor="another")))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, "on")
    return tmp_path / "cache" / "freeexport" / "costs"


def taught(manifest: object = ELSEWHERE, requests: int = LEAST + 1) -> CostCache:
    """After requests whose steps take 4 ms, and passes 10 and 12."""
    _, cache = costs_for(manifest, 1, on_cpu=True)  # type: ignore[arg-type]
    assert cache is not None
    for _ in range(requests):
        cache.learn(head=True, steps=10, shallow=0.04, outside=0.001, passes={1: 0.01, 4: 0.012})
    return cache


def test_enough_requests_give_costs_that_the_next_session_finds(folder: Path) -> None:
    assert costs_for(ELSEWHERE, 1, on_cpu=True)[0] is None
    assert taught(requests=LEAST).known is None
    assert not folder.exists()
    learned = taught().known
    assert learned is not None
    assert learned.deep == {1: 0.01, 4: 0.012}
    # The step without the head was not seen: half, as on the other machine.
    assert (learned.shallow, learned.shallow_without_head) == (0.004, 0.002)
    assert costs_for(ELSEWHERE, 1, on_cpu=True) == (learned, None)
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_steps_without_the_head_are_learned_from_mode_full() -> None:
    cache = taught(requests=1)
    for _ in range(LEAST):
        cache.learn(head=True, steps=10, shallow=0.04, outside=0.001, passes={1: 0.01, 4: 0.012})
        cache.learn(head=False, steps=10, shallow=0.03, outside=0.002, passes={1: 0.01})
    for _ in range(8 * LEAST):
        cache.learn(head=False, steps=10, shallow=0.03, outside=0.002, passes={1: 0.01})
    assert cache.known is not None
    assert (cache.known.shallow_without_head, cache.known.outside.full) == (0.003, 0.0002)


def test_requests_that_say_too_little_teach_nothing(folder: Path) -> None:
    cache = taught(requests=0)
    for _ in range(4 * LEAST):
        cache.learn(head=True, steps=2, shallow=0.04, outside=0.001, passes={1: 0.01, 4: 0.012})
        cache.learn(head=True, steps=10, shallow=0.04, outside=0.001, passes={1: 0.01})
    assert cache.known is None
    assert not folder.exists()


def test_other_engines_threads_or_processors_have_files_of_their_own() -> None:
    taught()
    assert costs_for(ELSEWHERE, 2, on_cpu=True)[0] is None
    assert costs_for(replace(ELSEWHERE, files={"deep.onnx": File(20, "00" * 32)}), 1, on_cpu=True)[0] is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"shallow": -1}', "foreign", "old", "large", "unsound"])
def test_a_damaged_or_foreign_file_is_passed_over(damage: str, folder: Path) -> None:
    taught()
    (path,) = folder.iterdir()
    content = json.loads(path.read_text())
    if damage == "foreign":
        path.write_text(json.dumps({**content, "host": {**content["host"], "processor": "another"}}))
    elif damage == "unsound":
        path.write_text(json.dumps({**content, "shallow": -1.0}))
    elif damage == "old":
        os.utime(path, (0, time.time() - OLDEST - 1))
    elif damage == "large":
        path.write_text(path.read_text() + " " * (1 << 17))
    else:
        path.write_text(damage)
    known, cache = costs_for(ELSEWHERE, 1, on_cpu=True)
    assert known is None
    assert cache is not None
    assert taught().known == costs_for(ELSEWHERE, 1, on_cpu=True)[0]


def test_files_are_bounded_and_the_oldest_go(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(MOST_FILES):
        (folder / f"{number}.json").write_text("{}")
        os.utime(folder / f"{number}.json", (number, number))
    taught()
    assert len(list(folder.iterdir())) == MOST_FILES
    assert not (folder / "0.json").exists()


def test_a_folder_that_cannot_be_made_costs_nothing_but_the_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert taught().known is not None


def test_it_can_be_turned_off_and_other_words_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taught()
    monkeypatch.setenv(VARIABLE, "off")
    assert costs_for(ELSEWHERE, 1, on_cpu=True) == (None, None)
    monkeypatch.setenv(VARIABLE, "perhaps")
    with pytest.raises(OptionError, match="FREEEXPORT_COST_CACHE is 'perhaps'; choose 'on' or 'off'"):
        costs_for(ELSEWHERE, 1, on_cpu=True)


def test_nothing_is_kept_where_the_bundle_knows_this_machine_or_on_a_gpu() -> None:
    known = replace(A_MANIFEST, costs=replace(ELSEWHERE.costs or Costs(1, 1, {1: 1}), host=HERE))
    assert costs_for(known, 1, on_cpu=True) == (known.costs, None)
    assert costs_for(ELSEWHERE, 1, on_cpu=False) == (None, None)


def test_a_session_learns_from_requests_of_its_own_calls_alone(bundle: Bundles, tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(bundle(LLAMA), path)
    manifest = replace(Bundle.open(path).manifest, costs=None)
    (path / MANIFEST).write_text(manifest.to_json())
    # From none to most: passes over one row and over several.
    options = {"threshold": 0.02, "output_confidence": True, "max_new_tokens": 40, "ignore_eos": True}
    with Session(path, threads=1) as session:
        for _ in range(2 * LEAST):
            session.generate([list(prompt) for prompt in PROMPTS], **options)
        assert not folder.exists()
        for _ in range(LEAST + 1):
            result = session.generate(list(PROMPTS[0]), **options)
            session.generate(list(PROMPTS[0]), **options | {"threshold": 1.0})
        assert len(result.stats.sync_sizes) > 1
    with Session(path, threads=1) as session:
        known = session.draft_lengths.costs.base
        assert known.host == HERE
        assert session._scheduler._calls.rules == rules_of(known)._replace(packed=manifest.packed)
