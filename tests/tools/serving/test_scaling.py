"""Processes that share a bundle, and the queueing model, against formulas that it does not use."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from checkpoints import LONG
from click.testing import CliRunner
from conftest import Bundles

from tools.serving import processes, queueing
from tools.serving.queueing import forecast


def erlang_c(servers: int, load: float) -> float:
    """Share that waits where `servers` work at `load` of what they can."""
    offered = servers * load
    last = offered**servers / math.factorial(servers) / (1 - load)
    return last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize("servers", [1, 4, 16])
@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
def test_servers_that_do_not_slow_each_other_down_are_erlangs(servers: int, load: float) -> None:
    found = forecast([2.0 * (k + 1) for k in range(servers)], 2.0 * servers * load, 1.0)
    waiting = erlang_c(servers, load)
    wait = waiting / (2 * servers * (1 - load))
    assert found.waiting == pytest.approx(waiting)
    assert found.wait == pytest.approx(wait)
    assert found.latency == pytest.approx(wait + 1 / 2)
    assert found.wait95 == pytest.approx(max(0, math.log(waiting / 0.05)) / (2 * servers * (1 - load)))


def test_work_that_is_always_the_same_waits_half_as_long() -> None:
    assert forecast([3.0], 2.4, 0.0).wait == pytest.approx(0.8 / (2 * 3 * 0.2))


def test_a_batch_is_what_a_simulation_says() -> None:
    """4 slots, of which each more adds less; work of 4 lengths, started in order of arrival."""
    rates, arrivals, lengths = [2.0, 3.0, 3.6, 4.0], 3.2, np.array(queueing.LENGTHS)
    draw = np.random.default_rng(0)
    now, latencies, waits = 0.0, list[float](), list[float]()
    running, queue = list[list[float]](), list[list[float]]()  # arrival, work that is left
    upcoming = draw.exponential(1 / arrivals)
    while len(latencies) < 60_000:
        speed = rates[len(running) - 1] / len(running) if running else 0.0
        ends = min((left / speed for _, left in running), default=math.inf)
        step = min(ends, upcoming - now)
        now += step
        for each in running:
            each[1] -= step * speed
        if step == ends:
            done = min(running, key=lambda each: each[1])
            running.remove(done)
            latencies.append(now - done[0])
        else:
            queue.append([now, draw.choice(lengths) / lengths.mean()])
            upcoming = now + draw.exponential(1 / arrivals)
        if queue and len(running) < len(rates):
            running.append(queue.pop(0))
            waits.append(now - running[-1][0])
    found = forecast(rates, arrivals, float(lengths.std() / lengths.mean()))
    assert found.latency == pytest.approx(np.mean(latencies), rel=0.1)
    assert found.wait == pytest.approx(np.mean(waits), rel=0.15)
    assert found.wait95 == pytest.approx(np.percentile(waits, 95), rel=0.15)


def test_more_than_the_server_takes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3.00 requests/s arrive, and at most 2.00 end"):
        forecast([1.0, 2.0], 3.0, 1.0)


def test_the_model_is_printed_beside_what_was_measured(chat: Path) -> None:
    given = [str(chat), "--force", "--threads", "1", "--slots", "2", "--seconds", "2", "--load", "0.3", "--load", "0.6"]
    result = CliRunner().invoke(queueing.main, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^\| 0\.\d+ \| [\d.]+ \| [\d.]+, [\d.]+ \| [\d.]+, [\d.]+ \|$", result.output, re.M)) == 2
    assert re.search(r"^1,000,000 requests a day, 23.1/s at the peak: \d+ machines", result.output, re.M)


def test_too_few_seconds_for_any_request_are_refused(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def closed(url: str, clients: int, seconds: float) -> float:
        return 0.5 * (clients != 2)

    monkeypatch.setattr(queueing, "served", lambda *given: nullcontext("http://127.0.0.1:1"))
    monkeypatch.setattr(queueing, "closed", closed)
    result = CliRunner().invoke(queueing.main, [str(chat), "--force", "--slots", "3", "--seconds", "2"])
    assert result.exit_code == 1
    assert "Error: no request ended in 0.5 s with 2 in flight; give more --seconds than 2" in result.output


def test_processes_share_the_weights_and_add_up(bundle: Bundles) -> None:
    path = bundle(LONG, 1, capacity=4096, precision="int8")
    given = [str(path), "--force", "--layout", "1x1", "--layout", "2x1", "--in-flight", "2", "--rounds", "1"]
    result = CliRunner().invoke(processes.main, [*given, "--seconds", "0.3"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^\| (\d) \| 1 \| (\d) \| (\d+) \| .* \| (\d+) \| (\d+) \|$", result.output, re.M)
    assert [row[:2] for row in rows] == [("1", "2"), ("2", "4")]
    assert all(int(speed) > 0 for _, _, speed, _, _ in rows)
    wrong = CliRunner().invoke(processes.main, [str(path), "--layout", "2"])
    assert wrong.exit_code == 2
    assert "'2' is no layout; give two numbers, as 2x1" in wrong.output
