"""One running server for most tests of serving: what they check does not depend on what it did before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from running_server import Running, running

from runtime import Session


@pytest.fixture(scope="session")
def server(chat: Path) -> Iterator[Running]:
    """Serves `chat` as "m"."""
    with running(chat, names=("m",), slots=4, queue=200, prefix_cache_mb=64, origins=("http://page",)) as server:
        yield server


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def session(chat: Path) -> Iterator[Session]:
    """A session on `chat`, beside the server."""
    with Session(chat, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client
