"""Synthetic sounds and WAV files."""

from __future__ import annotations

import io
import wave

import numpy as np

from runtime.speech.audio import RATE


def sound(seconds: float, rate: int = RATE) -> np.ndarray:
    """Return a rising tone in noise, with pauses."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(time))
    return ((0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time) + 0.01 * noise) * (time % 1 < 0.7)).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE, width: int = 2, channels: int = 1) -> bytes:
    """Return a WAV file of samples in [-1, 1], with `width` bytes per sample."""
    whole = np.repeat(np.clip(samples, -1, 1), channels).astype(np.float64)
    if width == 1:
        data = ((whole + 1) * 127.5).astype(np.uint8).tobytes()
    else:
        data = (whole * (2**31 - 1)).astype("<i4").view(np.uint8).reshape(-1, 4)[:, 4 - width :].tobytes()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return buffer.getvalue()
