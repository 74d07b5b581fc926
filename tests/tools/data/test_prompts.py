from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from freeexport.checkpoints.examples import read_examples
from tools.data import prompts as tool
from tools.data.prompts import KINDS, Subject, prompts
from tools.data.splits import SHARES, split_of

BODY = "A frobnicator turns the knobs of a machine. " * 8


def sources(count: int = 3000) -> list[Subject]:
    record = "Package: foo\nVersion: 1"
    made = [
        Subject(
            origin,
            f"{origin} {number}",
            f"name {number}",
            "group",
            f"{origin} {number}: {BODY}",
            f"Knob {origin} {number} turned.",
            record + str(number),
        )
        for origin in ("package", "foldoc", "wordnet")
        for number in range(count // 3)
    ]
    return [source for source in made if split_of(source.key) == "train"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_the_requested_number_of_distinct_complete_prompts(kind: str) -> None:
    made = prompts(kind, sources(), 60, 0, set())
    texts = [line.input[0]["content"] for line in made if isinstance(line.input, list)]
    assert len(set(texts)) == 60
    assert not any("{" in text or "}" in text for text in texts)
    assert made == prompts(kind, sources(), 60, 0, set()) != prompts(kind, sources(), 60, 1, set())
    named = {line.keys[0].partition(" ")[0] for line in made}
    assert named == (
        {"foldoc", "wordnet"} if kind in ("explain", "list", "compare") else {"package", "foldoc", "wordnet"}
    )


def test_data_set_is_read_as_messages_without_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, out = tmp_path / "index", tmp_path / "out"
    index.mkdir()
    for name in ("Packages", "Translation-en"):
        (index / name).write_text("")
    for name in ("dictd", "wordnet"):
        (tmp_path / "dictionaries/usr/share" / name).mkdir(parents=True)
    (tmp_path / "dictionaries/usr/share/dictd/foldoc.index").write_text("")
    (tmp_path / "dictionaries/usr/share/dictd/foldoc.dict.dz").write_bytes(b"")
    for name in ("data.noun", "cntlist.rev"):
        (tmp_path / "dictionaries/usr/share/wordnet" / name).write_text("")
    everything = [
        Subject(
            "foldoc",
            f"term {number}",
            f"name {number}",
            "group",
            f"{number}: {BODY}",
            f"Knob {number} turned.",
            "Package: foo",
        )
        for number in range(1500)
    ]
    monkeypatch.setattr(tool, "terms", lambda *_: everything)
    monkeypatch.setattr(tool.gzip, "decompress", lambda data: data)
    arguments = [str(out), "--index", str(index), "--dictionaries", str(tmp_path / "dictionaries")]
    arguments += ["--train", "80", "--held-out", "16"]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        result = CliRunner().invoke(tool.command, arguments, catch_exceptions=False)
    assert not [one.message for one in seen if "wordnet" in str(one.message)]  # every file is closed
    assert "80 train, 16 validation, 16 calibration, 16 test" in result.output
    for name in SHARES:
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert set(Counter(line["kind"] for line in lines).values()) == {10 if name == "train" else 2}
        assert all("target" not in line for line in lines)
    assert len(read_examples(out / "train.jsonl")) == 80
    first = (out / "test.jsonl").read_text()
    arguments += ["--test-version", "2", "--overwrite"]
    result = CliRunner().invoke(tool.command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    names = re.compile(r"name \d+|Knob (\d+)|\d+: A frob")
    both = [{found.group() for found in names.finditer(text)} for text in (first, (out / "test.jsonl").read_text())]
    assert both[0]
    assert both[1]
    assert both[0].isdisjoint(both[1])
