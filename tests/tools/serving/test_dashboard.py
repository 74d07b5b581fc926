"""The panels of the dashboard: what they ask, what is refused, and the picture; with a real Prometheus, if at hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.image import imread

from tools.serving.dashboard import DOCS, evaluate, main
from tools.serving.panels import (
    DashboardError,
    Panel,
    Series,
    Target,
    all_of,
    draw,
    rate_interval,
    read_panels,
    read_variables,
    series_of,
    with_values,
)

DASHBOARD = DOCS / "grafana.json"
TARGET = Target("A", "rate(x[$__rate_interval])", "{{model_name}} {{ reason }}")


def answer(*values: tuple[dict[str, str], list[Any]]) -> dict[str, Any]:
    """As Prometheus writes it: a number is text."""
    results = [{"metric": metric, "values": [[1000 + 2 * n, v] for n, v in enumerate(v)]} for metric, v in values]
    return {"status": "success", "data": {"resultType": "matrix", "result": results}}


def test_the_dashboard_is_read_and_every_variable_has_a_value() -> None:
    panels = read_panels(DASHBOARD)
    assert len(panels) == 15
    assert panels[0].place == (0, 0, 8, 8)
    variables = list(read_variables(DASHBOARD))
    assert variables == [("model", "freeexport_num_requests_running", "model_name")]
    values = {"model": "m", "__rate_interval": "4s"}
    for target in (target for panel in panels for target in panel.targets):
        assert "$" not in with_values(target.expression, values)
    with pytest.raises(DashboardError, match=r"nothing is known of the variable \$other"):
        with_values("x{a=~'$other'}", values)


def test_variables_are_replaced_as_grafana_does() -> None:
    assert all_of(["one"]) == "one"
    assert all_of(["llama-3.2", "b"]) == r"(llama-3\\.2|b)"
    assert (rate_interval(1, 0.9), rate_interval(1, 30), rate_interval(0.6, 1)) == ("4000ms", "31000ms", "2400ms")


def test_series_have_names_of_their_labels_and_gaps() -> None:
    found = series_of(TARGET, answer(({"model_name": "m", "reason": "eos"}, ["1", "NaN", "2.5"]), ({}, ["0"])))
    assert [series.label for series in found] == ["m eos", "{}"]
    assert found[0].times == (1000, 1002, 1004)
    assert found[0].values[::2] == (1, 2.5)
    assert math.isnan(found[0].values[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"status": "error", "errorType": "bad_data", "error": "parse error"}, "bad_data: parse error"),
        (answer(), "no series"),
        (answer(({}, ["NaN", "NaN"]), ({}, ["+Inf"])), "2 series, but no number in them"),
    ],
)
def test_an_expression_that_gives_nothing_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DashboardError, match=message):
        series_of(TARGET, given)


def test_every_expression_that_gives_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, **given: Any) -> None: ...
        def __enter__(self) -> Client:
            return self

        def __exit__(self, *given: object) -> None: ...
        def get(self, path: str, params: dict[str, Any]) -> Any:
            assert (path, params["start"], params["step"]) == ("/api/v1/query_range", 1, 2)
            asked.append(params["query"])
            told = answer() if "gone" in params["query"] else answer(({"model_name": "m"}, ["1"]))
            return type("Answer", (), {"json": lambda self: told})()

    asked: list[str] = []
    monkeypatch.setattr("httpx.Client", Client)
    good = Panel("Good", (0, 0, 8, 8), "s", (TARGET,))
    bad = Panel("Bad", (8, 0, 8, 8), "s", (TARGET, Target("B", "gone_1", ""), Target("C", "gone_2", "")))
    times = {"start": 1, "end": 9, "step": 2}
    found = evaluate([good], "http://x", {"__rate_interval": "4s"}, times)
    assert found == {"Good": [Series("m", (1000.0,), (1.0,))]}
    with pytest.raises(DashboardError) as raised:
        evaluate([good, bad], "http://x", {"__rate_interval": "4s"}, times)
    assert str(raised.value).splitlines() == [
        "panel 'Bad', B: no series; gone_1",
        "panel 'Bad', C: no series; gone_2",
    ]
    assert asked[0] == "rate(x[4s])"


def test_all_panels_are_drawn_into_a_small_file(tmp_path: Path) -> None:
    panels, path = read_panels(DASHBOARD), tmp_path / "drawn.png"
    times = tuple(float(second) for second in range(100))
    waves = [Series(f"series {n}", times, tuple(1 + math.sin(t / 9 + n) for t in times)) for n in range(3)]
    draw(panels, {panel.title: waves for panel in panels}, path)
    assert path.stat().st_size < 150_000
    drawn = imread(path)
    height, width = drawn.shape[:2]
    assert height > width > 1000
    # Something in each of the 3 x 5 places.
    for row in range(5):
        for column in range(3):
            place = drawn[row * height // 5 : (row + 1) * height // 5, column * width // 3 : (column + 1) * width // 3]
            assert place[..., :3].std() > 0.02, (row, column)


@pytest.mark.parametrize(("field", "value"), [("type", "gauge"), ("title", "Threshold")])
def test_a_panel_that_cannot_be_drawn_is_refused(field: str, value: str, tmp_path: Path) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    dashboard["panels"][0][field] = value
    path = tmp_path / "dashboard.json"
    path.write_text(json.dumps(dashboard))
    with pytest.raises(DashboardError, match="is a gauge" if field == "type" else "two panels have one title"):
        read_panels(path)


def test_without_prometheus_it_says_so_in_a_line() -> None:
    result = CliRunner().invoke(main, ["--prometheus", "/nowhere/prometheus"])
    assert result.exit_code == 1
    assert result.output == (
        "Error: /nowhere/prometheus is not there; give --prometheus the path of Prometheus's program\n"
    )


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on PATH")
def test_a_real_prometheus_answers_every_expression(chat: Path, tmp_path: Path) -> None:
    path = tmp_path / "drawn.png"
    result = CliRunner().invoke(main, [str(chat), "--seconds", "16", "--scrape", "0.5", "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert "26 expressions gave" in result.output
    assert path.stat().st_size > 10_000
