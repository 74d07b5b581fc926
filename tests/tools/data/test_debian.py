from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from freeexport.system.output import OutputError
from tools.data import debian
from tools.data.debian import EXTRACT_SEPARATORS, Pair, extracted, extractions, split_pairs
from tools.data.debian_index import (
    PackageDescription,
    descriptions,
    fetch_index,
    package_families,
    snapshot,
    sources,
    splits_of,
    stanzas,
    stem,
)
from tools.data.splits import DataError, split_of

TRANSLATION = """\
Package: libfoo2
Description-md5: aaa
Description-en: fast foo library
 Foo is a library that
 does things.
 .
 This package has
  the library.

Package: bar
Description-md5: bbb
Description-en: bar
"""

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
LONG = "Frobnication is the art of turning knobs without any purpose at all."


def test_paragraph_lines_are_joined() -> None:
    found = descriptions(stanzas(TRANSLATION.splitlines(keepends=True)))
    assert found["aaa"] == PackageDescription(
        "libfoo2", "fast foo library", ("Foo is a library that does things.", "This package has the library.")
    )
    assert found["bbb"].paragraphs == ()


@pytest.mark.parametrize("package", ["libfoo2", "libfoo-dev", "foo-doc", "foo", "python3-foo", "libfoo1.2-dev"])
def test_similar_package_names_have_one_stem(package: str) -> None:
    assert stem(package) == "foo"


def test_families_share_source_name_or_a_rare_paragraph() -> None:
    texts = {
        "1": ("libfoo2", ()),
        "2": ("foo-doc", ()),
        "3": ("alpha", (LONG,)),
        "4": ("beta", (LONG.upper(),)),
        "5": ("gamma", ("short text",)),
        "6": ("delta", ("short text",)),
        "7": ("epsilon", ()),
    }
    packages = [{"Package": "x", "Source": "same (1)", "Description-md5": md5} for md5 in "67"]
    english = {md5: PackageDescription(name, "", text) for md5, (name, text) in texts.items()}
    found = package_families(english, sources(english, packages))
    assert found["1"] == found["2"]
    assert found["3"] == found["4"]
    assert found["6"] == found["7"]
    assert len({found[md5] for md5 in "1356"}) == 4


def test_restoration_inputs_are_lowercase_without_punctuation() -> None:
    text = (
        "It is a shell (POSIX), for people who like short names; see dash(1) as well. "
        "this one starts in lower case, so it is left out."
    )
    (pair,) = debian.restorations({"a": PackageDescription("x", "y", (text, text))})
    assert pair.input == "it is a shell posix for people who like short names see dash 1 as well\n=> "
    assert pair.target == "It is a shell (POSIX), for people who like short names; see dash(1) as well."


def test_extraction_values_omit_epoch_revision_architecture_and_versions() -> None:
    assert json.loads(extracted(FOO) or "") == {
        "name": "libfoo2",
        "version": "1.2~rc1",
        "section": "libs",
        "homepage": "https://foo.example",
        "summary": 'fast "foo" library',
        "depends": ["libc6", "perl", "bar-jack", "python3"],
    }


def test_plain_fields_are_one_line_that_t5_can_write() -> None:
    assert extracted(FOO, plain=True) is None, "its version has a tilde"
    assert extracted({**FOO, "Version": "1.2-3"}, plain=True) == (
        'name: libfoo2; version: 1.2; section: libs; homepage: https://foo.example; summary: fast "foo" library; '
        "depends: libc6, perl, bar-jack, python3"
    )


def test_description_is_extracted_once_without_people_and_checksums() -> None:
    (pair,) = extractions([FOO, DOC, FOO], {"aaa": PackageDescription("libfoo2", "", ())})
    assert pair.md5 == "aaa"
    assert pair.input.startswith("Package: libfoo2\nSource: foo (1:1.2~rc1-3)\nVersion: ")
    assert pair.input.endswith(EXTRACT_SEPARATORS["extraction"])
    assert "Team" not in pair.input
    assert "SHA256" not in pair.input


def test_family_is_in_one_split_and_a_large_one_is_not_held_out() -> None:
    pairs = [Pair(str(index), f"text {index}", "x") for index in range(2000)]
    family = {str(index): "large" if index < 100 else f"family {index // 3}" for index in range(2000)}
    source = {md5: [name] for md5, name in family.items()}
    split = splits_of(source, family)
    split |= dict.fromkeys((name for name in family if family[name] == "large"), "test")
    splits = split_pairs(pairs, family, split)
    owner: dict[str, set[str]] = {}
    for name, lines in splits.items():
        for line in lines:
            owner.setdefault(line.keys[0], set()).add(name)
    assert "large" not in owner
    assert all(len(names) == 1 for names in owner.values())
    assert len(splits["test"]) > 10


