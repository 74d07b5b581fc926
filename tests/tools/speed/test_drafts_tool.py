"""The tool that measures drafts from text, on a tiny bundle."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from checkpoints import CASES, Bundles
from click.testing import CliRunner

from tools.speed import drafts

LLAMA = next(case for case in CASES if case.name == "llama-tied")


def test_texts_are_changed_as_much_as_was_asked() -> None:
    text = " ".join(f"word{number}" for number in range(100))
    assert (
        sum(a != b for a, b in zip(text.split(), drafts.edited(text, 0.1, random.Random(0)).split(), strict=True)) >= 9
    )
    assert (
        sum(a != b for a, b in zip(text.split(), drafts.misspelled(text, random.Random(0)).split(), strict=True)) == 10
    )
    assert drafts.table(random.Random(0)).count(" | ") == 12


def test_every_task_is_measured_and_compared(bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "LEAST_WORDS", 5)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": "summarize: a b c d ef gh " + str(n)}) + "\n" for n in range(3)))
    path = bundle(LLAMA, 2, capacity=512)
    arguments = ["--data", data, "--samples", 1, "--rounds", 1, "--max-new-tokens", 12, "--force"]
    result = CliRunner().invoke(drafts.main, list(map(str, [path, *arguments])))
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()[-6:]] == list(drafts.TASKS)
