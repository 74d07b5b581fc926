"""The README's rows: declared, measured in a clean checkout, published, and shown."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from checkpoints import BY_NAME, Bundles
from click.testing import CliRunner

from freeexport.checkpoints.examples import read_examples
from tools.data.prompts import KINDS
from tools.data.splits import TEST_LINES
from tools.results import measure as measuring
from tools.results import pages, published
from tools.results.measure import clean_commit, measure_row
from tools.results.published import RESULTS, ROOT, SHIPPED, USES, changed_since, fingerprint, read_lines
from tools.results.rows import CALIBRATION_LINES, ORDINARY, ORDINARY_LINES, RISK, ROWS, Data, ResultRow

command = import_module("tools.results.__main__")


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run git in `root`. Its return code is not checked."""
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True)


def has_history() -> bool:
    """Tell if the commits of old measurements can be read. They cannot in a copy or a shallow clone."""
    oldest = read_lines(ROOT / USES)[0]
    return git(ROOT, "cat-file", "-e", oldest["commit"] or oldest["added_in"]).returncode == 0


def test_committed_pages_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(command.main, ["pages", "--check"])
    assert done.exit_code == 0, done.output
    assert pages.README.search((ROOT / "README.md").read_text(encoding="utf-8"))


def test_rows_use_at_most_the_lines_of_their_split() -> None:
    # Rule `risk` cannot choose a threshold from fewer sequences.
    assert (1 - RISK) ** CALIBRATION_LINES < 0.05
    for row in ROWS.values():
        assert row.lines <= TEST_LINES
        assert row.calibrated == ("free" in row.methods)
        assert {"full", "lookup", "lossless"} <= set(row.methods)
        assert set(row.shipped) <= set(SHIPPED)


def test_ordinary_prompts_follow_no_template() -> None:
    messages = [line.text for line in read_examples(ORDINARY)]
    lines = [json.loads(line) for line in ORDINARY.read_text(encoding="utf-8").splitlines()]
    assert messages == [line["input"] for line in lines]
    assert all([one["role"] for one in line["input"]] == ["user"] for line in lines)
    texts = [line["input"][0]["content"] for line in lines]
    assert len(texts) == len(set(texts)) == ORDINARY_LINES
    assert all(10 <= len(text) <= 2000 and text == text.strip() for text in texts)
    # What stands before the first placeholder, where that says something.
    templates = [template.partition("{")[0] for kind in KINDS.values() for template in kind]
    beginnings = tuple(text for text in templates if len(text) > 12)
    assert [text for text in texts if text.startswith(beginnings)] == []


@pytest.fixture
def row(tmp_path: Path, bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> ResultRow:
    """A row of a tiny model and of data that need not be built. Results are published below tmp_path."""
    path = bundle(BY_NAME["t5-relu-tied"])
    monkeypatch.setattr(measuring, "converted", lambda row, output: path)
    monkeypatch.setattr(measuring, "clean_commit", lambda: "0" * 40)
    (tmp_path / RESULTS).parent.mkdir(parents=True)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"input": text}) + "\n" for text in ("one two", "five six", "x")))
    chat = ROWS["ordinary-chat-int8"]
    return replace(chat, data=Data("prompts", "prompts, version 1", file=data), lines=2, max_new_tokens=8)


def test_measurement_publishes_its_rows_and_records_the_use_of_test_lines(tmp_path: Path, row: ResultRow) -> None:
    measure_row(row, tmp_path / "out", tmp_path)
    lines = read_lines(tmp_path / RESULTS)
    assert [line["method"] for line in lines] == ["full", "lookup", "phrases", "lossless"]
    for line in lines:
        assert (line["result"], line["n"], line["rounds"]) == ("ordinary-chat-int8", 2, 1)
        assert (line["commit"], line["test_lines"]) == ("0" * 40, "prompts, version 1")
        assert set(line["sha256"]) == {"data", "bundle"}
    mean, low, high = lines[-1]["per_request"]
    assert low <= mean <= high
    assert str(tmp_path) not in (tmp_path / RESULTS).read_text()
    (use,) = read_lines(tmp_path / USES)
    assert (use["test_lines"], use["n"], use["result"]) == ("prompts, version 1", 2, "ordinary-chat-int8")
    assert set(use["shipped"]) == {"smollm2-chat", "phrases", "draft rule"}
    assert changed_since(use) == []
    assert (tmp_path / "out" / "evaluations" / row.name / "evaluation.json").is_file()


