"""Recordings in the files of exits for speech: the prompts of their samples.

A recording is the tensor sound.NUMBER, int8 [n]: samples at 16 kHz, compressed by the mu-law (ITU-T
G.711) with 127 levels of each sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from freeexport.checkpoints.weight_files import CheckpointError, SafetensorsFile
from runtime.speech.audio import RATE

SOUND_PREFIX = "sound."
MAX_SECONDS = 30
_MU = 255
_LEVELS = 127
_REMEDY = "get the file again"


def fields_of_sounds(sounds: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of recordings, float32 [n] in -1 to 1, by their names in a file."""
    fields = {}
    for number, samples in enumerate(sounds):
        loudness = np.log1p(_MU * np.abs(samples).clip(max=1)) / math.log1p(_MU)
        fields[f"{SOUND_PREFIX}{number}"] = np.rint(
            _LEVELS * np.copysign(loudness, samples)
        ).astype(np.int8)
    return fields


def read_sounds(file: SafetensorsFile, samples: int) -> tuple[np.ndarray, ...]:
    """Return the recordings of a file, float32 [n] at 16 kHz. Empty if it has none.

    Args:
        samples: Number of samples in the file, each of which needs a recording.

    Raises:
        CheckpointError: If recordings are missing, too long or not int8.
    """
    names = [name for name in file.shapes if name.startswith(SOUND_PREFIX)]
    if not names:
        return ()
    if sorted(names) != sorted(f"{SOUND_PREFIX}{number}" for number in range(samples)):
        raise CheckpointError(
            f"{file.path} is damaged: it has {len(names)} recordings for {samples} samples; "
            f"{_REMEDY}"
        )
    found = []
    for number in range(samples):
        name = f"{SOUND_PREFIX}{number}"
        stored = file.read_stored(name)
        if stored.dtype != np.int8 or stored.ndim != 1 or not len(stored):
            raise CheckpointError(
                f"{file.path} is damaged: {name} is {stored.dtype} {list(stored.shape)}, not int8 "
                f"of one dimension; {_REMEDY}"
            )
        if len(stored) > MAX_SECONDS * RATE:
            raise CheckpointError(
                f"{file.path} has a recording of {len(stored) / RATE:.1f} s, at most "
                f"{MAX_SECONDS} are read; {_REMEDY}"
            )
        level = np.abs(stored.astype(np.float32)) / _LEVELS
        size = np.expm1(level * math.log1p(_MU)) / _MU
        found.append(np.copysign(size, stored).astype(np.float32))
    return tuple(found)
