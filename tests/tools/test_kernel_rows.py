"""Costs of rows of the kernels: a small run, with a second library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from runtime.engines.kernels import LIBRARY, missing
from tools import kernel_rows

pytestmark = pytest.mark.skipif(missing() is not None, reason="the kernels are not built")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rows, "LAYERS", 1)
    monkeypatch.setattr(kernel_rows, "LAYER", ((48, 64, 0, True), (32, 64, 2, True)))
    monkeypatch.setattr(kernel_rows, "HEAD", ((80, 64, 0, True),))


def test_two_libraries_are_timed_alternately(tmp_path: Path) -> None:
    saved = tmp_path / "rows.json"
    arguments = ["--against", str(LIBRARY), "--rounds", "1", "--rows", "3", "--save", str(saved)]
    result = CliRunner().invoke(kernel_rows.main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(saved.read_text())["rows"]
    assert [(row["part"], row["library"]) for row in rows] == [
        (part, library) for part in ("int4 layers", "int8 layers", "int8 head") for library in ("this", "other")
    ]
    assert all(list(row["milliseconds"]) == ["1", "2", "3"] for row in rows)
    assert "GB/s" in result.output


def test_threads_divide_the_outputs_of_a_product() -> None:
    product = kernel_rows.PackedProduct(weight=kernel_rows.PackedWeight(80, 64, 4, 32, 1000, 2000))
    first, second = (kernel_rows.share(product, thread, 2).weight for thread in range(2))
    assert (first.outputs, first.data, first.scales) == (32, 1000, 2000)
    # Two panels of 16 outputs: 64 inputs in 4 bits, and two blocks with a scale of 2 bytes.
    assert (second.outputs, second.data, second.scales) == (48, 1000 + 32 * 32, 2000 + 32 * 4)
    result = CliRunner().invoke(
        kernel_rows.main, ["--rounds", "1", "--rows", "2", "--threads", "2", "--activations", "int16"]
    )
    assert result.exit_code == 0, result.output
    assert "int8 head, activations in int16, this" in result.output


def test_libraries_with_different_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied = kernel_rows.multiply

    def differs(call: object, *rest: object) -> float:
        seconds = multiplied(call, *rest)  # type: ignore[arg-type]
        rest[-1][0, 0] += call is calls[1]  # type: ignore[index]
        return seconds

    calls = [kernel_rows.load(LIBRARY), kernel_rows.load(LIBRARY)]
    monkeypatch.setattr(kernel_rows, "load", lambda path: calls[path == Path("other.so")])
    monkeypatch.setattr(kernel_rows, "multiply", differs)
    result = CliRunner().invoke(kernel_rows.main, ["--against", "other.so", "--rounds", "1"])
    assert "results of 1 rows differ" in str(result.exception or result.output)
