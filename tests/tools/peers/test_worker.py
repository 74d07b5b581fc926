from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_peer
import pytest

from tools.peers.environment import PeerError
from tools.peers.worker import Worker

COMMAND = [sys.executable, fake_peer.__file__]
LOAD = {"op": "load", "model": "", "threads": 1, "cpus": [], "options": {}}


@pytest.fixture
def worker() -> Iterator[Worker]:
    root = str(Path(__file__).parents[3])
    worker = Worker(COMMAND, {"PYTHONPATH": root})
    yield worker
    worker.close()


def generate(last: int, tokens: int = 3) -> dict[str, Any]:
    return {"op": "generate", "prompt": [last], "tokens": tokens}


def test_answers_come_back_whatever_libraries_print(worker: Worker) -> None:
    assert worker.ask(LOAD, 60) == {"versions": {"fake": "1.0"}}
    answer = worker.ask(generate(7), 60)
    assert answer["tokens"] == [8, 9, 10]
    assert answer["times"] == sorted(answer["times"])
    assert 0 < answer["times"][0] < answer["times"][-1] <= answer["seconds"]
    assert answer["peak_bytes"] > 1 << 20


def test_a_failure_is_its_message_on_one_line_and_the_next_request_is_answered(worker: Worker) -> None:
    worker.ask(LOAD, 60)
    with pytest.raises(PeerError, match=r"^ValueError: cannot read this$"):
        worker.ask(generate(fake_peer.FAILS), 60)
    assert worker.ask(generate(1), 60)["tokens"] == [2, 3, 4]


def test_too_few_tokens_are_a_failure(worker: Worker) -> None:
    worker.ask(LOAD, 60)
    with pytest.raises(PeerError, match="gave 2 tokens, 3 were asked for"):
        worker.ask(generate(fake_peer.SHORT), 60)


def test_a_process_that_dies_is_reported_with_its_last_words(worker: Worker) -> None:
    worker.ask(LOAD, 60)
    with pytest.raises(PeerError, match=r"ended with code 3.*the last words"):
        worker.ask(generate(fake_peer.DIES), 60)
    with pytest.raises(PeerError, match="ended with code 3"):
        worker.ask(generate(1), 60)


def test_a_process_that_hangs_is_ended(worker: Worker) -> None:
    worker.ask(LOAD, 60)
    with pytest.raises(PeerError, match="generate took more than 0 s, and was ended"):
        worker.ask(generate(fake_peer.HANGS), 0.2)
    with pytest.raises(PeerError, match="its process was ended"):
        worker.ask(generate(1), 60)


def test_requests_before_a_model_is_loaded_are_refused(worker: Worker) -> None:
    with pytest.raises(PeerError, match="cannot generate now"):
        worker.ask(generate(1), 60)


def test_what_is_no_answer_is_reported() -> None:
    worker = Worker([sys.executable, "-c", "input(); print('hello')"], {})
    with pytest.raises(PeerError, match="answered 'hello', which is not JSON"):
        worker.ask(LOAD, 60)
    worker.close()


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(PeerError, match="/nowhere/python cannot be started"):
        Worker(["/nowhere/python"], {})
