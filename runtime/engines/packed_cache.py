"""The engine cache: a bundle's graphs as ONNX Runtime runs them here, their weights packed, in files to be mapped.

Packed weights in memory belong to one process; mapped from a file, processes share them. An entry is of one ONNX
Runtime on one kind of processor, lies in the user's cache and never in the bundle, and can always be made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.bundle.bundle import Bundle, engine_files, engines_digest
from runtime.engines.onnx import build_of_onnxruntime, save_packed
from runtime.engines.packed_entry import ENTRY, SCHEMA_VERSION, Entry, check_entry, read_entry, write_entry
from runtime.errors import CacheError, EngineError, FreeExportError
from runtime.machine.machine import cpu_features
from runtime.machine.user_cache import user_cache
from runtime.options import SessionOptions

logger = logging.getLogger(__name__)

# Weights as they are and packed, for each engine that reads them: measured 2.2 to 3.3 times the bundle's weights.
MOST_TIMES = 4
# Bytes that an entry must leave free on the disk.
RESERVE = 10**9
# Bytes of all entries, beyond which those go that were not used for longest; FREEEXPORT_CACHE_GB is another limit.
MOST_BYTES = 32 * 10**9
# A directory in the making that is older was left by a process that is gone.
_STALE_SECONDS = 3600
_MAKING = ".making-"


def packed_engines(bundle: Bundle, options: SessionOptions) -> Path | None:
    """The directory of the cache that a session loads its engines from, None for the bundle itself.

    A session that checks every file of the bundle (`verify="full"`), or runs on a GPU, takes the bundle's own. So does
    one of a bundle with our own kernels, which reads its weights where they are.
    """
    if bundle.manifest.kernels is not None:
        return None
    if options.cache == "off" or options.verify == "full" or options.device != "cpu":
        return None
    if options.cache == "use":
        return find(bundle)
    try:
        return write(bundle)
    except CacheError as error:
        logger.warning("%s", error)
        return None


def cache_root() -> Path:
    return user_cache("engines")


def find(bundle: Bundle) -> Path | None:
    """The directory of this bundle's entry for this machine, None where there is none that can be trusted.

    Trusted is what stands in a directory that only this user, or root, can write, and is unchanged since by sizes,
    times, and the sha256 of the graphs: weights are not read for it, as they are not of a bundle. ONNX Runtime compares
    packed weights with what it would pack.
    """
    place = _place(bundle)
    if not place.is_dir():
        return None
    try:
        check_entry(place, engine_files(bundle.manifest))
    except (FreeExportError, OSError) as error:
        logger.warning("the engine cache is not used: %s; run: freeexport cache clear", error)
        return None
    with contextlib.suppress(OSError):
        os.utime(place / ENTRY)  # for `entries`, which go by when they were used
    return place


def write(bundle: Bundle) -> Path:
    """Make this bundle's entry where there is none to trust, and the directory that holds it.

    Takes the place of entries that were not used for longest. Raises CacheError where it cannot be written, or there
    is no room; nothing is left then. Two processes may write one entry: the first is kept.
    """
    if bundle.manifest.kernels is not None:
        raise CacheError(
            f"{bundle.path} has freeexport's kernels, which read its weights as they are: it needs no cache"
        )
    found = find(bundle)
    if found is not None:
        return found
    place, root = _place(bundle), cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_left_over(root)
        _make_room(root, bundle)
        making = Path(tempfile.mkdtemp(prefix=_MAKING, dir=root))
        try:
            for graph in engine_files(bundle.manifest):
                save_packed(bundle.path / graph, making)
            write_entry(making, bundle.path, engines_digest(bundle.manifest), build_of_onnxruntime())
            _move(making, place, bundle)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    except (OSError, EngineError) as error:
        raise CacheError(f"the engine cache {root} cannot be written ({error}); free space, or go without it") from None
    found = find(bundle)
    if found is None:
        raise CacheError(f"what was written to the engine cache {root} is not as it was written; go without it")
    return found


def entries() -> Iterator[tuple[Path, Entry | None, float]]:
    """Every entry, last used first: its directory, its record (None where it cannot be read), and seconds since the
    epoch when it was used."""
    root = cache_root()
    found = [path for path in root.iterdir() if _is_entry(path)] if root.is_dir() else []
    for path in sorted(found, key=_used, reverse=True):
        try:
            yield path, read_entry(path), _used(path)
        except FreeExportError:
            yield path, None, _used(path)


def clear(bundle: Bundle | None = None) -> int:
    """Remove all entries, or those of one bundle for any machine; how many. Processes that have mapped one keep it."""
    gone = 0
    for path, entry, _ in list(entries()):
        if bundle is None or (entry is not None and entry.engines == engines_digest(bundle.manifest)):
            shutil.rmtree(path)
            gone += 1
    return gone


def most_bytes() -> int:
    """Bytes that all entries together may take."""
    given = os.environ.get("FREEEXPORT_CACHE_GB")
    if not given:
        return MOST_BYTES
    try:
        return max(0, int(float(given) * 1e9))
    except (ValueError, OverflowError):
        raise CacheError(f"FREEEXPORT_CACHE_GB is {given!r}; give a number of gigabytes") from None


def _place(bundle: Bundle) -> Path:
    machine = [platform.machine(), sorted(cpu_features())]
    return (
        cache_root() / _digest([SCHEMA_VERSION, engines_digest(bundle.manifest), build_of_onnxruntime(), machine])[:32]
    )


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _move(making: Path, place: Path, bundle: Bundle) -> None:
    if find(bundle) is not None:
        return  # another process was first
    shutil.rmtree(place, ignore_errors=True)  # what cannot be trusted
    with contextlib.suppress(OSError):  # another process was first just now
        making.rename(place)


def _make_room(root: Path, bundle: Bundle) -> None:
    need = MOST_TIMES * bundle.manifest.weight_bytes
    most, free = most_bytes(), shutil.disk_usage(root).free
    if need > most:
        raise CacheError(
            f"an entry may need {need / 1e9:.1f} GB, the limit is {most / 1e9:g} GB; set FREEEXPORT_CACHE_GB"
        )
    held = sum(entry.bytes for _, entry, _ in entries() if entry)
    for path, entry, _ in reversed(list(entries())):
        if held + need <= most:
            break
        shutil.rmtree(path, ignore_errors=True)
        held -= entry.bytes if entry else 0
    if need + RESERVE > free:
        raise CacheError(f"an entry may need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB is free at {root}; free some")


def _remove_left_over(root: Path) -> None:
    for path in root.glob(f"{_MAKING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _is_entry(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(_MAKING)


def _used(path: Path) -> float:
    try:
        return (path / ENTRY).stat().st_mtime
    except OSError:
        return 0.0