def test_lines_keep_their_split_with_another_index() -> None:
    """Whichever packages join, leave or link families, a line is in the split of its own source or in none."""
    names = [f"{first}{second}q" for first in "abcdefghijklmnopqrst" for second in "abcdefghijklmnopqrst"]
    whole = {name: PackageDescription(name, "", (f"{LONG} {name[0]}",)) for name in names}

    def split_by(index: dict[str, PackageDescription]) -> dict[str, str]:
        source = sources(index, [{"Package": name, "Description-md5": name} for name in index])
        return splits_of(source, package_families(index, source))

    alone = {name: split_of(f"source {name}") for name in names}
    for kept in (names, names[::2], names[::7], names[3:]):
        found = split_by({name: whole[name] for name in kept})
        assert found
        assert all(alone[name] == split for name, split in found.items())
    assert split_by({"abq": whole["abq"]}) == {"abq": alone["abq"]}


def test_description_of_two_sources_is_in_the_earlier_split() -> None:
    by_split = {split_of(f"source p{number}"): f"p{number}" for number in range(1000)}
    english = {"a": PackageDescription("x", "", ())}
    packages = [{"Package": by_split[name], "Description-md5": "a"} for name in ("test", "calibration")]
    source = sources(english, packages)
    assert splits_of(source, package_families(english, source)) == {"a": "calibration"}


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand for apt: `lists` are what an update leaves, `fails` what another command raises."""
    apt: dict[str, Any] = {"lists": [], "fails": None, "configurations": [], "release": ""}

    def run(command: tuple[str, ...], cwd: Path, env: dict[str, str], **given: Any) -> Any:
        apt["configurations"].append(Path(env["APT_CONFIG"]).read_text())
        for name in apt["lists"]:
            (cwd / "lists" / f"mirror_main_{name}").write_bytes(b"x")
        if apt["release"]:
            (cwd / "lists" / "mirror_InRelease").write_text(apt["release"])
        if apt["fails"] is not None and "update" not in command:
            raise apt["fails"]
        return subprocess.CompletedProcess(command, 0, b"text", b"")

    monkeypatch.setattr(subprocess, "run", run)
    return apt


def test_apt_receives_absolute_directories(
    apt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads a relative one as below its own, and finds no lists there."""
    apt["lists"] = ["binary-amd64_Packages.lz4", "i18n_Translation-en"]
    monkeypatch.chdir(tmp_path)
    fetch_index(Path("index"))
    assert all(f'"{tmp_path}/' in configuration for configuration in apt["configurations"])
    assert all((tmp_path / "index" / name).read_bytes() == b"text\n" for name in ("Packages", "Translation-en"))


def test_snapshot_records_release_date_and_hashes(apt: dict[str, Any], tmp_path: Path) -> None:
    apt["lists"] = ["binary-amd64_Packages.lz4", "i18n_Translation-en"]
    apt["release"] = "Suite: stable\nCodename: name\nDate: Sat, 01 Nov 2025 10:00:00 UTC\nSHA256:\n 00 x\n"
    fetch_index(tmp_path / "index")
    found = snapshot(tmp_path / "index")
    (release,) = found["releases"]
    assert {key: release[key] for key in ("codename", "date")} == {
        "codename": "name",
        "date": "Sat, 01 Nov 2025 10:00:00 UTC",
    }
    assert len(release["sha256"]) == 64
    assert set(found["sha256"]) == {"Packages", "Translation-en"}


def test_tool_reads_a_fetched_index(tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    blocks, packages = [], []
    letters = "abcdefghijklmnopqrst"
    for name in (f"{first}x{second}q" for first in letters for second in letters):
        text = f"The package {name} has no other purpose than to be one of many packages in a test."
        blocks.append(f"Package: {name}\nDescription-md5: {name}\nDescription-en: what {name} is\n {text}\n")
        packages.append(f"Package: {name}\nVersion: 1\nDescription-md5: {name}\n")
    (index / "Translation-en").write_text("\n".join(blocks))
    (index / "Packages").write_text("\n".join(packages))
    arguments = ["restoration", str(tmp_path / "set"), "--index", str(index), "--train", "50"]
    result = CliRunner().invoke(debian.command, arguments)
    assert result.exit_code == 0, result.output
    assert "50 train" in result.output
    about = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert (about["test_version"], set(about["snapshot"]["sha256"])) == (1, {"Packages", "Translation-en"})
    other_order = CliRunner().invoke(debian.command, [*arguments, "--test-version", "2", "--seed", "1"])
    assert "leave out --seed 1" in other_order.output


def test_existing_output_and_incomplete_index_are_refused_before_any_work(tmp_path: Path) -> None:
    index, out = tmp_path / "index", tmp_path / "out"
    index.mkdir()
    result = CliRunner().invoke(debian.command, ["fields", str(out), "--index", str(index)])
    assert isinstance(result.exception, DataError)
    assert "index has no Packages; choose another --index" in str(result.exception)
    out.mkdir()
    (out / "notes").write_text("")
    result = CliRunner().invoke(debian.command, ["fields", str(out), "--index", str(index)])
    assert isinstance(result.exception, OutputError)
