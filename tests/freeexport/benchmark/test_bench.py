from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_peer
import pytest
from checkpoints import CASES, Case, load
from click.testing import CliRunner, Result
from conftest import Bundles

from freeexport.benchmark import benchmark
from freeexport.benchmark.peers import model as peer_model
from freeexport.benchmark.peers.catalog import PEERS, SCRIPTS, find_peer
from freeexport.benchmark.peers.environment import PeerError
from freeexport.cli import main
from freeexport.system import idle
from runtime.errors import OptionError

LLAMA = next(case for case in CASES if case.name == "llama-tied")
T5 = next(case for case in CASES if case.name == "t5-gated-tied")
FEW = ("--max-new-tokens", "3", "--samples", "1", "--rounds", "1", "--threads", "1")


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "cores_in_use", lambda: 0.0)
    monkeypatch.setattr(benchmark, "bandwidth_of", lambda threads: 1e10)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Puts a peer in the catalogue that this interpreter runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("freeexport.benchmark.contenders.installed", lambda peer: Path(sys.executable))
    program = "import sys, runpy; sys.path[:0] = sys.argv[1:3]; runpy.run_path(sys.argv[3], run_name='__main__')"
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", program, str(root), str(root / "tests"), fake_peer.__file__]
    for module in ("freeexport.benchmark.contenders", "freeexport.benchmark.peers.model"):
        monkeypatch.setattr(f"{module}.peer_command", lambda peer, interpreter: command)

    def add(name: str, **changes: Any) -> None:
        monkeypatch.setitem(PEERS, name, replace(PEERS["hf"], name=name, **changes))

    return add


def test_a_busy_machine_is_refused(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "cores_in_use", lambda: 1.0)
    result = bench(bundle(LLAMA), *FEW)
    assert result.exit_code == 1
    assert "other processes keep 1.0 cores busy" in result.output
    assert "bench" not in result.stdout


