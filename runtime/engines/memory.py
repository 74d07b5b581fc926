"""Memory that the caches of a session may take, checked against what is available."""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress

from runtime.bundle.manifest import Manifest
from runtime.engines.cross_cache import STEP
from runtime.errors import CapacityError
from runtime.machine.machine import available_memory

logger = logging.getLogger(__name__)


def check_memory(manifest: Manifest, capacity: int, slots: int, prefixes: int = 0) -> None:
    """CapacityError where the caches, full, are more than the memory that is available: self-attention's, of an
    encoder-decoder what cross-attention reads, with prompts as long as the bundle allows, and `prefixes`, the bytes of
    prompts that are kept."""
    # What glibc's heaps, one a thread, keep of closed sessions: 30 MB of 477 once SmolLM2 was opened 16 times.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    rows, each, longest = capacity + manifest.max_pending, manifest.kv_bytes_per_token, manifest.encoder_capacity
    each += manifest.feature_bytes_per_token
    need, what = slots * rows * each, f"{slots} slots x {rows} positions x {each} bytes"
    # Prompts of an encoder: each sequence's own, and a padded copy where several share calls (CrossCache).
    read = slots * (longest + (-(-longest // STEP) * STEP if slots > 1 else 0))
    if read:
        need += read * each
        what += f", and {read} positions of prompts"
    if prefixes:
        need += prefixes
        what += f", and {prefixes // 1_000_000} MB of prefixes"
    logger.info("KV cache: %.1f MB (%s)", need / 1e6, what)
    available = available_memory()
    if available is not None and need > available:
        raise CapacityError(
            f"the KV cache needs {need / 1e9:.1f} GB ({what}), {available / 1e9:.1f} GB is available; "
            f"lower {'prefix_cache_mb, ' if prefixes else ''}"
            f"{'slots, or convert with a lower --encoder-capacity' if read else 'capacity or slots'}"
        )


def check_beams(manifest: Manifest, beams: int, positions: int) -> None:
    """CapacityError where the caches of a beam search, should it come to so many positions, are more than the memory
    that is available."""
    need, available = beams * positions * manifest.kv_bytes_per_token, available_memory()
    if available is not None and need > available:
        raise CapacityError(
            f"{beams} beams of {positions} positions need {need / 1e9:.1f} GB, {available / 1e9:.1f} GB is available; "
            "lower num_beams or max_new_tokens"
        )
