"""Every layer's predictions against the model cut after that layer, and the report of them."""

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
from click.testing import CliRunner, Result
from command_errors import error
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from traces import trace

from freeexport.checkpoints.checkpoint import Checkpoint, open_checkpoint
from freeexport.checkpoints.examples import Example
from freeexport.checkpoints.exit_file import EXIT_WEIGHTS, ExitFile, write_exit_file
from freeexport.cli import main
from freeexport.measure.layers import NO_EXIT, Curve, LayerReader, LayersOptions, layers_report
from freeexport.measure.traces import Traces
from freeexport.verification.reference import reference_ids
from graphs.exit_head import ADAPTER_DOWN, ADAPTER_NORM, ADAPTER_UP, EXIT_NORM
from graphs.families import describe
from graphs.step_costs import StepCosts

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


def evaluated(model: Any, opened: Checkpoint, given: list[Example], batch: int = 2) -> tuple[list[Traces], np.ndarray]:
    return reader(model, opened).every_layer(given, batch, nothing)


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_a_layer_predicts_what_the_model_cut_after_it_predicts(case: Case, checkpoint: Directory) -> None:
    opened, model = open_checkpoint(str(checkpoint(case))), load(checkpoint(case))
    given = examples()
    traces, targets = evaluated(model, opened, given)
    assert len(traces) == case.layers
    predicted = reference.predicted_of(model)
    order = sorted(given, key=lambda one: -len(one.prompt) - len(one.target))
    assert targets.tolist() == [token for one in order for token in one.target[predicted:].tolist()]
    for layer, found in enumerate(traces, start=1):
        shallow = []
        for one in order:
            run = reference.Run(model, one.prompt.tolist(), layer)
            shallow.append(run.logits(one.target[:-1].tolist())[0 if layer < case.layers else 1][predicted:])
        logits = torch.cat(shallow)
        assert found.token.tolist() == logits.argmax(-1).tolist()
        assert found.agrees.tolist() == (found.token == traces[-1].token).tolist()
        assert found.length.tolist() == [len(one.target) - predicted for one in order]
        expected = [reference.confidence_of(row) for row in logits]
        np.testing.assert_allclose(found.confidence, expected, atol=2e-5)


def test_the_batch_size_changes_nothing(checkpoint: Directory) -> None:
    case = BY_NAME["t5-gated-tied"]
    opened, model = open_checkpoint(str(checkpoint(case))), load(checkpoint(case))
    for one, three in zip(*(evaluated(model, opened, examples(), size)[0] for size in (1, 3)), strict=True):
        np.testing.assert_array_equal(one.token, three.token)
        np.testing.assert_allclose(one.confidence, three.confidence, atol=1e-5)


@pytest.mark.parametrize("case", SOME[::3], ids=lambda case: case.name)
def test_outputs_are_the_models_own_greedy_ones(case: Case, checkpoint: Directory) -> None:
    opened, model = open_checkpoint(str(checkpoint(case))), load(checkpoint(case))
    before = model.generation_config
    outputs = reader(model, opened).greedy_outputs(examples(), 6, 3, nothing)
    ends = opened.generation_config["eos_token_id"]
    for example in outputs:
        ids, _ = reference_ids(model, example.prompt.tolist(), 6, ends if isinstance(ends, list) else [ends])
        assert example.target.tolist() == ids
    assert model.generation_config is before
    traces, targets = evaluated(model, opened, outputs)
    assert (traces[-1].token == targets).all()
    # Settings of sampling are ignored.
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=9.0, top_k=3)
    again = reader(model, opened).greedy_outputs(examples(), 6, 3, nothing)
    assert [one.target.tolist() for one in again] == [one.target.tolist() for one in outputs]


def rms(hidden: np.ndarray) -> np.ndarray:
    return hidden / np.sqrt(np.square(hidden).mean(-1, keepdims=True) + 1e-5)