def test_repeated_measurement_replaces_rows_and_adds_a_use(tmp_path: Path, row: ResultRow) -> None:
    other = {"result": "other"}
    published.write_lines(tmp_path / RESULTS, [other])
    picture = "docs/picture.png"
    for run in ("first", "second"):
        measure_row(replace(row, picture=picture), tmp_path / run, tmp_path)
    lines = read_lines(tmp_path / RESULTS)
    assert [line["result"] for line in lines] == ["ordinary-chat-int8"] * 4 + ["other"]
    assert len(read_lines(tmp_path / USES)) == 2
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_measure_refuses_unrelated_uncommitted_changes(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"git failed in .*not a git repository"):
        clean_commit(tmp_path)
    git(tmp_path, "init")
    written = (RESULTS, USES, "docs/g2p.png")
    for name in ("code.py", *written):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    for name in (*written, "untracked"):
        (tmp_path / name).write_text("2\n")
    assert clean_commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD").stdout.decode().strip()
    (tmp_path / "code.py").write_text("2\n")
    with pytest.raises(click.ClickException, match=r"no commit would name what is measured: code\.py; commit"):
        clean_commit(tmp_path)


def test_measure_runs_named_rows_or_those_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(row: ResultRow, output: Path) -> dict[str, Any]:
        measured.append(row.name)
        return {"rows": [{"setting": "lossless", "request_speed": 2.0, "same": 1.0}]}

    monkeypatch.setattr(command, "measure_row", measure)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    (tmp_path / RESULTS).parent.mkdir(parents=True)
    lines = [{"result": name, "test_lines": row.data.split} for name, row in ROWS.items()]
    lines[0]["test_lines"] = "an older version"
    published.write_lines(tmp_path / RESULTS, lines)
    given = ["measure", "--output", str(tmp_path)]
    done = CliRunner().invoke(command.main, given)
    assert measured == [lines[0]["result"]]
    assert f"{measured[0]}, lossless: 2.00x a request, same 100%" in done.output
    CliRunner().invoke(command.main, [*given, "ordinary-chat-int8"])
    assert measured[1:] == ["ordinary-chat-int8"]


def test_missing_data_is_built_in_the_output_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(measuring, "run_command", lambda *command: asked.append(command))
    assert measuring.built(ROWS["records-int8"].data, tmp_path) == tmp_path / "data" / "records" / "test.jsonl"
    ((_, *arguments),) = asked
    assert arguments[:4] == ["-m", "tools.data.debian", "extraction", str(tmp_path / "data" / "records")]
    assert arguments[4:] == ["--test-version", "4", "--index", f"{tmp_path}/debian"]


def test_uses_name_shipped_files_whose_weights_or_constants_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(notes: bytes, tensors: bytes) -> bytes:
        return len(notes).to_bytes(8, "little") + notes + tensors

    exit = tmp_path / "exit.safetensors"
    rule = tmp_path / "rule.py"
    monkeypatch.setattr(published, "ROOT", tmp_path)
    monkeypatch.setattr(published, "SHIPPED", {"exit": exit.name, "draft rule": rule.name})
    exit.write_bytes(weights(b"{}", b"1234"))
    rule.write_text('"""Old text."""\nmargin = 0.5\n')
    use = {"shipped": published.shipped(["exit", "draft rule"])}
    exit.write_bytes(weights(b'{"notes": 1}', b"1234"))
    rule.write_text('"""Other words."""\nleast_gain = 0.5  # renamed\n')
    assert changed_since(use) == []
    rule.write_text("least_gain = 0.6\n")
    assert changed_since(use) == ["draft rule"]
    exit.write_bytes(weights(b"{}", b"1235"))
    assert changed_since(use) == ["exit", "draft rule"]
    exit.unlink()
    assert changed_since({"shipped": {"exit": None}}) == ["exit"]


