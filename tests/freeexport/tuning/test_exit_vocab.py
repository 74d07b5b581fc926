"""`freeexport exit-vocab`, and a conversion with what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES, Case
from click.testing import CliRunner, Result
from command_errors import error
from conftest import Bundles

from freeexport.calibration import source as calibration_source
from freeexport.cli import main
from freeexport.commands import tune
from runtime import Bundle, Session
from runtime.bundle.costs import Costs

BY_NAME = {case.name: case for case in CASES}
LLAMA, T5, MANY_EOS = (BY_NAME[name] for name in ("llama-tied", "t5-deep-decoder", "llama-untied-many-eos"))
# The head is most of a step.
PAYS = Costs(shallow=1.0, shallow_without_head=0.1, deep={1: 0.2, 16: 0.3})
Directory = Callable[[Case], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_source, "measured_costs", lambda *given: PAYS)
    monkeypatch.setattr(tune, "cores_in_use", lambda: 0.0)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["exit-vocab", *map(str, arguments), "--max-new-tokens", "12"])


@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
def test_what_is_chosen_makes_a_bundle_whose_exits_are_of_it(
    case: Case, checkpoint: Directory, bundle: Bundles, data: Path, tmp_path: Path
) -> None:
    chosen, out = tmp_path / "exit-vocab.json", tmp_path / "out"
    given = ("--data", data, "--threshold", 0, "--output", chosen)
    result = run(bundle(case), *given, "--size", 100)
    assert result.exit_code == 0, result.output
    assert re.search(r"100 of \d+ tokens: [\d.]+% of the exits lost, predicted", result.stdout)
    tokens = json.loads(chosen.read_text())["tokens"]
    assert len(tokens) == 100
    fast = ("--no-verify", "--no-measure", "--capacity", "128", "--exit-layer", "1")
    converted = CliRunner().invoke(
        main, ["convert", str(checkpoint(case)), str(out), *fast, "--exit-vocab", str(chosen)]
    )
    assert converted.exit_code == 0, converted.output
    assert "exit vocabulary: 100 of " in converted.stdout
    facts = Bundle.open(out, "full").manifest.exit_vocabulary
    assert facts is not None
    assert facts.size == 100
    with Session(out) as session:
        freely = session.generate("Hello", mode="free", threshold=0.0, max_new_tokens=24, ignore_eos=True)
        options = {"mode": "full", "max_new_tokens": 24, "ignore_eos": True}
        full = session.generate("Hello", **options)
    exits = {token for token, exited in zip(freely.token_ids, freely.exited, strict=True) if exited}
    assert exits
    assert exits <= set(tokens)
    # The deep head knows all tokens.
    with Session(bundle(case)) as whole:
        assert whole.generate("Hello", **options).token_ids == full.token_ids
    assert (
        f"100 of {Bundle.open(out).manifest.vocab_size} tokens"
        in CliRunner().invoke(main, ["inspect", str(out)]).stdout
    )
    # Of its own bundle there is nothing more to choose.
    assert "has an exit vocabulary already" in error(run(out, *given))


def test_a_busy_machine_predicts_nothing(
    bundle: Bundles, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "cores_in_use", lambda: 1.3)
    result = run(bundle(LLAMA), "--data", data, "--threshold", 0, "--size", 100, "--output", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "of the exits lost; speed not measured: machine busy" in result.stdout
    assert not re.search(r"\d\.\d\dx", result.stdout)
    assert "give --size" in result.stderr


def test_a_checkpoint_gives_what_its_bundle_gives(
    checkpoint: Directory, bundle: Bundles, data: Path, tmp_path: Path
) -> None:
    chosen = [tmp_path / "bundle.json", tmp_path / "checkpoint.json"]
    for model, output, more in (
        (bundle(LLAMA), chosen[0], ()),
        (checkpoint(LLAMA), chosen[1], ("--exit-layer", 1)),
    ):
        result = run(model, "--data", data, "--threshold", 0, "--size", 80, "--output", output, *more)
        assert result.exit_code == 0, result.output
    first, second = (json.loads(path.read_text()) for path in chosen)
    assert first["tokens"] == second["tokens"]
    assert first["exits_lost"] == pytest.approx(second["exits_lost"], abs=0.01)


def test_the_largest_of_the_fastest_sizes_is_chosen_and_a_whole_vocabulary_writes_nothing(
    bundle: Bundles, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "exit-vocab.json"
    given = (bundle(LLAMA), "--data", data, "--threshold", 0, "--output", output)
    found = json.loads(run(*given, "--json").stdout)
    fastest = max(gain["predicted_speedup"] for gain in found["gains"])
    as_good = [gain["tokens"] for gain in found["gains"] if gain["predicted_speedup"] >= 0.98 * fastest]
    assert found["chosen"] == as_good[-1] == len(json.loads(output.read_text())["tokens"])
    output.unlink()
    free_head = Costs(shallow=1.0, shallow_without_head=1.0, deep=PAYS.deep)
    monkeypatch.setattr(calibration_source, "measured_costs", lambda *given: free_head)
    result = run(*given)
    assert "keep the whole vocabulary" in result.stdout
    assert not output.exists()


def test_text_ranks_what_the_decoded_lines_do_not_have(bundle: Bundles, data: Path, tmp_path: Path) -> None:
    text, output = tmp_path / "text.jsonl", tmp_path / "exit-vocab.json"
    text.write_text(json.dumps({"input": "a", "target": "zebra quiz"}) + "\n")
    with Session(bundle(LLAMA)) as session:
        assert session.tokenizer is not None
        expected = set(session.tokenizer.encode("zebra quiz"))
    given = (bundle(LLAMA), "--data", data, "--threshold", 0, "--size", 180, "--output", output)
    chosen = []
    for more in ((), ("--text", text)):
        assert run(*given, *more).exit_code == 0
        chosen.append(set(json.loads(output.read_text())["tokens"]))
    assert expected <= chosen[1]
    assert not expected <= chosen[0]
    text.write_text('{"input": "a"}\n')
    assert "line 1: 'target' is missing" in error(run(*given, "--text", text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", 999), "exit vocabulary 999 is out of range"),
        (("--threshold", 1), "nothing exits at threshold 1"),
        (("--output", "nowhere/file"), "--output: there is no directory nowhere"),
        (("--exit-layer", 1), "--exit-layer is for checkpoints"),
        (("--dtype", "float16"), "--dtype is for checkpoints"),
        (("--device", "cuda:7"), "converted for the CPU; for device cuda:7 convert again"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[Any, ...], message: str, bundle: Bundles, data: Path, tmp_path: Path
) -> None:
    output = () if "--output" in arguments else ("--output", tmp_path / "out.json")
    assert message in error(run(bundle(LLAMA), "--data", data, *output, *arguments))
    assert not (tmp_path / "out.json").exists()


def test_every_end_of_sequence_is_known(bundle: Bundles, data: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "exit-vocab.json"
    given = ("--data", data, "--threshold", 0, "--output", chosen)
    assert "11 that end a sequence, choose 11 to 288" in error(run(bundle(MANY_EOS), *given, "--size", 10))
    assert run(bundle(MANY_EOS), *given, "--size", 12).exit_code == 0
    assert {2, *range(223, 233)} < set(json.loads(chosen.read_text())["tokens"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_sha256": "0" * 64}, "is of another model"),
        ({"exit_layer": 2}, "is of another model"),
        ({"tokens": [5, 4]}, "not in ascending order"),
        ({"tokens": [5, 288]}, "not ids of a vocabulary of 288"),
        ({"tokens": []}, "not ids of a vocabulary"),
        ({"tokens": [2, 5.5]}, "expected int"),
        ({"schema_version": 9}, "schema version 9"),
        ({"extra": 1}, "unknown fields extra"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, checkpoint: Directory, bundle: Bundles, tmp_path: Path
) -> None:
    manifest = Bundle.open(bundle(LLAMA)).manifest
    good = {
        "source_sha256": manifest.source_sha256, "vocab_size": 288, "exit_layer": 1, "threshold": 0.5,
        "predictions": 10, "covered": 0.9, "exits_lost": 0.1, "tokens": [2, 5, 9], "schema_version": 1,
    }  # fmt: skip
    path = tmp_path / "exit-vocab.json"
    path.write_text(json.dumps({**good, **change}))
    out = tmp_path / "out"
    arguments = ["convert", str(checkpoint(LLAMA)), str(out), "--exit-layer", "1", "--exit-vocab", str(path)]
    assert message in error(CliRunner().invoke(main, arguments))
    assert not out.exists()
