from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.data import apt, debian
from tools.data.debian import Pair, split_pairs, summaries, translations
from tools.data.debian_index import Description, components, descriptions, families, sources, stem
from tools.data.splits import DataError

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
Source: foo (1.2)
Description: fast foo library
Description-md5: aaa

Package: bar
Description-md5: bbb
"""


def test_paragraphs_are_joined_lines() -> None:
    found = descriptions(TRANSLATION.splitlines(keepends=True), "en")
    assert found["aaa"] == Description(
        "libfoo2", "fast foo library", ("Foo is a library that does things.", "This package has the library.")
    )
    assert found["bbb"].paragraphs == ()


def test_a_package_without_a_source_is_its_own() -> None:
    assert sources(PACKAGES.splitlines()) == {"aaa": "foo", "bbb": "bar"}


@pytest.mark.parametrize(
    "package", ["libfoo2", "libfoo-dev", "foo-doc", "libfoo2-dbg", "foo", "python3-foo", "libfoo1.2-dev", "foo-data"]
)
def test_packages_named_alike_have_one_stem(package: str) -> None:
    assert stem(package) == "foo"


def test_items_are_joined_through_others() -> None:
    found = components({"a": ["1"], "b": ["1", "2"], "c": ["2", "3"], "d": ["4"]})
    assert found["a"] == found["b"] == found["c"] != found["d"]


LONG = "Frobnication is the art of turning knobs without any purpose at all."


def test_families_share_source_name_or_a_rare_paragraph() -> None:
    english = {
        "1": Description("libfoo2", "", ()),
        "2": Description("foo-doc", "", ()),
        "3": Description("alpha", "", (LONG,)),
        "4": Description("beta", "", (LONG.upper(),)),
        "5": Description("gamma", "", ("short text",)),
        "6": Description("delta", "", ("short text",)),
        "7": Description("epsilon", "", ()),
    }
    found = families(english, {"6": "same", "7": "same"})
    assert found["1"] == found["2"]
    assert found["3"] == found["4"]
    assert found["6"] == found["7"]
    assert len({found[md5] for md5 in "1356"}) == 4 - (found["5"] == found["6"])
    assert found["5"] != found["6"]


def test_boilerplate_makes_no_family() -> None:
    english = {name: Description(name, "", (LONG,)) for name in ("one", "two", "six", "ten", "cat", "dog")}
    assert len(set(families(english, {}).values())) == 6


def test_a_summary_needs_a_long_text_and_stands_once() -> None:
    body = " ".join(["word"] * 20)
    english = {
        "1": Description("a", "a synopsis here", (body,)),
        "2": Description("b", "another synopsis here", (body.upper(),)),
        "3": Description("c", "a synopsis here", ("too short",)),
        "4": Description("d", "short", (body + " more",)),
    }
    assert list(summaries(english)) == [Pair("1", f"summarize: {body}", "a synopsis here")]


def test_translations_pair_synopses_and_paragraphs() -> None:
    english = {
        "1": Description("a", "a tool", ("one two three four", "x")),
        "2": Description("b", "a tool", ("one two three four",)),
        "3": Description("c", "untouched", ("only here is one paragraph", "two")),
    }
    german = {
        "1": Description("a", "ein Werkzeug", ("eins zwei drei vier", "x")),
        "2": Description("b", "ein Tool", ("anders",)),
        "3": Description("c", "untouched", ("nur einer ist hier",)),
        "9": Description("gone", "weg", ()),
    }
    prefix = "translate English to German: "
    assert list(translations(english, german, "de")) == [
        Pair("1", prefix + "a tool", "ein Werkzeug"),
        Pair("1", prefix + "one two three four", "eins zwei drei vier"),
    ]


def test_a_family_is_in_one_split_and_a_large_one_in_train() -> None:
    pairs = [Pair(str(index), f"text {index}", "x") for index in range(1000)]
    family = {str(index): "large" if index < 100 else f"family {index // 3}" for index in range(1000)}
    splits = split_pairs(pairs, family)
    owner: dict[str, set[str]] = {}
    for name, lines in splits.items():
        for line in lines:
            owner.setdefault(line.keys[0], set()).add(name)
    assert owner["large"] == {"train"}
    assert all(len(names) == 1 for names in owner.values())
    assert len(splits["test"]) > 10


def test_the_private_configuration_leaves_out_the_machines_languages(tmp_path: Path) -> None:
    system = tmp_path / "system"
    system.mkdir()
    (system / "languages").write_text('Acquire::Languages "none";')
    (system / "proxy").write_text('Acquire::http::Proxy "http://proxy";')
    path = apt.private_configuration(tmp_path / "own", ["en", "de"], system)
    assert {part.name for part in (tmp_path / "own/parts").iterdir()} == {"proxy", "zz-languages"}
    assert (tmp_path / "own/parts/zz-languages").read_text() == 'Acquire::Languages {"en"; "de";};\n'
    assert f'Dir::State::lists "{tmp_path}/own/lists/";' in path.read_text()
    assert "/etc" not in path.read_text()


def test_apt_is_told_absolute_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads a relative one as below its own, and finds no lists there."""
    seen = []

    def lists(command: list[str], directory: Path, environment: dict[str, str]) -> bytes:
        configuration = Path(environment["APT_CONFIG"])
        seen.append(configuration.is_absolute() and f'"{tmp_path}/' in configuration.read_text())
        for name in ("main_binary-amd64_Packages", "main_i18n_Translation-en"):
            (directory / "lists" / f"mirror_{name}").write_bytes(b"x")
        return b"text"

    monkeypatch.setattr(apt, "_command", lists)
    monkeypatch.chdir(tmp_path)
    apt.fetch_index(Path("index"), ["en"])
    assert seen
    assert all(seen)
    assert (tmp_path / "index/Packages").read_bytes() == b"text\n"


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "_command", _fail)
    with pytest.raises(DataError, match="offline"):
        apt.fetch_index(tmp_path / "index", ["en"])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some(command: list[str], directory: Path, environment: dict[str, str]) -> bytes:
        if "update" not in command:
            raise KeyboardInterrupt
        (directory / "lists/mirror_main_binary-amd64_Packages.lz4").write_bytes(b"x")
        return b""

    monkeypatch.setattr(apt, "_command", some)
    with pytest.raises(KeyboardInterrupt):
        apt.fetch_index(tmp_path / "index", ["en"])
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_without_translations_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "_command", lambda *arguments: b"")
    with pytest.raises(DataError, match="no Packages"):
        apt.fetch_index(tmp_path / "index", ["en"])


