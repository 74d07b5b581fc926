"""Ours beside peers: who runs, who cannot, and what they are compared by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_peer
import pytest
from checkpoints import BY_NAME, Bundles, Case

from freeexport.evaluate.settings import EvaluateOptions, Setting, entries_of
from runtime.errors import FreeExportError, OptionError
from tools.peers import compare as comparing
from tools.peers.catalog import PEERS, Peer, find_source
from tools.peers.compare import Contender, compare, measure
from tools.peers.prompts import first_tokens
from tools.peers.worker import PeerError, Worker

LLAMA = BY_NAME["llama-tied"]
T5 = BY_NAME["t5-gated-tied"]
ROOT = Path(__file__).parents[3]
PROGRAM = "import sys, runpy; sys.path[:0] = sys.argv[1:3]; runpy.run_path(sys.argv[3], run_name='__main__')"
COMMAND = [sys.executable, "-c", PROGRAM, str(ROOT), str(ROOT / "tests"), fake_peer.__file__]
FULL = ((Path(), ("full",)),)
OPTIONS = EvaluateOptions(FULL, max_new_tokens=3, rounds=2, threads=1)  # type: ignore[arg-type]


def contender(name: str, ours: bool = False) -> Contender:
    return Contender(name, "fp32", COMMAND, "", {}, Setting("full") if ours else None)


def test_everyone_runs_in_every_round_and_failures_stop_nobody_else() -> None:
    missing = replace(contender("missing"), command=["/nowhere/python"])
    everyone = [missing, contender("good"), contender("bad")]
    runs, versions, failed = measure(everyone[:2], [[5], [6]], OPTIONS, settle=0)
    assert list(failed) == ["missing"]
    assert "cannot be started" in failed["missing"]
    tokens = {line: [one.token_ids for one in turns] for line, turns in runs["good"].items()}
    assert tokens == {1: [(6, 7, 8)] * 2, 2: [(7, 8, 9)] * 2}
    assert [one.round for one in runs["good"][2]] == [0, 1]
    assert versions == {"good": {"fake": "1.0"}}
    runs, _, failed = measure(everyone[2:], [[5], [fake_peer.DIES]], OPTIONS, settle=0)
    assert "ended with code 3" in failed["bad"]
    assert not runs


def test_prompts_are_timed_to_their_first_token() -> None:
    missing = replace(contender("missing"), command=["/nowhere/python"])
    rows, failed = first_tokens([missing, contender("good"), contender("again")], [3, 5], 2, 2, 1, vocabulary=4)
    assert [(row["length"], row["name"]) for row in rows] == [(3, "good"), (3, "again"), (5, "good"), (5, "again")]
    assert all(row["tokens_per_second"] == pytest.approx(1e3 * row["length"] / row["first_token_ms"]) for row in rows)
    assert rows[0]["ratio"] == rows[2]["ratio"] == rows[2]["decode_ratio"] == 1
    assert list(failed) == ["missing"]


def test_ours_may_not_fail() -> None:
    with pytest.raises(FreeExportError, match=r"^ours: ValueError: cannot read this$"):
        measure([contender("ours", ours=True)], [[fake_peer.FAILS]], OPTIONS, settle=0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, cache: None) -> Callable[..., None]:
    """Put a peer in the catalogue that this interpreter runs."""
    monkeypatch.setattr(comparing, "peer_command", lambda peer: COMMAND)
    monkeypatch.setattr(comparing, "bandwidth_of", lambda threads: 1e10)
    monkeypatch.setattr(comparing, "SETTLE", 0.0)

    def add(name: str, **changes: Any) -> None:
        monkeypatch.setitem(PEERS, name, replace(PEERS["hf"], name=name, **changes))

    return add


def test_bundles_the_checkpoint_and_peers_in_one_run(
    bundle: Bundles, checkpoint: Callable[[Case], Path], fake: Callable[..., None], tmp_path: Path
) -> None:
    fake("fake")
    fake("converted", converts=True)
    fake("unconvertible", converts=True, options={"unconvertible": True})
    fake("gguf-only", gguf=True)
    methods = ("full", "free")
    options = replace(OPTIONS, bundles=((bundle(LLAMA), methods),), samples=1, rounds=1, thresholds=(0.0,))
    source = str(checkpoint(LLAMA))
    found = compare(options, [source, "fake", "converted", "unconvertible", "gguf-only"], None)
    assert found["failed"]["unconvertible"] == "its model cannot be converted: ValueError: no such layer"
    assert "it reads GGUF files" in found["failed"]["gguf-only"]
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["transformers", "fake", "converted", "full", "free 0"]
    assert rows["full"]["agreement"] == 1
    assert rows["fake"]["agreement"] < 1
    assert rows["fake"]["versions"] == {"fake": "1.0"}
    assert rows["free 0"]["exit_rate"] == 1
    assert rows["full"]["token_bytes"] > 0
    assert all(row["peak_bytes"] > 1 << 20 for row in rows.values())
    models = next((tmp_path / "cache" / "freeexport" / "peers" / "models").iterdir())
    # The checkpoint is a plain directory: it is not copied.
    assert [path.name.split("-")[0] for path in models.iterdir()] == ["converted"]


def test_what_a_peer_cannot_run_or_have_is_said(
    bundle: Bundles, checkpoint: Callable[[Case], Path], fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("fake", decoder_only=True)
    entries = entries_of(replace(OPTIONS, bundles=((bundle(T5), ("full",)),)))
    manifest = entries[0].bundle.manifest
    found = find_source(manifest, str(checkpoint(T5)))
    contenders, failed = comparing.contenders_of(["fake"], found, entries)
    assert [one.name for one in contenders] == ["full"]
    assert "it supports decoder-only models" in failed["fake"]

    def unavailable(peer: Peer) -> list[str]:
        raise PeerError("its environment cannot be built (No matching distribution)")

    monkeypatch.setattr(comparing, "peer_command", unavailable)
    _, failed = comparing.contenders_of(["genai"], found, entries)
    assert failed == {"genai": "its environment cannot be built (No matching distribution)"}
    with pytest.raises(OptionError, match="give it with --model"):
        comparing.contenders_of(["genai"], None, entries)
    with pytest.raises(OptionError, match="is not the checkpoint that the bundle came from"):
        find_source(manifest, str(checkpoint(LLAMA)))


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(COMMAND, {})
    made.ask({"op": "load", "model": "", "threads": 1, "cpus": [], "options": {}}, 60)
    yield made
    made.close()


def generate(last: int, tokens: int = 3) -> dict[str, Any]:
    return {"op": "generate", "prompt": [last], "tokens": tokens}


def test_a_worker_answers_whatever_libraries_print_and_after_failures(worker: Worker) -> None:
    with pytest.raises(PeerError, match=r"^ValueError: cannot read this$"):
        worker.ask(generate(fake_peer.FAILS), 60)
    with pytest.raises(PeerError, match="generated 2 tokens instead of 3"):
        worker.ask(generate(fake_peer.SHORT), 60)
    answer = worker.ask(generate(7), 60)
    assert answer["tokens"] == [8, 9, 10]
    assert answer["times"] == sorted(answer["times"])
    assert 0 < answer["times"][0] < answer["times"][-1] <= answer["seconds"]
    assert answer["peak_bytes"] > 1 << 20


@pytest.mark.parametrize(
    ("last", "limit", "said", "then"),
    [
        (fake_peer.DIES, 60, "ended with code 3.*the last words", "ended with code 3"),
        (fake_peer.HANGS, 0.2, "generate took more than 0 s and was stopped", "its process was stopped"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_reported(worker: Worker, last: int, limit: float, said: str, then: str) -> None:
    with pytest.raises(PeerError, match=said):
        worker.ask(generate(last), limit)
    with pytest.raises(PeerError, match=then):
        worker.ask(generate(1), 60)
