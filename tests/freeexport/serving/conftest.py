"""One running server for most tests of serving: what they check does not depend on what it did before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running_server import Running, running


@pytest.fixture(scope="session")
def server(chat: Path) -> Iterator[Running]:
    """Serves `chat` as "m"."""
    with running(chat, names=("m",), slots=4, queue=200, prefix_cache_mb=64, origins=("http://page",)) as server:
        yield server


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
