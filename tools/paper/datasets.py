"""Converts the original files of the paper's data sets to JSON lines with 'input' and 'target'.

Nothing is downloaded. Inputs begin with the task prefixes of T5. Which files are read:

- samsum: `train.json`, `val.json` or `test.json`, arrays of dialogues.
- cnn-dm: `.story` files or directories of them, and optionally a list of URLs (`.txt`) that selects
  a split: a story is named after the SHA-1 of its URL.
- multi-news: a pair `SPLIT.src` (or `.src.cleaned`) and `SPLIT.tgt`, one example per line.
- bigpatent: files of JSON lines, also compressed (`.gz`), or directories of them.
- squad: `train-v1.1.json` or `dev-v1.1.json`.
- iwslt17-de-en: a pair of `train.tags.de-en.de` and `.en`, or of `.de.xml` and `.en.xml`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from freeexport.checkpoints.examples import DataError
from freeexport.system.output import write_whole
from runtime.bundle.json_file import UnreadableError, parse_json
from runtime.errors import one_line

SUMMARIZE = "summarize: "
QUESTION = "question: "
TRANSLATE = "translate German to English: "
HIGHLIGHT = "@highlight"
# Marks of Multi-News: the end of a document, and of a line in it.
DOCUMENT_END = "|||||"
LINE_END = "NEWLINE_CHAR"
# Lines of IWSLT training files that are no sentences, such as <url> and <talkid>.
_TAG = re.compile(
    r"</?(url|keywords|speaker|talkid|title|description|transcript|reviewer|translator|doc)\b"
)
_DOCTYPE = re.compile(r"<!(DOCTYPE|ENTITY)", re.IGNORECASE)

Line = dict[str, Any]


def convert_data_set(name: str, sources: Sequence[Path], output: Path) -> int:
    """Convert the original files of a data set to JSON lines, and return their number."""
    for path in sources:
        if not path.exists():
            raise DataError(f"{path} does not exist; name the original files of {name}")
    lines = list(DATA_SETS[name](sources))
    if not lines:
        raise DataError(f"{', '.join(map(str, sources))}: there are no examples of {name}")
    write_whole(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return len(lines)


def samsum(sources: Sequence[Path]) -> Iterator[Line]:
    """Yield the dialogues of SAMSum."""
    for path in sources:
        content = _json(path)
        for number, one in enumerate(_list(content, path, "array of dialogues"), 1):
            where = f"{path}, dialogue {number}"
            dialogue = _text(one, "dialogue", where)
            yield {
                "input": SUMMARIZE + dialogue.replace("\r\n", "\n"),
                "target": _text(one, "summary", where),
            }


def cnn_dm(sources: Sequence[Path]) -> Iterator[Line]:
    """Yield the stories of CNN/Daily Mail. Stories without an article are left out."""
    lists = [path for path in sources if path.suffix == ".txt"]
    chosen = {
        hashlib.sha1(url.strip().encode(), usedforsecurity=False).hexdigest()
        for path in lists
        for url in _read(path).splitlines()
    }
    stories = [path for path in sources if path not in lists]
    for path in _files(stories, ".story"):
        if lists and path.stem not in chosen:
            continue
        article, *highlights = _read(path).split(HIGHLIGHT)
        if not highlights:
            raise DataError(f"{path} has no {HIGHLIGHT}, so it is no story of CNN/Daily Mail")
        body = " ".join(article.split())
        if body:
            target = "\n".join(" ".join(highlight.split()) for highlight in highlights)
            yield {"input": SUMMARIZE + body, "target": target}


def multi_news(sources: Sequence[Path]) -> Iterator[Line]:
    """Yield the clusters of Multi-News. Their documents keep the mark between them."""
    source, target = _pair(sources, lambda path: ".src" in path.name, "SPLIT.src and SPLIT.tgt")
    files = [_read(path).removesuffix("\n").split("\n") for path in (source, target)]
    for documents, summary in _parallel(source, target, *files):
        text = documents.replace(LINE_END, "\n").strip().removesuffix(DOCUMENT_END).strip()
        if text:
            yield {"input": SUMMARIZE + text, "target": summary.strip().removeprefix("–").strip()}


def bigpatent(sources: Sequence[Path]) -> Iterator[Line]:
    """Yield the patents of BIGPATENT: descriptions, with abstracts as targets."""
    for path in _files(sources, ".gz", ".json", ".jsonl"):
        for number, text in enumerate(_read(path).splitlines(), 1):
            where = f"{path}, line {number}"
            if text.strip():
                one = _parsed(text, where)
                yield {
                    "input": SUMMARIZE + _text(one, "description", where),
                    "target": _text(one, "abstract", where),
                }


def squad(sources: Sequence[Path]) -> Iterator[Line]:
    """Yield the questions of SQuAD 1.1, with all answers as references."""
    for path in sources:
        content = _json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path} has no 'data', so it is no file of SQuAD")
        for article in _list(content.get("data"), path, "'data', an array of articles"):
            for paragraph in _list(_field(article, "paragraphs"), path, "'paragraphs'"):
                context = _text(paragraph, "context", str(path))
                for question in _list(_field(paragraph, "qas"), path, "'qas'"):
                    where = f"{path}, question {str(_field(question, 'id'))[:40]}"
                    found = _list(_field(question, "answers"), path, "'answers'")
                    answers = list(dict.fromkeys(_text(one, "text", where) for one in found))
                    if not answers:
                        raise DataError(f"{where} has no answer; use SQuAD 1.1, not 2.0")
                    line = {
                        "input": f"{QUESTION}{_text(question, 'question', where).strip()} "
                        f"context: {context.strip()}",
                        "target": answers[0],
                    }
                    yield line | ({"references": answers[1:]} if answers[1:] else {})


def iwslt17_de_en(sources: Sequence[Path]) -> Iterator[Line]:
    """Yield the sentences of IWSLT 2017, German to English."""
    german = re.compile(r"\.de(\.xml)?$")
    pair = "train.tags.de-en.de and train.tags.de-en.en, or files .de.xml and .en.xml"
    source, target = _pair(sources, lambda path: german.search(path.name) is not None, pair)
    for one, other in _parallel(source, target, _sentences(source), _sentences(target)):
        if one and other:
            yield {"input": TRANSLATE + one, "target": other}


DATA_SETS: dict[str, Callable[[Sequence[Path]], Iterable[Line]]] = {
    "samsum": samsum,
    "cnn-dm": cnn_dm,
    "multi-news": multi_news,
    "bigpatent": bigpatent,
    "squad": squad,
    "iwslt17-de-en": iwslt17_de_en,
}


def _sentences(path: Path) -> list[str]:
    """Return the sentences of a file of IWSLT. Empty ones keep their places."""
    text = _read(path)
    if path.suffix != ".xml":
        return [" ".join(line.split()) for line in text.splitlines() if not _TAG.match(line)]
    if _DOCTYPE.search(text):
        raise DataError(f"{path} declares entities, which files of IWSLT do not")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is not XML ({one_line(error)})") from None
    return [" ".join("".join(segment.itertext()).split()) for segment in root.iter("seg")]


def _pair(
    sources: Sequence[Path], is_source: Callable[[Path], bool], wanted: str
) -> tuple[Path, Path]:
    first = [path for path in sources if is_source(path)]
    others = [path for path in sources if not is_source(path)]
    if len(first) != 1 or len(others) != 1:
        given = ", ".join(path.name for path in sources)
        raise DataError(f"{given} are not one pair of files; name {wanted}")
    return first[0], others[0]


def _parallel(
    source: Path, target: Path, lines: Sequence[str], others: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Pair the lines of two files."""
    if len(lines) != len(others):
        raise DataError(
            f"{source} has {len(lines)} examples and {target} has {len(others)}; name the two "
            "files of one split"
        )
    return zip(lines, others, strict=True)


def _files(sources: Sequence[Path], *suffixes: str) -> list[Path]:
    """Return the files with these endings, with those in directories, in order."""
    found = []
    for path in sources:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix in suffixes)
        elif path.suffix in suffixes:
            found.append(path)
        else:
            raise DataError(f"{path} does not end in {' or '.join(suffixes)}; name such files")
    return found


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)})") from None


def _json(path: Path) -> Any:
    return _parsed(_read(path), str(path))


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except (UnreadableError, ValueError) as error:
        raise DataError(f"{where} is not JSON ({one_line(error)})") from None


def _list(value: Any, path: Path, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{path} has no {what}; name an original file")
    return value


def _field(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, dict) else None


def _text(record: Any, name: str, where: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        raise DataError(f"{where} has no text in {name!r}; name an original file")
    return value
