"""Embeddings of sessions against torch, and /v1/embeddings with the official client."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from checkpoints import BY_NAME, Bundles, Case
from running_server import Running, running

from freeexport.serving.embeddings import Embedder
from freeexport.serving.errors import ApiError
from runtime import OptionError, PromptError, PromptLengthError, QueueFullError, Session

TEXTS = ["once", "a much longer text about nothing", "once upon"]


@pytest.fixture(scope="module")
def server(chat: Path, t5: Path) -> Iterator[Running]:
    with running(chat, t5, names=("chat", "t5"), deadline=60.0) as server:
        yield server


@pytest.fixture(scope="module")
def embedding(t5: Path) -> Iterator[Session]:
    with Session(t5, threads=1) as session:
        yield session


@pytest.mark.parametrize("name", ["t5-relu-tied", "bart"])
def test_embedding_is_the_mean_of_the_hidden_states_in_transformers(
    name: str, bundle: Bundles, source_model: Callable[[Case], Any]
) -> None:
    import torch

    case = BY_NAME[name]
    encoder = source_model(case).get_encoder()
    with Session(bundle(case, 1), threads=1) as session:
        found = session.embed(TEXTS)
        prompts = [session.encode(text) for text in TEXTS]
        assert len({len(ids) for ids in prompts}) == 3
        longest = max(map(len, prompts))
        ids = torch.zeros((3, longest), dtype=torch.long)
        mask = torch.zeros((3, longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.from_numpy(prompt)
            mask[row, : len(prompt)] = 1
        with torch.no_grad():
            states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        wanted = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)
        assert found.dtype == np.float32
        for text, row in zip(TEXTS, found, strict=True):
            assert (session.embed(text)[0] == row).all()
        assert (session.embed(prompts) == found).all()
        unit = session.embed(TEXTS, normalize=True)
        np.testing.assert_allclose(unit, found / np.linalg.norm(found, axis=1, keepdims=True), rtol=1e-5)


def test_models_without_embeddings_are_refused_in_one_line(session: Session, embedding: Session) -> None:
    with pytest.raises(OptionError, match=r"^the bundle is decoder-only; embeddings need an encoder of text[^\n]*$"):
        session.embed(["a"])
    for prompt, error in (("", PromptError), ([999_999], PromptError), ([5] * 129, PromptLengthError)):
        with pytest.raises(error, match=r"^[^\n]*$"):
            embedding.embed(["a", prompt])  # type: ignore[list-item]


def test_official_client_receives_unit_vectors(client: openai.OpenAI, embedding: Session) -> None:
    wanted = embedding.embed(TEXTS, normalize=True)
    ids = [embedding.encode(text).tolist() for text in TEXTS]
    inputs: list[tuple[Any, np.ndarray]] = [
        (TEXTS, wanted),
        (ids, wanted),
        (TEXTS[0], wanted[:1]),
        (ids[0], wanted[:1]),
    ]
    forms: list[dict[str, Any]] = [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}]
    for given, rows in inputs:
        for form in forms:
            answer = client.embeddings.create(model="t5", input=given, **form)
            vectors: list[Any] = [each.embedding for each in answer.data]
            if form.get("encoding_format") == "base64":  # otherwise the client decodes it
                vectors = [np.frombuffer(base64.b64decode(text), np.float32) for text in vectors]
            np.testing.assert_allclose(np.array(vectors), rows, rtol=1e-6)
            assert [each.index for each in answer.data] == list(range(len(rows)))
            assert answer.usage.prompt_tokens == sum(map(len, ids[: len(rows)])) == answer.usage.total_tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "chat", "input": "a"}, "the bundle is decoder-only; embeddings need an encoder"),
        ({"model": "t5", "input": "a", "dimensions": 8}, "dimensions is not supported; embeddings have the model's"),
        ({"model": "t5", "input": []}, "input is an empty list"),
        ({"model": "t5", "input": ["a", 1]}, "input mixes text and token ids"),
        ({"model": "t5", "input": [5] * 129}, "prompt has 129 tokens"),
        ({"model": "t5", "input": ["a"] * 2049}, "Expected `array` of length <= 2048"),
        ({"model": "t5", "input": "a", "encoding_format": "int8"}, "choose 'base64', 'float'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_requests_are_refused(client: openai.OpenAI, given: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(**given)
    assert message in raised.value.message
    assert "\n" not in raised.value.message


def test_requests_are_queued_within_limits(t5: Path) -> None:
    async def embed(session: Session, count: int, deadline: float | None) -> list[Any]:
        embedder = Embedder()
        works = [embedder.embed(session, ["once"], deadline) for _ in range(count)]
        return await asyncio.gather(*works, return_exceptions=True)

    with Session(t5, threads=1, slots=1, queue=2) as session:
        *served, refused = asyncio.run(embed(session, 4, None))
        assert [tokens for _, tokens in served] == [len(session.encode("once"))] * 3
        assert isinstance(refused, QueueFullError)
        (late,) = asyncio.run(embed(session, 1, 1e-9))
        assert isinstance(late, ApiError)
        assert (late.status, "expired before all inputs were embedded" in late.message) == (504, True)
