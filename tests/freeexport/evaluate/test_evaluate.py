"""`freeexport evaluate` from bundles and data to its report."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import pytest
from checkpoints import BY_NAME, Bundles
from click.testing import Result
from command_line import invoke, succeed

from freeexport.costs.measured import measured_costs
from freeexport.costs.verdict import setting_verdicts
from freeexport.evaluate import evaluate as evaluation
from freeexport.evaluate import measure, page, tables
from freeexport.evaluate.records import OUTPUTS, RUN
from freeexport.evaluate.settings import METHODS
from freeexport.system.environment import commit_of
from freeexport.task_metrics import metric_of
from runtime import Session
from runtime.bundle.bundle import Bundle, sha256_of
from runtime.bundle.manifest import MANIFEST
from runtime.decoding import drafts
from runtime.engines import kernels

CASE = BY_NAME["t5-relu-tied"]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def path(bundle: Bundles) -> Path:
    return bundle(CASE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, path: Path) -> Path:
    """Four lines, whose references are what the full model writes, but for the last."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    inputs = ["one two", "<three> & four", "five six seven", "x"]
    with Session(path, slots=1) as session:
        texts = [session.generate(text, mode="full", max_new_tokens=12).text for text in inputs]
    texts[-1] = "something else"
    lines = [json.dumps({"input": text, "target": target}) for text, target in zip(inputs, texts, strict=True)]
    file.write_text("\n".join(lines) + "\n")
    return file


def call(bundles: tuple[Any, ...], data: Path, out: Path, *arguments: Any) -> Result:
    given = ("--metric", "exact", "--max-new-tokens", 12, "--threads", 1, "--output", out)
    options = ("--threshold", 0.3, "--threshold", 0.7)
    everything = ("evaluate", *bundles, "--data", data, *given, *options, *arguments)
    return invoke(*everything)


