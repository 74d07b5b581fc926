"""Log-mel features against transformers' extractor, WAV files of all kinds, resampling."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import sound, wav

from runtime.errors import PromptError
from runtime.speech.audio import RATE, LateError, log_mel, read_audio, resampled, window

# The extractor in torch is float32 as ours is, and in numpy float64: both are as far from each other.
TOLERANCE = 2e-4


@pytest.mark.parametrize(("bins", "seconds"), [(80, 3.21), (128, 0.003), (80, 31.0)])
def test_features_match_transformers(bins: int, seconds: float) -> None:
    from transformers import WhisperFeatureExtractor

    samples = sound(seconds)
    theirs = WhisperFeatureExtractor(feature_size=bins)(samples, sampling_rate=RATE, return_tensors="np")
    theirs = theirs["input_features"][0]
    ours = window(log_mel(samples[: 30 * RATE], bins), 0, 3000)[0]
    # The frames at 30 s read beyond what the extractor was given, and it mirrors what is before instead.
    until = 2998 if seconds > 30 else 3000
    assert np.abs(ours - theirs)[:, :until].max() < TOLERANCE


@pytest.mark.parametrize(("width", "channels", "error"), [(1, 1, 0.02), (2, 2, 1e-4), (3, 1, 1e-6), (4, 1, 1e-6)])
def test_pcm_of_every_width_is_read_and_channels_are_averaged(
    width: int, channels: int, error: float, tmp_path: Path
) -> None:
    path = tmp_path / "sound.wav"
    path.write_bytes(wav(sound(0.1), width=width, channels=channels))
    assert np.abs(read_audio(path) - sound(0.1)).max() < error


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_sample_rates_are_resampled(rate: int) -> None:
    time, tone = np.arange(rate) / rate, 440.0
    samples = read_audio(wav(np.sin(2 * np.pi * tone * time) / 2, rate))
    wanted = np.sin(2 * np.pi * tone * np.arange(RATE) / RATE) / 2
    assert len(samples) == RATE
    assert np.abs(samples - wanted)[100:-100].max() < 2e-3
    # What the new rate cannot hold is gone.
    high = np.sin(2 * np.pi * 11000 * time).astype(np.float32)
    assert rate <= RATE or rate == 22050 or np.abs(resampled(high, rate)[100:-100]).max() < 0.01


def test_a_long_file_is_read_a_minute_at_a_time(tmp_path: Path) -> None:
    loud = np.random.default_rng(0).uniform(-0.5, 0.5, 8000 * 61)
    (path := tmp_path / "a.wav").write_bytes(content := wav(loud, 8000, channels=2))
    whole = resampled(np.frombuffer(content[44:], "<i2")[::2].astype(np.float32) / 2**15, 8000)
    assert np.abs(read_audio(path) - whole).max() < 1e-6
    # What wrote to a pipe did not know the length.
    assert len(read_audio(content[:40] + b"\xf0\xff\xff\xff" + content[44:])) == 61 * RATE
    with path.open("r+b") as file:  # of which nothing is read
        file.seek(40)
        file.write(b"\xf0\xff\xff\xff")
        file.truncate(2 * 2 * 8000 * 3600 * 5)
    with pytest.raises(PromptError, match=r"5\.0 hours, at most 4 are read"):
        read_audio(path)


def altered_headers() -> Iterator[bytes]:
    """A WAV file with each byte and each field of its header, and of a chunk before the samples, as something else."""
    plain = wav(sound(0.05))
    for whole in (plain, plain[:36] + b"LIST\x06\x00\x00\x00abcdef" + plain[36:]):
        for place in range(60):
            for size in (1, 2, 4):
                for value in (0, 1, 0x7F, 0xFF):
                    yield whole[:place] + bytes([value]) * size + whole[place + size :]
        for bits in (0, 4, 12, 20, 40, 48, 64, 65_535):
            yield whole[:34] + bits.to_bytes(2, "little") + whole[36:]
        for size in range(0, len(whole), 7):
            yield whole[:size]


def test_arbitrary_headers_are_read_or_refused() -> None:
    refused = 0
    for content in altered_headers():
        try:
            read_audio(content)
        except PromptError:
            refused += 1
    assert refused > 200


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=6), st.integers(0, 200))
def test_altered_header_is_read_or_refused(changes: list[tuple[int, int]], size: int) -> None:
    content = bytearray(wav(sound(0.005)))
    for place, value in changes:
        content[place] = value
    with suppress(PromptError):
        read_audio(bytes(content[: 44 + size]))


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.float32), "the audio is empty"),
        (np.zeros((2, 100), np.float32), "an array of float32 [2, 100]"),
        (np.zeros(100, np.int16), "an array of int16 [100]"),
        (np.array([0.0, np.nan]), "NaN or infinite"),
        (sound(0.1) * 32767, "divide them, so that they lie between -1 and 1"),
        (np.broadcast_to(np.float32(0), 5 * 3600 * RATE), "5.0 hours, at most 4"),
        (b"RIFX" + bytes(100), "no WAV file of PCM samples"),
        (wav(sound(0.1))[:30], "no WAV file of PCM samples"),
        (wav(sound(0.1), 1000), "1000 samples a second"),
        ("/missing.wav", "/missing.wav cannot be read"),
    ],
)
def test_invalid_audio_is_refused_in_one_line(audio: object, message: str) -> None:
    with pytest.raises(PromptError, match=r"^[^\n]*$") as caught:
        read_audio(audio)
    assert message in str(caught.value)


FORMATS = {"FLAC": "PCM_16", "OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}


def compressed(kind: str, samples: np.ndarray, rate: int = RATE) -> bytes:
    soundfile = pytest.importorskip("soundfile")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=FORMATS.get(kind, "FLOAT"))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [*FORMATS, "WAV"])
@pytest.mark.parametrize("rate", [RATE, 44100])
def test_compressed_and_float_files_are_read(kind: str, rate: int, tmp_path: Path) -> None:
    time = np.arange(rate) / rate
    stereo = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(rate)], axis=1) / 2
    (path := tmp_path / "sound").write_bytes(content := compressed(kind, stereo, rate))
    samples = read_audio(path)
    np.testing.assert_array_equal(samples, read_audio(content))
    wanted = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE) / 4
    assert abs(len(samples) - RATE) < 0.1 * RATE  # an MP3 consists of whole frames
    assert np.abs(samples[:RATE][200:-200] - wanted[: len(samples)][200:-200]).max() < 0.03


@pytest.mark.parametrize("kind", FORMATS)
def test_file_that_contradicts_its_header_is_refused_in_one_line(kind: str) -> None:
    content = compressed(kind, sound(0.5))
    random = np.random.default_rng(0)
    for lies in (
        content[:4] + random.bytes(2000),
        content[:4] + bytes(2000),
        content[:4] + wav(sound(0.1)),
        content[: len(content) // 3],
    ):
        with suppress(PromptError):  # a decoder may skip to the next frame
            assert len(read_audio(lies)) < 2 * RATE
    with pytest.raises(PromptError, match=r"^the audio begins as \w+, but cannot be decoded \([^\n]*$"):
        read_audio(content[:4] + bytes(2000))


def test_wav_file_with_a_wrong_sample_count_is_refused_in_one_line() -> None:
    pytest.importorskip("soundfile")
    content = wav(sound(0.1))
    for tag in (b"\x55\0", b"\3\0", b"\xfe\xff"):  # MP3, floats, extensible
        with pytest.raises(PromptError, match=r"^the audio begins as a WAV file without PCM samples, but[^\n]*$"):
            read_audio(content[:20] + tag + content[22:])


def test_compressed_file_without_soundfile_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(PromptError, match=r"the audio is FLAC; pip install 'freeexport\[audio\]', or convert it"):
        read_audio(b"fLaC" + bytes(100))


LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1(back)", 8: "7.1"}


def m4a(samples: np.ndarray, rate: int = RATE, video: bool = False) -> bytes:
    """Return an MP4 file with AAC of samples [n] or [n, channels], or with one stream of `video`."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        if video:
            stream = container.add_stream("mpeg4", rate=25, width=16, height=16)
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        else:
            packed = samples.reshape(len(samples), -1).astype(np.float32)
            layout = LAYOUTS[packed.shape[1]]
            stream = container.add_stream("aac", rate=rate, layout=layout)
            frame = av.AudioFrame.from_ndarray(packed.reshape(1, -1), format="flt", layout=layout)
            frame.sample_rate = rate
            frame.pts = 0  # the file then names the encoder's delay
        for each in (frame, None):
            container.mux(stream.encode(each))
    return buffer.getvalue()


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_m4a_files_are_read(rate: int, tmp_path: Path) -> None:
    time = np.arange(rate) / rate
    stereo = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(rate)], axis=1) / 2
    (path := tmp_path / "sound").write_bytes(content := m4a(stereo, rate))
    samples = read_audio(path)
    np.testing.assert_array_equal(samples, read_audio(content))
    wanted = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE) / 4
    assert abs(len(samples) - RATE) < 0.1 * RATE  # whole frames
    # The encoder begins roughly, as the tone does at once.
    assert np.abs(samples[2000:15000] - wanted[2000:15000]).max() < 0.03


