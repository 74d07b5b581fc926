"""Whisper bundles timed in turn with faster-whisper."""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tools.peers import speech
from tools.peers.catalog import Peer
from tools.peers.worker import Worker

close = Worker.close


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
        return SimpleNamespace(text="hello there", token_ids=[1, 2])


@pytest.mark.parametrize("starts", [True, False])
def test_sessions_and_the_peer_are_closed(starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSession, "opened", [], raising=False)
    monkeypatch.setattr(speech, "Session", FakeSession)
    monkeypatch.setattr(speech, "chosen", lambda names: {})
    monkeypatch.setattr(Peer, "command", [sys.executable, "-m", "tools.peers.decoders", "faster_whisper"])
    closed: list[Worker] = []

    def recorded(worker: Worker) -> None:
        closed.append(worker)
        close(worker)

    monkeypatch.setattr(Worker, "close", recorded)
    package = tmp_path / "packages" / "faster_whisper"
    package.mkdir(parents=True)
    (package / "audio.py").write_text("def decode_audio(path):\n    return path\n")
    (package / "__init__.py").write_text(
        "from types import SimpleNamespace\n"
        "class WhisperModel:\n"
        f"    def __init__(self, *given, **options):\n        assert {starts}, 'no model'\n"
        "    def transcribe(self, sound, **options):\n"
        "        return [SimpleNamespace(text='hello there')], None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    with wave.open(str(tmp_path / "clip.wav"), "wb") as clip:
        clip.setparams((1, 2, 16000, 0, "NONE", ""))
        clip.writeframes(bytes(3200))
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"audio": "clip.wav", "target": "Hello, there."}) + "\n")
    given = ["--bundle", "int8=bundle", "--peer", "int8=model"]
    result = CliRunner().invoke(speech.main, [str(data), *given])
    assert (result.exit_code == 0) is starts, result.output
    if starts:
        found = json.loads(result.stdout)["rows"]
        assert found["int8 full"]["wer"] == found["int8 faster-whisper"]["wer"] == 0
    else:
        assert "no model" in str(result.exception)
    assert [session.closed for session in FakeSession.opened] == [True]
    assert len(closed) == 1
