"""Answers over the wire, byte for byte, and what clients do to a server that they should not."""

from __future__ import annotations

import ctypes
import gc
import json
import random
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from draft_plans import draft_texts
from running_server import ENDLESS, MESSAGES, ROOT, Running, command, eventually, read, running, status
from starlette.testclient import TestClient

from freeexport.serving import events, middleware, routes
from freeexport.serving.service import ServerOptions, Service
from runtime import AsyncStream, EngineError, Session, Token
from runtime.engines.onnx import Call

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 4000, "stream": True, **ENDLESS}


def still_answers(server: Running) -> bool:
    asked = {"messages": MESSAGES, "max_tokens": 2}
    return httpx.post(server.url + CHAT, json=asked, timeout=30).status_code == 200


def idle(session: Session) -> bool:
    counted = session.metrics()
    return counted.running == counted.waiting == 0 and counted.kv_cache_usage == 0


def test_stream_has_the_documented_bytes(http: httpx.Client) -> None:
    asked = {"prompt": [5, 6], "max_tokens": 2, "stream": True, "free": {"mode": "full"}}
    asked["stream_options"] = {"include_usage": True}
    answer = http.post(TEXT, json=asked)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    shown = re.sub(r'"(id|created)":("cmpl-[0-9a-f]{24}"|\d+)', r'"\1":0', answer.text)
    head = 'data: {"id":0,"object":"text_completion","created":0,"model":"m",'
    *chunks, usage, done, end = shown.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert chunks[-1] == head + (
        '"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"length"}],"usage":null}'
    )
    choice = r'"choices":\[{"index":0,"text":".+","logprobs":null,"finish_reason":null}\],"usage":null}'
    assert all(re.fullmatch(re.escape(head) + choice, chunk) for chunk in chunks[:-1])
    assert usage == head + (
        '"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":2,"total_tokens":4,"completion_tokens_details":'
        '{"accepted_prediction_tokens":0,"rejected_prediction_tokens":0},"prompt_tokens_details":{"cached_tokens":0},'
        '"free":{"mode":"full","exit_rate":0.0,"sync_passes":1}}}'
    )


def test_chunks_report_which_tokens_exited(http: httpx.Client, server: Running) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 30, "free": {"threshold": 0.3, "exits": True}}
    lines = http.post(CHAT, json={**asked, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    streamed = [flag for chunk in chunks for flag in chunk["choices"][0]["free"]["exited"]]
    result = server.service.sessions["m"].generate(MESSAGES, max_new_tokens=30, threshold=0.3)
    assert streamed == list(result.exited)
    assert http.post(CHAT, json=asked).json()["choices"][0]["free"]["exited"] == streamed
    assert 0 < sum(streamed) < 30


def test_a_silent_stream_has_pings(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PING_SECONDS", 0.1)
    session = server.service.sessions["m"]
    held = [session.stream([1], max_new_tokens=4000, ignore_eos=True) for _ in range(4)]
    with httpx.stream("POST", server.url + TEXT, json={"prompt": "x", "max_tokens": 1, "stream": True}) as answer:
        lines = answer.iter_lines()
        assert [next(lines), next(lines)] == [": ping", ""]
        for stream in held:
            stream.close()
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_token_ids_and_text_are_accepted_and_returned(http: httpx.Client, server: Running) -> None:
    session = server.service.sessions["m"]
    found = http.post("/tokenize", json={"prompt": "hello"}).json()
    assert found == {"count": 6, "max_model_len": 4096, "tokens": session.encode("hello").tolist()}
    assert http.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False}).json()["count"] == 5
    assert http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"] == session.encode(MESSAGES).tolist()
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "hello"}
    for path, body in (("/tokenize", {}), ("/detokenize", {"tokens": [288]}), ("/detokenize", {"tokens": [-1]})):
        assert http.post(path, json=body).status_code == 400


