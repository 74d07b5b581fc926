from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, Case

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.examples import (
    TARGETS_WANTED,
    DataError,
    Example,
    TextFormat,
    encode,
    read_examples,
    split,
    unwritable,
)
from freeexport.checkpoints.tokenizer_files import load_tokenizer
from freeexport.system.jsonl import InputLine
from freeexport.training.batches import Collator, LengthBatches

T5, LLAMA = (BY_NAME[name] for name in ("t5-deep-decoder", "llama-tied"))


@pytest.fixture
def form(checkpoint: Callable[[Case], Path]) -> Callable[[Case, int], TextFormat]:
    def of(case: Case, limit: int) -> TextFormat:
        tokenizer = load_tokenizer(open_checkpoint(str(checkpoint(case))))
        return TextFormat(tokenizer, tokenizer.eos_token_id, limit, case is T5)

    return of


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "has no examples"),
        (["", "  "], "has no examples"),
        ([{"input": "a", "target": "b"}, {"input": "a"}], "line 2: 'target' is missing"),
        ([{"target": "b"}], "line 1: 'input' is missing"),
        ([{"input": "a", "target": 3}], "line 1: 'target' is int"),
        ([{"input": "a", "target": "b"}, "", "{broken"], "line 3: not JSON"),
    ],
)
def test_malformed_data_is_refused_with_its_line(tmp_path: Path, lines: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_examples(written(tmp_path / "data.jsonl", *lines), need_target=TARGETS_WANTED)


def test_split_is_stable_keeps_equal_inputs_together_and_has_both_parts(tmp_path: Path) -> None:
    requests = [InputLine(n, f"text {n % 500}", "x") for n in range(1000)]
    training, validation = split(requests, 0.1, tmp_path)
    assert {r.input for r in training}.isdisjoint(r.input for r in validation)
    assert 20 < len({str(r.input) for r in validation}) < 90
    _, half = split(requests[::2], 0.1, tmp_path)
    assert {r.input for r in half} <= {r.input for r in validation}
    training, validation = split([InputLine(1, "a", "x"), InputLine(2, "b", "x")], 0.02, tmp_path)
    assert len(training) == len(validation) == 1
    with pytest.raises(DataError, match="one distinct input"):
        split([InputLine(1, "a", "x"), InputLine(2, "a", "y")], 0.02, tmp_path)


def test_overlong_examples_are_skipped_or_truncated_and_counted(form: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    requests = [InputLine(4, "ab", "c"), InputLine(5, "a", "d" * 20), InputLine(9, "efghijklmnopqrstuvwxyz", "f")]
    for case in (T5, LLAMA):
        whole, none = encode(requests, form(case, 100), path)
        assert none is None
        examples, left_out = encode(requests, form(case, 10), path)
        assert [example.line for example in examples] == [4]
        assert left_out.startswith(
            f"{path}: 2 of 3 examples are longer than 10 tokens and are left out (the first on line 5)"
        )
        examples, left_out = encode(requests, replace(form(case, 10), truncate=True), path)
        assert [example.line for example in examples] == [4, 9]
        assert "1 of 3 inputs are cut, so that examples have 10 tokens; 1 of 3 examples are longer" in left_out
        assert "the first on line 5" in left_out
        np.testing.assert_array_equal(examples[0].prompt, whole[0].prompt)
        (long, cut), target = (one[-1].prompt for one in (whole, examples)), whole[-1].target
        np.testing.assert_array_equal(examples[-1].target, target)
        special = form(case, 10).tokenizer.all_special_ids
        if case is T5:  # the beginning, and the end of sequence that an encoder has seen behind every text
            assert len(cut) == 10
            np.testing.assert_array_equal(cut, [*long[:9], long[-1]] if long[-1] in special else long[:10])
        else:
            assert len(cut) == 10 - len(target)
            kept = 1 if long[0] in special else 0
            np.testing.assert_array_equal(cut, [*long[:kept], *long[len(long) - len(cut) + kept :]])
    with pytest.raises(DataError, match="none of the 1 examples fits 10"):
        encode(requests[1:2], form(T5, 10), path)


def test_length_limit_covers_prompt_and_target_in_a_decoder_only_model(form: Any, tmp_path: Path) -> None:
    requests = [InputLine(1, "abcdef", "ghijkl")]
    assert encode(requests, form(T5, 7), tmp_path)[1] is None  # 7 tokens each, with their end
    assert encode(requests, form(LLAMA, 14), tmp_path)[1] is None
    with pytest.raises(DataError):
        encode(requests, form(LLAMA, 13), tmp_path)


def test_encoding_matches_the_runtime(form: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text, chat = encode([InputLine(1, "ab", "c"), InputLine(2, messages, "d")], form(LLAMA, 99), tmp_path)[0]
    tokenizer = form(LLAMA, 99).tokenizer
    assert text.prompt.tolist() == tokenizer("ab")["input_ids"]
    assert text.target.tolist() == [*tokenizer("c", add_special_tokens=False)["input_ids"], 2]
    rendered = "<user>hi</user>\n<assistant>"
    assert chat.prompt.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match="chat template"):
        encode([InputLine(1, messages, "c")], form(T5, 99), tmp_path)


def example(prompt: list[int], target: list[int]) -> Example:
    return Example(np.array(prompt, np.int32), np.array(target, np.int32), 1)


def test_encoder_decoder_batch_shifts_the_target_and_pads_on_the_right() -> None:
    batch = Collator(start=0)([example([5, 6, 1], [7, 1]), example([8, 1], [9, 10, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 1], [8, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 0], [0, 9, 10]]
    assert batch["labels"].tolist() == [[7, 1, -100], [9, 10, 1]]


def test_decoder_only_batch_predicts_only_the_target() -> None:
    examples = [example([1, 5, 6], [7, 2]), example([1, 5], [2])]
    batch = Collator(start=None)(examples)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7], [1, 5, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100, 2, -100, -100]]


@pytest.mark.parametrize(("tokens", "devices"), [(400, 1), (300, 4)])
def test_batches_cover_every_example_each_epoch(tokens: int, devices: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 90, 501).tolist()
    orders = []
    for epoch in (0, 1):
        shares = [LengthBatches(lengths, tokens, 3, device, devices) for device in range(devices)]
        for share in shares:
            share.set_epoch(epoch)
        batches = [list(share) for share in shares]
        assert len({len(share) for share in batches} | {len(shares[0])}) == 1
        seen = [index for share in batches for batch in share for index in batch]
        assert set(seen) == set(range(501))
        assert len(seen) - 501 <= (devices - 1) * max(len(batch) for share in batches for batch in share)
        for batch in (batch for share in batches for batch in share):
            assert len(batch) * max(lengths[index] for index in batch) <= tokens
        orders.append(batches)
    assert orders[0] != orders[1]
    again = LengthBatches(lengths, tokens, 3, 0, devices)
    assert list(again) == orders[0][0]


def test_batches_have_little_padding_and_an_overlong_example_its_own_batch() -> None:
    lengths = np.random.default_rng(1).integers(1, 300, 4000)
    batches = list(LengthBatches(lengths.tolist(), 4096, 0))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded / lengths.sum() < 1.1
    assert sorted(map(sorted, LengthBatches([10, 10, 50], 20, 0))) == [[0, 1], [2]]


@pytest.fixture(scope="module")
def phonemes() -> TextFormat:
    """The vocabulary of the pronunciation model: letters and phonemes, no braces."""
    tokenizer = load_tokenizer(open_checkpoint("freeexport/data/g2p"))
    return TextFormat(tokenizer, tokenizer.eos_token_id, 64, True)


def requests_of(*targets: str) -> list[InputLine]:
    return [InputLine(line, "a word", target) for line, target in enumerate(targets, 1)]


def test_untokenizable_targets_are_counted(phonemes: TextFormat, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    fine = requests_of("D AH K", "AA  B")
    assert unwritable(fine, phonemes, path) is None
    found = unwritable([*fine, *requests_of('{"D": "AH"}')], phonemes, path)
    assert found is not None
    assert found.startswith(f'{path}: the tokenizer cannot write 1 of 3 targets (line 1: \'{{"D": "AH"}}\' becomes ')
    with pytest.raises(DataError, match=r"cannot write 2 of 3 targets .* no output can equal them"):
        unwritable([*fine[:1], *requests_of("{", "}")], phonemes, path)


@pytest.mark.parametrize("case", [T5, LLAMA])
def test_byte_tokenizer_encodes_every_target(
    case: Case, form: Callable[[Case, int], TextFormat], tmp_path: Path
) -> None:
    assert unwritable(requests_of('{"a": [1]}', "naïve", " two  spaces\n"), form(case, 64), tmp_path) is None
