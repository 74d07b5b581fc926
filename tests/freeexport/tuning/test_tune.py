from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES
from click.testing import CliRunner, Result
from command_errors import error
from conftest import TEXTS, Bundles

from freeexport.calibration import source as calibration_source
from freeexport.cli import main
from freeexport.costs.threshold_speed import Setting
from freeexport.system import idle
from freeexport.tuning import bundles as tune_bundles
from freeexport.tuning import tune as tune_run
from freeexport.tuning.options import TuneOptions
from runtime import Bundle, Session
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import MANIFEST, Manifest
from runtime.errors import OptionError

BY_NAME = {case.name: case for case in CASES}
LLAMA, T5 = BY_NAME["llama-tied"], BY_NAME["t5-deep-decoder"]
# Deep passes over several rows cost little more than over one: exits pay.
PAYS = Costs(shallow=1.0, shallow_without_head=0.9, deep={1: 4.0, 2: 4.1, 4: 4.2, 16: 30.0})

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def own(tmp_path: Path, bundle: Bundles) -> Callable[..., Path]:
    """A bundle that the test may change."""

    def copied(exit_layer: int) -> Path:
        return Path(shutil.copytree(bundle(LLAMA, exit_layer), tmp_path / f"exit-{exit_layer}"))

    return copied


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Costs, float], None]:
    """A machine of known costs, on which mode free is so much faster than mode full."""

    def behaves(costs: Costs, faster: float) -> None:
        def speeds(settings: Sequence[Setting], prompts: Any, tokens: int, rounds: int) -> np.ndarray:
            return np.tile([100.0 if one.threshold is None else 100.0 * faster for one in settings], (rounds, 1))

        monkeypatch.setattr(idle, "cores_in_use", lambda: 0.0)
        monkeypatch.setattr(calibration_source, "measured_costs", lambda *given: costs)
        monkeypatch.setattr(tune_run, "speeds_in_turn", speeds)

    behaves(PAYS, 1.5)
    return behaves


def run(*arguments: Any) -> Result:
    quick = ("--max-new-tokens", 12, "--metric", "chrf")
    return CliRunner().invoke(main, ["tune", *map(str, arguments), *map(str, quick)])


