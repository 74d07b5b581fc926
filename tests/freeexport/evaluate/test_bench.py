"""`freeexport bench`: rows by hand, and from bundles to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles, Case
from click.testing import Result
from command_line import invoke

from freeexport.evaluate import bench as benching
from freeexport.evaluate.bench import Run, rows_of, verdict

LLAMA = BY_NAME["llama-tied"]
T5 = BY_NAME["t5-gated-tied"]
FEW = ("--max-new-tokens", "3", "--samples", "1", "--rounds", "2", "--threads", "1")


def run_of(tokens: tuple[int, ...] = (1, 2, 3, 4), start: float = 0.5, step: float = 0.1, **given: Any) -> Run:
    times = tuple(start + step * number for number in range(len(tokens)))
    return Run(tokens, times, times[-1], **given)


def rows(reference: Any = None, **runs: list[list[Run]]) -> list[dict[str, Any]]:
    return rows_of(runs, dict.fromkeys(runs, "fp32"), reference)


def test_figures_of_a_row() -> None:
    (row,) = rows(one=[[run_of()], [run_of(step=0.2)], [run_of(step=0.3)]])
    assert row["tokens_per_second"] == pytest.approx(4 / 1.1)
    assert row["spread"] == pytest.approx((4 / 0.8 - 4 / 1.4) / (4 / 1.1))
    assert row["decode_per_second"] == pytest.approx(5)
    assert [row[name] for name in ("first_token_ms", "token_ms", "token_ms_95")] == pytest.approx([500, 200, 300])
    assert (row["ratio"], row["agreement"]) == (1, None)


def test_ratios_are_of_speeds_in_the_same_round() -> None:
    """A machine that is slower in the second round slows both."""
    found = rows(one=[[run_of(step=0.5)], [run_of(step=1.0)]], two=[[run_of()], [run_of(step=0.2)]])
    one, two = ([row[name] for name in ("ratio_low", "ratio", "ratio_high")] for row in found)
    assert one == [1, 1, 1]
    assert two == pytest.approx([2 / 0.8, (2 / 0.8 + 3.5 / 1.1) / 2, 3.5 / 1.1])


def test_agreement_and_where_it_ends() -> None:
    tokens = (1, 2, 3, 4)
    first, second = rows([tokens, tokens], one=[[run_of(), run_of((1, 2, 9, 4))]], two=[[run_of(), run_of()]])
    assert (first["agreement"], first["first_difference"]) == (7 / 8, 2)
    assert (second["agreement"], second["first_difference"]) == (1, None)


@pytest.mark.parametrize(("predicted", "passes"), [(1, 2 / 3), (0, 1 / 2)])
def test_deep_passes_a_token_are_counted(predicted: int, passes: float) -> None:
    (row,) = rows(one=[[run_of(sync_sizes={1: 1, 2: 1}, overhead=4e-5, predicted=predicted)]])
    assert (row["passes"], row["overhead_us"]) == pytest.approx((passes, 10))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((0.05, 0.05), "two is the fastest: 1.23x (1.23 to 1.23 by round) the speed of one"),
        ((0.05, 0.11), "nothing is faster than one in every round"),
    ],
)
def test_a_winner_is_faster_in_its_slowest_round(steps: tuple[float, float], said: str) -> None:
    two = [[run_of(step=step)] for step in steps]
    found = rows(one=[[run_of()]] * 2, two=two, replayed=[[run_of(step=0.01)]] * 2)
    assert verdict(found, ["one", "two"]) == said
    assert verdict(found[:1], ["one"]) == ""


def bench(*arguments: object) -> Result:
    return invoke("bench", *arguments)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "bandwidth_of", lambda threads: 1e10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--drafts", "lookup", "--drafts", "lookup"), "lookup is named twice among drafts"),
        (("--threshold", "2"), "choose one from 0 to 1"),
        (("--device", "gpu"), "device is 'gpu'"),
        (("--device", "cuda:0"), "convert again with --target cuda"),
        (("--output", "/nowhere/x.json"), "no directory /nowhere"),
        (("--output", "x.pdf"), "end its name in one of .json"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], said: str, bundle: Bundles) -> None:
    result = bench(bundle(LLAMA), *FEW, *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_bundles_are_of_one_checkpoint_and_named_once(bundle: Bundles) -> None:
    assert "is of another checkpoint" in bench(bundle(LLAMA), bundle(T5), *FEW).stderr
    assert "is named twice among bundles" in bench(bundle(LLAMA), bundle(LLAMA), *FEW).stderr


@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
def test_every_kind_of_setting_in_one_run(
    case: Case, bundle: Bundles, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = iter([1.7])
    monkeypatch.setattr(benching.other_load().__enter__().__class__, "so_far", lambda self: next(loads))
    saved = {suffix: tmp_path / f"run.{suffix}" for suffix in ("json", "csv", "md", "png", "svg")}
    exits = ("--threshold", "0", "--mode", "free", "--mode", "shallow")
    drafts = [part for source in ("auto", "exit", "lookup") for part in ("--drafts", source)]
    outputs = [part for path in saved.values() for part in ("--output", path)]
    result = bench(bundle(case), bundle(case, 2), *FEW, *exits, *drafts, *outputs)
    assert result.exit_code == 0, result.output
    found = json.loads(saved["json"].read_text())
    names = [row["name"] for row in found["rows"]]
    label = names[0].removesuffix(" full")
    each = ["full", "free, threshold 0", "shallow", *(f"lossless, drafts: {one}" for one in ("auto", "exit", "lookup"))]
    assert names[:6] == [f"{label} {name}" for name in each]
    assert len(names) == 12
    by_name = dict(zip(each, found["rows"], strict=False))
    assert {row["agreement"] for name, row in by_name.items() if name.startswith(("full", "lossless"))} == {1}
    assert by_name["free, threshold 0"]["exit_rate"] == by_name["shallow"]["exit_rate"] == 1
    assert by_name["shallow"]["passes"] == 0
    assert by_name["full"]["token_bytes"] > 0
    assert all(row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in found["rows"])
    assert found["bandwidth"] == 1e10
    assert not found["settings"]["idle"]
    assert "other processes kept 1.7 cores busy" in result.stdout
    assert result.stdout.rstrip().endswith(found["verdict"])
    assert found["verdict"] in saved["md"].read_text()
    assert saved["csv"].read_text().count("\n") == 13
    assert saved["png"].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in saved["svg"].read_text()


def test_thresholds_are_the_calibrated_ones_where_none_is_given(bundle: Bundles, quick: None) -> None:
    """This bundle is not calibrated."""
    found = json.loads(bench(bundle(LLAMA), *FEW, "--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["full", "lossless"]
    found = json.loads(bench(bundle(LLAMA), *FEW, "--threshold", "0.5", "--json").stdout)
    assert [row["name"] for row in found["rows"]] == ["full", "free, threshold 0.5", "lossless, threshold 0.5"]


def test_a_table_fits_80_columns_and_leaves_out_what_nobody_has(bundle: Bundles, quick: None) -> None:
    given = ("--threshold", "0", "--mode", "free", "--mode", "lossless", "--drafts", "lookup")
    result = bench(bundle(LLAMA), *FEW, *given)
    table = result.stdout.split("\n\n")[0].splitlines()
    assert len(table) == 1 + 4
    assert max(len(line.rstrip()) for line in table) <= 80
    assert "precision" not in table[0]
    assert "precision: fp32" in result.stdout
    # A column that there is no room for is not explained.
    assert ("differs: the place" in result.stdout) == ("differs" in table[0])
    assert "same: tokens equal" in result.stdout
