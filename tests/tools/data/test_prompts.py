from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from freeexport.checkpoints.examples import read_examples
from tools.data import prompts as tool
from tools.data.debian_index import Description
from tools.data.prompts import _DIGITS, KINDS, Source, nouns, packages, prompts, terms
from tools.data.splits import SHARES, split_of

BODY = "A frobnicator turns the knobs of a machine. " * 8


def digits(value: int) -> str:
    return "".join(_DIGITS[value >> shift & 63] for shift in (12, 6, 0))


def dictd(entries: dict[str, str]) -> tuple[list[str], bytes]:
    """Index and text of a dictionary."""
    index, text = list[str](), b""
    for headword, entry in entries.items():
        index.append(f"{headword}\t{digits(len(text))}\t{digits(len(entry.encode()))}\n")
        text += entry.encode()
    return index, text


def sources(count: int = 3000) -> list[Source]:
    record = "Package: foo\nVersion: 1"
    made = [
        Source(
            origin,
            f"{origin} {number}",
            f"name {number}",
            "group",
            f"{origin} {number}: {BODY}",
            f"Knob {origin} {number} turned.",
            record + str(number),
        )
        for origin in ("package", "foldoc", "wordnet")
        for number in range(count // 3)
    ]
    return [source for source in made if split_of(source.key) == "train"]


def test_terms_are_the_first_paragraphs_without_marks_and_references_are_left_out() -> None:
    entries = {
        "00-database-info": "FOLDOC\n   About this dictionary and what is to be found in it.\n",
        "foo bar": "Foo Bar\n\n   <jargon> A {sample name} for\n   absolutely anything, "
        "see (http://foo.example), used (1996-01-02).\n",
        "baz": "baz\n\n   <jargon> See {foo bar} and all that is said about it there.\n",
    }
    [term] = terms(*dictd(entries))
    assert (term.key, term.name, term.group) == ("term foo bar", "Foo Bar", "subject jargon")
    assert term.sentence == "A sample name for absolutely anything, see, used."


def test_nouns_are_common_and_their_examples_sentences() -> None:
    data = [
        "  1 licence text\n",
        '00015388 05 n 01 animal 0 002 @ 1 n 0000 | a living organism; "they saw the animal at night"; "so"\n',
        "00015389 05 n 01 Rome 0 002 @ 1 n 0000 | a town\n",
        "00015390 05 n 01 okapi 0 002 @ 1 n 0000 | a rare animal\n",
    ]
    counts = ["animal%1:05:00:: 1 9\n", "rome%1:15:00:: 1 9\n", "okapi%1:05:00:: 1 1\n", "animal%3:00:00:: 1 9\n"]
    [noun] = nouns(data, counts)
    assert (noun.name, noun.group, noun.sentence) == ("animal", "class 05", "They saw the animal at night.")


def test_packages_of_one_family_have_one_key() -> None:
    english = {"a": Description("libfoo2", "foo", (BODY,)), "b": Description("foo-doc", "doc", ("Short.",))}
    records = [{"Package": "libfoo2", "Version": "1", "Section": "libs", "Description-md5": "a"}]
    first, second = packages(english, records)
    assert first.key == second.key
    assert first.record == "Package: libfoo2\nVersion: 1\nSection: libs"
    assert first.text == BODY.strip()
    assert second.text == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_as_many_prompts_as_asked_for_each_once_and_whole(kind: str) -> None:
    made = prompts(kind, sources(), 60, 0, set())
    texts = [line.input[0]["content"] for line in made if isinstance(line.input, list)]
    assert len(set(texts)) == 60
    assert not any("{" in text or "}" in text for text in texts)
    assert made == prompts(kind, sources(), 60, 0, set()) != prompts(kind, sources(), 60, 1, set())
    named = {line.keys[0].partition(" ")[0] for line in made}
    assert named == (
        {"foldoc", "wordnet"} if kind in ("explain", "list", "compare") else {"package", "foldoc", "wordnet"}
    )


def test_the_data_set_is_read_as_messages_without_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, out = tmp_path / "index", tmp_path / "out"
    index.mkdir()
    for name in ("Packages", "Translation-en"):
        (index / name).write_text("")
    for name in ("dictd", "wordnet"):
        (tmp_path / "dictionaries/usr/share" / name).mkdir(parents=True)
    (tmp_path / "dictionaries/usr/share/dictd/foldoc.index").write_text("")
    (tmp_path / "dictionaries/usr/share/dictd/foldoc.dict.dz").write_bytes(b"")
    for name in ("data.noun", "cntlist.rev"):
        (tmp_path / "dictionaries/usr/share/wordnet" / name).write_text("")
    everything = [
        Source(
            "foldoc",
            f"term {number}",
            f"name {number}",
            "group",
            f"{number}: {BODY}",
            f"Knob {number} turned.",
            "Package: foo",
        )
        for number in range(1500)
    ]
    monkeypatch.setattr(tool, "terms", lambda *_: everything)
    monkeypatch.setattr(tool.gzip, "decompress", lambda data: data)
    arguments = [str(out), "--index", str(index), "--dictionaries", str(tmp_path / "dictionaries")]
    result = CliRunner().invoke(tool.command, [*arguments, "--train", "80", "--held-out", "16"], catch_exceptions=False)
    assert "80 train, 16 validation, 16 calibration, 16 test" in result.output
    for name in SHARES:
        lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert set(Counter(line["kind"] for line in lines).values()) == {10 if name == "train" else 2}
        assert all("target" not in line for line in lines)
    assert len(read_examples(out / "train.jsonl")) == 80
