"""Optimization profiles: the sizes that each engine is called with while decoding, syncing and reading a prompt."""

from __future__ import annotations

from graphs.errors import BuildError
from runtime.bundle.manifest import Manifest
from runtime.engines.cross_cache import STEP
from runtime.tensorrt.plan import Profile

MAX_BATCH = 256
# What a prompt usually has, for the tactics of prefill.
USUAL_PROMPT = 128


def profiles_of(engine: str, manifest: Manifest, max_batch: int) -> tuple[Profile, ...]:
    """The profiles of an engine for up to `max_batch` sequences, the most frequent first. BuildError where `max_batch`
    is out of range.

    Dimensions are those of the engine contract: B sequences, q or k rows each, E prompt tokens, R head rows.
    """
    if not 1 <= max_batch <= MAX_BATCH:
        raise BuildError(f"max batch {max_batch} is out of range; choose 1 to {MAX_BATCH}")
    batch = {"B": (1, 1, max_batch)}
    # Sequences that share calls read arrays of one width, which is a multiple of STEP.
    longest = -(-manifest.encoder_capacity // STEP) * STEP
    prompt = {"E": _up_to(longest)} if manifest.encoder_decoder else {}
    if engine in ("encoder", "prologue"):
        return (Profile("prompt", {**batch, **prompt}),)
    rows = "q" if engine == "shallow" else "k"
    # Where nothing may exit, the shallow head runs for no row.
    decode = Profile("decode", {**batch, **prompt, rows: (1, 1, 1), "R": (0, 1, max_batch)})
    prefill = Profile("prefill", {**batch, **prompt, rows: _up_to(manifest.capacity), "R": (0, 1, max_batch)})
    if engine == "shallow":
        return decode, prefill
    most = manifest.max_pending
    sync = Profile("sync", {**batch, **prompt, "k": (1, min(4, most), most), "R": (0, 1, most * max_batch)})
    return decode, sync, prefill


def _up_to(limit: int) -> tuple[int, int, int]:
    return 1, min(USUAL_PROMPT, limit), limit
