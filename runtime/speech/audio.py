"""Audio input for speech encoders: samples of files and arrays, and log-mel spectrograms.

See Radford et al. 2022, arXiv 2212.04356, section 2.2.
"""

from __future__ import annotations

import io
import itertools
import math
import wave
from collections.abc import Callable
from functools import cache
from os import PathLike
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

import numpy as np

from runtime.bundle.json_file import UnreadableError, opened
from runtime.engines.matmul import product
from runtime.errors import PromptError, one_line

RATE = 16_000  # samples per second
HOP = 160  # samples from one frame to the next
FFT = 400  # samples per frame
FRAMES_A_SECOND = RATE // HOP
# Maximum length, and maximum file size: 24-bit stereo at 48 kHz reaches it in half that time.
LONGEST_SECONDS = 4 * 3600
LARGEST_WAV = 2 << 30
# Compressed files are read with soundfile: the first bytes of each format, its name, and the name
# that soundfile reports. A file that begins with the frame of an MP3 has no other mark.
COMPRESSED = (
    (b"fLaC", "FLAC", ("FLAC",)),
    (b"OggS", "Ogg", ("OGG",)),
    (b"ID3", "MP3", ("MP3", "MPEG")),
    *((bytes([0xFF, second]), "MP3", ("MP3", "MPEG")) for second in (0xFB, 0xFA, 0xF3, 0xF2)),
)
M4A = b"ftyp"  # bytes 4 to 8 of an MP4 file, which is read with PyAV
# WAV files of floats, and of compressed samples.
OTHER_WAV = ("a WAV file without PCM samples", ("WAV", "WAVEX"))
MAX_CHANNELS = 8  # of a compressed file, whose size does not limit its samples
LOWEST_RATE, HIGHEST_RATE = 4_000, 192_000
# Samples up to this value are accepted as meant for -1 to 1. Those of 16 bits are far larger.
LOUDEST = 100.0
MIN_POWER = 1e-10
RANGE = 8.0  # dynamic range, in powers of ten below the maximum
# Frames that are transformed together.
_BLOCK = 3000
_PHASES = 64
_HALF_TAPS = 16  # zero crossings of the resampling filter on each side


class LateError(Exception):
    """The deadline passed before the audio was read."""


def read_audio(source: Any, name: str = "the audio", until: float = math.inf) -> np.ndarray:
    """Return float32 samples [n] at 16 kHz.

    Args:
        source: Array of floats in about -1 to 1 at 16 kHz, or the path or content of a WAV file
            with PCM of 8 to 32 bits, of a FLAC, Ogg or MP3 file or a WAV file of floats, which
            require soundfile, or of an M4A file, which requires PyAV.
            Channels are averaged, and other rates are resampled.
        name: Name of the audio in error messages.
        until: Deadline, on the monotonic clock.

    Raises:
        PromptError: If the audio is not valid, empty or too long.
        LateError: If a file has not been read by `until`.
    """
    if isinstance(source, (str, PathLike)):
        name = str(source)
    if isinstance(source, (str, PathLike, bytes)):
        samples = _read_file(source, name, until)
    else:
        samples = np.asarray(source)
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            raise PromptError(
                f"{name} is an array of {samples.dtype} {list(samples.shape)}; pass float "
                f"samples [n] at {RATE} Hz, one channel, or the path of a WAV file"
            )
    if len(samples) == 0:
        raise PromptError(f"{name} is empty; pass at least one sample")
    _check_length(len(samples) / RATE, name)
    samples = np.ascontiguousarray(samples, np.float32)
    if not np.isfinite(samples).all():
        raise PromptError(f"{name} has samples that are NaN or infinite; repair it")
    if (loudest := max(samples.max(), -samples.min())) > LOUDEST:
        raise PromptError(
            f"{name} has samples up to {loudest:g}; divide them, so that they lie between -1 and 1"
        )
    return samples