def test_health_needs_no_key_and_names_the_model(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ready", "ready": True}
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").status_code == 200
    assert http.get("/v2/models/m/ready").json() == {"name": "m", "ready": True}
    assert http.get("/v2/models/other/ready").status_code == 404
    assert http.get("/nothing").json()["error"]["message"] == "path /nothing not found"
    assert http.get(CHAT).status_code == 405


def test_metrics_match_the_log(chat: Path) -> None:
    with running(chat, names=("m",)) as server:
        for mode, threshold in (("free", 0.3), ("lossless", 0.1), ("full", None)):
            asked = {"messages": MESSAGES, "max_tokens": 30, "free": {"mode": mode, "threshold": threshold}}
            assert httpx.post(server.url + CHAT, json=asked).status_code == 200
        text = httpx.get(server.url + "/metrics").text
        figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = '{model_name="m"}'
    assert float(figures[f"freeexport_generation_tokens_total{label}"]) == 90
    assert float(figures[f"freeexport_prompt_tokens_total{label}"]) == sum(line["prompt_tokens"] for line in server.log)
    depths = [
        float(figures[f'freeexport_exit_tokens_total{{depth="{d}",model_name="m"}}']) for d in ("shallow", "deep")
    ]
    assert sum(depths) == 90
    assert depths[0] == sum(round(line["exit_rate"] * 29) for line in server.log)
    assert float(figures['freeexport_request_success_total{finished_reason="length",model_name="m"}']) == 3
    assert float(figures[f"freeexport_inter_token_latency_seconds_count{label}"]) == 87
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert float(figures[f"freeexport_{name}_seconds_count{label}"]) == 3
    assert float(figures[f'freeexport_http_responses_total{{path="{CHAT}",status="200"}}']) == 3


def test_accepted_share_on_the_dashboard_equals_the_usage(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_texts(monkeypatch)
    with running(chat, names=("m",)) as server:
        asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 60, **ENDLESS}
        full = {**asked, "free": {"mode": "full"}}
        text = httpx.post(server.url + CHAT, json=full).json()["choices"][0]["message"]["content"]
        expected = {"type": "content", "content": text[:-4] + "end"}
        usage = httpx.post(server.url + CHAT, json={**asked, "prediction": expected}).json()["usage"]
        exposed = httpx.get(server.url + "/metrics").text
    counted = usage["completion_tokens_details"]
    accepted, rejected = (counted[f"{name}_prediction_tokens"] for name in ("accepted", "rejected"))
    assert accepted > 0
    figures = dict(line.rsplit(" ", 1) for line in exposed.splitlines() if not line.startswith("#"))
    drafts = {
        name: float(figures[f'freeexport_spec_decode_num_{name}_tokens_total{{model_name="m"}}'])
        for name in ("accepted", "draft")
    }
    dashboard = (ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8")
    divided = re.search(r"num_(\w+)_tokens_total[^/]*/ sum\(rate\(freeexport_spec_decode_num_(\w+)_tokens", dashboard)
    assert divided is not None
    assert drafts[divided[1]] / drafts[divided[2]] == pytest.approx(accepted / (accepted + rejected))


def test_log_has_no_prompt_by_default(server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a prompt is one line of ASCII, whatever separates lines in it."""
    text = "a secret\u2028b\u0085c\x9bd\x00e\x7f"
    lines: list[str] = []
    monkeypatch.setattr(server.service, "log", lines.append)
    for wanted in (False, True):
        monkeypatch.setattr(server.service, "options", replace(server.service.options, log_prompts=wanted))
        for tools in ({}, {"tools": [1]}):
            http.post(TEXT, json={"prompt": text, "max_tokens": 2, **tools})
    assert all(line.isascii() and len(line.splitlines()) == 1 for line in lines)
    found = [json.loads(line) for line in lines]
    assert [line.get("prompt") for line in found] == [None, None, [text], None]
    assert [line["status"] for line in found] == [200, 400] * 2
    assert {"id", "model", "prompt_tokens", "exit_rate", "queue_seconds", "seconds"} <= set(found[0])


def test_other_origins_are_allowed_only_if_configured(http: httpx.Client, tmp_path: Path) -> None:
    asking = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    closed = TestClient(routes.application(Service(ServerOptions([tmp_path]), lambda line: None)))
    assert "access-control-allow-origin" not in closed.options(CHAT, headers=asking).headers
    assert http.options(CHAT, headers=asking).headers["access-control-allow-origin"] == "http://page"
    assert "access-control-allow-origin" not in http.options(CHAT, headers={**asking, "Origin": "http://evil"}).headers


def test_hundred_disconnected_clients_free_their_slots(server: Running) -> None:
    session = server.service.sessions["m"]
    bodies = [json.dumps({**LONG, "stream": stream}).encode() for stream in (True, False)]
    source, before = random.Random(4), len(server.log)
    held: list[int] = []
    for turn in (1, 2):
        connections = [server.ask(CHAT, bodies[number % 2]) for number in range(50)]
        for connection in source.sample(connections, 50):
            time.sleep(source.random() * 0.01)
            connection.close()
        assert eventually(lambda: idle(session)), session.metrics()
        assert eventually(lambda: len(server.log) == before + 50 * turn)  # noqa: B023
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        held.append(psutil.Process().memory_info().rss)
    assert {line["status"] for line in server.log[before:]} == {499}
    assert held[1] - held[0] < 30e6
    assert still_answers(server)


def test_slot_is_freed_within_a_token_of_a_disconnect(server: Running) -> None:
    session, before = server.service.sessions["m"], len(server.log)
    with server.ask(CHAT, json.dumps(LONG).encode()) as connection:
        assert connection.recv(1 << 16)
        assert eventually(lambda: session.metrics().running == 1)
    assert eventually(lambda: idle(session) and len(server.log) > before)
    assert server.log[-1]["status"] == 499
    assert server.log[-1]["completion_tokens"] < 400


def test_slow_reader_blocks_no_slot_and_receives_everything(chat: Path) -> None:
    with running(chat, slots=1, buffer=4096) as server:
        session = next(iter(server.service.sessions.values()))
        connection = server.ask(CHAT, json.dumps({**LONG, "max_tokens": 1000, "free": {"exits": True}}).encode())
        assert eventually(lambda: session.metrics().finished["length"] == 1)
        assert idle(session)
        assert server.log == []  # most of it waits to be read
        assert still_answers(server)
        assert read(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("told", [True, False])
def test_ten_megabyte_body_is_refused(told: bool, server: Running) -> None:
    body = b"x" * 10_000_000
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    if told:
        head += f"Content-Length: {len(body)}\r\n\r\n"
    else:
        head += f"Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n"
        body += b"\r\n0\r\n\r\n"
    connection = server.send(head.encode())
    sent = threading.Thread(target=_send, args=(connection, body))
    sent.start()
    answer = read(connection)
    sent.join()
    assert status(answer) == 413
    assert b"larger than 4194304 bytes" in answer
    assert still_answers(server)


def _send(connection: Any, data: bytes) -> None:
    with suppress(OSError):  # the server had enough
        connection.sendall(data)


@pytest.mark.parametrize(
    ("path", "expected"), [("/missing", 404), ("/health", 405), ("/v1/audio/transcriptions", 400), (CHAT, 413)]
)
def test_client_that_sends_its_whole_body_first_reads_the_refusal(path: str, expected: int, server: Running) -> None:
    # It asks to close the connection, and would not read before it has sent everything.
    request = urllib.request.Request(server.url + path, data=b"x" * 40_000_000)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    with refused.value as answer:
        assert answer.code == expected
        assert json.load(answer)["error"]["message"]


def test_at_most_a_limit_of_a_refused_body_is_read(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "DISCARDED", 1_000_000)
    connection = server.send(b"POST /missing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert status(connection.recv(1 << 16)) == 404
    piece = b"10000\r\n" + b"x" * (1 << 16) + b"\r\n"
    with pytest.raises(ConnectionError):
        connection.sendall(2_000 * piece)
    connection.close()
    monkeypatch.setattr(middleware, "DISCARD_SECONDS", 0.2)
    connection = server.send(b"POST /missing HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
    assert status(read(connection)) == 404  # closed by the server


def test_missing_refused_body_leaves_no_traceback_at_shutdown(chat: Path) -> None:
    with command(str(chat), "--port", "0", "--threads", "1") as (process, url, _):
        address = httpx.URL(url)
        connection = socket.create_connection((address.host, address.port))
        connection.sendall(b"POST /missing HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        assert status(connection.recv(1 << 16)) == 404
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        connection.close()
    assert "Traceback" not in said


def test_missing_body_times_out(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "BODY_SECONDS", 0.2)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    half = server.send(head.encode() + b'{"mess')
    assert status(half.recv(1 << 16)) == 408
    half.close()
    before = len(server.log)
    server.send(head.encode() + b'{"mess').close()
    assert eventually(lambda: len(server.log) > before)
    assert server.log[-1]["status"] == 499
    assert still_answers(server)


def test_malformed_bodies_and_headers_are_client_errors(server: Running) -> None:
    for body in (b"\xff\xfe\xfd", b"{" * 50_000, b'{"prompt": "\xc3\x28"}', b"", b"0" * 90_000):
        answer = read(server.ask(CHAT, body))
        assert status(answer) == 400
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    many = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 100) for number in range(5_000))
    for head in (many, b"X: " + b"y" * 1_000_000, b"no header at all\r\n"):
        connection = server.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        _send(connection, head + b"\r\n\r\n")
        with suppress(ConnectionResetError):
            assert status(read(connection)) == 400
    assert still_answers(server)


def test_engine_failure_is_a_server_error(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(stream: AsyncStream) -> Token:
        raise EngineError("the engine is broken")

    monkeypatch.setattr(AsyncStream, "__anext__", failing)
    streamed = httpx.post(server.url + TEXT, json={"prompt": "x", "stream": True})
    *_, error, done, end = streamed.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"] == {
        "message": "the engine is broken",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert (done, end) == ("data: [DONE]", "")
    monkeypatch.setattr(Session, "astream", lambda *given, **options: 1 / 0)
    whole = httpx.post(server.url + TEXT, json={"prompt": "x"})
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "internal_error")
    assert "division" not in whole.text
    assert eventually(lambda: [line["status"] for line in server.log[-2:]] == [500, 500])
    assert idle(server.service.sessions["m"])


def test_loading_server_is_alive_but_not_ready(tmp_path: Path) -> None:
    service = Service(ServerOptions([tmp_path]), lambda line: None)
    client = TestClient(routes.application(service))
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/health").json() == {"status": "loading", "ready": False}
    refused = client.post(TEXT, json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    assert refused.headers["retry-after"] == "1"


def test_shutdown_finishes_running_requests_and_refuses_new_ones(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, refuses = Call.run, threading.Event()

    def held(call: Call) -> None:
        assert refuses.wait(60)
        run(call)

    with running(chat, names=("m",)) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        monkeypatch.setattr(Call, "run", held)
        answers: list[httpx.Response] = []
        asked = {"messages": MESSAGES, "max_tokens": 60, **ENDLESS}
        asking = threading.Thread(target=lambda: answers.append(httpx.post(server.url + CHAT, json=asked, timeout=60)))
        asking.start()
        session = server.service.sessions["m"]
        assert eventually(lambda: session.metrics().running == 1)
        server.stop()
        assert eventually(lambda: http.get("/health").status_code == 503)
        refused = http.post(CHAT, json=asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert http.get("/v2/health/live").status_code == 200
        refuses.set()
        asking.join()
        server.thread.join(10)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 60


def test_requests_running_at_the_end_of_shutdown_receive_an_error(chat: Path) -> None:
    with running(chat, names=("m",), shutdown_timeout=0.1) as server:
        answers: dict[bool, bytes] = {}

        def ask(stream: bool) -> None:
            answers[stream] = read(server.ask(CHAT, json.dumps({**LONG, "stream": stream}).encode()))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: server.service.sessions["m"].metrics().running == 2)
        server.stop()
        for thread in threads:
            thread.join(20)
    assert status(answers[False]) == 503
    assert b'"code":"shutting_down"' in answers[False]
    assert status(answers[True]) == 200
    assert b'data: {"error":{"message":"the server is shutting down' in answers[True]
    assert b"data: [DONE]" in answers[True]
    assert sorted(line["status"] for line in server.log) == [503, 503]