def line(name: str, method: str, speed: float, **changes: Any) -> dict[str, Any]:
    """A published row."""
    made = {"result": name, "command": "c", "test_lines": "s", "commit": "ab12" * 10 + "-dirty", "date": "2025-01-02"}
    where = {"n": 150, "rounds": 1, "threads": 2, "processor": "P", "kernels": "avx2"}
    what = {"precision": name.rpartition("-")[2], "method": method, "setting": method, "tokens_per_second": 99.0}
    speeds = {f"per_{of}": [speed, speed - 0.05, speed + 0.05] for of in ("token", "request")}
    quality = {"same": 0.9 if method in ("free", "published") else 1.0, "scores": {"chrf": [0.5, 0.996, 0.99, 1.0]}}
    return {**made, **where, **what, **speeds, "byte_model": 2.0, **quality, **changes}


def test_tables_show_precisions_quality_processor_and_what_is_slower() -> None:
    speeds = (("records-int8", 2.15), ("records-int4", 1.6), ("ordinary-chat-int4", 0.97))
    lines = [
        line(name, method, 1.0 if method == "full" else speed, setting=setting)
        for name, speed in speeds
        for method, setting in (
            *(("full", "full"), ("published", "published 0.95, calibrated"), ("free", "free 0.9")),
            ("free", "free 0.95, calibrated"),
            *(("lookup", "lookup"), ("lossless", "lossless")),
        )
    ]
    table = pages.readme_table(lines)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {line.count("|") for line in rows} == {5}
    assert "| int8 **2.15x** (2.15x)<br>int4 **1.60x** (1.60x) |" in rows[2]
    assert "int8 99.6±0.5 % of chrf" in rows[2]
    assert "P (avx2 kernels), 2 threads, 150 test lines per row. Half a 95 % interval is at most ±0.05." in table
    assert "In all modes but `free`, every token equals that of `full`." in table
    assert "Slower than `full`: `free` on ordinary-chat-int4 (0.97x), `free`, as published on ordinary" in table
    old = line("older-int8", "full", 1.0, commit=None, added_in="cd34" * 10)
    use = {"date": "2025-01-02", "result": "r", "test_lines": "s", "n": 9, "commit": "ab", "shipped": {}}
    index = pages.index([*lines, old, {"page": "docs/speech.md", **line("speech", "", 1.0)}], [use, use])
    assert "| records-int8 | 99 | 2.15x ±0.05 | 2.15x ±0.05 | 2.15x ±0.05 | 2.15x ±0.05 | 99.6±0.5 % of chrf |" in index
    # The whole commit, and that files had changes.
    assert f"| 2025-01-02 | {'ab12' * 10}-dirty |" in index
    assert f"| 2025-01-02 | {'cd34' * 10} |" in index
    assert "[speech](../speech.md)" in index
    assert "| s | 2 | 2025-01-02 | nothing |" in index


def test_tables_name_results_whose_tokens_differ_from_those_of_full() -> None:
    lines = [line("records-int8", method, 1.5, same=same) for method, same in (("full", 1.0), ("lossless", 0.985))]
    assert "Tokens of `full` in fewer than all lines: records-int8, `lossless` (98.5% of lines)." in pages.figures(
        lines, ["records-int8"]
    )


def test_every_published_result_on_test_lines_is_a_recorded_use() -> None:
    def look(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line.get(name) for name in ("result", "test_lines", "n", "commit", "added_in"))

    uses = {look(use) for use in read_lines(ROOT / USES)}
    results = [line for line in read_lines(ROOT / RESULTS) if line["test_lines"]]
    assert len(results) > 100
    assert [line["result"] for line in results if look(line) not in uses] == []


