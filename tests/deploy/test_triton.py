"""The model for Triton's Python backend, against a stub written from the documentation; Triton itself is not run."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton import DTYPES, Request, TritonError, install
from running_server import eventually

from runtime import Session

MODEL = Path(__file__).resolve().parents[2] / "deploy" / "triton" / "freeexport"
PARAMETERS = {"threads": "1", "slots": "2", "mode": "free"}


@pytest.fixture
def model(chat: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    install(monkeypatch)
    spec = importlib.util.spec_from_file_location("triton_model", MODEL / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    given = {name: {"string_value": value} for name, value in {**PARAMETERS, "bundle": str(chat)}.items()}
    model.initialize({"model_config": json.dumps({"parameters": given})})
    yield model
    model.finalize()


def request(prompt: str | bytes, tokens: int = 20, **more: Any) -> Request:
    text = prompt.encode() if isinstance(prompt, str) else prompt
    return Request(
        prompt=np.array([text], np.object_),
        max_new_tokens=np.array([tokens], np.int32),
        threshold=np.array([0.3], np.float32),
        **more,
    )


def test_each_token_is_a_response_of_its_own_request(model: Any, chat: Path) -> None:
    prompts = ["one", "two", "three"]
    requests = [request(prompt) for prompt in prompts]
    assert asyncio.run(model.execute(requests)) is None
    with Session(chat, threads=1) as session:
        expected = [session.generate(prompt, max_new_tokens=20, threshold=np.float32(0.3).item()) for prompt in prompts]
    for asked, whole in zip(requests, expected, strict=True):
        assert asked.ended
        assert b"".join(each.tensors["text"][0] for each in asked.responses).decode() == whole.text
        assert [bool(each.tensors["exited"][0]) for each in asked.responses] == list(whole.exited)
    assert any(any(whole.exited) for whole in expected)


def test_options_may_be_left_out(model: Any) -> None:
    alone = Request(patience=3, prompt=np.array([b"one"], np.object_))
    asyncio.run(model.execute([alone]))
    assert alone.ended
    assert len(alone.responses) == 3


def test_what_is_wrong_is_an_error_of_that_request_alone(model: Any) -> None:
    good, long, text, count = request("one"), request("x" * 5000), request(b"\xff"), request("one", tokens=0)
    asyncio.run(model.execute([good, long, text, count]))
    assert len(good.responses) == 20
    for bad, message in ((long, "at most 4096 fit"), (text, "utf-8"), (count, "max_new_tokens is 0")):
        assert bad.ended
        (answer,) = bad.responses
        assert answer.error is not None
        assert message in answer.error.text
        assert answer.error.code == TritonError.INVALID_ARG


def test_a_cancelled_request_gives_its_slot_back(model: Any) -> None:
    gone = request("one", tokens=4000, patience=5)
    asyncio.run(model.execute([gone]))
    assert gone.ended
    assert len(gone.responses) == 5
    assert eventually(lambda: model._session.metrics().running == 0)


def test_the_configuration_is_one_of_tritons_and_fits_the_model() -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    from google.protobuf import text_format

    config = text_format.Parse((MODEL / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())
    kinds = {schema.TYPE_STRING: np.object_, schema.TYPE_BOOL: np.bool_}
    assert config.model_transaction_policy.decoupled
    assert {output.name: kinds[output.data_type] for output in config.output} == DTYPES
    assert {given.name: given.optional for given in config.input} == {
        "prompt": False,
        "max_new_tokens": True,
        "threshold": True,
    }
    assert set(config.parameters) == {*PARAMETERS, "bundle"}
