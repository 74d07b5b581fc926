from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from freeexport.checkpoints.examples import DataError, read_examples
from runtime.result import GenerationResult, Stats
from runtime.text.tokenizer import Tokenizer
from tools.data import self_prompts as tool
from tools.data.self_prompts import text_before_user, write_conversation


class Writer:
    """Stands in for a session: writes `texts` as the user, and answers every conversation."""

    def __init__(self, *texts: str, cut: bool = False) -> None:
        self.texts = list(texts)
        self.cut = cut
        self.read: list[Any] = []

    def generate(self, prompt: Any, do_sample: bool = False, **_: Any) -> Any:
        self.read.append(prompt)
        if do_sample:
            return GenerationResult(self.texts.pop(0), (), (), (), "length" if self.cut else "eos", Stats())
        return GenerationResult(f"answer {len(prompt)}", (), (), (), "eos", Stats())


def test_user_text_starts_after_the_prefix_of_the_template(chat: Path) -> None:
    tokenizer = Tokenizer.load(chat)
    assert tokenizer is not None
    before = text_before_user(tokenizer, [])
    assert tokenizer.render_chat([{"role": "user", "content": "Hello"}]).startswith(before + "Hello")


def test_template_that_alters_the_text_is_refused() -> None:
    upper: Any = SimpleNamespace(render_chat=lambda messages: messages[-1]["content"].upper())
    with pytest.raises(DataError, match="alters"):
        text_before_user(upper, [])


def test_each_turn_includes_the_answers_before_it(chat: Path) -> None:
    tokenizer = Tokenizer.load(chat)
    assert tokenizer is not None
    writer: Any = Writer("Please write me a poem.", "Now write a longer one.")
    first, second = write_conversation(writer, tokenizer, 0, 2)
    assert first == [{"role": "user", "content": "Please write me a poem."}]
    assert second == [
        *first,
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "Now write a longer one."},
    ]


@pytest.mark.parametrize("writer", [Writer("Hi"), Writer("Please write me a poem about", cut=True)])
def test_short_or_truncated_text_is_skipped(writer: Any, chat: Path) -> None:
    tokenizer = Tokenizer.load(chat)
    assert tokenizer is not None
    assert write_conversation(writer, tokenizer, 0, 1) == []


def test_interrupted_run_continues_and_writes_each_prompt_once(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def conversation(session: Any, tokenizer: Any, seed: int, turns: int) -> list[Any]:
        return [[{"role": "user", "content": f"Question {seed // 2}"}]]

    monkeypatch.setattr(tool, "write_conversation", conversation)
    out = tmp_path / "prompts.jsonl"
    for count in ("3", "6"):
        done = CliRunner().invoke(tool.command, [str(chat), str(out), "--conversations", count, "--threads", "1"])
        assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["input"][0]["content"] for line in lines] == ["Question 0", "Question 1", "Question 2"]
    assert len(list(read_examples(out))) == 3


def test_file_without_seeds_is_not_continued(chat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"input": "another file"}\n')
    result = CliRunner().invoke(tool.command, [str(chat), str(out)])
    assert "without 'seed' and 'input'" in str(result.exception)


def test_encoder_decoder_is_refused(t5: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(tool.command, [str(t5), str(tmp_path / "out.jsonl")])
    assert isinstance(result.exception, DataError)