def test_work_that_begins_in_between_withholds_the_ratios(
    bundle: Bundles, calm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "is_idle", lambda: False)
    found = json.loads(bench(bundle(LLAMA), *FEW, "--json").stdout)
    assert [row["ratio"] for row in found["rows"]] == [None]
    assert not found["settings"]["idle"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--against", "optimun"), "did you mean optimum? known are hf, hf-compile"),
        (("--against", "nothing-like-it"), "known are hf, hf-compile"),
        (("--against", "hf", "--against", "hf"), "--against names hf twice"),
        (("--against", "hf"), "give it with --model"),
        (("--replay", "1.5"), "no rate of exits"),
        (("--replay", "missing.jsonl"), "there is no such file"),
        (("--replay-drafts", "1.5"), "no share of right drafts"),
        (("--drafts", "lookup", "--drafts", "lookup"), "--drafts names lookup twice"),
        (("--threshold", "2"), "choose one from 0 to 1"),
        (("--device", "gpu"), "device is 'gpu'"),
        (("--device", "cuda:0"), "convert again with --target cuda"),
        (("--save", "/nowhere/x.json"), "no directory /nowhere"),
        (("--plot", "x.pdf"), "no PNG"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], said: str, bundle: Bundles) -> None:
    result = bench(bundle(LLAMA), *FEW, *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_checkpoint_of_another_bundle_is_refused(
    bundle: Bundles, checkpoint: Callable[[Case], Path], calm: None
) -> None:
    result = bench(bundle(LLAMA), *FEW, "--against", "hf", "--model", checkpoint(T5))
    assert "is not the checkpoint that the bundle came from" in result.stderr
    result = bench(bundle(LLAMA), *FEW, "--also", bundle(T5))
    assert "is of another checkpoint" in result.stderr


def test_paths_and_hub_names_are_no_peers(tmp_path: Path) -> None:
    assert find_peer("organisation/model") is None
    assert find_peer(str(tmp_path)) is None
    with pytest.raises(OptionError, match="did you mean genai-int4"):
        find_peer("genai_int4")


def test_bundles_the_checkpoint_and_peers_in_one_run(
    bundle: Bundles, checkpoint: Callable[[Case], Path], calm: None, fake: Callable[..., None], tmp_path: Path
) -> None:
    fake("fake")
    fake("converted", converts=True)
    fake("unconvertible", converts=True, options={"unconvertible": True})
    fake("gguf-only", gguf=True)
    source, save, plot = checkpoint(LLAMA), tmp_path / "saved.json", tmp_path / "plot.png"
    peers = [part for name in ("fake", "converted", "unconvertible", "gguf-only") for part in ("--against", name)]
    exits = ("--threshold", "0", "--replay", "0.5", "--replay-drafts", "1", "--save", save, "--plot", plot)
    result = bench(bundle(LLAMA), *FEW, "--against", source, *peers, *exits)
    assert result.exit_code == 0, result.output
    assert "unconvertible: not run: its model cannot be converted: ValueError: no such layer" in result.stdout
    assert "gguf-only: not run: it reads GGUF files" in result.stdout
    found = json.loads(save.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    replayed = ["free, exits replayed: 0.5", "lossless, drafts replayed: 1 right"]
    assert list(rows) == ["transformers", "fake", "converted", "full", "free, threshold 0", *replayed]
    assert rows[replayed[1]]["agreement"] == 1
    assert rows["full"]["agreement"] == 1
    assert rows["fake"]["agreement"] < 1
    assert rows["fake"]["versions"] == {"fake": "1.0"}
    assert rows["free, threshold 0"]["exit_rate"] == 1
    assert rows["free, exits replayed: 0.5"]["predicted"] > 0
    assert rows["full"]["token_bytes"] > 0
    assert found["bandwidth"] == 1e10
    assert plot.read_bytes().startswith(b"\x89PNG")
    models = next((tmp_path / "cache" / "freeexport" / "peers" / "models").iterdir())
    assert [path.name.split("-")[0] for path in models.iterdir()] == ["converted"]


def test_the_shallow_decoder_alone_is_a_row_without_a_threshold(bundle: Bundles, calm: None) -> None:
    found = json.loads(bench(bundle(LLAMA), *FEW, "--mode", "shallow", "--threshold", "0.5", "--json").stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["full", "shallow"]
    assert (rows["shallow"]["exit_rate"], rows["shallow"]["passes"]) == (1, 0)
    both = json.loads(bench(bundle(LLAMA), *FEW, "--mode", "shallow", "--mode", "free", "--json").stdout)
    assert [row["name"] for row in both["rows"]] == ["full", "shallow"]


def test_decoders_of_one_kind_refuse_the_other(
    bundle: Bundles,
    checkpoint: Callable[[Case], Path],
    calm: None,
    fake: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake("fake", decoder_only=True)
    monkeypatch.setattr(benchmark, "reference_answers", lambda *arguments: (None, None))
    result = bench(bundle(T5), *FEW, "--against", "fake", "--model", checkpoint(T5))
    assert "fake: not run: it runs decoder-only models" in result.stdout
    assert "full" in result.stdout


def test_a_peer_that_cannot_be_installed_is_reported(
    bundle: Bundles, checkpoint: Callable[[Case], Path], calm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(peer: Any) -> Path:
        raise PeerError("its environment cannot be built (No matching distribution)")

    monkeypatch.setattr("freeexport.benchmark.contenders.installed", installed)
    monkeypatch.setattr(benchmark, "reference_answers", lambda *arguments: (None, None))
    found = json.loads(bench(bundle(LLAMA), *FEW, "--against", "genai", "--model", checkpoint(LLAMA), "--json").stdout)
    assert found["failed"] == {"genai": "its environment cannot be built (No matching distribution)"}
    assert [row["name"] for row in found["rows"]] == ["full"]


def test_several_bundles_are_told_apart(bundle: Bundles, calm: None) -> None:
    other = bundle(LLAMA, 2)
    found = json.loads(bench(bundle(LLAMA), *FEW, "--also", other, "--json").stdout)
    assert len(found["rows"]) == 2
    assert "two rows would be called" in bench(bundle(LLAMA), *FEW, "--also", bundle(LLAMA)).stderr


def test_peer_models_need_no_copy_of_a_plain_checkpoint(bundle: Bundles, checkpoint: Callable[[Case], Path]) -> None:
    from runtime.bundle.bundle import Bundle

    source = peer_model.Source.of(Bundle.open(bundle(LLAMA)).manifest, str(checkpoint(LLAMA)))
    assert source is not None
    assert source.plain == checkpoint(LLAMA)
    assert source.gguf is None


def test_each_source_of_drafts_is_a_row_that_equals_full(bundle: Bundles, calm: None) -> None:
    drafts = [part for source in ("auto", "exit", "lookup") for part in ("--drafts", source)]
    found = json.loads(bench(bundle(LLAMA), *FEW, *drafts, "--json").stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["full", "lossless, drafts: auto", "lossless, drafts: exit", "lossless, drafts: lookup"]
    assert {row["agreement"] for row in rows.values()} == {1}


def test_transformers_drafts_from_the_prompt_where_it_is_asked_to(checkpoint: Callable[[Case], Path]) -> None:
    sys.path.insert(0, str(SCRIPTS))
    from run_transformers import generator

    plain, lookup = list[int](), list[int]()
    prompt = [*range(20, 40)] * 3
    generator(load(checkpoint(LLAMA)), {})(prompt, 24, lambda *tokens: plain.extend(tokens))
    generator(load(checkpoint(LLAMA)), {"lookup": 10})(prompt, 24, lambda *tokens: lookup.extend(tokens))
    assert lookup == plain
    assert PEERS["hf-lookup"].options == {"lookup": 10}
