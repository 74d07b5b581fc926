from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle.beta import Beta, BetaMixture
from runtime.bundle.calibration import (
    CALIBRATION_MINOR,
    CALIBRATION_VERSION,
    Calibration,
    TableRow,
    check_calibration,
    read_calibration,
)
from runtime.bundle.costs import Costs
from runtime.errors import BundleError, CalibrationError

CALIBRATED = Calibration(
    schema_version=CALIBRATION_VERSION,
    source_sha256="ab" * 32,
    vocab_size=288,
    exit_layer=2,
    confidence="softmax",
    method="bmm",
    threshold=0.83,
    sequences=300,
    positions=9000,
    agreement=0.91,
    target=0.99,
    rollback_threshold=3.0,
    mixture=BetaMixture(Beta(8.0, 0.5), Beta(1.5, 2.5), 0.9),
    table=(TableRow(0.5, 0.8, 0.95, 0.99, 1.8, 1.7), TableRow(1.0, 0.0)),
    costs=Costs(0.002, 0.001, {1: 0.01, 8: 0.02}),
    created_with={"freeexport": "0.1.0"},
)
REMOVED = object()


def written(**changes: Any) -> str:
    content = {**json.loads(CALIBRATED.to_json()), **changes}
    return json.dumps({name: value for name, value in content.items() if value is not REMOVED})


def refusal(text: str) -> str:
    with pytest.raises(BundleError) as refused:
        Calibration.from_json(text)
    message = str(refused.value)
    assert message.startswith("calibration.json")
    assert "\n" not in message
    assert "calibrate again" in message or "upgrade" in message
    return message


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(CALIBRATED.to_json())
    assert read_calibration(path) == CALIBRATED


def test_what_was_not_measured_may_be_left_out() -> None:
    optional = ["target", "risk", "delta", "rollback_threshold", "mixture", "table", "costs", "created_with"]
    read = Calibration.from_json(written(**dict.fromkeys(optional, REMOVED)))
    assert (read.mixture, read.table, read.costs) == (None, (), None)


def test_a_number_that_is_none_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(CALIBRATED, threshold=math.nan).to_json()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema_version", 0),
        ("vocab_size", 0),
        ("exit_layer", 0),
        ("threshold", 1.5),
        ("threshold", math.nan),
        ("sequences", 0),
        ("positions", 0),
        ("agreement", -0.1),
        ("target", 2.0),
        ("target", math.inf),
        ("risk", -0.5),
        ("delta", math.nan),
        ("rollback_threshold", -1.0),
        ("rollback_threshold", math.inf),
        ("costs", {"shallow": math.nan, "shallow_without_head": 1.0, "deep": {"1": 1.0}}),
        ("costs", {"shallow": 1e300, "shallow_without_head": 1.0, "deep": {"1": 1.0}}),
        ("sequences", 10**90),
        ("positions", 10**90),
        ("vocab_size", 1 << 60),
        ("max_pending", 10**9),
        ("rollback_threshold", 1e300),
        ("schema_minor", -1),
        ("mixture", {"agree": {"a": 0.0, "b": 1.0}, "disagree": {"a": 1.0, "b": 1.0}, "weight_agree": 0.5}),
        ("mixture", {"agree": {"a": 1e308, "b": 1.0}, "disagree": {"a": 1.0, "b": 1.0}, "weight_agree": 0.5}),
        ("mixture", {"agree": {"a": 1.0, "b": 1.0}, "disagree": {"a": 1.0, "b": 1.0}, "weight_agree": 1.0}),
        ("table", [{"threshold": 0.5, "exit_rate": 1.5}]),
        ("table", [{"threshold": 0.5, "exit_rate": 0.5, "measured_speedup": -1.0}]),
        ("table", [{"threshold": 0.5, "exit_rate": 0.5, "quality": math.nan}]),
        ("method", "guess"),
        ("confidence", "feeling"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    assert name in refusal(written(**{name: value}))


@pytest.mark.parametrize("name", [field.name for field in fields(Calibration)])
def test_a_field_of_the_wrong_type_is_refused_by_name(name: str) -> None:
    assert name in refusal(written(**{name: [["x"]]}))


def test_missing_and_unknown_fields_are_refused_by_name() -> None:
    assert "lacks threshold" in refusal(written(threshold=REMOVED))
    assert "unknown fields surprise" in refusal(written(surprise=1))
    assert "table[0] has unknown fields speed" in refusal(
        written(table=[{"threshold": 0.5, "exit_rate": 0.5, "speed": 2}])
    )


def test_a_newer_schema_asks_for_an_upgrade() -> None:
    assert "upgrade" in refusal(written(schema_version=CALIBRATION_VERSION + 1, novelty=1))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_what_is_no_calibration_is_refused(text: str) -> None:
    refusal(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"calibration\.json cannot be read \(No such file"):
        read_calibration(tmp_path / "calibration.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CalibrationError, match="not text"):
        read_calibration(tmp_path / "binary")


def test_a_calibration_fits_the_model_it_was_measured_on_alone() -> None:
    model: tuple[Any, ...] = ("ab" * 32, 288, 2, "softmax")
    check_calibration(CALIBRATED, *model)
    others = [
        (0, "ab" * 31 + "cd", "model"),
        (1, 300, "vocabulary 288, not 300"),
        (2, 3, "exit layer 2, not 3"),
        (3, "entropy", "confidence measure 'softmax', not 'entropy'"),
    ]
    for position, other, reason in others:
        changed = list(model)
        changed[position] = other
        with pytest.raises(CalibrationError, match=reason):
            check_calibration(CALIBRATED, *changed)


def test_a_newer_minor_version_is_read_and_another_major_one_refused() -> None:
    assert Calibration.from_json(written(schema_minor=CALIBRATION_MINOR + 1, novelty=1)) == CALIBRATED
    for version in (1, 3):
        with pytest.raises((BundleError, CalibrationError)):
            Calibration.from_json(written(schema_version=version))
