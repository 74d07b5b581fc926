from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from runtime.speech.audio import RATE, read_audio
from tools.data import speech


def test_clips_are_made_of_the_sentences_of_descriptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    names = ["".join(letters) for letters in itertools.product("bcdfghklmn", repeat=3)]  # enough for each split
    records = (f"Package: {name}\nVersion: 1\nDescription-md5: md5 of {name}\n" for name in names)
    (index / "Packages").write_text("\n".join(records))
    texts = (
        f"Package: {name}\nDescription-md5: md5 of {name}\nDescription-en: {name}\n"
        f" The {name} tool helps many people with small things on most days.\n"
        for name in names
    )
    (index / "Translation-en").write_text("\n".join(texts))
    spoken: list[str] = []

    def speak(text: str, drawn: int) -> np.ndarray:
        spoken.append(text)
        return np.zeros(round(len(text.split()) / speech.WORDS_A_SECOND * RATE), np.float32)

    monkeypatch.setattr(speech, "COMMON", 1)
    monkeypatch.setattr(speech, "espeak", speak)
    out = tmp_path / "speech"
    arguments = [str(out), "--index", str(index), "--voices", "espeak-ng", "--clips", "2", "1", "1"]
    result = CliRunner().invoke(speech.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = {}
    for split in ("train", "validation", "test"):
        lines[split] = [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        for line in lines[split]:
            assert line["target"] in spoken
            assert len(read_audio(out / line["audio"])) / RATE == pytest.approx(line["seconds"], abs=0.01)
    lengths = {split: [line["length"] for line in found] for split, found in lines.items()}
    assert lengths == {"train": ["short", "long"], "validation": ["short"], "test": ["short"]}