@pytest.fixture
def run(tmp_path: Path, path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Evaluates without files of results, which take longer to draw than these models to decode."""
    monkeypatch.setattr(page, "write_evaluation", lambda found, out: None)

    def evaluate(*arguments: Any, bundles: tuple[Any, ...] = (path,), file: Path = data) -> Result:
        return call(bundles, file, tmp_path / "out", *arguments)

    return evaluate


def figures(result: Result) -> dict[str, dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return {row["setting"]: row for row in json.loads(result.stdout)["rows"]}


@dataclass(frozen=True)
class Done:
    """A run of most methods by two metrics in two rounds: what it printed, wrote and found."""

    stdout: str
    out: Path
    found: evaluation.Evaluation


OTHERS = ("free", "adaptive", "rollback", "phrases", "exit-drafts")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, path: Path, data: Path) -> Done:
    out, found = tmp_path_factory.mktemp("results") / "out", list[evaluation.Evaluation]()
    methods = ",".join(method for method in METHODS if method not in OTHERS)
    write = page.write_evaluation
    with (
        mock.patch.object(drafts, "MAX_SEARCH_PAUSE", 0),  # searching does not pay for such a small model
        mock.patch.object(page, "write_evaluation", lambda one, out: (found.append(one), write(one, out))),
    ):
        result = call((path,), data, out, "--methods", methods, "--rounds", 2, "--metric", "chrf")
    assert result.exit_code == 0, result.output
    return Done(result.stdout, out, found[0])


def test_every_method_is_decoded_and_compared(done: Done) -> None:
    content = json.loads((done.out / "evaluation.json").read_text())
    rows = {row["setting"]: row for row in content["rows"]}
    assert list(rows) == ["full", "static", "published 0.3", "published 0.7", "lookup", "lossless"]
    full, static, lossless = rows["full"], rows["static"], rows["lossless"]
    assert rows["lookup"]["same"] == 1
    assert (rows["lookup"]["exit_rate"], full["predicted"]) == (0, None)
    assert static["predicted"] > rows["published 0.3"]["predicted"] >= rows["published 0.7"]["predicted"] > 0
    assert rows["lookup"]["predicted"] > 0.3
    assert content["machine"]["kernels"] == kernels.instructions()
    assert content["row_shares"] == {str(path_name): 0.13 for path_name in content["bundles"]}
    assert full["scores"]["exact"]["value"] == 0.75
    assert full["request_speed"] == full["scores"]["exact"]["relative"] == full["same"] == 1
    assert (full["layers"], static["layers"], static["exit_rate"]) == (CASE.layers, 1, 1)
    assert lossless["same"] == 1
    assert all(0 <= share <= 1 for drafts in lossless["drafts"].values() for share, _ in drafts)
    assert set(rows["lookup"]["drafts"]) == {"lookup"}
    assert rows["published 0.3"]["drafts"] == {}
    assert lossless["scores"] == {name: {**score, "low": 1, "high": 1} for name, score in full["scores"].items()}
    assert rows["published 0.3"]["exit_rate"] >= rows["published 0.7"]["exit_rate"]
    assert all(row["request_speed"] > 0 and row["first_speed"] > 0 and row["lines"] == 4 for row in rows.values())
    assert all(row["request_low"] <= row["request_speed"] <= row["request_high"] for row in list(rows.values())[1:])
    assert content["metrics"]["chrf"].startswith("nrefs:1|case:mixed")
    assert len((done.out / OUTPUTS).read_text().splitlines()) == 6 * 4 * 2
    trained = "was not trained for its exit after layer 1: its figures for static, published, lossless show"
    assert any(trained in note for note in content["notes"])
    assert any("is not calibrated" in note for note in content["notes"])


def test_results_record_commit_weights_and_data(done: Done, path: Path, data: Path) -> None:
    content = json.loads((done.out / "evaluation.json").read_text())
    (about,) = content["bundles"].values()
    manifest = Bundle.open(path).manifest
    assert about["manifest_sha256"] == sha256_of(path / MANIFEST)
    assert (about["source_sha256"], about["calibration"]) == (manifest.source_sha256, None)
    assert (content["data_sha256"], content["references"]) == (sha256_of(data), "targets")
    assert content["versions"]["kernels"] == str(kernels.VERSION)
    assert {"made", "commit", "machine"} <= set(content)


def test_commit_is_that_of_the_checkout_with_a_flag_for_changes(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "file").write_text("x")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "Add a file"], ["tag", "-m", "t", "v1"]):
        subprocess.run([*git, *arguments], check=True)
    commit = commit_of(tmp_path)
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("y")
    assert commit_of(tmp_path) == f"{commit}-dirty"


def test_lines_without_targets_are_compared_with_the_full_model(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"input": text}) + "\n" for text in ("one two", "five six seven")))
    result = run("--methods", "full,static,lossless", "--json", file=file)
    rows = figures(result)
    assert rows["full"]["scores"]["exact"]["value"] == rows["lossless"]["scores"]["exact"]["value"] == 1
    assert rows["static"]["scores"]["exact"]["value"] < 1
    report = json.loads(result.stdout)
    assert report["references"] == "full"
    assert any("compared with those of the full model" in note for note in report["notes"])


def test_tables_plots_and_an_escaped_page_are_written(done: Done) -> None:
    with (done.out / "evaluation.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["setting"] for row in listed] == [row["setting"] for row in done.found.rows]
    assert float(listed[0]["scores exact value"]) == 0.75
    markdown = (done.out / "results.md").read_text()
    assert markdown.startswith("**no winner: 4 lines are too few")
    table = [line for line in markdown.splitlines() if line.startswith("|")][: 2 + len(listed)]
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| full | 0.7500 |  | ")
    assert (done.out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(done.out / "curve.svg").getroot().tag.endswith("svg")
    text = (done.out / "report.html").read_text()
    assert "&lt;three&gt; &amp; four" in text
    assert "<three>" not in text
    assert "<b>No winner" in text
    assert '<span class="exited">' in text.partition("<h2>Outputs</h2>")[2]
    assert "<svg" in text
    assert not any(word in text for word in ("<script", "src=", "<link", "@import"))  # it loads nothing


def test_share_is_rounded_alike_in_table_and_verdict() -> None:
    """With an error rate, both show 1 minus the rate."""
    scores = {"value": 0.96, "relative": 0.98, "low": 0.97, "high": 0.99, "error": 0.04, "support": 180.0}
    full = {"bundle": "b", "method": "full", "setting": "full", "lines": 200, "scores": {"per": scores}}
    row = full | {
        "method": "free",
        "setting": "free 0.5",
        "same": 0.5,
        "request_speed": 2.0,
        "request_low": 1.9,
        "request_high": 2.1,
    }
    metric = metric_of("per")
    assert tables.relative_score(metric.name, row) == "98.0±1.0"
    (verdict,) = setting_verdicts([full, row], metric, 0.95)
    assert "keeps 95 % of full's 1 - PER: 2.00x" in verdict
    assert verdict.endswith("at 98.0 % (97.0 to 99.0)")


def test_legend_explains_only_the_columns_shown(done: Done) -> None:
    whole = tables.settings_sheet(done.found)
    names = {name.rstrip("#") for name in whole.columns}
    for count in range(1, len(names)):
        shown = whole.only(range(count))
        explained = names & {name for name, _ in tables.facts(done.found, shown)}
        assert explained.isdisjoint(shown.hides(whole))
    assert names & {name for name, _ in tables.facts(done.found)} >= {"speed", "predicted"}


def test_table_fits_80_columns_and_states_constant_columns_once(done: Done) -> None:
    lines = done.stdout.splitlines()
    table = lines[: lines.index("")]
    assert max(map(len, (line.rstrip() for line in table))) <= 80
    assert len(table) == 2 + 6  # a title, names, and a line for each setting
    assert table[1].split()[:2] == ["setting", "exact"]
    assert "±" in table[3]
    assert "precision: fp32" in lines


def test_bundles_alternate_like_settings(
    run: Run, bundle: Bundles, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is slow for some lines must slow the same lines of every bundle."""
    decoded: list[tuple[int, str, bytes]] = []
    decode = measure.decode

    def noted(session: Any, setting: Any, prompt: Any, options: Any, **given: Any) -> Any:
        if options["max_new_tokens"] == 12:  # 16: warming up
            decoded.append((id(session), setting.name, prompt.tobytes()))
        return decode(session, setting, prompt, options, **given)

    monkeypatch.setattr(measure, "decode", noted)
    other = bundle(CASE, 2)
    rows = json.loads(run("--json", bundles=(f"{path}=full,free", f"{other}=static")).stdout)["rows"]
    assert [(row["bundle"], row["setting"]) for row in rows] == [
        (str(path), "full"), (str(path), "free 0.3"), (str(path), "free 0.7"), (str(other), "static"),
    ]  # fmt: skip
    assert rows[-1]["against"] == str(path)
    turns = [decoded[start : start + 4] for start in range(0, len(decoded), 4)]
    assert len(turns) == 4
    for turn in turns:  # one line in the settings of both bundles before the next line
        assert len({prompt for *_, prompt in turn}) == 1
        assert len({decoder for decoder, *_ in turn}) == 2
    assert len({tuple(name for _, name, _ in turn) for turn in turns}) > 2  # in another order each time


def test_interrupted_run_continues_without_decoding_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, lines = measure.decode, list[bytes]()

    def counted(session: Any, setting: Any, prompt: Any, options: Any, **given: Any) -> Any:
        if options["max_new_tokens"] == 12:  # 16: warming up
            lines.append(prompt.tobytes())
        if len(lines) == 5:
            raise KeyboardInterrupt
        return decode(session, setting, prompt, options, **given)

    monkeypatch.setattr(measure, "decode", counted)
    assert run("--methods", "full,lossless").exit_code == 130
    outputs = tmp_path / "out" / OUTPUTS
    before = outputs.read_text()
    assert before.count("\n") == 4
    outputs.write_text(before + '{"bundle": "t5-re')  # as a killed process leaves it
    lines.append(b"")
    # Another metric, and more rounds, need no more than what is new.
    for more, decoded in (((), 10), (("--metric", "wer"), 10), (("--rounds", 2), 18)):
        assert run("--methods", "full,lossless", *more).exit_code == 0
        assert len(lines) == decoded
    assert lines[6] == lines[7] == lines[4]  # the line that was interrupted, anew in both settings
    assert outputs.read_text().startswith(before)


def test_lines_are_sampled_with_their_numbers_as_seeds(run: Run, path: Path, data: Path, tmp_path: Path) -> None:
    sampled = ("--methods", "full,lossless", "--temperature", 1.5)
    found = figures(run(*sampled, "--json"))
    assert found["lossless"]["same"] == 1
    records = [json.loads(line) for line in (tmp_path / "out" / OUTPUTS).read_text().splitlines()]
    inputs = [json.loads(line)["input"] for line in data.read_text().splitlines()]
    with Session(path, slots=1) as session:
        for record in records:
            given = {"mode": "full", "max_new_tokens": 12, "temperature": 1.5, "seed": record["line"]}
            assert tuple(record["token_ids"]) == session.generate(inputs[record["line"] - 1], **given).token_ids
    assert "--output" in run("--methods", "full,lossless").stderr  # greedy: another run
    told = run(*sampled).stdout
    assert "sampled at temperature 1.5, each line with its number as seed, at most 12 tokens" in " ".join(told.split())


def test_output_of_another_run_is_refused_with_the_difference(run: Run, tmp_path: Path) -> None:
    assert run("--methods", "full").exit_code == 0
    result = run("--methods", "full,static", "--samples", 3)
    assert result.exit_code == 1
    assert "holds another run, with other samples, settings; name another --output" in result.stderr
    assert run("--methods", "full,static", "--samples", 3, "--overwrite").exit_code == 0
    (tmp_path / "out" / RUN).unlink()
    assert "is no output of this command (no run.json)" in run("--overwrite").stderr


def test_adaptive_threshold_continues_in_the_next_run(
    run: Run, bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freeexport.calibrate.calibrate.measured_costs", partial(measured_costs, rounds=1, seconds=0.1))
    calibration = tmp_path / "calibration.json"
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"input": f"line {n}"}) + "\n" for n in range(12)))
    given = (bundle(CASE), "--data", many, "--agreement", 0.3, "--max-new-tokens", 12, "--output", calibration)
    succeed("calibrate", *given)
    calibrated = bundle(CASE, calibration=calibration)
    assert 0 < Bundle.open(calibrated).manifest.threshold < 1
    rows = figures(run("--methods", "full,free,adaptive", "--json", bundles=(calibrated,)))
    assert any("calibrated" in name for name in rows)
    records = [json.loads(line) for line in (tmp_path / "out" / OUTPUTS).read_text().splitlines()]
    states = [record["adaptive_state"] for record in records if record["setting"] == "adaptive"]
    assert len(states) == 4
    assert states[0] != states[-1]
    assert all(0 <= record["threshold"] <= 1 for record in records if record["setting"] == "adaptive")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "rouge"), "'rouge' is no metric; choose from exact"),
        (("--metric", "no_such_module:f"), "No module named 'no_such_module'"),
        (("--methods", "full,magic"), "'magic' is no method; choose from full"),
        (("--methods", "free"), "the first bundle has no method full"),
        (("--threshold", "1"), "--threshold 1 is out of range"),
        (("--target-quality", "0"), "target quality is 0.0"),
        (("--temperature", "-1"), "temperature is -1.0"),
    ],
)
def test_invalid_options_are_refused_before_decoding(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"input": "x", "target": "y"}, {"input": "x"}], "line 2 has no 'target' and no 'references', which other"),
        ([{"input": "long " * 200, "target": "y"}], "none of the 1 inputs can be used; line 1"),
        ([{"input": "x", "target": "lower case"}], "metric case-f1 does not fit these data"),
    ],
)
def test_data_that_cannot_be_compared_are_refused(
    run: Run, tmp_path: Path, lines: list[dict[str, Any]], message: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    extra = ("--metric", "case-f1") if "case-f1" in message else ()
    assert run("--methods", "full").exit_code == 0
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = run(*extra, "--overwrite", file=file)
    assert result.exit_code == 1
    assert message in result.stderr
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    assert run(*extra, file=file).exit_code == 1
    assert not out.exists()
