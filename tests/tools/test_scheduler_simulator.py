from __future__ import annotations

import pytest
from click.testing import CliRunner

from runtime.shared_calls import Rules
from tools.scheduler_simulator import main, tokens_per_second


def test_a_request_alone_takes_what_its_calls_take() -> None:
    # Nothing exits: a step and a pass for each token but the first, and both for the prompt.
    assert tokens_per_second(1, 0.0, (1.0, 3.0, 0.1), Rules(), tokens=20) == pytest.approx(1e3 / 4, rel=1e-6)


def test_rows_that_cost_nothing_multiply_the_throughput_and_are_worth_waiting_for() -> None:
    costs = 0.1, 1.0, 0.0
    alone = tokens_per_second(1, 0.8, costs, Rules(), tokens=60)
    assert tokens_per_second(8, 0.8, costs, Rules(1.0, 8, 0.0), tokens=60) > 4 * alone
    patient, hasty = (tokens_per_second(8, 0.8, costs, Rules(r, p, 0.0), tokens=60) for r, p in ((1.0, 8), (0.1, 0)))
    assert patient > 1.1 * hasty


def test_padding_costs_time_where_it_is_computed() -> None:
    costs = 0.3, 1.0, 0.15
    padded, packed = (tokens_per_second(8, 0.8, costs, Rules(0.5, 4, 0.15, flag), tokens=60) for flag in (False, True))
    assert packed > 1.1 * padded


def test_the_table_has_a_line_for_each_rule() -> None:
    few = ["--shallow", "1", "--deep", "3", "--rates", "0.8", "--batches", "2,3", "--ready", "0.5", "--patience", "4,8"]
    result = CliRunner().invoke(main, few)
    assert result.exit_code == 0, result.output
    header, same, other = result.output.splitlines()
    assert header.split()[2:] == ["2", "at", "0.8", "3", "at", "0.8", "mean"]
    assert same.split() == ["0.5", "4", "1.000", "1.000", "1.000"]
    assert other.split()[:2] == ["0.5", "8"]
    assert CliRunner().invoke(main, [*few, "--rates", "many"]).exit_code == 2
