"""How busy other processes are, and what follows for threads that wait."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from freeexport.system import load
from freeexport.system.load import WAIT_POLICY, load_note, other_load, wait_quietly


@pytest.mark.parametrize(("cores", "noted"), [(0.0, False), (0.1, False), (1.2, True)])
def test_busy_machine_is_reported(cores: float, noted: bool) -> None:
    assert ("kept 1.2 cores busy" in load_note(cores)) == noted


def test_own_work_and_that_of_children_is_not_counted_as_load(monkeypatch: pytest.MonkeyPatch) -> None:
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    others = iter([100.0, 101.5])
    monkeypatch.setattr(load, "_SHORTEST", 0.0)
    monkeypatch.setattr(load, "_busy_seconds", lambda: next(others))
    with other_load() as others_load:
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", spin], check=True)
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        elapsed = time.monotonic() - began
    # Of 1.5 busy seconds, at least 0.5 were this process's and its child's.
    assert 0 < others_load.cores <= 1.02 / elapsed


@pytest.mark.parametrize(
    ("busy", "threads", "given", "policy"),
    [
        (0.0, 2, None, None),
        (1.0, 2, None, "PASSIVE"),
        (1.0, 1, None, None),  # a core is left to it
        (2.0, 1, None, "PASSIVE"),
        (2.0, 2, "ACTIVE", "ACTIVE"),
    ],
)
def test_waiting_threads_sleep_if_other_processes_use_the_cores(
    busy: float, threads: int, given: str | None, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load.OtherLoad, "so_far", lambda self: busy)
    monkeypatch.setattr(load, "_SHORTEST", 0.0)
    monkeypatch.setattr(load, "usable_cores", lambda: 2)
    monkeypatch.setattr(os, "environ", {} if given is None else {WAIT_POLICY: given})
    wait_quietly(threads)
    assert os.environ.get(WAIT_POLICY) == policy