def test_an_adapter_of_the_exit_is_what_is_worked_out_by_hand(checkpoint: Directory, tmp_path: Path) -> None:
    directory, random = tmp_path / "own", np.random.default_rng(0)
    plain = open_checkpoint(str(shutil.copytree(checkpoint(BY_NAME["llama-tied"]), directory)))
    shapes = {EXIT_NORM: (64,), ADAPTER_NORM: (64,), ADAPTER_DOWN: (4, 64), ADAPTER_UP: (64, 4)}
    own = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model, given = load(directory), examples()[:1]
    without, _ = evaluated(model, plain, given)
    save_file(own, directory / EXIT_WEIGHTS)
    write_exit_file(directory, ExitFile(2, True, 4, plain.sha256, "ce", "exit"))
    result, _ = evaluated(model, open_checkpoint(str(directory)), given)
    assert result[0].token.tolist() == without[0].token.tolist()  # layer 1 is no exit
    ids = torch.tensor([[*PROMPTS[0], *TARGETS[0][:-1]]])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[2][0, len(PROMPTS[0]) :].numpy()
    inner = rms(hidden) * own[ADAPTER_NORM] @ own[ADAPTER_DOWN].T
    hidden = hidden + inner / (1 + np.exp(-inner)) @ own[ADAPTER_UP].T
    logits = torch.from_numpy(rms(hidden) * own[EXIT_NORM] @ model.lm_head.weight.detach().numpy().T)
    assert result[1].token.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(result[1].confidence, [reference.confidence_of(row) for row in logits], atol=2e-5)


