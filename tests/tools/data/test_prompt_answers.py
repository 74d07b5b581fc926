from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from runtime import Session
from tools.data import answers as tool


def test_answers_are_those_of_the_full_model_and_a_run_continues(chat: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    inputs = [[{"role": "user", "content": text}] for text in ("one", "two", "word " * 3000, "three")]
    for count in (1, 4):  # the second run answers the others
        prompts.write_text("".join(json.dumps({"input": prompt}) + "\n" for prompt in inputs[:count]))
        done = CliRunner().invoke(
            tool.main, [str(chat), str(prompts), str(out), "--max-new-tokens", "6", "--threads", "1"]
        )
        assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["input"] for line in lines] == [inputs[0], inputs[1], inputs[3]]  # one is too long
    with Session(chat, threads=1) as session:
        for line in lines:
            expected = session.generate(line["input"], mode="full", max_new_tokens=6)
            assert (line["target"], line["complete"]) == (expected.text, expected.complete)
