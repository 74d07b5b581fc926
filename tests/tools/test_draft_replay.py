"""Requests recorded with a bundle, and replayed with the costs that it recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles
from click.testing import CliRunner

from runtime import Bundle
from runtime.bundle.costs import Costs, Outside
from runtime.bundle.manifest import MANIFEST
from runtime.decoding.phrases import PhraseTable
from runtime.errors import OptionError
from tools.draft_replay import Trace, main, replay_setting

COSTS = Costs(0.5e-3, 0.2e-3, {1: 3.0e-3, 2: 3.5e-3, 16: 9.0e-3}, Outside(0.1e-3, 0.05e-3))


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def priced(bundle: Bundles, tmp_path: Path) -> Callable[[Costs | None], Path]:
    """Return a function that copies a bundle and gives it costs."""

    def copy(costs: Costs | None) -> Path:
        path = tmp_path / "bundle"
        shutil.copytree(bundle(BY_NAME["llama-tied"], 2), path)
        manifest = replace(Bundle.open(path).manifest, costs=costs)
        (path / MANIFEST).write_text(manifest.to_json())
        return path

    return copy


@pytest.mark.usefixtures("one_thread")
def test_recorded_requests_are_replayed(priced: Callable[[Costs | None], Path], tmp_path: Path) -> None:
    path = priced(COSTS)
    prompts, traces, saved = (tmp_path / name for name in ("prompts.jsonl", "traces.jsonl", "result.json"))
    prompts.write_text("".join(json.dumps({"input": [*map(int, prompt)]}) + "\n" for prompt in PROMPTS[:2]))
    run("record", path, prompts, traces, "--max-new-tokens", 12)
    run("replay", path, traces, "--setting", "memory", "--shuffles", 1, "--save", saved)
    (replayed,) = json.loads(saved.read_text())["rows"]
    assert replayed["setting"] == "memory"
    assert 0 < replayed["passes_per_token"] <= 1


def test_bundle_without_costs_is_refused(priced: Callable[[Costs | None], Path], tmp_path: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    traces.write_text(json.dumps({"prompt": [1], "output": [2, 3], "chains": []}) + "\n")
    with pytest.raises(OptionError, match="has no costs"):
        run("replay", priced(None), traces)


def test_traces_without_an_exit_are_refused_for_its_setting(
    priced: Callable[[Costs | None], Path], tmp_path: Path
) -> None:
    traces = tmp_path / "traces.jsonl"
    traces.write_text(json.dumps({"prompt": [1], "output": [2, 3], "chains": []}) + "\n")
    with pytest.raises(OptionError, match="no drafts of an exit"):
        run("replay", priced(COSTS), traces)


def test_replay_accepts_drafts_equal_to_the_recorded_output() -> None:
    """Four equal outputs, which the memory has from the second on. Half of the exit's predictions are right."""
    output = [(7 * place * place) % 997 for place in range(60)]
    chains = [[(token if place % 2 else 5, 0.9) for token in output[place + 1 : place + 3]] for place in range(59)]
    traces = [Trace([1, 2], output, chains)] * 4
    text, memory, exits = (
        replay_setting(traces, COSTS, setting, [], shuffles=1, after=0) for setting in ("text", "memory", "exit")
    )
    assert text["exits_per_token"] == memory["exits_per_token"] == 0
    assert memory["speed"] > 1.5 > text["speed"]
    assert exits["exits_per_token"] > 0.25
    assert exits["speed"] > 1.1 * text["speed"]
    phrases = replay_setting(traces, COSTS, "text", [PhraseTable.build([output])], shuffles=1, after=0)
    assert phrases["phrases"] > 100
    assert phrases["speed"] > memory["speed"]