def found(*arguments: Any) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_the_fastest_choice_that_keeps_the_quality_goes_into_its_bundle(
    own: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    bundles, save = [own(1), own(2)], tmp_path / "tuned.json"
    answer = found(*bundles, "--data", data, "--target-quality", 0.5, "--write", "--save", save)
    assert answer == json.loads(save.read_text())
    chosen = answer["choice"]
    assert chosen in answer["candidates"]
    assert 1 <= len(answer["candidates"]) <= 3
    assert chosen["quality"] >= 0.5
    assert (answer["sequences"], answer["held_out"]) == (24, 12)
    assert answer["written"]
    assert chosen["max_pending"] < 16  # long passes cost more than they save here
    other = next(path for path in bundles if str(path) != chosen["bundle"])
    assert Bundle.open(other, verify="full").manifest.threshold == 1.0
    opened = Bundle.open(Path(chosen["bundle"]), verify="full")
    assert (opened.manifest.threshold, opened.manifest.tuned_max_pending) == (
        chosen["threshold"],
        chosen["max_pending"],
    )
    assert opened.calibration is not None
    row = next(row for row in opened.calibration.table if row.threshold == chosen["threshold"])
    assert (row.quality, row.measured_speedup) == (chosen["quality"], 1.5)
    # The choice's own agreement with the full model, decoded again.
    with Session(chosen["bundle"], slots=1) as session:
        sizes = session.generate(TEXTS[0], max_new_tokens=12, ignore_eos=True).stats.sync_sizes
        given = {"threshold": chosen["threshold"], "max_pending": chosen["max_pending"]}
        assert sizes == session.generate(TEXTS[0], max_new_tokens=12, ignore_eos=True, **given).stats.sync_sizes


def test_the_table_says_what_each_candidate_gives_and_names_the_choice(bundle: Bundles, data: Path) -> None:
    result = run(bundle(LLAMA, 1), bundle(LLAMA, 2), "--data", data, "--target-quality", 0.5)
    assert result.exit_code == 0, result.output
    assert "chosen" in result.stdout
    assert "of the full model's chrf on 12 sequences not used for the choice, at 1.50x its speed" in result.stdout


def test_bundles_of_equal_names_are_told_apart(bundle: Bundles, data: Path) -> None:
    paths = [bundle(LLAMA, 1), bundle(LLAMA, 2)]
    assert paths[0].name == paths[1].name
    answer = found(*paths, "--data", data, "--target-quality", 0.5)
    assert [entry["bundle"] for entry in answer["bundles"]] == list(map(str, paths))


def test_mode_full_where_exits_cost_more_than_they_save(
    own: Callable[..., Path], data: Path, machine: Callable[..., None]
) -> None:
    machine(replace(PAYS, shallow=20.0), 0.5)
    path = own(1)
    before = (path / MANIFEST).read_bytes()
    result = run(path, "--data", data, "--write")
    assert result.exit_code == 0, result.output
    assert "use mode full: exits are predicted to cost more than they save" in result.stdout
    assert "nothing was written" in result.stdout
    assert (path / MANIFEST).read_bytes() == before


def test_mode_full_where_no_choice_is_measured_to_be_faster(
    bundle: Bundles, data: Path, machine: Callable[..., None]
) -> None:
    machine(PAYS, 0.9)
    answer = found(bundle(LLAMA, 1), "--data", data, "--target-quality", 0.5)
    assert answer["choice"] is None
    assert "the fastest was measured at 0.90x the full model's speed" in answer["advice"]


def test_mode_full_where_nothing_keeps_the_quality(
    bundle: Bundles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_run.Outputs, "kept", lambda *given, **options: 0.3)
    answer = found(bundle(LLAMA, 1), "--data", data, "--target-quality", 0.5)
    assert (answer["choice"], answer["candidates"], answer["full_tokens_per_second"]) == (None, [], None)
    assert "no choice that is faster than the full model keeps 0.5 of the full model's chrf" in answer["advice"]


def test_quality_on_the_sequences_held_out_decides(
    bundle: Bundles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(outputs: Any, metric: str, threshold: float, max_pending: int) -> float:
        return 0.9 if len(outputs) == 24 else 0.4

    monkeypatch.setattr(tune_run.Outputs, "kept", kept)
    answer = found(bundle(LLAMA, 1), "--data", data, "--target-quality", 0.5)
    assert answer["choice"] is None
    assert answer["candidates"]
    assert "keeps it on the sequences held out" in answer["advice"]


def test_speeds_of_a_busy_machine_are_refused_unless_forced(
    bundle: Bundles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle, "cores_in_use", lambda: 1.5)
    given = (bundle(LLAMA, 1), "--data", data, "--target-quality", 0.5)
    assert "other processes keep 1.5 cores busy" in error(run(*given))
    answer = found(*given, "--force")
    assert not answer["idle"]
    assert "not to be trusted" in answer["notes"][0]


def test_bundles_that_do_not_go_together_are_refused(bundle: Bundles, data: Path, tmp_path: Path) -> None:
    one = bundle(LLAMA, 1)
    assert "are of different checkpoints (family" in error(run(one, bundle(T5, 1), "--data", data))
    assert "is given twice" in error(run(one, one, "--data", data))
    assert "different precisions" in error(run(one, bundle(LLAMA, 1, precision="int8"), "--data", data))


def test_checkpoints_that_differ_go_together_where_their_full_models_write_the_same(
    own: Callable[..., Path], bundle: Bundles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own(2)
    manifest = Manifest.from_json((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(replace(manifest, source_sha256="cd" * 32).to_json())
    given = (bundle(LLAMA, 1), path, "--data", data, "--target-quality", 0.5)
    assert found(*given)["choice"] is not None

    def other(source: Any, *given: Any) -> list[int]:
        return [source.facts.exit_layer]

    monkeypatch.setattr(tune_bundles, "_written", other)
    assert "their full models do not write the same" in error(run(*given))


def test_too_few_samples_to_hold_any_out_are_refused(bundle: Bundles, data: Path) -> None:
    assert "of which 9 would be held out; give 30 or more" in error(
        run(bundle(LLAMA, 1), "--data", data, "--samples", 29)
    )


def test_no_directory_to_save_in_is_refused_before_any_work(bundle: Bundles, data: Path, tmp_path: Path) -> None:
    result = run(bundle(LLAMA, 1), "--data", data, "--save", tmp_path / "no" / "tuned.json")
    assert "--save: there is no directory" in error(result)


def test_a_device_that_bundles_are_not_for_is_named(bundle: Bundles, data: Path) -> None:
    result = run(bundle(LLAMA, 1), "--data", data, "--device", "cuda:7")
    assert "converted for the CPU; for device cuda:7 convert again" in error(result)


@pytest.mark.parametrize(
    "wrong", [{"device": "tpu"}, {"quality": 0.0}, {"quality": 1.0}, {"quality": float("nan")}, {"candidates": 0}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        TuneOptions(**wrong)
