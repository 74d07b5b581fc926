"""Requests to encoder-decoders, timed in turn with CTranslate2's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from tools.peers import translation


class Decoder:
    """Takes so many seconds a token."""

    def __init__(self, seconds: float, token: int) -> None:
        self.seconds, self.token, self.asked = seconds, token, list[list[int]]()

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        self.asked.append(request["prompt"])
        count = request["tokens"]
        seconds = self.seconds * count
        return {"tokens": [self.token] * count, "times": [seconds] * count, "seconds": seconds, "peak_bytes": 1}


def test_a_row_has_medians_of_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "PAUSE", 0.0)
    workers = {"ours": Decoder(0.1, 7), "ctranslate2": Decoder(0.2, 7)}
    manifest: Any = SimpleNamespace(vocab_size=1000, eos_token_ids=(3,))
    row = translation.row_of(workers, "5x4", 2, 3, manifest)
    assert row["ratio"] == row["least"] == row["most"] == pytest.approx(2.0)
    assert (row["seconds"], row["ctranslate2"], row["same"]) == (pytest.approx(0.4), pytest.approx(0.8), 3)
    assert workers["ours"].asked == workers["ctranslate2"].asked
    assert all(len(prompt) == 5 and prompt[-1] == 3 for prompt in workers["ours"].asked)
    assert len({tuple(prompt) for prompt in workers["ours"].asked}) == 4


@pytest.mark.parametrize("size", translation.SIZES)
def test_tokens_of_a_made_vocabulary_are_where_its_configuration_says(size: str, tmp_path: Path) -> None:
    config = translation.configuration(size)
    translation.write_tokenizer(tmp_path, 200, translation.SPECIAL[size])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    last = 199 if size == "marian" else config["pad_token_id"]
    assert tokenizer.token_to_id("<pad>") == last
    assert tokenizer.encode("hello").ids[-1] == tokenizer.token_to_id("</s>") == config["eos_token_id"]
    assert tokenizer.get_vocab_size() == 200
