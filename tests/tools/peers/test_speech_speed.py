"""Whisper bundles timed in turn with faster-whisper."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tools.data.speech import wav
from tools.peers import speech


class FakeSession:
    """Transcribes every clip as the same text."""

    opened: list[FakeSession]

    def __init__(self, directory: str, **options: Any) -> None:
        self.closed = False
        self.opened.append(self)

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def generate(self, samples: np.ndarray, **options: Any) -> SimpleNamespace:
        stats = SimpleNamespace(seconds=2e-3, encode_seconds=1e-3, tokens=2)
        return SimpleNamespace(text="hello there", token_ids=[1, 2], stats=stats)


class Process(subprocess.Popen[str]):
    """A child process that is recorded."""

    started: list[Process]

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.started.append(self)


@pytest.mark.parametrize("starts", [True, False])
def test_sessions_and_the_peer_are_closed(starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSession, "opened", [], raising=False)
    monkeypatch.setattr(Process, "started", [], raising=False)
    monkeypatch.setattr(speech, "Session", FakeSession)
    monkeypatch.setattr(speech, "subprocess", SimpleNamespace(Popen=Process, PIPE=subprocess.PIPE))
    package = tmp_path / "packages" / "faster_whisper"
    package.mkdir(parents=True)
    (package / "audio.py").write_text("def decode_audio(path):\n    return path\n")
    (package / "__init__.py").write_text(
        "from types import SimpleNamespace\n"
        "class WhisperModel:\n"
        f"    def __init__(self, *given, **options):\n        assert {starts}\n"
        "    def transcribe(self, sound, **options):\n"
        "        return [SimpleNamespace(text='hello there')], None\n"
    )
    (tmp_path / "clip.wav").write_bytes(wav(np.zeros(1600, np.float32)))
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"audio": "clip.wav", "target": "Hello, there."}) + "\n")
    given = ["--bundle", "int8=bundle", "--peer", "int8=model", "--packages", str(package.parent)]
    result = CliRunner().invoke(speech.main, [str(data), *given])
    assert (result.exit_code == 0) is starts, result.output
    if starts:
        found = json.loads(result.stdout)["groups"]["all"]
        assert found["int8 full"]["wer"] == found["int8 faster-whisper"]["wer"] == 0
    else:
        assert "faster-whisper does not start with model" in result.output
    assert [session.closed for session in FakeSession.opened] == [True]
    assert len(Process.started) == 1
    assert Process.started[0].returncode is not None