def test_every_published_result_names_a_whole_commit() -> None:
    for line in (*read_lines(ROOT / RESULTS), *read_lines(ROOT / USES)):
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", line["commit"] or line["added_in"]), line["result"]


@pytest.mark.skipif(not has_history(), reason="no history of git")
def test_uses_record_what_was_shipped_at_their_commit() -> None:
    seen: dict[tuple[str, str], str | None] = {}
    for use in read_lines(ROOT / USES):
        commit = (use["commit"] or use["added_in"]).removesuffix("-dirty")
        for name, recorded in use["shipped"].items():
            blob = git(ROOT, "rev-parse", f"{commit}:{SHIPPED[name]}")
            if blob.returncode:  # at another path
                continue
            key = (name, blob.stdout.decode().strip())
            if key not in seen:
                seen[key] = fingerprint(SHIPPED[name], git(ROOT, "cat-file", "blob", key[1]).stdout)
            assert recorded == seen[key], (use["result"], name)
    assert len(seen) > len(SHIPPED)


@pytest.mark.skipif(not has_history(), reason="no history of git")
def test_full_reports_of_published_results_can_be_read() -> None:
    reports = {line["report"] for line in read_lines(ROOT / RESULTS) if "report" in line}
    assert [name for name in sorted(reports) if git(ROOT, "cat-file", "-e", name).returncode] == []


def test_published_json_is_small_and_contains_no_local_path() -> None:
    files = [path for name in ("results", "benchmarks") for path in (ROOT / "docs" / name).glob("*.json*")]
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        assert not re.search(r'"(/|[A-Z]:\\)[^"]*/[^"]*"', path.read_text(encoding="utf-8")), path.name


def unsupported(text: str, root: Path) -> Iterator[str]:
    """Yield sentences with a figure of no result, or which no page of results linked in the sentence shows."""
    figures = set()
    for line in read_lines(root / RESULTS):
        if "per_request" in line:
            figures |= {f"{line[name][0]:.2f}x" for name in ("per_token", "per_request")}
            figures.add(f"{line['tokens_per_second']:.0f}")
    text = re.sub(r"<!-- (results|other decoders), by .*?<!-- end of", "", text, flags=re.DOTALL)
    for sentence in re.split(r"\n\n|\n(?=- )|(?<=[.:]) ", text):
        links = re.findall(r"\]\((docs/results/[\w-]+\.md)", sentence)
        shown = "".join((root / link).read_text(encoding="utf-8") for link in links)
        for figure in re.findall(r"\b(\d+\.\d+x|\d+(?= tokens/s)|(?<=\[)\d+(?=\]\())", sentence):
            if figure not in figures or not re.search(rf"\b{re.escape(figure)}\b", shown):
                yield f"{figure} in: {' '.join(sentence.split())}"


def test_readme_figures_are_in_published_results() -> None:
    assert list(unsupported((ROOT / "README.md").read_text(encoding="utf-8"), ROOT)) == []


def test_figures_without_a_result_or_page_are_detected(tmp_path: Path) -> None:
    (tmp_path / RESULTS).parent.mkdir(parents=True)
    published.write_lines(tmp_path / RESULTS, [line("chat-int8", "lossless", 1.25)])
    (tmp_path / "docs/results/chat.md").write_text("| 1.25x | 99 |")
    (tmp_path / "docs/results/other.md").write_text("")
    supported = "It is [1.25x](docs/results/chat.md) as fast, at [99](docs/results/chat.md) tokens/s."
    assert list(unsupported(f"{supported} <!-- results, by x --> 9.99x <!-- end of results -->", tmp_path)) == []
    for sentence in (supported.replace("1.25x", "1.26x"), "It is 1.25x as fast.", "[1.25x](docs/results/other.md)"):
        assert len(list(unsupported(sentence, tmp_path))) == 1