def _fail(command: list[str], directory: Path, environment: dict[str, str]) -> bytes:
    raise DataError("offline")


def test_the_tool_reads_a_fetched_index(tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    blocks, packages = [], []
    letters = "abcdefghijklmnopqrst"
    for first in letters:
        for second in letters:
            name = f"{first}x{second}q"
            text = " ".join([f"{name}{letter}" for letter in letters])
            blocks.append(f"Package: {name}\nDescription-md5: {name}\nDescription-en: what {name} is\n {text}\n")
            packages.append(f"Package: {name}\nDescription-md5: {name}\n")
    (index / "Translation-en").write_text("\n".join(blocks))
    (index / "Packages").write_text("\n".join(packages))
    out = tmp_path / "set"
    result = CliRunner().invoke(debian.command, ["summarization", str(out), "--index", str(index), "--train", "50"])
    assert result.exit_code == 0, result.output
    assert "50 train" in result.output
    shutil.rmtree(out)


def test_sentences_are_restored_from_lower_case_without_punctuation() -> None:
    text = (
        "It is a shell (POSIX), for people who like short names; see dash(1) as well. "
        "this one starts in lower case, so it is left out."
    )
    (pair,) = debian.restorations({"a": Description("x", "y", (text, text))})
    assert pair.input == "it is a shell posix for people who like short names see dash 1 as well\n=> "
    assert pair.target == "It is a shell (POSIX), for people who like short names; see dash(1) as well."
