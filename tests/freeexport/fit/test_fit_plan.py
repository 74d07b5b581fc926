"""Plans of `fit`: the exit by bytes, times within the budget, and what is refused before long work."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_device import Machine

from freeexport.checkpoints.examples import DataError
from freeexport.fit import exit_choice
from freeexport.fit import fit_plan as planning
from freeexport.fit.fit_options import FitOptions
from freeexport.fit.fit_plan import Texts, make_plan
from freeexport.fit.plan_table import describe_plan
from freeexport.fit.recipe import fit, steps_of
from freeexport.fit.splits import read_lines
from freeexport.task_metrics import MetricError
from freeexport.training.train import step_speed
from freeexport.training.training_options import TrainingOptions
from runtime.errors import CapacityError, DeviceError, OptionError

Options = Callable[..., FitOptions]


def planned(options: FitOptions) -> planning.Plan:
    return make_plan(options, [] if options.data is None else read_lines(options.data, 1))


@pytest.mark.parametrize("case", ["llama-tied", "t5-deep-decoder"])
def test_plan_keeps_its_budget_and_names_its_decisions(options: Options, case: str) -> None:
    given = options(case)
    found = planned(given)
    assert found.exit is not None
    assert found.texts is not None
    assert found.precision == "int8"
    assert 0 <= found.exit.layer < found.layers
    assert found.exit.own == 1
    assert 1 < found.exit.speeds["usual"] < found.exit.speeds["easy"]
    assert sum(found.seconds.values()) == pytest.approx(given.budget)
    assert found.seconds["joint"] > found.seconds["exit"]
    assert sum(found.lines.values()) == 330
    shown = dict(describe_plan(given, found))
    place = f"after layer {found.exit.layer}" if found.exit.layer else "before layer 1"
    assert shown["exit"].startswith(f"{place} of {found.layers}, ")
    assert "1,000 tokens/s" in shown["training"]
    assert {"expected, a token", "expected, a request", "time", "precision"} <= shown.keys()


@pytest.mark.parametrize(("name", "layer"), [("llama-tied", 1), ("t5-deep-decoder", 0)])
def test_exit_reads_the_feature_if_that_is_fastest(
    name: str, layer: int, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(name)
    monkeypatch.setattr(exit_choice, "FEATURE_RATES", dict.fromkeys(exit_choice.FEATURE_RATES, 0.01))
    depth = planned(given).exit
    assert depth is not None
    assert depth.input == "state"
    monkeypatch.setattr(exit_choice, "FEATURE_RATES", dict.fromkeys(exit_choice.FEATURE_RATES, 0.99))
    found = planned(given)
    assert found.exit is not None
    assert (found.exit.layer, found.exit.input) == (layer, "feature")
    assert "read the deep decoder's feature" in dict(describe_plan(given, found))["exit"]
    joint, alone = (step.arguments for step in steps_of(given, found) if step.name in ("joint", "exit"))
    assert "deep-ce" in joint
    assert "--exit-head-layers" not in joint
    assert alone[1] == joint[2]  # on the weights that were kept
    assert alone[alone.index("--exit-input") + 1] == "feature"


def test_nothing_is_trained_without_data(options: Options) -> None:
    found = planned(options(data=None))
    assert (found.exit, found.training, list(found.seconds)) == (None, None, ["convert", "speed"])
    assert (
        "mode lossless generates the full model's tokens" in dict(describe_plan(options(data=None), found))["training"]
    )


def test_fitting_ready_made_exit_is_used_if_it_leaves_the_model_unchanged(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = {"extraction": "{}", "general": None, "other": None}
    exits = [SimpleNamespace(name=name, adapter_config=adapter) for name, adapter in adapters.items()]
    monkeypatch.setattr(planning, "fitting_exits", lambda checkpoint: exits)
    given = options(data=None)
    found = planned(given)
    assert found.drafting == "general"
    shown = dict(describe_plan(given, found))
    assert "mode lossless with the ready-made exit general generates" in shown["training"]
    assert shown["ready-made exits"].startswith("extraction, general, other fit these weights; what they gain: ")
    (step,) = steps_of(given, found)
    assert step.arguments[-2:] == ("--exit", "general")


def test_nothing_is_trained_if_prompts_take_most_of_the_time(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PROMPT", 100.0)
    found = planned(options())
    assert found.exit is None
    assert "training cannot pay" in found.why
    assert list(found.seconds) == ["given", "evaluate"]


def test_request_speedup_excludes_the_prompt() -> None:
    # SmolLM2 on the extraction task: 2.05x a token was measured as 1.66x a request.
    assert Texts(144, 92, 128, share=planning.PROMPT).request(2.05) == pytest.approx(1.7, abs=0.1)
    assert Texts(0, 92, 128, share=planning.PROMPT).request(2.05) == pytest.approx(2.05)


def test_too_small_budget_has_a_plan_that_names_the_missing_time(options: Options) -> None:
    given = options(budget=60.0)
    found = planned(given)
    shown = dict(describe_plan(given, found))
    assert re.search(r"100 steps of \d+ tokens take", shown["missing"])
    assert shown["in all"].endswith(" of 60 s")
    with pytest.raises(OptionError, match="give --budget"):
        fit(given, found)
    needed = re.search(r"give --budget (\d+)min or more", found.missing)
    assert needed is not None
    assert not planned(options(budget=60.0 * int(needed[1]))).missing


def test_small_budget_gets_smaller_steps(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def speed(*given: Any, **options: Any) -> dict[str, float]:
        asked.append(given[-1])
        return {"step": given[-1] / 2048, "tokens_per_second": 2048.0}

    monkeypatch.setattr(planning, "training_speed", speed)
    given = options(budget=130.0)  # 100 steps of 2,048 tokens take 100 s and more
    found = planned(given)
    assert not found.missing
    assert found.training is not None
    assert asked == [2048, found.training.batch_tokens]
    assert 256 <= found.training.batch_tokens < 1024
    joint = next(step.arguments for step in steps_of(given, found) if step.name == "joint")
    assert joint[joint.index("--batch-tokens") + 1] == str(found.training.batch_tokens)
    assert planned(options(budget=4000.0)).training.batch_tokens == 2048  # type: ignore[union-attr]


def test_threads_option_reaches_training(options: Options) -> None:
    given = options(threads=1)
    steps = steps_of(given, planned(given))
    trained = [step.arguments for step in steps if step.arguments[0] == "train"]
    assert len(trained) == 2
    for arguments in trained:
        assert arguments[arguments.index("--threads") + 1] == "1"


def test_existing_exit_is_evaluated_and_trained_further(with_exit: Options) -> None:
    given = with_exit(budget=200.0)
    found = planned(given)
    assert found.exit is not None
    assert (found.exit.layer, found.exit.own, found.exit.exists) == (2, 0, True)
    assert sum(found.seconds.values()) == pytest.approx(given.budget)
    shown = dict(describe_plan(given, found))
    assert shown["exit"].startswith("the existing one, trained further: after layer 2")
    assert "only a better one replaces it" in shown["existing exit"]
    steps = steps_of(given, found)
    assert [step.name for step in steps] == ["given", "calibrate given", "joint", "trained", "calibrate", "evaluate"]
    assert "given=full,static,free,lossless" in " ".join(steps[-1].arguments)
    joint = steps[2].arguments
    assert joint[joint.index("--exit-layer") + 1] == "2"
    assert joint[joint.index("--loss") + 1] == "logit-kd"


def test_untokenizable_targets_are_listed_in_the_plan(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "unwritable", lambda *given: "the tokenizer cannot write 3 of 330 targets")
    given = options()
    assert ("note", "the tokenizer cannot write 3 of 330 targets") in describe_plan(given, planned(given))


def test_4_bit_plan_names_its_precision(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(data=None)
    in_8_bits = planned(given)
    monkeypatch.setattr(planning, "as_stored", lambda checkpoint: "int4")
    found = planned(given)
    assert found.rate > in_8_bits.rate
    assert "tokens/s of the full model in 4 bits, by" in dict(describe_plan(given, found))["speed"]


def test_model_too_large_for_memory_is_trained_only_at_its_exit(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "ACTIVATIONS", 1 << 60)
    found = planned(options())
    assert found.training is not None
    assert found.trainings == ("exit",)
    assert "joint" not in found.seconds


def test_metric_that_does_not_fit_the_targets_is_refused(options: Options) -> None:
    with pytest.raises(MetricError, match="no capital letters"):
        planned(options(metric="case-f1"))
    with pytest.raises(MetricError, match="gives the targets themselves 0"):
        planned(options(metric="bleu"))  # a word has no 4-grams


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"budget": 0.0}, "--budget is 0 s; give a time above 0"),
        ({"quality": 1.5}, "--quality is 1.5; give a share between 0 and 1, or --lossless"),
        ({"data": Path("missing.jsonl")}, "missing.jsonl: there is no such file"),
        ({"metric": "rouge"}, "'rouge' is no metric"),
    ],
)
def test_out_of_range_options_are_refused(options: Options, change: dict[str, object], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        options(**change)


def test_too_few_lines_are_refused_before_the_model_is_read(options: Options, task: Path) -> None:
    task.write_text("".join(f"{line}\n" for line in task.read_text().splitlines()[:5]))
    with pytest.raises(DataError, match="has 5 lines"):
        read_lines(task, planning.min_lines())


def test_training_steps_are_timed(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a few lines, most may have targets that cannot be written; the plan has counted them in all.
    monkeypatch.setattr("freeexport.training.batches.unwritable", None)
    given = options()
    assert given.data is not None
    training = TrainingOptions(given.data, exit_layer=1, exit_head_layers=1, batch_tokens=200, steps=4)
    for number, one in enumerate((training, replace(training, tune="exit"))):
        directory = tmp_path / str(number)
        directory.mkdir()
        step, tokens_per_second = step_speed(given.model, one, directory, seconds=0.0 if number else 15.0)
        assert 0 < step < 60
        assert tokens_per_second > 0
        assert {path.name for path in directory.iterdir()} <= {"states"}


def test_gpu_plan_uses_fp16_and_passes_the_device_to_every_step(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch)
    monkeypatch.setattr(exit_choice, "FEATURE_RATES", dict.fromkeys(exit_choice.FEATURE_RATES, 0.99))
    given = options(device="cuda:0")
    found = planned(given)
    assert found.precision == "fp16"
    assert found.exit is not None
    assert found.exit.input == "feature"
    assert "cuda:0" in dict(describe_plan(given, found))["speed"]
    steps = {step.name: step.command for step in steps_of(given, found)}
    assert "--target cuda --precision fp16" in steps["trained"]
    assert "--device cuda:0" in steps["calibrate"]
    assert "--device cuda:0" in steps["evaluate"]


def test_missing_or_too_small_device_is_refused_before_any_work(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "bandwidth_of", lambda threads: pytest.fail("work was done"))
    machine = Machine(monkeypatch)
    with pytest.raises(DeviceError, match="cuda:5 does not exist: this machine has 1 CUDA devices"):
        planned(options(device="cuda:5"))
    monkeypatch.setattr(machine.cuda, "cudaMemGetInfo", lambda: (0, 1000, 2000))
    with pytest.raises(CapacityError, match=r"MB of weights in fp16 \(2 bundles\) needs \d+ bytes .* 1000 are free"):
        planned(options(device="cuda:0"))
