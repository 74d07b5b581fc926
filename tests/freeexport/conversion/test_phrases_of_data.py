"""`freeexport convert --phrases`: a table from the targets of a task, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import BY_NAME, Case
from command_line import error, invoke, succeed
from draft_plans import draft_candidates

from runtime import Session

FAST = ("--verify", "none", "--capacity", "64", "--exit-layer", "1")


@pytest.mark.parametrize("name", ["llama-tied", "t5-relu-tied"])
def test_outputs_like_the_targets_are_drafted(
    name: str, checkpoint: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_candidates(monkeypatch)
    model, plain, data, out = checkpoint(BY_NAME[name]), tmp_path / "plain", tmp_path / "data.jsonl", tmp_path / "out"
    succeed("convert", model, plain, *FAST)
    with Session(plain, threads=1) as session:
        wanted = session.generate("word 3 is", mode="full", max_new_tokens=24)
    data.write_text("".join(json.dumps({"input": "word", "target": wanted.text}) + "\n" for _ in range(3)))
    succeed("convert", model, out, *FAST, "--phrases", data)
    page = succeed("inspect", out).stdout
    assert "frequent phrases" in page
    assert "frequent phrases" not in succeed("inspect", plain).stdout
    with Session(out, threads=1, draft_memory_mb=0) as session:
        ours = session.generate("word 3 is", max_new_tokens=24)
    assert ours.token_ids == wanted.token_ids
    # Not all are right: a random model's text is encoded as other tokens than it came from.
    assert ours.stats.drafts["phrases"].proposed > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--phrases {data}: there is no such file; name another"),
        ('{"input": "a"}\n', "{data}, line 1: 'target' is missing; phrases are counted in targets; add them"),
        ("[1]\n", "{data}, line 1: "),
        ("", "{data} has no examples; give one JSON object"),
    ],
)
def test_data_without_targets_is_refused(
    content: str | None, message: str, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    if content is not None:
        data.write_text(content)
    failed = invoke("convert", checkpoint(BY_NAME["llama-tied"]), out, *FAST, "--phrases", data)
    assert message.format(data=data) in error(failed)
    assert not out.exists()
