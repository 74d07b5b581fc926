from __future__ import annotations

from pathlib import Path

import pytest

from freeexport.evaluation.energy import Energy


def counter(root: Path, name: str, value: int) -> Path:
    place = root / name
    place.mkdir(exist_ok=True)
    (place / "energy_uj").write_text(f"{value}\n")
    (place / "max_energy_range_uj").write_text("10000000\n")
    return place / "energy_uj"


def test_packages_are_added_parts_of_them_are_not_and_overflow_is_seen(tmp_path: Path) -> None:
    first, second = counter(tmp_path, "intel-rapl:0", 9_000_000), counter(tmp_path, "intel-rapl:1", 0)
    counter(tmp_path, "intel-rapl:0:0", 5)
    energy = Energy(tmp_path)
    assert energy.joules() is not None
    first.write_text("1000000")
    second.write_text("500000")
    assert energy.joules() == pytest.approx(2.5)
    second.write_text("700000")
    assert energy.joules() == pytest.approx(2.7)


def test_a_machine_that_does_not_tell_has_none(tmp_path: Path) -> None:
    assert Energy(tmp_path / "missing").joules() is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert Energy(tmp_path).joules() is None
