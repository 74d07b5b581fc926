from __future__ import annotations

import pytest

from tools.data.foldoc import definition, entries, examples, number

ENTRY = """\
C compiler
cc

   <language> A {program} that translates {C
   (http://example.org/c)} ,  see __below__.  (2014-11-04)

   A second paragraph.

"""


@pytest.mark.parametrize(
    ("text", "value"), [("A", 0), ("B", 1), ("/", 63), ("BA", 64), ("GcFN", 6 * 64**3 + 28 * 64**2 + 5 * 64 + 13)]
)
def test_numbers_are_digits_to_the_base_64(text: str, value: int) -> None:
    assert number(text) == value


def test_entries_are_cut_out_of_the_dictionary() -> None:
    index = ["00-database-info\tA\tC\n", "cc\tC\tD\n", "x\tF\tB\n"]
    assert list(entries(index, "..é1ab".encode())) == [("cc", "é1"), ("x", "a")]


def test_a_definition_is_the_first_paragraph_without_marks() -> None:
    assert definition(ENTRY) == "<language> A program that translates C, see below."


def test_an_entry_without_a_paragraph_is_empty() -> None:
    assert definition("word\nother\n") == ""


def test_headwords_stand_once_and_references_to_others_are_left_out() -> None:
    found = [
        ("cc", ENTRY),
        ("CC", ENTRY),
        ("c compiler", ENTRY),
        ("see", "see\n\n   See {compiler} and {linker} as well.\n"),
        ("short", "short\n\n   Not long.\n"),
    ]
    made = list(examples(found))
    assert [example.input for example in made] == ["define: cc", "define: c compiler"]
    assert made[0].keys[0] == made[1].keys[0]
