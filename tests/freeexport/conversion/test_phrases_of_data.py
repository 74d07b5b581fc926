"""`freeexport convert --phrases`: a table of targets or of the answers in the package, and what is refused."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import BY_NAME, Case
from click.testing import CliRunner
from command_line import error, invoke, succeed
from draft_plans import draft_texts

from freeexport.conversion import phrases
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.decoding.phrases import PHRASES, PhraseTable
from runtime.text.tokenizer import Tokenizer
from tools.data import pack_answers

FAST = ("--verify", "none", "--capacity", "64", "--exit-layer", "1")


@pytest.mark.parametrize("name", ["llama-tied", "t5-relu-tied"])
def test_outputs_similar_to_the_targets_are_drafted(
    name: str, checkpoint: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_texts(monkeypatch)
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


# Answers in the package


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two answers in place of those of the package, which serve a small vocabulary, too."""
    packed, written = tmp_path / "answers.jsonl.xz", tmp_path / "answers.jsonl"
    for module in (phrases, pack_answers):
        monkeypatch.setattr(module, "READY_MADE", packed)
    monkeypatch.setattr(phrases, "MIN_VOCABULARY", 1)
    lines = [{"text": "word 3 is a word", "finish_reason": "eos"}, {"text": "is a", "finish_reason": "length"}]
    written.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0], {"error": "too long"}]))
    done = CliRunner().invoke(pack_answers.main, [str(written)])
    assert "2 answers" in done.output
    return packed


def test_shipped_answers_are_tokenized_for_each_decoder_only_model(
    answers: Path, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    for name in ("llama-tied", "gpt2"):
        out = tmp_path / name
        succeed("convert", checkpoint(BY_NAME[name]), out, *FAST)
        tokenizer = Tokenizer.load(out)
        assert tokenizer is not None
        whole, part = (tokenizer.encode(text, special=False) for text in ("word 3 is a word", "is a"))
        end = Bundle.open(out).manifest.eos_token_ids[0]
        assert (np.load(out / PHRASES) == PhraseTable.build([[*whole, end], part]).entries).all()
    succeed("convert", checkpoint(BY_NAME["llama-tied"]), tmp_path / "without", *FAST, "--phrases", "none")
    succeed("convert", checkpoint(BY_NAME["bart"]), tmp_path / "bart", *FAST)
    assert not any((tmp_path / name / PHRASES).exists() for name in ("without", "bart"))


def test_model_with_a_small_vocabulary_gets_no_shipped_answers(
    checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    succeed("convert", checkpoint(BY_NAME["llama-tied"]), tmp_path / "out", *FAST)
    assert not (tmp_path / "out" / PHRASES).exists()


@pytest.mark.parametrize("content", [None, b"no archive", lzma.compress(b'{"target": 3\n'), lzma.compress(b"{}")[:-5]])
def test_damaged_package_file_gives_a_one_line_error(
    content: bytes | None, answers: Path, checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    if content is None:
        answers.unlink()
    else:
        answers.write_bytes(content)
    failed = invoke("convert", checkpoint(BY_NAME["llama-tied"]), tmp_path / "out", *FAST)
    assert f"{answers} cannot be read" in error(failed)
    assert "install freeexport again" in error(failed)
    assert not (tmp_path / "out").exists()


def test_chat_phrases_end_with_the_end_token_of_the_template(
    checkpoint: Callable[[Case], Path], tmp_path: Path
) -> None:
    succeed("convert", checkpoint(BY_NAME["llama-tied"]), tmp_path / "out", *FAST)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer is not None
    word, other = tokenizer.encode("b word", special=False)[-1], tokenizer.encode("3", special=False)[0]
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} word{% endif %}{% endfor %}"
    for given, expected in (
        (None, other),
        ("{{ none }}", other),
        ("{{ raise_exception('') }}", other),
        (template, word),
    ):
        loaded = Tokenizer.load(tmp_path / "out")
        assert loaded is not None
        loaded.chat_template = given
        assert phrases._end_of_answer(loaded, [other, word]) == [expected]
        assert phrases._end_of_answer(loaded, []) == []


def test_shipped_answers_are_complete() -> None:
    with lzma.open(phrases.READY_MADE, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) > 10_000
    assert {type(line["target"]) for line in lines} == {str}
    assert {line["complete"] for line in lines} == {True, False}
