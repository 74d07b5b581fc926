"""CALM: between the whole model and the shallow decoder, and what it writes for the layers that it skips."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, Bundles, Case
from command_line import succeed

from freeexport.evaluate.plot import quality_speed
from freeexport.evaluate.records import OUTPUTS, RUN, Record, Records, read_records
from freeexport.evaluate.scores import rows_of
from freeexport.evaluate.settings import Entry, Setting
from freeexport.task_metrics import Reference, metric_of
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError
from runtime.text.tokenizer import Tokenizer
from tools.paper.calm import CALM, Calm, CalmDecoder, decaying_threshold
from tools.paper.calm_engines import write_calm

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
    assert decaying_threshold(0.9, 0, 100) == pytest.approx(0.91)
    assert decaying_threshold(0.9, 100, 100) == pytest.approx(0.81 + 0.1 * np.exp(-4))
    assert decaying_threshold(1.0, 0, 10) == 1.0


def test_its_records_stand_beside_those_of_evaluate(bundle: Bundles, checkpoint: Directory, tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"input": text, "target": text}) + "\n" for text in PROMPTS))
    given = ["--metric", "chrf", "--max-new-tokens", 8, "--threads", 1, "--output", out, "--methods", "full"]
    succeed("evaluate", bundle(T5), "--data", data, *given)
    records = Records(out, json.loads((out / RUN).read_text()))
    opened = Bundle.open(bundle(T5))
    decoder = CalmDecoder(opened, str(checkpoint(T5)), tmp_path / "engines")
    settings = [Setting(method, threshold) for method in CALM for threshold in (0.0, 0.999)]
    entry = Entry("bundle", opened, (Setting("full"), *settings))
    tokenizer = Tokenizer.load(opened.path, opened.manifest.files)
    assert tokenizer is not None
    whole = {record.line: record for record in read_records(out / OUTPUTS)}
    made = [
        Record(entry.name, setting.name, line, 0, busy=0.0, **decoder.decode(setting, np.array(ids, np.int64), 8))
        for setting in settings
        for line, ids in enumerate(map(tokenizer.encode, PROMPTS), start=1)
    ]
    records.add([replace(record, bundle=entry.name) for record in whole.values()] + made)
    references = {line: Reference((record.text,)) for line, record in whole.items()}
    rows = {row["setting"]: row for row in rows_of([entry], records.by_setting(), references, [metric_of("chrf")])}
    assert (rows["calm 0"]["layers"], rows["calm 0"]["exit_rate"]) == (1, 1)
    assert 1 < rows["calm 0.999"]["layers"] <= rows["full"]["layers"] == T5.layers
    assert rows["calm-single 0"]["layers"] == 1
    assert rows["calm-decay 0"]["layers"] >= 1  # the threshold of the first tokens is up to 0.1
    assert rows["calm 0"]["request_speed"] > 0
    assert "an unknown loss, not weighted-ce" in decoder.notes[0]
    figure = quality_speed(list(rows.values()), "chrf", "chrF", 0.99)
    labels = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert {"calm", "calm-single"} <= labels  # those of calm-decay are below the picture


@pytest.mark.parametrize(
    ("case", "least", "message"),
    [(LLAMA, 1, "is not what the bundle came from"), (T5, 99, "first exit layer 99 is out of range; choose 1 to")],
    ids=["checkpoint", "layer"],
)
def test_a_checkpoint_or_layer_that_does_not_fit_is_refused(
    case: Case, least: int, message: str, bundle: Bundles, checkpoint: Directory, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        CalmDecoder(Bundle.open(bundle(T5)), str(checkpoint(case)), tmp_path / "engines", least)
    assert not (tmp_path / "engines").exists()


def test_other_settings_are_refused(bundle: Bundles, checkpoint: Directory, tmp_path: Path) -> None:
    decoder = CalmDecoder(Bundle.open(bundle(T5)), str(checkpoint(T5)), tmp_path / "engines")
    with pytest.raises(OptionError, match=r"'free 0.5' is no setting of CALM; choose calm, calm-decay"):
        decoder.decode(Setting("free", 0.5), np.zeros(1, np.int64), 1)
