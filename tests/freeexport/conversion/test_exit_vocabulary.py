"""The choice of an exit vocabulary: frequency, ends of sequence, sizes out of range, and conversion with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import CASES, Case
from click.testing import CliRunner, Result
from conftest import Bundles

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.examples import DataError
from freeexport.cli import main
from freeexport.conversion.exit_vocabulary import exit_vocabulary
from graphs.families import describe
from runtime import Bundle, Session
from runtime.text.tokenizer import Tokenizer

BY_NAME = {case.name: case for case in CASES}
LLAMA, MANY_EOS, T5 = BY_NAME["llama-tied"], BY_NAME["llama-untied-many-eos"], BY_NAME["t5-relu-tied"]
Checkpoint = Callable[[Case], Path]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """90 a, 10 b, 1 c in targets; the inputs have other letters."""
    path = tmp_path / "text.jsonl"
    lines = [{"input": "zzzz", "target": "a" * 9 + "b"}] * 10 + [{"input": "c"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def ids(case: Case, bundle: Bundles, letters: str) -> list[int]:
    tokenizer = Tokenizer.load(bundle(case))
    assert tokenizer is not None
    return tokenizer.encode(letters, special=False)


@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
def test_the_most_frequent_tokens_of_the_targets_are_chosen(
    case: Case, text: Path, checkpoint: Checkpoint, bundle: Bundles
) -> None:
    source = open_checkpoint(str(checkpoint(case)))
    end = 1 if case is T5 else 2
    a, b, c = ids(case, bundle, "abc")
    # 11 lines end 11 times.
    for size, covered in ((2, 101 / 112), (3, 111 / 112), (4, 1.0)):
        chosen, vocabulary = exit_vocabulary(source, describe(source.config, source), size, text)
        assert chosen == tuple(sorted([end, a, b, c][:size]))
        assert (vocabulary.size, vocabulary.text_tokens) == (size, 112)
        assert vocabulary.covered == pytest.approx(covered)


def test_every_end_of_sequence_is_always_among_them(text: Path, checkpoint: Checkpoint) -> None:
    source = open_checkpoint(str(checkpoint(MANY_EOS)))
    chosen, _ = exit_vocabulary(source, describe(source.config, source), 12, text)
    assert {2, *range(223, 233)} < set(chosen)


def test_auto_is_the_smallest_multiple_that_covers_99_percent(text: Path, checkpoint: Checkpoint) -> None:
    source = open_checkpoint(str(checkpoint(LLAMA)))
    chosen, vocabulary = exit_vocabulary(source, describe(source.config, source), None, text)
    assert len(chosen) == len(set(chosen)) == vocabulary.size == 64
    assert vocabulary.covered == 1.0


def convert(model: Path, out: Path, *arguments: str) -> Result:
    fast = ("--exit-layer", "1", "--no-verify", "--no-measure", "--capacity", "64")
    return CliRunner().invoke(main, ["convert", str(model), str(out), *fast, *arguments])


def test_a_bundle_exits_with_known_tokens_only(
    text: Path, checkpoint: Checkpoint, bundle: Bundles, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = convert(checkpoint(LLAMA), out, "--exit-vocab", "40", "--exit-vocab-text", str(text))
    assert result.exit_code == 0, result.output
    assert "exit vocabulary: 40 of 288 tokens, 100.00% of the text" in result.stdout
    assert Bundle.open(out, "full").manifest.exit_vocabulary is not None
    with Session(out) as session, Session(bundle(LLAMA)) as whole:
        freely = session.generate("Hello", mode="free", threshold=0.0, max_new_tokens=24, ignore_eos=True)
        assert sum(freely.exited) > 10
        exits = {token for token, exited in zip(freely.token_ids, freely.exited, strict=True) if exited}
        source = open_checkpoint(str(checkpoint(LLAMA)))
        assert exits <= set(exit_vocabulary(source, describe(source.config, source), 40, text)[0])
        # The deep head knows all tokens.
        options = {"mode": "full", "max_new_tokens": 24, "ignore_eos": True}
        assert session.generate("Hello", **options).token_ids == whole.generate("Hello", **options).token_ids
    page = CliRunner().invoke(main, ["inspect", str(out)]).stdout
    assert "40 of 288 tokens" in page


@pytest.mark.parametrize(
    ("case", "size", "message"),
    [
        (LLAMA, "289", "exit vocabulary 289 is out of range.*288 tokens and 1 that end.*choose 2 to 288"),
        (LLAMA, "1", "exit vocabulary 1 is out of range"),
        (MANY_EOS, "10", "11 that end a sequence, choose 11 to 288"),
    ],
)
def test_a_size_that_cannot_be_is_refused(
    case: Case, size: str, message: str, text: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    result = convert(checkpoint(case), tmp_path / "out", "--exit-vocab", size, "--exit-vocab-text", str(text))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("--exit-vocab", "40"), ("--exit-vocab-text", "x.jsonl")])
def test_size_and_text_belong_together(arguments: tuple[str, ...], checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = convert(checkpoint(LLAMA), tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert "give both --exit-vocab and --exit-vocab-text" in result.stderr


def test_a_size_that_is_no_number_is_a_usage_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = convert(checkpoint(LLAMA), tmp_path / "out", "--exit-vocab", "many", "--exit-vocab-text", "x")
    assert result.exit_code == 2
    assert "'many' is not a number, auto, all or a file" in result.stderr


@pytest.mark.parametrize(("content", "message"), [("", "has no text"), ('{"input": "a"}\n{"x": 1}', "line 2: ")])
def test_text_that_cannot_be_used_is_refused(
    content: str, message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    source = open_checkpoint(str(checkpoint(LLAMA)))
    with pytest.raises(DataError, match=message):
        exit_vocabulary(source, describe(source.config, source), 40, path)