def _read_file(source: Any, name: str, until: float) -> np.ndarray:
    """Return the samples of a file at 16 kHz, whose first bytes decide its format."""
    try:
        with (
            io.BytesIO(source)
            if isinstance(source, bytes)
            else opened(Path(source), LARGEST_WAV) as file
        ):
            begin = file.read(8)
            file.seek(0)
            if begin[4:] == M4A:
                return _read_m4a(file, name, until)
            for mark, kind, formats in COMPRESSED:
                if begin.startswith(mark):
                    return _read_compressed(file, name, until, kind=kind, formats=formats)
            try:
                return _read_wav(file, name, until)
            except wave.Error as error:
                if "unknown format" not in str(error):
                    raise
                file.seek(0)
                return _read_compressed(file, name, until, *OTHER_WAV)
    except UnreadableError as error:
        raise PromptError(f"{name} cannot be read ({error}); give a WAV file") from None
    except (wave.Error, EOFError) as error:
        problem = one_line(error) if str(error) else "it ends early"
        raise PromptError(
            f"{name} is no WAV file of PCM samples ({problem}); convert it to one"
        ) from None


def _read_wav(file: BinaryIO, name: str, until: float) -> np.ndarray:
    """Return the samples of a WAV file at 16 kHz."""
    rate, channels, width, begin, count = _wav_header(file)
    if width not in (1, 2, 3, 4):
        raise PromptError(
            f"{name} has samples of {8 * width} bits; convert it to PCM of 8, 16, 24 or 32"
        )
    frame = width * channels
    # The header of a stream has the largest number, because its length is unknown.
    count = min(count, (file.seek(0, io.SEEK_END) - begin) // frame)

    def read(first: int, frames: int) -> np.ndarray:
        file.seek(begin + first * frame)
        return _decoded(file.read(frames * frame), width, channels)

    return _joined(read, count, rate, name=name, until=until)


def _read_compressed(
    file: BinaryIO, name: str, until: float, kind: str, formats: tuple[str, ...]
) -> np.ndarray:
    """Return the samples of a file that soundfile reads, at 16 kHz.

    Args:
        file: The file.
        name: Its name in error messages.
        until: Deadline, on the monotonic clock.
        kind: Its format, by its first bytes.
        formats: Names of this format in soundfile.
    """
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package has no library for this platform
        raise PromptError(
            f"{name} is {kind}; pip install 'freeexport[audio]', or convert it to a WAV file"
        ) from None
    broken = f"{name} begins as {kind}, but cannot be decoded"
    try:
        with soundfile.SoundFile(file) as sound:
            if sound.format not in formats:
                raise PromptError(f"{broken} (it is {sound.format}); convert it to a WAV file")
            _check_channels(sound.channels, name)

            def read(first: int, frames: int) -> np.ndarray:
                sound.seek(first)
                samples = sound.read(frames, dtype="float32", always_2d=True)
                if len(samples) < frames:
                    raise PromptError(f"{broken} (it ends early); convert it to a WAV file")
                return samples.mean(axis=1)

            return _joined(read, sound.frames, sound.samplerate, name=name, until=until)
    except soundfile.SoundFileError as error:
        problem = getattr(error, "error_string", None) or one_line(error)
        raise PromptError(f"{broken} ({problem}); convert it to a WAV file") from None


def _read_m4a(file: BinaryIO, name: str, until: float) -> np.ndarray:
    """Return the samples of the first audio stream of an MP4 file, at 16 kHz, with PyAV."""
    try:
        import av
    except (ImportError, OSError):  # OSError: the package has no library for this platform
        raise PromptError(
            f"{name} is M4A; pip install 'freeexport[m4a]', or convert it to a WAV file"
        ) from None
    broken = f"{name} begins as M4A, but cannot be decoded"
    samples = bytearray()
    try:
        # Only this format: others may read further files.
        with av.open(file, mode="r", format="mp4") as container:
            if not container.streams.audio:
                raise PromptError(f"{name} has no audio stream; give a file with sound")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise PromptError(f"{broken} (its codec is unknown); convert it to a WAV file")
            _check_channels(stream.channels, name)
            _check_rate(stream.rate, name)
            if stream.duration is not None and stream.time_base is not None:
                _check_length(float(stream.duration * stream.time_base), name)
            # All channels, because the library would not average them but add 0.7 of each. Packed,
            # because PyAV reads beyond the planes of a frame with eight.
            resampler = av.AudioResampler(format="flt", rate=RATE)
            for frame in itertools.chain(container.decode(stream), (None,)):
                if monotonic() >= until:
                    raise LateError
                if frame is not None:
                    _check_channels(frame.layout.nb_channels, name)
                for part in resampler.resample(frame):
                    packed = part.to_ndarray().reshape(-1, part.layout.nb_channels)
                    samples += packed.mean(axis=1, dtype=np.float32).tobytes()
                # The length in the header may be wrong.
                _check_length(len(samples) / 4 / RATE, name)
    except (av.FFmpegError, ValueError, ArithmeticError) as error:
        raise PromptError(f"{broken} ({one_line(error)}); convert it to a WAV file") from None
    return np.frombuffer(samples, np.float32)


def _joined(
    read: Callable[[int, int], np.ndarray], count: int, rate: int, name: str, until: float
) -> np.ndarray:
    """Return the samples of a file at 16 kHz.

    Reads a minute at a time, because hours of stereo would need several times the memory.

    Args:
        read: Returns some samples, float32 [n], from the first of them on.
        count: Number of samples.
        rate: Samples per second.
        name: Name of the file in error messages.
        until: Deadline, on the monotonic clock.
    """
    _check_rate(rate, name)
    _check_length(count / rate, name)
    samples = np.empty(math.ceil(count * RATE / rate), np.float32)
    minute = 60 * rate
    # One second, of which the resampling filter reads a part.
    beside = 0 if rate == RATE else rate
    for start in range(0, count, minute):
        if monotonic() >= until:
            raise LateError
        first = max(0, start - beside)
        part = read(first, min(count, start + minute + beside) - first)
        part = (
            part if rate == RATE else resampled(part, rate)[RATE * (first < start) :][: 60 * RATE]
        )
        samples[start // rate * RATE :][: len(part)] = part
    return samples


def _wav_header(file: BinaryIO) -> tuple[int, int, int, int, int]:
    """Return sample rate, channels, bytes per sample, offset of the samples, and frame count."""
    try:
        with wave.open(file) as header:
            rate = header.getframerate()
            channels = header.getnchannels()
            width = header.getsampwidth()
            return rate, channels, width, file.tell(), header.getnframes()
    except (RuntimeError, ValueError) as error:  # raised by the library for sizes beyond the file
        raise wave.Error(str(error) or "a chunk ends beyond the file") from None


def _check_channels(channels: int, name: str) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise PromptError(
            f"{name} has {channels} channels, at most {MAX_CHANNELS} are read; convert it to one"
        )


def _check_rate(rate: int, name: str) -> None:
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise PromptError(
            f"{name} has {rate} samples a second; give {LOWEST_RATE} to {HIGHEST_RATE}, best {RATE}"
        )


def _check_length(seconds: float, name: str) -> None:
    if seconds > LONGEST_SECONDS:
        raise PromptError(
            f"{name} has {seconds / 3600:.1f} hours, at most {LONGEST_SECONDS // 3600} are read; "
            "cut it into files"
        )


def _decoded(frames: bytes, width: int, channels: int) -> np.ndarray:
    """Convert PCM samples of `width` bytes to float32 [n], averaging the channels."""
    if width == 1:
        samples = np.frombuffer(frames, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        parts = np.frombuffer(frames, np.uint8).reshape(-1, 3)
        whole = np.zeros((len(parts), 4), np.uint8)
        whole[:, 1:] = parts
        samples = whole.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        samples = np.frombuffer(frames, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    # Numpy's mean is slow over such a short axis, and a product would start threads
    # (runtime/engines/matmul.py).
    total = samples[::channels].copy()
    for channel in range(1, channels):
        total += samples[channel::channels]
    total /= np.float32(channels)
    return total


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample float32 [n] to 16 kHz with a windowed sinc filter."""
    shared = math.gcd(rate, RATE)
    # Every `down` old samples correspond to `up` new ones. _PHASES of these are computed in one
    # matrix product.
    repeat = math.ceil(_PHASES * shared / RATE)
    up, down = RATE // shared * repeat, rate // shared * repeat
    narrow = min(1.0, RATE / rate)  # share of the old bandwidth that is kept
    reach = math.ceil(_HALF_TAPS / narrow)
    size = math.ceil(len(samples) * RATE / rate)
    count = max(1, math.ceil(size / up))
    padded = np.pad(samples, (reach, max(0, count * down - len(samples)) + reach + 2))
    result = np.empty((count, up), np.float32)
    for phase in range(0, up, _PHASES):
        whole, part = np.divmod(np.arange(phase, min(phase + _PHASES, up)) * down, up)
        width = whole[-1] - whole[0] + 2 * reach + 2
        distance = (np.arange(width) - reach)[:, None] - (whole - whole[0] + part / up)
        taper = np.where(abs(distance) < reach, np.cos(np.pi / 2 * distance / reach) ** 2, 0)
        kernel = (np.sinc(distance * narrow) * narrow * taper).astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(padded, width)[whole[0] :: down][:count]
        result[:, phase : phase + _PHASES] = product(np.ascontiguousarray(windows), kernel)
    return result.reshape(-1)[:size]


def log_mel(samples: np.ndarray, bins: int, until: float = math.inf) -> np.ndarray:
    """Return the log-mel spectrogram, float32 [bins, frames], of float32 samples [n].

    There are 100 frames per second, and the last one is silence. Values are scaled as in Whisper's
    training: logarithms, at most 8 powers of ten below the maximum, in about -1 to 1.5.

    Raises:
        LateError: If it is not finished by `until`.
    """
    frames = math.ceil((len(samples) + FFT // 2) / HOP) + 1
    padded = np.zeros(frames * HOP + FFT, np.float32)
    padded[FFT // 2 : FFT // 2 + len(samples)] = samples
    padded[: FFT // 2] = padded[FFT : FFT // 2 : -1]  # reflect the start
    windows = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP][:frames]
    hann = (0.5 - 0.5 * np.cos(2 * np.pi / FFT * np.arange(FFT))).astype(np.float32)
    filters = mel_filters(bins)
    mels = np.empty((bins, frames), np.float32)
    for start in range(0, frames, _BLOCK):
        if monotonic() >= until:
            raise LateError
        spectrum = np.fft.rfft(windows[start : start + _BLOCK] * hann, axis=1)
        power = spectrum.real.astype(np.float32) ** 2 + spectrum.imag.astype(np.float32) ** 2
        mels[:, start : start + _BLOCK] = product(power, filters.T).T
    np.log10(np.maximum(mels, np.float32(MIN_POWER), out=mels), out=mels)
    np.maximum(mels, np.max(mels) - np.float32(RANGE), out=mels)
    mels += 4
    mels /= 4
    return mels


def window(mels: np.ndarray, start: int, count: int) -> np.ndarray:
    """Return `count` frames of a spectrogram from `start` on, padded with silence.

    The result is float32 [1, bins, count].
    """
    part = mels[:, start : start + count]
    silence = np.broadcast_to(mels[:, -1:], (len(mels), count - part.shape[1]))
    return np.ascontiguousarray(np.concatenate([part, silence], axis=1))[None]


@cache
def mel_filters(bins: int) -> np.ndarray:
    """Return triangular filters of equal area, float32 [bins, FFT / 2 + 1].

    Their corners are equally spaced on Slaney's mel scale, which is linear up to 1 kHz and
    logarithmic above.
    """
    linear = 200 / 3  # Hz per mel below 1 kHz
    step = math.log(6.4) / 27  # logarithm of the ratio per mel above
    break_mel = 1000 / linear
    top = break_mel + math.log(RATE / 2 / 1000) / step
    mels = np.linspace(0, top, bins + 2)
    corners = np.where(mels < break_mel, mels * linear, 1000 * np.exp(step * (mels - break_mel)))
    frequencies = np.linspace(0, RATE / 2, FFT // 2 + 1)
    left, middle, right = (corners[first : first + bins, None] for first in range(3))
    rising = (frequencies - left) / (middle - left)
    falling = (right - frequencies) / (right - middle)
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)).astype(np.float32)
