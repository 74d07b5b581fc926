"""`freeexport evaluate` without metrics: rows by hand, and from bundles to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles, Case
from click.testing import Result
from command_line import error, invoke
from fake_device import Machine

from freeexport.costs.bytes import Calls
from freeexport.costs.verdict import speed_verdict
from freeexport.evaluate import speed
from freeexport.evaluate.measure import timing_of
from freeexport.evaluate.records import Record
from freeexport.evaluate.speed_rows import speed_rows
from freeexport.system.load import OtherLoad
from runtime.bundle.bundle import Bundle as BundleFiles

LLAMA = BY_NAME["llama-tied"]
T5 = BY_NAME["t5-gated-tied"]
FEW = ("--max-new-tokens", "3", "--samples", "1", "--rounds", "2", "--threads", "1")


def run_of(tokens: tuple[int, ...] = (1, 2, 3, 4), start: float = 0.5, step: float = 0.1, **given: Any) -> Record:
    times = [start + step * number for number in range(len(tokens))]
    timing = timing_of(times, times[-1])
    return Record("", "", 1, 0, busy=0.0, tokens=len(tokens), token_ids=tokens, **timing, **given)


def rows(reference: str | None = None, **runs: list[list[Record]]) -> list[dict[str, Any]]:
    """Compute rows from the records of each name by round, then by line."""
    found: dict[str, dict[int, Sequence[Record]]] = {
        name: dict(enumerate(zip(*rounds, strict=True), 1)) for name, rounds in runs.items()
    }
    return speed_rows(found, dict.fromkeys(runs, "fp32"), reference)


def test_row_has_speeds_latencies_and_their_spread() -> None:
    (row,) = rows(one=[[run_of()], [run_of(step=0.2)], [run_of(step=0.3)]])
    assert row["tokens_per_second"] == pytest.approx(4 / 1.1)
    assert row["spread"] == pytest.approx((4 / 0.8 - 4 / 1.4) / (4 / 1.1))
    assert row["decode_per_second"] == pytest.approx(5)
    assert [row[name] for name in ("first_token_ms", "token_ms", "token_ms_95")] == pytest.approx([500, 200, 300])
    assert (row["ratio"], row["agreement"]) == (1, None)


def test_interrupted_round_does_not_count() -> None:
    lines = {1: [run_of(), run_of(step=0.2)], 2: [run_of()]}
    (row,) = speed_rows({"one": lines}, {"one": "fp32"}, None)
    assert (row["tokens_per_second"], row["spread"]) == (pytest.approx(8 / 1.6), 0)


def test_ratios_compare_speeds_of_the_same_round() -> None:
    """A machine that is slower in the second round slows both."""
    found = rows(one=[[run_of(step=0.5)], [run_of(step=1.0)]], two=[[run_of()], [run_of(step=0.2)]])
    one, two = ([row[name] for name in ("ratio_low", "ratio", "ratio_high")] for row in found)
    assert one == [1, 1, 1]
    assert two == pytest.approx([2 / 0.8, (2 / 0.8 + 3.5 / 1.1) / 2, 3.5 / 1.1])


def test_agreement_and_first_difference_are_reported() -> None:
    one, two = [[run_of(), run_of((1, 2, 9, 4))]], [[run_of(), run_of()]]
    first, second = rows("two", one=one, two=two)
    assert (first["agreement"], first["first_difference"]) == (7 / 8, 2)
    assert (second["agreement"], second["first_difference"]) == (1, None)


@pytest.mark.parametrize(("decided", "passes"), [(3, 2 / 3), (4, 1 / 2)])
def test_deep_passes_per_token_are_counted(decided: int, passes: float) -> None:
    calls = Calls(5, decided, steps=decided, heads=0, own=False, further=0, passes={1: 1, 2: 1})
    (row,) = rows(one=[[run_of(calls=calls, exited=(False, True, False, False), overhead=4e-5)]])
    assert (row["passes"], row["overhead_us"], row["exit_rate"]) == pytest.approx((passes, 10, 1 / decided))


def test_other_decoders_have_one_pass_per_token() -> None:
    (row,) = rows(one=[[run_of()]])
    assert (row["passes"], row["overhead_us"], row["exit_rate"], row["acceptance"]) == (1, None, 0, 1)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((0.05, 0.05), "two is the fastest: 1.23x (1.23 to 1.23 by round) the speed of one"),
        ((0.05, 0.11), "nothing is faster than one in every round"),
    ],
)
def test_winner_is_faster_even_in_its_slowest_round(steps: tuple[float, float], said: str) -> None:
    two = [[run_of(step=step)] for step in steps]
    found = rows(one=[[run_of()]] * 2, two=two, replayed=[[run_of(step=0.01)]] * 2)
    assert speed_verdict(found, ["one", "two"]) == said
    assert speed_verdict(found[:1], ["one"]) == ""


def evaluate(*arguments: object) -> Result:
    return invoke("evaluate", *arguments)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "bandwidth_of", lambda threads: 1e10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--threshold", "1"), "choose one from 0 to below 1"),
        (("--methods", "free"), "the first bundle has no method full"),
        (("--device", "gpu"), "device is 'gpu'"),
        (("--device", "cuda:0"), "convert again with --target cuda"),
        (("--metric", "exact"), "give --data FILE and --output DIRECTORY"),
    ],
)
def test_invalid_options_are_refused(arguments: tuple[str, ...], said: str, bundle: Bundles) -> None:
    result = evaluate(bundle(LLAMA), *FEW, *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_share_of_a_metric_requires_a_metric(bundle: Bundles) -> None:
    assert "give --metric" in evaluate(bundle(LLAMA), "--target-quality", "0.9").stderr


def test_bundles_must_be_of_one_checkpoint_and_named_once(bundle: Bundles) -> None:
    assert "is of another checkpoint" in evaluate(bundle(LLAMA), bundle(T5), *FEW).stderr
    assert "is named twice" in evaluate(bundle(LLAMA), bundle(LLAMA), *FEW).stderr


@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
def test_every_kind_of_setting_runs_together(
    case: Case, bundle: Bundles, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OtherLoad, "so_far", lambda self: 1.7)
    out = tmp_path / "out"
    methods = ("full", "static", "free", "lookup", "exit-drafts", "lossless")
    settings = ("--threshold", "0", "--methods", ",".join(methods))
    result = evaluate(bundle(case), bundle(case, 2), *FEW, *settings, "--output", out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "evaluation.json").read_text())
    names = [row["name"] for row in found["rows"]]
    label = names[0].removesuffix(" full")
    each = ["full", "static", "free 0", "lookup", "exit-drafts", "lossless"]
    assert names[:6] == [f"{label} {name}" for name in each]
    assert len(names) == 12
    by_name = dict(zip(each, found["rows"], strict=False))
    equal = ("full", "lookup", "exit-drafts", "lossless")
    assert {by_name[name]["agreement"] for name in equal} == {1}
    assert by_name["free 0"]["exit_rate"] == by_name["static"]["exit_rate"] == 1
    assert by_name["static"]["passes"] == 0
    assert by_name["full"]["token_bytes"] > by_name["static"]["token_bytes"] > 0
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in found["rows"])
    assert found["bandwidth"] == 1e10
    assert not found["settings"]["idle"]
    assert "other processes kept 1.7 cores busy" in result.stdout
    assert found["verdict"] in result.stdout
    assert found["verdict"] in (out / "results.md").read_text()
    assert (out / "evaluation.csv").read_text().count("\n") == 13
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "speed.svg").read_text()
    # Another run with the same output measures nothing again.
    lines = (out / "outputs.jsonl").read_text()
    assert evaluate(bundle(case), bundle(case, 2), *FEW, *settings, "--output", out).exit_code == 0
    assert (out / "outputs.jsonl").read_text() == lines
    assert json.loads((out / "evaluation.json").read_text())["rows"] == found["rows"]


def test_mode_free_defaults_to_the_calibrated_threshold(bundle: Bundles, quick: None) -> None:
    """This bundle is not calibrated."""
    found = json.loads(evaluate(bundle(LLAMA), *FEW, "--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["full", "static", "lossless"]
    found = json.loads(evaluate(bundle(LLAMA), *FEW, "--threshold", "0.5", "--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["full", "static", "free 0.5", "lossless"]


def test_table_fits_80_columns_and_omits_empty_columns(bundle: Bundles, quick: None) -> None:
    given = ("--threshold", "0", "--methods", "full,free,lookup,lossless")
    result = evaluate(bundle(LLAMA), *FEW, *given)
    table = result.stdout.split("\n\n")[0].splitlines()
    assert len(table) == 1 + 4
    assert max(len(line.rstrip()) for line in table) <= 80
    assert "precision" not in table[0]
    assert "precision: fp32" in result.stdout
    # A column that there is no room for is not explained.
    assert ("differs: the place" in result.stdout) == ("differs" in table[0])
    assert "same: tokens equal" in result.stdout


def test_bundles_that_do_not_fit_a_gpu_together_are_refused_before_any_work(
    bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [bundle(LLAMA, target="cuda", precision=precision) for precision in ("fp32", "fp16")]
    monkeypatch.setattr(speed, "bandwidth_of", lambda threads: pytest.fail("work was done"))
    machine = Machine(monkeypatch)
    assert "cuda:1 does not exist" in error(invoke("evaluate", *paths, "--device", "cuda:1"))
    manifests = [BundleFiles.open(path).manifest for path in paths]
    needed = sum(one.weight_bytes + one.kv_bytes_per_sequence for one in manifests)
    monkeypatch.setattr(machine.cuda, "cudaMemGetInfo", lambda: (0, needed - 1, needed))
    refused = error(invoke("evaluate", *paths, "--device", "cuda:0"))
    assert f"of 2 bundles needs {needed} bytes of device cuda:0, and {needed - 1} are free" in refused


def test_bundle_is_measured_on_a_gpu(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)
    path = bundle(LLAMA, target="cuda", precision="fp16")
    result = invoke("evaluate", path, "--device", "cuda:0", "--methods", "full,lossless", *FEW)
    assert result.exit_code == 0, result.output
    assert "the bundles ran on cuda:0" in result.output
