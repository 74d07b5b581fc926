from __future__ import annotations

import json

import pytest

from tools.data.debian import EXTRACT_SEPARATOR, MOST_DEPENDENCIES, extracted, extractions, record
from tools.data.debian_index import descriptions, stanzas

PACKAGES = """\
Package: libfoo2
Source: foo (1:1.2~rc1-3)
Version: 1:1.2~rc1-3+b1
Maintainer: A Team <team@example.org>
Depends: libc6 (>= 2.34), perl:any, bar-jack (= 1:1.2) | bar, python3
Description: fast "foo" library
Homepage: https://foo.example
Description-md5: aaa
Section: libs
SHA256: 00

Package: foo-doc
Version: 3
Description: foo's manual
Description-md5: bbb
"""
FOO, DOC = stanzas(PACKAGES.splitlines())


def test_values_are_the_records_without_epoch_revision_architecture_and_versions() -> None:
    assert json.loads(extracted(FOO) or "") == {
        "name": "libfoo2",
        "version": "1.2~rc1",
        "section": "libs",
        "homepage": "https://foo.example",
        "summary": 'fast "foo" library',
        "depends": ["libc6", "perl", "bar-jack", "python3"],
    }


def test_a_record_shows_no_people_and_no_checksums() -> None:
    assert "Team" not in record(FOO)
    assert "SHA256" not in record(FOO)
    assert record(FOO).startswith("Package: libfoo2\nSource: foo (1:1.2~rc1-3)\nVersion: ")


@pytest.mark.parametrize("depends", ["", ", ".join(f"lib{number}" for number in range(MOST_DEPENDENCIES + 1))])
def test_records_without_or_with_very_many_dependencies_are_left_out(depends: str) -> None:
    assert extracted({**FOO, "Depends": depends}) is None


def test_a_description_is_used_once_and_only_where_its_english_text_is_known() -> None:
    english = descriptions(["Description-md5: aaa", "Description-en: fast foo library", " It is."], "en")
    found = list(extractions((PACKAGES + "\n" + PACKAGES).splitlines(), english))
    assert [pair.md5 for pair in found] == ["aaa"]
    assert found[0].input == record(FOO) + EXTRACT_SEPARATOR
    assert extracted(DOC) is None
