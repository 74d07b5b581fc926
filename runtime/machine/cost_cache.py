"""Costs of a bundle's engine calls on this machine, where it records none: learned from requests, kept for the user.

A file for each bundle's engines and host lies in `$XDG_CACHE_HOME/freeexport/costs`. Nothing in it changes a token:
costs decide how calls are batched, how long drafts are, and how often labels are gathered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from statistics import median

from runtime.bundle.bundle import engines_digest
from runtime.bundle.costs import NEUTRAL, Costs, Host, Outside
from runtime.bundle.manifest import Manifest
from runtime.bundle.schema import Reader
from runtime.errors import FreeExportError, OptionError
from runtime.json_file import read_object
from runtime.machine.machine import costs_here, host
from runtime.machine.user_cache import user_cache

logger = logging.getLogger(__name__)

VARIABLE = "FREEEXPORT_COST_CACHE"
# Requests that each figure is the median of, at least and at most, and the fewest tokens of one.
LEAST, MOST, TOKENS = 5, 33, 8
# Files that are kept, bytes of one, and seconds after which it is measured again.
MOST_FILES, LARGEST, OLDEST = 64, 1 << 16, 30 * 86400


class CostCache:
    """`known`: what was learned before, by this session or another; None where there is nothing yet."""

    def __init__(self, manifest: Manifest, here: Host) -> None:
        # What was not seen is taken in proportion to what was.
        self._base, self._host = manifest.costs or NEUTRAL, here
        name = hashlib.sha256(json.dumps([engines_digest(manifest), asdict(here)]).encode()).hexdigest()[:32]
        self._file = f"{name}.json"
        self._steps: dict[bool, deque[float]] = defaultdict(lambda: deque(maxlen=MOST))
        self._outside: dict[bool, deque[float]] = defaultdict(lambda: deque(maxlen=MOST))
        self._passes: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=MOST))
        self._requests, self._due = 0, LEAST
        self.known = self._read()

    def learn(self, head: bool, steps: int, shallow: float, outside: float, passes: Mapping[int, float]) -> None:
        """From a request that shared no engine call: so many shallow steps, with the head or without, the seconds that
        they took, those outside the engine calls, and of a deep pass by rows. Writes the file when it has learned
        enough, and again after four times as many requests."""
        if steps < TOKENS:
            return
        self._requests += 1
        if self._requests == 1:
            return  # it bound its calls, and found its weights on no page
        self._steps[head].append(shallow / steps)
        self._outside[head].append(max(0.0, outside / steps))
        for rows, seconds in passes.items():
            self._passes[rows].append(seconds)
        costs = self._costs() if self._requests >= self._due else None
        if costs is not None:
            self._due = 4 * self._requests
            self.known = costs
            self._write(costs)

    def _costs(self) -> Costs | None:
        """None unless steps with the head, passes over one row, and others were seen often enough."""
        deep = {rows: median(seen) for rows, seen in sorted(self._passes.items()) if len(seen) >= LEAST}
        if len(self._steps[True]) < LEAST or len(deep) < 2 or 1 not in deep:
            return None
        shallow = median(self._steps[True])
        without = shallow * self._base.shallow_without_head / self._base.shallow
        if len(self._steps[False]) >= LEAST:
            without = median(self._steps[False])
        free = median(self._outside[True])
        full = median(self._outside[False]) if self._outside[False] else free
        rising = dict(zip(deep, accumulate(deep.values(), max), strict=True))
        return Costs(shallow, min(shallow, without), rising, Outside(full, free), host=self._host)

    def _read(self) -> Costs | None:
        with contextlib.suppress(OSError, RuntimeError, FreeExportError):
            path = user_cache("costs") / self._file
            if time.time() - path.stat().st_mtime <= OLDEST:
                costs: Costs = Reader("", finite=True, most=1024).read(
                    Costs, read_object(path, "", limit=LARGEST), "costs"
                )
                if costs.sound and costs.measured and costs.host == self._host:
                    return costs
        return None

    def _write(self, costs: Costs) -> None:
        try:
            folder = user_cache("costs")
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, making = tempfile.mkstemp(prefix=".making-", dir=folder)
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(asdict(costs), file)
                os.replace(making, folder / self._file)
            finally:
                Path(making).unlink(missing_ok=True)
            files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in files[:-MOST_FILES]:
                path.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            logger.debug("costs are not kept: %s", error)


def costs_for(manifest: Manifest, threads: int, on_cpu: bool) -> tuple[Costs | None, CostCache | None]:
    """Costs to act on, None where they are not known; and what is to learn them, where the bundle has none of this
    machine. FREEEXPORT_COST_CACHE=off neither reads nor writes. OptionError where it is something else than on or
    off."""
    chosen = os.environ.get(VARIABLE) or "on"
    if chosen not in ("on", "off"):
        raise OptionError(f"{VARIABLE} is {chosen[:80]!r}; choose 'on' or 'off'")
    recorded = costs_here(manifest, threads)
    if recorded is not None or not on_cpu or chosen == "off":
        return recorded, None
    cache = CostCache(manifest, host(threads))
    return cache.known, None if cache.known else cache
