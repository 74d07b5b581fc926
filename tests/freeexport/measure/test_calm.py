"""CALM: between the whole model and the shallow decoder, and what it writes for the layers that it skips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, Bundles, Case
from command_line import invoke, succeed

from freeexport.measure.calm import Calm, threshold_at, write_calm
from runtime import Session
from runtime.bundle.bundle import Bundle

T5, LLAMA, QWEN = BY_NAME["t5-deep-decoder"], BY_NAME["llama-tied"], BY_NAME["qwen3"]
Directory = Callable[[Case], Path]
PROMPTS = ["one two three", "x", "line 5 of 25 lines"]


@pytest.fixture(scope="module")
def calm(
    bundle: Bundles, checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Calm, Path]]:
    made: dict[Any, tuple[Calm, Path]] = {}

    def build(case: Case, **options: Any) -> tuple[Calm, Path]:
        key = case.name, *options
        if key not in made:
            path, directory = bundle(case, **options), tmp_path_factory.mktemp("calm") / "engines"
            opened = Bundle.open(path)
            write_calm(str(checkpoint(case)), opened.manifest, 1, directory)
            made[key] = Calm(opened, directory, 1, 1), path
        return made[key]

    return build


@pytest.mark.parametrize("case", [T5, LLAMA, QWEN], ids=lambda case: case.name)
@pytest.mark.parametrize("options", [{}, {"precision": "int8", "kernels": "freeexport"}], ids=["fp32", "int8"])
def test_without_exits_it_is_the_whole_model_and_with_all_exits_the_shallow_one(
    case: Case, options: dict[str, Any], calm: Callable[..., tuple[Calm, Path]]
) -> None:
    made, path = calm(case, **options)
    with Session(path, threads=1, slots=1) as session:
        assert session.tokenizer is not None
        for text in PROMPTS:
            prompt = np.array(session.tokenizer.encode(text), np.int64)
            full, shallow = (session.generate(prompt, mode=mode, max_new_tokens=16) for mode in ("full", "shallow"))
            never, always = (made.generate(prompt, 16, threshold) for threshold in (1.0, 0.0))
            assert never.token_ids == full.token_ids
            assert set(never.layers) == {case.layers}
            assert always.token_ids == shallow.token_ids
            assert set(always.layers[1:]) <= {1}
            some = made.generate(prompt, 16, 0.3)
            assert set(some.layers) <= set(range(1, case.layers + 1))
            assert 0 < some.first_seconds < some.seconds


@pytest.mark.parametrize("case", [T5, LLAMA, QWEN], ids=lambda case: case.name)
def test_skipped_layers_get_the_keys_and_values_of_the_copied_state(
    case: Case, calm: Callable[..., tuple[Calm, Path]]
) -> None:
    made, path = calm(case)
    with Session(path, threads=1, slots=1) as session:
        assert session.tokenizer is not None
        made.generate(np.array(session.tokenizer.encode(PROMPTS[0]), np.int64), 4, 0.0)
    calls, arrays, row = made._calls, made._cache.arrays, int(made._cache.lengths[0])
    state = np.random.default_rng(1).normal(size=(1, 1, Bundle.open(path).manifest.hidden_size)).astype(np.float32)

    def written(call: str, read: str, layer: int) -> list[np.ndarray]:
        for name in ("key", "value"):
            arrays[f"{layer}.{name}"][:, :, row] = 0
        calls[read]._inputs["state"][:] = state
        calls[call].run()
        return [arrays[f"{layer}.{name}"][:, :, row].copy() for name in ("key", "value")]

    for layer in range(1, case.layers):
        copied, own = written("fill.1", "fill.1", layer), written(f"layer.{layer}", f"layer.{layer}", layer)
        for ours, theirs in zip(copied, own, strict=True):
            assert np.abs(theirs).max() > 0.01
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_single_exit_is_that_of_the_shallow_decoder_with_states_copied(
    calm: Callable[..., tuple[Calm, Path]],
) -> None:
    made, path = calm(T5)
    with Session(path, threads=1, slots=1) as session:
        assert session.tokenizer is not None
        prompt = np.array(session.tokenizer.encode(PROMPTS[0]), np.int64)
        full, shallow = (session.generate(prompt, mode=mode, max_new_tokens=16) for mode in ("full", "shallow"))
    never, always, some = (made.generate(prompt, 16, threshold, single=True) for threshold in (1.0, 0.0, 0.4))
    assert (never.token_ids, always.token_ids) == (full.token_ids, shallow.token_ids)
    assert set(some.layers) <= {1, T5.layers}
    # Up to the first token that takes more than one layer, and not all, both do the same.
    others = made.generate(prompt, 16, 0.4)
    same = next((n for n, taken in enumerate(others.layers) if taken not in (1, T5.layers)), len(others.layers))
    assert some.token_ids[:same] == others.token_ids[:same]


def test_the_decaying_threshold_is_that_of_the_paper() -> None:
    assert threshold_at(0.9, 0, 100) == pytest.approx(0.91)
    assert threshold_at(0.9, 100, 100) == pytest.approx(0.81 + 0.1 * np.exp(-4))
    assert threshold_at(1.0, 0, 10) == 1.0


def test_evaluate_runs_it_beside_the_others_and_says_what_it_was_trained_for(
    bundle: Bundles, checkpoint: Directory, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": text, "target": text}) + "\n" for text in PROMPTS))
    given = ["--data", data, "--metric", "chrf", "--max-new-tokens", 8, "--threads", 1, "--output", tmp_path / "out"]
    exits = ["--methods", "full,calm,calm-single,calm-decay", "--threshold", 0, "--threshold", 0.999, "--json"]
    command = ["evaluate", bundle(T5), *given, *exits, "--calm-model"]
    result = succeed(*command, checkpoint(T5))
    found = json.loads(result.stdout)
    rows = {row["setting"]: row for row in found["rows"]}
    assert (rows["calm 0"]["layers"], rows["calm 0"]["exit_rate"]) == (1, 1)
    assert 1 < rows["calm 0.999"]["layers"] <= rows["full"]["layers"] == T5.layers
    assert rows["calm-single 0"]["layers"] == 1
    assert rows["calm-decay 0"]["layers"] >= 1  # the threshold of the first tokens is up to 0.1
    assert any("an unknown loss, not weighted-ce" in note for note in found["notes"])
    assert [curve["method"] for curve in found["curves"]] == ["calm", "calm-decay", "calm-single"]
    both = [f"{bundle(case)}=full,calm-single" for case in (T5, LLAMA)]
    models = [
        "--calm-model",
        checkpoint(T5),
        "--calm-model",
        checkpoint(LLAMA),
        "--overwrite",
        "--threshold",
        0,
        "--json",
    ]
    result = succeed("evaluate", *both, *given, *models)
    assert [row["layers"] for row in json.loads(result.stdout)["rows"]] == [T5.layers, 1, LLAMA.layers, 1]
    wrong = invoke(*command, checkpoint(LLAMA), "--overwrite")
    assert "is not what the bundle came from" in wrong.stderr
    far = invoke(*command, checkpoint(T5), "--overwrite", "--calm-from", "99")
    assert "--calm-from 99 is out of range" in far.stderr
