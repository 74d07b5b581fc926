"""Audio of clients is read in processes that may crash, and have limits."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from child_processes import processes_of
from sounds import sound, wav

from freeexport.serving import audio_process
from freeexport.serving.audio_process import AudioReader
from freeexport.serving.errors import ApiError
from runtime.errors import PromptError
from runtime.speech.audio import RATE, LateError, read_audio

SOUND = wav(sound(0.3))
NEVER = float("inf")


@pytest.fixture
def reader() -> Iterator[AudioReader]:
    reader = AudioReader()
    yield reader
    reader.close()


def damaged_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> bytes:
    """Return a file whose decoder runs `code`."""
    (tmp_path / "soundfile.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return b"fLaC" + bytes(100)


def test_files_are_read_one_after_another_in_one_process(reader: AudioReader) -> None:
    reader.prepare()
    np.testing.assert_array_equal(reader.read(SOUND, NEVER), read_audio(SOUND))
    (process,) = processes_of(audio_process)
    with pytest.raises(PromptError, match=r"^the audio is no WAV file of PCM samples \(it ends early\)"):
        reader.read(b"none", NEVER)
    assert len(reader.read(SOUND, NEVER)) == len(read_audio(SOUND))
    assert processes_of(audio_process) == {process}
    os.kill(process, signal.SIGKILL)  # as the system may
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert len(reader.read(SOUND, NEVER)) == len(read_audio(SOUND))
    (other,) = processes_of(audio_process)
    assert other != process


def test_file_that_crashes_its_decoder_is_refused(
    reader: AudioReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = damaged_by(monkeypatch, tmp_path, "import ctypes; ctypes.string_at(0)")
    for _ in range(2):
        assert len(reader.read(SOUND, NEVER)) == len(read_audio(SOUND))
        with pytest.raises(PromptError, match="the audio makes its decoder crash; convert it to a WAV file"):
            reader.read(content, NEVER)
    assert len(processes_of(audio_process)) == 1  # for the next file


def test_file_that_takes_too_much_time_or_memory_is_refused(
    reader: AudioReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    greedy = damaged_by(monkeypatch, tmp_path, "bytearray(5 << 30)")
    with pytest.raises(PromptError, match="the audio takes more than 4 GiB of memory to read; send a shorter file"):
        reader.read(greedy, NEVER)
    reader.close()
    reader = AudioReader()
    slow = damaged_by(monkeypatch, tmp_path, "import time; time.sleep(1000)")
    with pytest.raises(LateError):
        reader.read(slow, time.monotonic() + 0.2)
    monkeypatch.setattr(audio_process, "READ_SECONDS", 0.2)
    with pytest.raises(PromptError, match=r"^the audio takes more than 0\.2 s to read; send a shorter file$"):
        reader.read(slow, NEVER)
    reader.close()
    assert processes_of(audio_process) == set()


def test_close_stops_files_being_read(reader: AudioReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = damaged_by(monkeypatch, tmp_path, "import time; time.sleep(1000)")
    failures = list[BaseException]()

    def read() -> None:
        try:
            reader.read(slow, NEVER)
        except ApiError as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while not reader._busy:
        time.sleep(0.01)
    reader.close()
    thread.join(20)
    assert [error.status for error in failures] == [503]  # type: ignore[attr-defined]


def test_audio_decoders_write_nothing_to_standard_error(reader: AudioReader, capfd: pytest.CaptureFixture[str]) -> None:
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(1.0), RATE, format="MP3", subtype="MPEG_LAYER_III")
    content = bytearray(buffer.getvalue())
    content[len(content) // 2 :: 7] = bytes(len(content[len(content) // 2 :: 7]))
    for read in (read_audio, partial(reader.read, until=NEVER)):
        with suppress(PromptError):  # a decoder may skip to the next frame
            read(bytes(content))
        # In this process, libmpg123 writes about the damage.
        assert bool(capfd.readouterr().err) == (read is read_audio)
