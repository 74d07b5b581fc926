from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tools.speed.sized_model import ROWS, SIZES, TOKENS, configuration, write_tokenizer


@pytest.mark.parametrize(("size", "millions"), [("t5-base", 223), ("t5-large", 738)])
def test_sizes_are_those_of_the_published_models(size: str, millions: int) -> None:
    config = configuration(size)
    width, inner, layers, heads = SIZES[size]
    assert width == heads * config["d_kv"]
    attention, mlp = 4 * width * width, 2 * width * inner
    assert ROWS * width + layers * (attention + mlp) + layers * (2 * attention + mlp) == pytest.approx(
        millions * 1e6, rel=0.01
    )


def test_the_tokenizer_reads_english_and_has_as_many_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TOKENS
    ids = tokenizer.encode("A cat, 3 dogs.").ids
    assert ids[-1] == 1
    assert 2 not in ids
    assert tokenizer.decode(ids) == "A cat, 3 dogs."
