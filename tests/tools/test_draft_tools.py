"""Tools that measure drafts: their cost by engine call, and requests replayed with fixed costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles
from click.testing import CliRunner

from runtime.decoding.phrases import PhraseTable
from runtime.engines.kernels import LIBRARY
from tools import draft_cost, draft_replay, draft_traces

COSTS = {
    "precision": "int4",
    "step": {"1": 0.2, "16": 1.0},
    "pass": {"1": 3.0, "2": 3.5, "16": 9.0},
    "exit_of_draft": 0.3,
    "row_of_exit": 0.1,
    "python_of_token": 0.1,
    "python_of_draft": 0.05,
}


def run(tool: object, *arguments: object) -> str:
    done = CliRunner().invoke(tool.main, [*map(str, arguments)], catch_exceptions=False)  # type: ignore[attr-defined]
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.usefixtures("one_thread")
def test_costs_and_traces_of_a_bundle_are_replayed(bundle: Bundles, tmp_path: Path) -> None:
    path = bundle(BY_NAME["llama-tied"], 2)
    costs, traces, saved = (tmp_path / name for name in ("costs.json", "traces.jsonl", "result.json"))
    assert "a draft" in run(draft_cost, path, "--rounds", 1, "--threads", 2, "--save", costs)
    assert json.loads(costs.read_text())["unit"] == "milliseconds of wall-clock time"
    (row,) = json.loads(costs.read_text())["rows"]
    assert min(row["token"], row["step"]["1"], row["pass"]["1"]) > 0
    assert set(COSTS) <= set(row)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": [*map(int, prompt)]}) + "\n" for prompt in PROMPTS[:2]))
    run(draft_traces, path, prompts, traces, "--max-new-tokens", 12)
    run(draft_replay, traces, "--costs", costs, "--setting", "memory", "--shuffles", 1, "--save", saved)
    (replayed,) = json.loads(saved.read_text())["rows"]
    assert replayed["setting"] == "memory"
    assert 0 < replayed["passes_per_token"] <= 1


@pytest.mark.usefixtures("one_thread")
def test_two_builds_of_the_kernels_take_turns(bundle: Bundles, tmp_path: Path) -> None:
    other, costs = tmp_path / "other.so", tmp_path / "costs.json"
    shutil.copy(LIBRARY, other)
    run(draft_cost, bundle(BY_NAME["llama-tied"], 2), "--rounds", 1, "--against", other, "--save", costs)
    saved = json.loads(costs.read_text())
    assert [row["library"] for row in saved["rows"]] == ["this", "other"]
    assert str(tmp_path) not in costs.read_text()


def test_a_replay_accepts_what_the_trace_confirms(tmp_path: Path) -> None:
    """Four equal outputs, which the memory has from the second on. Half of the exit's predictions are right."""
    output = [(7 * place * place) % 997 for place in range(60)]
    chains = [[(token if place % 2 else 5, 0.9) for token in output[place + 1 : place + 3]] for place in range(59)]
    traces, costs = tmp_path / "traces.jsonl", tmp_path / "costs.json"
    traces.write_text((json.dumps({"prompt": [1, 2], "output": output, "chains": chains}) + "\n") * 4)
    costs.write_text(json.dumps({"rows": [COSTS]}))
    rows = [json.loads(line) for line in run(draft_replay, traces, "--costs", costs, "--shuffles", 1).splitlines()]
    text, memory, exits = rows
    assert text["exits_per_token"] == memory["exits_per_token"] == 0
    assert memory["speed"] > 1.5 > text["speed"]
    assert exits["exits_per_token"] > 0.25
    assert exits["speed"] > 1.1 * text["speed"]
    table = tmp_path / "phrases.npy"
    np.save(table, PhraseTable.build([output]).entries)
    found = run(draft_replay, traces, "--costs", costs, "--shuffles", 1, "--setting", "text", "--phrases", table)
    phrases = json.loads(found)
    assert phrases["phrases"] > 100
    assert phrases["speed"] > memory["speed"]
