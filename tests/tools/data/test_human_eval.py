from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from freeexport.checkpoints.examples import DataError, read_examples
from tools.data import human_eval as tool


def test_each_problem_becomes_a_chat_prompt(tmp_path: Path) -> None:
    source, out = tmp_path / "HumanEval.jsonl.gz", tmp_path / "prompts.jsonl"
    problems = [{"task_id": f"HumanEval/{at}", "prompt": f"def f{at}():\n"} for at in range(2)]
    source.write_bytes(gzip.compress("".join(json.dumps(problem) + "\n" for problem in problems).encode()))
    done = CliRunner().invoke(tool.main, [str(source), str(out)])
    assert done.exit_code == 0, done.output
    first, second = read_examples(out)
    assert first.input == [{"role": "user", "content": "Complete this Python function:\n\n```python\ndef f0():\n```"}]
    assert second.input != first.input


# A gzip file holds the time. An identifier made of it would differ between the processes that collect the tests.
@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"{"), gzip.compress(b'{"task_id": 1}')],
    ids=["empty", "no gzip", "no JSON", "no prompt"],
)
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(content)
    with pytest.raises(DataError, match=r"is not HumanEval\.jsonl\.gz"):
        tool.prompts_of(source)