def read_damaged(content: bytes, times: int) -> list[str]:
    """Read a file with 1 to 15 changed bytes, `times` times. Return the messages of refusals."""
    random = np.random.default_rng(0)
    refused = []
    for _ in range(times):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = random.integers(len(content), size=random.integers(1, 16))
        damaged[places] = random.integers(256, size=len(places))
        try:
            read_audio(damaged.tobytes())
        except PromptError as error:
            refused.append(str(error))
    return refused


@pytest.mark.parametrize("times", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_m4a_file_of_any_number_of_channels_is_read_or_refused(times: int) -> None:
    # In another process, because a crash would end this one.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for channels in LAYOUTS:
            content = m4a(np.stack([sound(0.1)] * channels, axis=1))
            refused = pool.submit(read_damaged, content, times).result()
            assert 0.3 * times < len(refused) <= times
            assert not any("\n" in message for message in refused)


@pytest.mark.parametrize("channels", LAYOUTS)
def test_channels_of_m4a_files_are_averaged(channels: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    parts = np.stack([tone * (channel == 0) for channel in range(channels)], axis=1) / 2
    samples = read_audio(m4a(parts))
    assert np.abs(samples[2000:15000] - tone[2000:15000] / 2 / channels).max() < 0.03


def test_m4a_file_with_an_unknown_codec_is_refused_in_one_line() -> None:
    content = m4a(sound(0.1))
    kind = content.index(b"\x40\x15", content.index(b"esds"))  # 0x40 is AAC
    with pytest.raises(PromptError, match=r"but cannot be decoded \(its codec is unknown\); convert it"):
        read_audio(content[:kind] + b"\1" + content[kind + 1 :])


def test_file_that_is_not_m4a_despite_its_name_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    content = m4a(sound(1.0))
    random = np.random.default_rng(0)
    for lies in (content[:8] + random.bytes(2000), content[:8] + bytes(2000), content[: len(content) // 3]):
        with pytest.raises(PromptError, match=r"^the audio begins as M4A, but cannot be decoded \([^\n]*$"):
            read_audio(lies)
    with pytest.raises(PromptError, match="the audio has no audio stream; give a file with sound"):
        read_audio(m4a(sound(0.1), video=True))
    place = content.index(b"mdat") + 100
    damaged = content[:place] + random.bytes(400) + content[place + 400 :]
    with suppress(PromptError):  # a decoder may skip to the next frame
        assert len(read_audio(damaged)) < 2 * RATE
    with pytest.raises(LateError):
        read_audio(content, until=0.0)
    monkeypatch.setattr("runtime.speech.audio.LONGEST_SECONDS", 0.5)
    with pytest.raises(PromptError, match=r"the audio has 0.0 hours, at most"):
        read_audio(content)


def test_m4a_file_without_pyav_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PromptError, match=r"the audio is M4A; pip install 'freeexport\[m4a\]', or convert it"):
        read_audio(b"\0\0\0\x20ftypM4A " + bytes(100))
