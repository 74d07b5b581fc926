from __future__ import annotations

import pytest

from freeexport.system.page import filled, human_bytes, pairs, print_page, table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1234, "1.23 kB"),
        (999_600, "1 MB"),
        (45_600_000, "45.6 MB"),
        (3 * 10**12, "3 TB"),
    ],
)
def test_bytes_are_formatted_with_units(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_square_brackets_and_long_values_are_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    value = "freeexport[cpu] " + "x" * 100
    print_page([pairs("[bold]title", [("name", value)])])
    printed = capsys.readouterr().out
    assert "[bold]title" in printed
    assert value in printed


def test_empty_tables_and_columns_are_omitted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", "", "1 %", ""), ("b", "", "", "")]
    print_page([table("Copies", ("tensor", "size#"), []), table("Rows", ("name", "quality#", "exits#", ""), rows)])
    printed = capsys.readouterr().out
    assert "Copies" not in printed
    assert printed.splitlines()[1].split() == ["name", "exits"]
    assert filled(("name", "size"), []) == (["name", "size"], [])
