"""Drafts from the outputs of earlier requests, through a session: tokens, users, limits and bad files."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles
from draft_plans import draft_texts

from runtime import OptionError, Session

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, T5 = "llama-tied", "t5-relu-tied"
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}


def memory_drafts(result: Any) -> int:
    return result.stats.drafts["memory"].accepted if "memory" in result.stats.drafts else 0


@pytest.mark.parametrize("name", [LLAMA, T5])
def test_draft_memory_changes_no_token(name: str, bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and in batches, with and without the exit, greedy, sampled and in mode rollback."""
    draft_texts(monkeypatch)
    ways: list[dict[str, Any]] = [
        {"mode": "lossless", "drafts": "lookup"},
        {"mode": "lossless", "drafts": "auto"},
        {"mode": "lossless", "drafts": "lookup", "temperature": 0.3, "seed": 5},
        {"mode": "rollback", "threshold": 0.1, "rollback_threshold": 3.0},
    ]
    asked = [(prompt, way) for prompt in PROMPTS[:1] for way in ways]
    results = []
    for megabytes in (0, 8):
        with (
            Session(bundle(BY_NAME[name], 2), threads=1, slots=4, draft_memory_mb=megabytes) as session,
            ThreadPoolExecutor(4) as pool,
        ):
            alone = [session.generate(prompt, **OPTIONS, **way) for prompt, way in asked]
            together = [*pool.map(lambda ask: session.generate(ask[0], **OPTIONS, **ask[1]), asked)]
            results.append([result.token_ids for result in (*alone, *together)])
            drafted = sum(map(memory_drafts, (*alone, *together)))
            assert (drafted > 0) == (megabytes > 0)
    assert results[0] == results[1]


def test_outputs_of_one_salt_are_never_drafted_for_another(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_texts(monkeypatch)
    with Session(bundle(BY_NAME[LLAMA], 2), threads=1, slots=1) as session:

        def drafted(salt: str | None) -> int:
            result = session.generate(PROMPTS[0], mode="lossless", drafts="lookup", cache_salt=salt, **OPTIONS)
            return memory_drafts(result)

        assert [drafted("a"), drafted("b"), drafted(None)] == [0, 0, 0]
        assert min(drafted("a"), drafted("b"), drafted(None)) > 0
        session.forget_drafts()
        assert drafted("a") == 0


def test_corpus_is_drafted_in_the_first_request(
    bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_texts(monkeypatch)
    path, file = bundle(BY_NAME[LLAMA], 2), tmp_path / "texts.jsonl"
    with Session(path, threads=1, slots=1) as session:
        wanted = session.generate(PROMPTS[0], mode="full", **OPTIONS)
    lines = ["another text", {"input": "x", "target": wanted.text}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    with Session(path, threads=1, slots=1, draft_corpus=file) as session:
        assert session._state.corpus is not None
        ours = session.generate(PROMPTS[0], mode="lossless", drafts="lookup", **OPTIONS)
    assert ours.token_ids == wanted.token_ids
    assert ours.stats.drafts["phrases"].accepted > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"draft_corpus is '.* which cannot be read \(No such file or directory\); give a text file"),
        (b"\xff\xfe\x00text", r"draft_corpus is '.* which is not text in UTF-8; give"),
        (b"a\x00b", r"draft_corpus is '.* which is not text in UTF-8; give"),
        (b'"good"\n{"input": 3}\n', r"draft_corpus is '.* line 2, which is '.*'; give a JSON string"),
        (b'"\\ud800"\n', r"draft_corpus is '.* line 1, which is '.*'; give a JSON string"),
        (b"x" * 1_000_001, r"draft_corpus is '.* which has 1,000,001 bytes, more than draft_memory_mb"),
        (
            bytes(random.Random(0).choices(range(ord("a"), ord("z") + 1), k=120_000)),
            r"draft_corpus is '.* whose phrases take [\d,]+ bytes, more than draft_memory_mb allows, 1,000,000;",
        ),
    ],
)
def test_invalid_corpus_is_refused_in_one_line(
    content: bytes | None, message: str, bundle: Bundles, tmp_path: Path
) -> None:
    file = tmp_path / ("texts.jsonl" if content and content.startswith(b'"') else "texts.txt")
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(OptionError, match=message) as refused:
        Session(bundle(BY_NAME[LLAMA], 2), threads=1, slots=1, draft_corpus=file, draft_memory_mb=1)
    assert "\n" not in str(refused.value)