LINES = [
    {"input": "one two three", "target": "abcdef"},
    {"input": "four", "target": "ghij"},
    {"input": "x", "target": "klm"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def run(model: Path | str, data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["evaluate", str(model), "--layers", "--data", str(data), *arguments])


def as_json(*arguments: Any) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("name", ["t5-deep-decoder", "llama-tied"])
def test_the_report_has_every_layer_but_the_last(name: str, checkpoint: Directory, data: Path) -> None:
    report = as_json(checkpoint(BY_NAME[name]), data, "--max-new-tokens", "5")
    assert [one["exit_layer"] for one in report["exits"]] == list(range(1, BY_NAME[name].layers))
    # The model's own output is what it predicts: its accuracy would say nothing.
    assert report["deep_accuracy"] is None
    assert report["examples"] == 3
    assert 0 < report["tokens"] <= 3 * 5
    for one in report["exits"]:
        assert one["at"]["0.99"]["exit_rate"] <= one["at"]["0.95"]["exit_rate"] <= one["at"]["0.9"]["exit_rate"]
        assert one["chosen"] == one["at"]["0.99"]
        assert one["accuracy"] is None
        assert one["exit_rate"]["value"] == pytest.approx(one["chosen"]["exit_rate"])
        assert one["exit_rate"]["low"] <= one["exit_rate"]["value"] <= one["exit_rate"]["high"]


def test_a_checkpoint_can_run_in_bfloat16(checkpoint: Directory, data: Path) -> None:
    path = checkpoint(BY_NAME["llama-tied"])
    exact, rough = (as_json(path, data, "--on", "targets", "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    assert rough["tokens"] == exact["tokens"]
    confidences = [[one["chosen"]["threshold"] for one in report["exits"]] for report in (exact, rough)]
    assert confidences[0] != confidences[1]


@pytest.mark.parametrize(("samples", "tokens"), [(3, 6 + 4 + 3), (2, 6 + 4)])
def test_targets_are_forced_on_request(samples: int, tokens: int, checkpoint: Directory, data: Path) -> None:
    """One token a byte and one for the end, without the first of each."""
    report = as_json(checkpoint(BY_NAME["llama-tied"]), data, "--on", "targets", "--samples", str(samples))
    assert (report["examples"], report["tokens"]) == (samples, tokens)
    assert report["deep_accuracy"] < 1


def test_the_page_recommends_or_says_why_not(checkpoint: Directory, data: Path) -> None:
    result = run(checkpoint(BY_NAME["llama-tied"]), data, "--on", "targets", "--agreement", "0")
    assert result.exit_code == 0, result.output
    shown = ("pays: ", "the exit after layer 1 of 5: above threshold", "95% interval", "MB of weights, not measured",
             "accuracy of all layers")  # fmt: skip
    assert [text for text in shown if text not in result.stdout] == []
    result = run(checkpoint(BY_NAME["llama-tied"]), data, "--max-new-tokens", "5")
    assert "accuracy" not in result.stdout  # the model is not compared with itself
    assert "verdict on the best layer" in result.stdout


COSTS = StepCosts(layer=1, head=0, growth={1: 1, 16: 1}, measured=False)


def test_an_exit_is_judged_at_the_agreement_asked_for() -> None:
    agrees = np.array([True] * 6 + [False] * 4)
    confidence = np.linspace(0.9, 0.1, 10).astype(np.float32)
    deep = trace(np.ones(10).tolist(), [True] * 10, token=[1] * 10)
    first = trace(confidence.tolist(), agrees.tolist(), token=np.where(agrees, 1, 2).tolist())
    report = layers_report("m", [first, deep], np.ones(10), 1, COSTS, LayersOptions(agreement=0.8))
    (one,) = report["exits"]
    assert (one["agreement"], one["chosen"]["exit_rate"], one["at"]["0.99"]["exit_rate"]) == (0.6, 0.7, 0.6)
    assert one["speedup"] == pytest.approx(COSTS.at(1, 2).speedup(0.7, 16))
    assert one["break_even"] == COSTS.at(1, 2).break_even(16)


def test_a_bundles_measurements_replace_the_sizes(checkpoint: Directory, data: Path, bundle: Any) -> None:
    case = BY_NAME["llama-tied"]
    other = bundle(BY_NAME["llama-biases"])
    assert "layers, the checkpoint 5" in error(run(checkpoint(case), data, str(other)))
    assert "no measured costs" in error(run(checkpoint(case), data, str(bundle(case))))


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", (), "has no examples"),
        ('{"input": "a"}\nnonsense\n', (), "line 2: not JSON"),
        ('{"input": "a"}\n', ("--on", "targets"), "line 1: 'target' is missing"),
        ('{"input": "a", "target": ""}\n', ("--on", "targets"), "no output has a second token"),
        (f'{{"input": "{"abcdefghijkl " * 50}", "target": "a"}}\n', (), "none of the 1 examples fits"),
    ],
)
def test_bad_data_is_named(
    text: str, arguments: tuple[str, ...], message: str, checkpoint: Directory, data: Path
) -> None:
    data.write_text(text)
    assert message in error(run(checkpoint(BY_NAME["llama-tied"]), data, *arguments))


@pytest.mark.smollm2
@pytest.mark.slow
def test_a_gguf_file_is_evaluated(data: Path) -> None:
    from freeexport.checkpoints.checkpoint import smollm2

    report = as_json(smollm2(), data, "--samples", "1", "--max-new-tokens", "4")
    assert len(report["exits"]) == 29


TOKENS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=12)


def arrays(tokens: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([one for one, _ in tokens], np.float32), np.array([agrees for _, agrees in tokens])


@given(TOKENS)
def test_points_are_what_their_threshold_does(tokens: list[tuple[float, bool]]) -> None:
    confidence, agrees = arrays(tokens)
    curve = Curve.of(confidence, agrees)
    assert (np.diff(curve.exit_rate) > 0).all()
    for threshold, rate, agreement in zip(curve.threshold, curve.exit_rate, curve.agreement, strict=True):
        exits = confidence > threshold
        assert exits.mean() == pytest.approx(rate)
        assert agrees[exits].mean() == pytest.approx(agreement)


@given(TOKENS, st.sampled_from([0.5, 0.75, 1.0]))
def test_no_threshold_lets_more_tokens_exit_at_the_agreement(tokens: list[tuple[float, bool]], target: float) -> None:
    confidence, agrees = arrays(tokens)
    rates = [0.0]
    for threshold in (0.0, 0.05, 0.2, 0.4, 0.7, 0.95, 1.0):
        exits = confidence > threshold
        if exits.any() and agrees[exits].mean() >= target:
            rates.append(float(exits.mean()))
    assert Curve.of(confidence, agrees).at_agreement(target).exit_rate == pytest.approx(max(rates))


def test_nothing_exits_at_confidence_0_and_where_the_agreement_is_not_reached() -> None:
    assert Curve.of(np.array([0.9, 0.1]), np.array([False, True])).at_agreement(0.9) == NO_EXIT
    assert Curve.of(np.zeros(3), np.ones(3, bool)).at_agreement(0.9) == NO_EXIT
