"""Converters of the paper's data sets, on small files in the original formats."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from freeexport.checkpoints.examples import DataError
from tools.paper.__main__ import main
from tools.paper.datasets import convert_data_set

URL = "http://web.archive.org/web/2015id_/http://www.cnn.com/a.html"
STORY = hashlib.sha1(URL.encode()).hexdigest()
TRAIN = "<url>http://x</url>\n<talkid>1</talkid>\n{}\n<transcript>\n{}\n</doc>\n"
TEST = '<?xml version="1.0" encoding="UTF-8"?><mteval><srcset><doc><seg id="1"> {} </seg></doc></srcset></mteval>'


def squad(answers: list[str]) -> str:
    item = {"id": "q", "question": " Who? ", "answers": [{"text": one, "answer_start": 0} for one in answers]}
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "C.", "qas": [item]}]}]})


def written(directory: Path, files: dict[str, str | bytes]) -> list[Path]:
    paths = []
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        paths.append(path)
    return paths


PATENT = json.dumps({"publication_number": "US-1", "abstract": "Short.", "description": "Long."})


@pytest.mark.parametrize(
    ("name", "files", "lines"),
    [
        (
            "samsum",
            {"test.json": json.dumps([{"id": "1", "summary": "They meet.", "dialogue": "A: Hi\r\nB: Hü"}])},
            [{"input": "summarize: A: Hi\nB: Hü", "target": "They meet."}],
        ),
        (
            "cnn-dm",
            {
                f"{STORY}.story": "(CNN) One.\n\nTwo.\n\n@highlight\n\nFirst\n\n@highlight\n\nSecond",
                "other.story": "Three.\n\n@highlight\n\nThird",
                "empty.story": "@highlight\n\nThird",
                "urls_test.txt": f"{URL}\nhttp://other\n",
            },
            [{"input": "summarize: (CNN) One. Two.", "target": "First\nSecond"}],
        ),
        (
            "multi-news",
            {"test.src.cleaned": "One.NEWLINE_CHARTwo. ||||| Three. |||||\n", "test.tgt": "– The news.\n"},
            [{"input": "summarize: One.\nTwo. ||||| Three.", "target": "The news."}],
        ),
        (
            "bigpatent",
            {"train/a/0.gz": gzip.compress(f"{PATENT}\n".encode()), "b.jsonl": f"{PATENT}\n\n"},
            [{"input": "summarize: Long.", "target": "Short."}] * 2,
        ),
        (
            "squad",
            {"dev-v1.1.json": squad(["Ann", "Ann Lee", "Ann"])},
            [{"input": "question: Who? context: C.", "target": "Ann", "references": ["Ann Lee"]}],
        ),
        (
            "iwslt17-de-en",
            {"train.tags.de-en.de": TRAIN.format("Ja.", "< 3 & so"), "train.tags.de-en.en": TRAIN.format("Yes.", "")},
            [{"input": "translate German to English: Ja.", "target": "Yes."}],
        ),
        (
            "iwslt17-de-en",
            {"tst2015.de-en.en.xml": TEST.format("A &amp; B"), "tst2015.de-en.de.xml": TEST.format("Ja")},
            [{"input": "translate German to English: Ja", "target": "A & B"}],
        ),
    ],
)  # fmt: skip
def test_original_files_are_converted_to_lines(
    name: str, files: dict[str, str | bytes], lines: list[dict[str, Any]], tmp_path: Path
) -> None:
    sources = [part for path in written(tmp_path, files) for part in ("--source", str(path))]
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(main, ["data", name, *sources, "--output", str(out)], catch_exceptions=False)
    assert result.output == f"{out}: {len(lines)} lines\n"
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("samsum", {"a.json": "{}"}, "has no array of dialogues"),
        ("samsum", {"a.json": "[{}]"}, "dialogue 1 has no text in 'dialogue'"),
        ("samsum", {"a.json": "["}, "a.json is not JSON"),
        ("samsum", {"a.json": b"\xff"}, "a.json cannot be read"),
        ("samsum", {"a.json": "[]"}, "there are no examples of samsum"),
        ("cnn-dm", {"a.story": "text"}, "has no @highlight"),
        ("cnn-dm", {"a.json": "[]"}, "does not end in .story"),
        ("multi-news", {"a.src": "x\n", "a.tgt": "y\nz\n"}, "a.src has 1 examples and .*a.tgt has 2"),
        ("multi-news", {"a.src": "x\n"}, "are not one pair of files; name SPLIT.src and SPLIT.tgt"),
        ("bigpatent", {"a.gz": b"plain"}, "a.gz cannot be read"),
        ("bigpatent", {"a.jsonl": '{"abstract": "x"}'}, "line 1 has no text in 'description'"),
        ("squad", {"a.json": squad([])}, "question q has no answer; use SQuAD 1.1"),
        ("squad", {"a.json": "[]"}, "has no 'data'"),
        ("iwslt17-de-en", {"a.de": "eins\n", "a.en": "one\ntwo\n"}, "a.de has 1 examples and .*a.en has 2"),
        ("iwslt17-de-en", {"a.de.xml": "<a>", "a.en.xml": TEST.format("x")}, "a.de.xml is not XML"),
        ("iwslt17-de-en", {"a.de.xml": "<!DOCTYPE a [<!ENTITY b 'c'>]><a/>", "a.en.xml": "<a/>"}, "declares entities"),
    ],
)
def test_unrecognized_files_are_refused_and_nothing_is_written(
    name: str, files: dict[str, str | bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        convert_data_set(name, written(tmp_path, files), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json does not exist; name the original files of samsum"):
        convert_data_set("samsum", [tmp_path / "none.json"], tmp_path / "out.jsonl")
