"""The official client, unchanged, against a server on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from checkpoints import BY_NAME, Bundles
from running_server import ENDLESS, MESSAGES, Running, eventually, running

from freeexport.serving.replies import usage
from runtime import GenerationResult, Session, Stats

FREE = {"free": {"threshold": 0.3}}
ASKED: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "max_tokens": 20, "extra_body": FREE}


@pytest.fixture(scope="module")
def nllb(bundle: Bundles) -> Path:
    return bundle(BY_NAME["nllb"], 1)


@pytest.fixture(scope="module")
def server(chat: Path, t5: Path, nllb: Path) -> Iterator[Running]:
    with running(chat, t5, nllb, names=("chat", "t5", "nllb"), slots=4, queue=4) as server:
        yield server


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["chat", "t5", "nllb"]
    assert client.models.retrieve("t5").owned_by == "freeexport"


def test_chat_matches_the_session_whole_and_streamed(client: openai.OpenAI, session: Session) -> None:
    answer = client.chat.completions.create(logprobs=True, **ASKED)
    expected = session.generate(MESSAGES, max_new_tokens=20, threshold=0.3, output_logprobs=True)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, "length")
    assert choice.logprobs.content[0].logprob == pytest.approx(expected.logprobs[0], abs=1e-4)
    assert len(choice.logprobs.content) == 20
    counted, stats = answer.usage, expected.stats
    assert (counted.prompt_tokens, counted.completion_tokens) == (stats.prompt_tokens, 20)
    assert counted.total_tokens == counted.prompt_tokens + 20
    assert counted.free == {
        "mode": "free",
        "exit_rate": round(stats.exit_rate, 4),
        "sync_passes": stats.sync_passes,
    }
    assert counted.free["exit_rate"] > 0
    *told, last = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ASKED)
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in (*told, last)}) == 1
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in told[-2:]] == [None, "length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 20)
    assert all(chunk.usage is None for chunk in told)
    continuous: Any = {"include_usage": True, "continuous_usage_stats": True}
    *told, last = client.chat.completions.create(stream=True, stream_options=continuous, **ASKED)
    counts = [chunk.usage.completion_tokens for chunk in told]
    assert (counts[0], counts[-1], counts) == (0, 20, sorted(counts))
    assert {chunk.usage.prompt_tokens for chunk in told} == {stats.prompt_tokens}


def spelled(session: Session, token: int) -> str:
    assert session.tokenizer is not None
    return session.tokenizer.decode([token]) or session.tokenizer.token(token) or str(token)


def test_chat_tokens_have_top_logprobs_whole_and_streamed(client: openai.OpenAI, session: Session) -> None:
    asked = {**ASKED, "logprobs": True, "top_logprobs": 4}
    expected = session.generate(MESSAGES, max_new_tokens=20, threshold=0.3, top_logprobs=4)
    assert 0 < sum(expected.exited) < 19
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = client.chat.completions.create(stream=True, **asked)
    told = [chunk.choices[0].logprobs for chunk in chunks]
    for content in (whole, [token for part in told if part is not None for token in part.content]):
        assert len(content) == 20
        for token, best in zip(content, expected.top_logprobs or (), strict=True):
            assert [each.token for each in token.top_logprobs] == [spelled(session, number) for number, _ in best]
            assert [each.logprob for each in token.top_logprobs] == pytest.approx([each[1] for each in best], abs=1e-4)
            first = token.top_logprobs[0]
            assert (first.token, first.logprob, first.bytes) == (token.token, token.logprob, token.bytes)


def test_completion_tokens_have_top_logprobs_by_text(client: openai.OpenAI, session: Session) -> None:
    asked: dict[str, Any] = {"model": "chat", "prompt": "once", "max_tokens": 12, "logprobs": 3, "extra_body": FREE}
    asked |= {"temperature": 1.2, "seed": 3}
    options: dict[str, Any] = {"max_new_tokens": 12, "threshold": 0.3, "temperature": 1.2, "seed": 3}
    expected = session.generate("once", top_logprobs=3, **options)
    whole = client.completions.create(**asked).choices[0].logprobs
    told = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **asked)]
    parts = [part for part in told if part is not None]
    assert [best for part in parts for best in part.top_logprobs] == whole.top_logprobs
    assert [token for part in parts for token in part.tokens] == whole.tokens
    for number, best in enumerate(expected.top_logprobs or ()):
        # Parts of a letter have one text: of those the best, or the token itself.
        by_text = {spelled(session, token): logprob for token, logprob in reversed(best)}
        by_text[whole.tokens[number]] = whole.token_logprobs[number]
        assert whole.top_logprobs[number] == pytest.approx(by_text, abs=1e-4)
    assert any(len(found) == 4 for found in whole.top_logprobs)  # the one that was drawn is not among the best
    alone = client.completions.create(**{**asked, "logprobs": 0}).choices[0].logprobs
    assert (alone.tokens, alone.top_logprobs) == (whole.tokens, None)


@pytest.mark.parametrize("as_ids", [False, True])
def test_text_offsets_count_from_the_start_of_the_prompt(as_ids: bool, client: openai.OpenAI, session: Session) -> None:
    text = "n\u00f6 \U0001f600 once"
    prompt = [session.encode(text).tolist()] if as_ids else text
    letters = dict.fromkeys(session.tokenizer.encode("abc", special=False), 50)
    asked: dict[str, Any] = {"model": "chat", "prompt": prompt, "max_tokens": 12, "logprobs": 0, "seed": 3}
    asked |= {"temperature": 1.2, "logit_bias": letters, "extra_body": FREE}
    echoed = client.completions.create(echo=True, **asked).choices[0]
    tokens, offsets = echoed.logprobs.tokens, echoed.logprobs.text_offset
    assert len(offsets) == len(tokens) > 20
    assert offsets[:3] == [0, 0, 1]  # the first token is a special one
    assert offsets == sorted(offsets)
    for token, place in zip(tokens[1:], offsets[1:], strict=True):
        assert "\ufffd" in token or echoed.text.startswith(token, place)  # or a part of a character
    assert offsets[tokens.index(" ") + 1] == text.index("\U0001f600")
    plain = client.completions.create(**asked).choices[0]
    assert plain.logprobs.text_offset == offsets[-12:]
    assert offsets[-12] == len(text)
    told = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **asked)]
    assert [place for part in told if part is not None for place in part.text_offset] == offsets[-12:]


def test_prediction_is_drafted_and_changes_no_token(client: openai.OpenAI, session: Session) -> None:
    letters = dict.fromkeys(session.tokenizer.encode("".join(map(chr, range(97, 123))), special=False), 50)
    asked: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "max_tokens": 60, "logit_bias": letters}
    expected = session.generate(MESSAGES, max_new_tokens=60, mode="full", sequence_bias=letters).text
    assert expected.islower()
    answer = client.chat.completions.create(prediction={"type": "content", "content": expected}, **asked)
    assert answer.choices[0].message.content == expected
    assert answer.usage.free["mode"] == "lossless"
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens > 10
    with pytest.raises(openai.BadRequestError, match="prediction: it has") as raised:
        client.chat.completions.create(prediction={"type": "content", "content": "x" * 300_000}, **asked)
    assert raised.value.param == "prediction"


def test_drafts_are_reported_as_accepted_and_rejected_prediction_tokens() -> None:
    stats = Stats("lossless", prompt_tokens=5, tokens=11, exits=6, rejected=2)
    exits = Stats("free", prompt_tokens=5, tokens=11, exits=6)
    results = [GenerationResult("", (), (), (), "eos", each) for each in (stats, exits)]
    details = usage(results, [5])["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 2}
    assert usage(results, [5])["total_tokens"] == 27
    assert usage(results, [5])["free"]["exit_rate"] == 0.6
    whole = GenerationResult("", (), (), (), "eos", Stats("free", predicted=0, tokens=10, exits=4))
    assert usage([*results, whole], [5])["free"]["exit_rate"] == round(16 / 30, 4)
    # Of a prompt counts what its first choice found.
    cached = [
        GenerationResult("", (), (), (), "length", Stats("full", prompt_tokens=40, cached_tokens=tokens))
        for tokens in (16, 32, 0, 32)
    ]
    for choices, prompts in ((cached, [40, 40]), (cached[:1], [40])):
        assert usage(choices, prompts)["prompt_tokens_details"] == {"cached_tokens": 16}


def test_choices_stream_interleaved_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "chat", "prompt": "once", "n": 3, "temperature": 1.0, "seed": 7}
    whole = client.completions.create(max_tokens=12, **options)
    again = client.completions.create(max_tokens=12, stream=True, **options)
    streamed = ["", "", ""]
    for chunk in again:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in whole.choices] == streamed
    assert len(set(streamed)) == 3


def test_completion_echoes_its_prompt_on_request(client: openai.OpenAI, session: Session) -> None:
    ids = [session.encode(text).tolist() for text in ("once", "twice")]
    asked: dict[str, Any] = {"model": "chat", "prompt": ids, "n": 2, "max_tokens": 6}
    plain = client.completions.create(**asked).choices
    echoed = client.completions.create(echo=True, **asked).choices
    assert session.tokenizer is not None
    prompts = [session.tokenizer.decode(one) for one in ids for _ in range(2)]
    expected = [prompt + choice.text for prompt, choice in zip(prompts, plain, strict=True)]
    assert [choice.text for choice in echoed] == expected
    bare = client.completions.create(**{**asked, "echo": True, "logprobs": 2, "max_tokens": 0, "n": 1}).choices[0]
    whole = client.completions.create(**{**asked, "echo": True, "logprobs": 2, "n": 1}).choices[0]
    read = len(bare.logprobs.tokens)
    assert (bare.text, bare.finish_reason, bare.logprobs.token_logprobs[0]) == (prompts[0], "length", None)
    assert whole.logprobs.token_logprobs[:read] == bare.logprobs.token_logprobs
    assert whole.logprobs.top_logprobs[:read] == bare.logprobs.top_logprobs
    assert len(whole.logprobs.tokens) > read
    for limit, texts in ((6, expected), (0, prompts)):
        streamed = [""] * 4
        for chunk in client.completions.create(echo=True, stream=True, **{**asked, "max_tokens": limit}):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == texts


def test_response_matches_the_chat_whole_and_as_events(client: openai.OpenAI, session: Session) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    expected = session.generate(messages, max_new_tokens=20, threshold=0.3)
    asked: dict[str, Any] = {"model": "chat", "instructions": "be brief", "max_output_tokens": 20, "extra_body": FREE}
    whole = client.responses.create(input="hello", **asked)
    assert (whole.output_text, whole.status) == (expected.text, "incomplete")
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (expected.stats.prompt_tokens, 20)
    parts = [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}]
    items: Any = [{"type": "message", "role": "user", "content": parts}]
    assert client.responses.create(input=items, **asked).output_text == expected.text
    events = list(client.responses.create(input="hello", stream=True, **asked))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected.text
    assert events[-1].response.output_text == expected.text


def test_response_obeys_its_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    asked: dict[str, Any] = {"model": "chat", "input": "?", "text": form, "max_output_tokens": 200, "extra_body": FREE}
    found = client.responses.create(**asked)
    assert isinstance(json.loads(found.output_text)["yes"], bool)
    assert found.status == "completed"
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text == found.output_text


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported; responses are not stored"),
        ({"tools": [{"type": "web_search"}]}, "tools.*Invalid enum value 'web_search'"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "output is missing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "content.0..type 'input_image' is not"),
        ({"input": []}, "input"),
    ],
)
def test_unsupported_response_fields_are_refused_by_name(
    client: openai.OpenAI, more: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        client.responses.create(**{"model": "chat", "input": "x", **more})


def test_prompts_can_be_texts_or_ids_and_encoder_decoders_read_them(client: openai.OpenAI, t5: Path) -> None:
    with Session(t5, threads=1) as session:
        ids = session.encode("one").tolist()
        expected = [session.generate(prompt, max_new_tokens=9).text for prompt in ("one", "two")]
    answer = client.completions.create(model="t5", prompt=["one", "two"], max_tokens=9)
    assert [choice.text for choice in answer.choices] == expected
    assert client.completions.create(model="t5", prompt=ids, max_tokens=9).choices[0].text == expected[0]
    both = client.completions.create(model="t5", prompt=[ids, ids], max_tokens=9)
    assert [choice.text for choice in both.choices] == [expected[0]] * 2
    assert both.usage.prompt_tokens == 2 * len(ids)


def test_languages_are_fields_of_a_completion(client: openai.OpenAI, nllb: Path) -> None:
    asked: dict[str, Any] = {"model": "nllb", "prompt": "x", "max_tokens": 9}
    languages = {"src_lang": "fra_Latn", "tgt_lang": "deu_Latn"}
    with Session(nllb, threads=1) as session:
        expected = session.generate("x", max_new_tokens=9, **languages)
        assert expected.token_ids != session.generate("x", max_new_tokens=9).token_ids
    answer = client.completions.create(**asked, extra_body=languages)
    assert answer.choices[0].text == expected.text
    for given, named in (
        ({"tgt_lang": "deu"}, "tgt_lang is 'deu'; this bundle has 3 languages, as deu_Latn"),
        ({"src_lang": "fra_Latn", "prompt": [259, 5]}, "src_lang is 'fra_Latn', which is for a prompt of text"),
        ({"tgt_lang": "deu_Latn", "model": "t5"}, "tgt_lang is 'deu_Latn'; this bundle has no language tokens"),
        ({"src_lang": ""}, "src_lang: Expected `str` of length >= 1"),
    ):
        with pytest.raises(openai.BadRequestError, match=named) as raised:
            client.completions.create(
                **asked | {n: given.pop(n) for n in ("model", "prompt") if n in given}, extra_body=given
            )
        assert raised.value.param == next(iter(given))


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, session: Session) -> None:
    text = session.generate(MESSAGES, max_new_tokens=40).text
    stop = text[5:7]
    answer = client.chat.completions.create(model="chat", messages=MESSAGES, max_tokens=40, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("given", "kind", "param", "message"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "model 'gpt-9' not found; choose 'chat' or 't5'"),
        ({"model": "t5"}, openai.BadRequestError, "prompt", "no chat template"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools[0]", "missing required field `function`"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "temperature is -1"),
        ({"max_tokens": 5000}, openai.BadRequestError, "prompt", "prompt has 30 tokens and max_tokens is 5000"),
        ({"n": 9}, openai.BadRequestError, "n", "takes 8 choices at once"),
        ({"extra_body": {"free": {"mode": "fast"}}}, openai.BadRequestError, "free.mode", "Invalid enum value"),
        ({"extra_body": {"free": {"threshold": 2}}}, openai.BadRequestError, "free.threshold", "free.threshold is 2"),
    ],
)
def test_errors_are_raised_as_the_clients_own_classes(
    given: dict[str, Any], kind: type[openai.APIStatusError], param: str, message: str, client: openai.OpenAI
) -> None:
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**{"model": "chat", "messages": MESSAGES, **given})
    assert raised.value.param == param
    assert message in raised.value.message


def test_wrong_key_and_oversized_body_are_refused(chat: Path) -> None:
    with running(chat, api_key="right", max_body=20_000) as server:
        base = f"{server.url}/v1"
        with openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="missing or invalid API key"):
                client.chat.completions.create(model="llama-long", messages=MESSAGES)
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with openai.OpenAI(base_url=base, api_key="right", max_retries=0) as client:
            assert client.chat.completions.create(model="llama-long", messages=MESSAGES, max_tokens=2).choices
            with pytest.raises(openai.APIStatusError, match="larger than 20000 bytes") as raised:
                client.completions.create(model="llama-long", prompt="x" * 30_000)
            assert raised.value.status_code == 413


def test_full_queue_is_a_rate_limit_and_choices_are_queued_all_or_none(server: Running, client: openai.OpenAI) -> None:
    session = server.service.sessions["chat"]
    for waiting, choices in ((8, 1), (6, 3)):
        held = [session.stream([1, 2, 3], ignore_eos=True) for _ in range(waiting)]
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model="chat", prompt="x", n=choices, temperature=1.0)
        for stream in held:
            stream.close()
        assert raised.value.code == "queue_full"
        assert raised.value.response.headers["retry-after"] == "1"
        assert eventually(lambda: session.metrics().waiting + session.metrics().running == 0)
    assert client.chat.completions.create(model="chat", messages=MESSAGES, max_tokens=1).choices


def test_deadline_ends_an_answer_with_partial_output(client: openai.OpenAI, server: Running) -> None:
    late = {"free": {"deadline": 0.05}, **ENDLESS}
    options: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "max_tokens": 4000, "extra_body": late}
    whole = client.chat.completions.create(**options)
    *chunks, last = client.chat.completions.create(stream=True, **options)
    for choice in (whole.choices[0], last.choices[0]):
        assert choice.finish_reason == "length"
        assert choice.model_dump()["free"]["finish_reason"] == "deadline"
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens < 4000
    assert chunks
    asked = {"model": "chat", "input": "hello", "max_output_tokens": 4000, "free": {"deadline": 0.05}}
    response = httpx.post(f"{server.url}/v1/responses", json={**asked, "metadata": {"run": "1"}}).json()
    assert response["metadata"] == {"run": "1"}
    if response["status"] == "incomplete":  # the model is random, and may end by itself
        assert response["free"]["finish_reason"] == "deadline"
        assert response["incomplete_details"]


@pytest.mark.parametrize("server_limit", [None, 0.3])
def test_deadline_before_the_first_token_is_an_error_without_retry(server_limit: float | None, chat: Path) -> None:
    late: dict[str, Any] = {"model": "chat", "messages": MESSAGES}
    late["extra_body"] = {"free": {"deadline": None if server_limit else 0.3}}
    with (
        running(chat, names=("chat",), slots=1, deadline=server_limit) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2) as client,
        server.service.sessions["chat"].decoder(),  # the only slot
    ):
        with pytest.raises(openai.APIStatusError, match=r"of 0\.3 s passed before the first token") as raised:
            client.chat.completions.create(**late)
        assert raised.value.status_code == (504 if server_limit else 408)
        assert raised.value.response.headers["x-should-retry"] == "false"
        assert eventually(lambda: len(server.log) == 1)
        with pytest.raises(openai.APIError, match="before the first token"):
            list(client.chat.completions.create(stream=True, **late))
        assert eventually(lambda: len(server.log) == 2)
