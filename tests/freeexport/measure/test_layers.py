"""Every layer's predictions against the model cut after that layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from checkpoints import CASES, PROMPTS, Case, load
from safetensors.numpy import save_file

from freeexport.checkpoints.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from freeexport.checkpoints.examples import Example, text_format
from freeexport.checkpoints.exit_file import (
    ADAPTER_DOWN,
    ADAPTER_NORM,
    ADAPTER_UP,
    EXIT_NORM,
    ExitFile,
    write_exit_file,
)
from freeexport.measure.layers import Evaluation, LayerReader
from freeexport.verification.reference import reference_ids
from graphs.families import describe

BY_NAME = {case.name: case for case in CASES}
SOME = [
    BY_NAME[name]
    for name in ("t5-deep-decoder", "t5-gated-tied", "mt5", "llama-tied", "mistral-window", "llama-yarn-rope", "qwen3")
]
TARGETS = ((5, 60, 61, 7, 90, 91), (44, 12, 13), (200, 100, 50, 25, 12, 6, 5))
Directory = Callable[[Case], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


def examples() -> list[Example]:
    pairs = zip(PROMPTS, TARGETS, strict=True)
    return [Example(np.array(p, np.int32), np.array(t, np.int32), n) for n, (p, t) in enumerate(pairs, start=1)]


def nothing(n: float = 1) -> None:
    pass


def reader(model: Any, opened: Checkpoint) -> LayerReader:
    return LayerReader(model, opened, describe(opened.config, opened), opened.exit.exit_layer if opened.exit else 1)


def evaluated(model: Any, opened: Checkpoint, given: list[Example], batch_size: int = 2) -> Evaluation:
    return reader(model, opened).evaluate(given, batch_size, nothing)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_a_layer_predicts_what_the_model_cut_after_it_predicts(case: Case, checkpoint: Directory) -> None:
    opened, model = open_checkpoint(str(checkpoint(case))), load(checkpoint(case))
    given = examples()
    result = evaluated(model, opened, given)
    assert len(result.prediction) == case.layers
    predicted = reference.predicted_of(model)
    order = sorted(given, key=lambda one: -len(one.prompt) - len(one.target))
    assert result.targets.tolist() == [token for one in order for token in one.target[predicted:].tolist()]
    for layer in range(1, case.layers + 1):
        shallow = []
        for one in order:
            run = reference.Run(model, one.prompt.tolist(), layer)
            shallow.append(run.logits(one.target[:-1].tolist())[0 if layer < case.layers else 1][predicted:])
        logits = torch.cat(shallow)
        assert result.prediction[layer - 1].tolist() == logits.argmax(-1).tolist()
        expected = [reference.confidence_of(row) for row in logits]
        np.testing.assert_allclose(result.confidence[layer - 1], expected, atol=2e-5)


def test_agreement_and_accuracy_count_tokens(checkpoint: Directory) -> None:
    case = BY_NAME["llama-tied"]
    result = evaluated(load(checkpoint(case)), open_checkpoint(str(checkpoint(case))), examples())
    last = result.prediction[-1]
    assert result.tokens == sum(len(target) - 1 for target in TARGETS)
    assert result.agrees(1).tolist() == (result.prediction[0] == last).tolist()
    assert result.agrees(case.layers).all()
    assert result.accuracy(case.layers) == pytest.approx((last == result.targets).mean())
    assert sorted(np.bincount(result.sequence).tolist()) == sorted(len(target) - 1 for target in TARGETS)


def test_the_batch_size_changes_nothing(checkpoint: Directory) -> None:
    case = BY_NAME["t5-gated-tied"]
    opened, model = open_checkpoint(str(checkpoint(case))), load(checkpoint(case))
    one, three = (evaluated(model, opened, examples(), size) for size in (1, 3))
    np.testing.assert_array_equal(one.prediction, three.prediction)
    np.testing.assert_allclose(one.confidence, three.confidence, atol=1e-5)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_outputs_are_the_models_own_greedy_ones(case: Case, checkpoint: Directory) -> None:
    opened, model = open_checkpoint(str(checkpoint(case))), load(checkpoint(case))
    before = model.generation_config
    outputs = reader(model, opened).greedy_outputs(examples(), 6, 3, nothing)
    ends = opened.generation_config["eos_token_id"]
    for example in outputs:
        ids, _ = reference_ids(model, example.prompt.tolist(), 6, ends if isinstance(ends, list) else [ends])
        assert example.target.tolist() == ids
    assert model.generation_config is before
    assert evaluated(model, opened, outputs).accuracy(case.layers) == 1


def test_sampling_settings_of_the_checkpoint_are_ignored(checkpoint: Directory) -> None:
    case = BY_NAME["llama-tied"]
    opened, model = open_checkpoint(str(checkpoint(case))), load(checkpoint(case))
    plain = reader(model, opened).greedy_outputs(examples(), 6, 3, nothing)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=9.0, top_k=3)
    again = reader(model, opened).greedy_outputs(examples(), 6, 3, nothing)
    assert [one.target.tolist() for one in again] == [one.target.tolist() for one in plain]


def test_an_exit_with_parameters_of_its_own_is_read_through_them(checkpoint: Directory, tmp_path: Path) -> None:
    case = BY_NAME["llama-tied"]
    directory = tmp_path / "own"
    shutil.copytree(checkpoint(case), directory)
    random = np.random.default_rng(0)
    own = {
        EXIT_NORM: random.standard_normal(64),
        ADAPTER_NORM: random.standard_normal(64),
        ADAPTER_DOWN: random.standard_normal((4, 64)),
        ADAPTER_UP: random.standard_normal((64, 4)),
    }
    own = {name: value.astype(np.float32) for name, value in own.items()}
    save_file(own, directory / "exit.safetensors")
    plain = open_checkpoint(str(checkpoint(case)))
    write_exit_file(directory, ExitFile(2, True, 4, plain.sha256, "ce", "exit"))
    model, given = load(checkpoint(case)), examples()[:1]
    without, result = evaluated(model, plain, given), evaluated(model, open_checkpoint(str(directory)), given)
    assert result.prediction[0].tolist() == without.prediction[0].tolist()

    ids = torch.tensor([[*PROMPTS[0], *TARGETS[0][:-1]]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[2][0, len(PROMPTS[0]) :].numpy()
    inner = rms(hidden) * own[ADAPTER_NORM] @ own[ADAPTER_DOWN].T
    hidden = hidden + inner / (1 + np.exp(-inner)) @ own[ADAPTER_UP].T
    logits = rms(hidden) * own[EXIT_NORM] @ model.lm_head.weight.detach().numpy().T
    assert result.prediction[1].tolist() == logits.argmax(-1).tolist()
    expected = [reference.confidence_of(torch.from_numpy(row)) for row in logits]
    np.testing.assert_allclose(result.confidence[1], expected, atol=2e-5)


def rms(hidden: np.ndarray) -> np.ndarray:
    return hidden / np.sqrt(np.square(hidden).mean(-1, keepdims=True) + 1e-5)


def test_text_needs_a_tokenizer(checkpoint: Directory, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(checkpoint(BY_NAME["llama-tied"]), directory, ignore=shutil.ignore_patterns("*token*"))
    opened = open_checkpoint(str(directory))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        text_format(opened, describe(opened.config, opened), 64)


def test_the_limit_is_at_most_what_the_model_can_take(checkpoint: Directory) -> None:
    opened = open_checkpoint(str(checkpoint(BY_NAME["llama-untied-many-eos"])))
    description = describe(opened.config, opened)
    assert text_format(opened, description, 64).limit == 64
    assert text_format(opened, description, 10_000).limit == 512
    assert (
        text_format(opened, description, 64).eos
        == json.loads((opened.path / "config.json").read_text())["eos_token_id"][0]
    )
