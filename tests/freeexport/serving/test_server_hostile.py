"""Hostile clients and surroundings of a server: none of it may stop it for the others."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import MESSAGES, Running, command, eventually, read, status

from freeexport.serving.errors import ApiError
from freeexport.serving.parsing import parse
from freeexport.serving.protocol import ChatRequest
from freeexport.serving.server import LogWriter
from runtime import GenerationOptions

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# Seconds that /health may take while a hostile request is worked on, on a machine that is busy with other tests.
SOON = 0.5


@contextmanager
def health_watched(server: Running) -> Iterator[list[float]]:
    """Seconds that each of the answers of /health took in the meantime."""
    took: list[float] = []
    done = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not (done.is_set() and took):  # once at least
                began = time.perf_counter()
                client.get("/health")
                took.append(time.perf_counter() - began)
                time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield took
    finally:
        done.set()
        thread.join()


WORDS = "some text of words " * (4 << 20)
TOKENS = "tokens that fit"
BIASES = dict.fromkeys(map(str, range(287)), 1)
EMPTY = [{"role": "user", "content": ""}]
WIDE: Any = {"type": "object", "properties": {f"k{number}": {} for number in range(1000)}}
CALL = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"enum": ["x" * 2_000_000]}}}


@pytest.mark.parametrize(
    ("path", "body", "expected", "message"),
    [
        ("/tokenize", {"prompt": WORDS[:4_100_000]}, 400, f"too many for the 4096 {TOKENS}"),
        ("/tokenize", {"messages": [{"role": "user", "content": WORDS[:4_000_000]}]}, 400, TOKENS),
        ("/tokenize", {"prompt": WORDS[:260_000]}, 200, ""),
        (TEXT, {"prompt": WORDS[:260_000]}, 400, "at most 4096 fit"),
        (CHAT, {"messages": EMPTY * 120_000}, 400, "array` of length <= 10000"),
        (CHAT, {"messages": EMPTY * 9_000}, 400, f"9000 messages, more than the 4096 {TOKENS}"),
        (CHAT, {"messages": [{"role": "r" * 4_000_000, "content": ""}]}, 400, TOKENS),
        (CHAT, {"messages": MESSAGES, "prediction": {"type": "content", "content": WORDS[:260_000]}, "max_tokens": 1},
         200, ""),
        (TEXT, {"prompt": "x", "max_tokens": 1, "n": 60, "logit_bias": BIASES}, 200, ""),
        ("/detokenize", {"tokens": [5] * 2_000_000}, 400, "tokens has 2000000 ids; send at most 4096"),
        (TEXT, {"prompt": "x", "max_tokens": 1, "structured_outputs": {"json": WIDE}}, 200, ""),
        (TEXT, {"prompt": "x", "structured_outputs": {"json": {"enum": ["x" * 4_000_000]}}}, 400, "at most 262144"),
        (CHAT, {"messages": MESSAGES, "tools": [TOOL]}, 400, TOKENS),
        ("/v1/responses", {"input": [CALL] * 10_000}, 400, TOKENS),
        (TEXT, {"prompt": "x", **dict.fromkeys(map(str, range(300_000)), 1)}, 400, "300001 fields; send at most 100"),
    ],
    ids=["text", "chat", "long", "prompt", "empty", "messages", "role", "prediction", "biases", "ids", "wide", "schema",
         "tools", "calls", "fields"],
)  # fmt: skip
def test_large_request_does_not_delay_others(
    path: str, body: dict[str, Any], expected: int, message: str, server: Running
) -> None:
    content = json.dumps(body, separators=(",", ":")).encode()
    for _ in range(3):  # a machine that is busy otherwise is late now and then
        with health_watched(server) as took:
            answer = httpx.post(server.url + path, content=content, timeout=60)
        assert answer.status_code == expected, answer.text[:300]
        assert message in answer.text
        if max(took) < SOON:
            return
    pytest.fail(f"/health took {max(took):.2f} s")


BOMB = "(((a{50}){50}){50}){50}"
STATES = "start: A\nA: /(.*a.{30}.*)/ & ~/(.*b.{30}.*)/"  # 2 to the 30th


@pytest.mark.parametrize(
    ("field", "constraint"),
    [
        ("regex", BOMB),
        ("json", {"type": "object", "properties": {"a": {"type": "string", "pattern": BOMB}}, "required": ["a"]}),
        ("regex", "^a{1000000000}$"),
        ("regex", "[ab]a{1000000000}"),
        ("json", {"const": "x" * 198_000}),
        ("regex", "a" * 200_000),
        ("choice", ["a" * 200_000, "b"]),
        ("grammar", 'start: A\nA: B{1000}{1000}\nB: "x"{1000}'),
        ("grammar", STATES),
        ("json", {"$ref": "#/$defs/d0", "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(990)}}),
    ],
    ids=["bomb", "pattern", "billion", "later", "const", "letters", "choice", "rules", "states", "references"],
)
def test_explosive_constraint_does_not_delay_others(field: str, constraint: Any, server: Running) -> None:
    pytest.importorskip("llguidance")
    body = {"prompt": "x", "max_tokens": 1, "structured_outputs": {field: constraint}}
    for _ in range(3):
        with health_watched(server) as took, ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda _: httpx.post(server.url + TEXT, json=body, timeout=60), range(5)))
        assert {(answer.status_code, answer.json()["error"]["param"]) for answer in answers} == {
            (400, f"structured_outputs.{field}")
        }
        assert "requires itself" not in answers[0].text
        if max(took) < SOON:
            return
    pytest.fail(f"/health took {max(took):.2f} s")


def test_request_with_a_million_tools_is_refused_before_parsing() -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "tools": [' + b"{}," * 1_300_000 + b"{}]}"
    tracemalloc.start()
    try:
        with pytest.raises(ApiError, match="tools"):
            parse(body, ChatRequest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(body)  # 24 times that if each tool becomes an object


def test_thousand_biases_are_validated_once() -> None:
    options = GenerationOptions(sequence_bias=dict.fromkeys(range(1024), 1.0))
    assert replace(options, seed=1).sequence_bias is options.sequence_bias  # a check makes a new mapping


@pytest.mark.parametrize("token", ["--5", "²", "9" * 5000, "-1", "", "१"])
def test_bias_of_an_invalid_token_is_a_client_error(token: str, http: httpx.Client) -> None:
    answer = http.post(TEXT, json={"prompt": "x", "logit_bias": {token: 1}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias")


def test_overlong_messages_keep_the_connection_alive(server: Running) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request("POST", "/tokenize", json.dumps({"messages": [{"role": "user", "content": "x" * 5000}]}))
    refused = connection.getresponse()
    assert (refused.status, refused.getheader("connection")) == (400, None)
    assert b"at most 4096 fit" in refused.read()
    opened = connection.sock
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    assert connection.sock is opened
    connection.close()


@pytest.mark.parametrize("host", ["[", "evil/secret?", "a b", "[::1", "@"])
def test_host_header_does_not_affect_the_path(host: str, server: Running) -> None:
    def ask(line: str) -> bytes:
        return read(server.send(f"{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()))

    missing, slashed = ask("GET /missing"), ask("GET /health/")
    assert status(missing) == status(slashed) == 404
    assert b'"path /missing not found"' in missing
    assert b"location" not in slashed.lower()
    before = len(server.log)
    assert status(ask(f"POST {CHAT}")) == 400
    assert eventually(lambda: len(server.log) > before)
    assert server.log[-1]["path"] == CHAT
    assert "evil" not in httpx.get(server.url + "/metrics").text


@pytest.mark.parametrize("path", ["/health", TEXT])
def test_conflicting_body_lengths_are_refused_and_the_connection_closed(path: str, server: Running) -> None:
    method = "GET" if path == "/health" else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    answer = read(server.send(head.encode() + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert status(answer) == 400
    assert b"Content-Length and Transfer-Encoding" in answer
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_half_closed_receives_its_answer(stream: bool, server: Running) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 400, "logit_bias": {"2": -100}, "stream": stream}
    connection = server.ask(CHAT, json.dumps(asked).encode())
    connection.shutdown(socket.SHUT_WR)
    answer = read(connection)
    while status(answer) == 100:
        answer = answer.partition(b"\r\n\r\n")[2]
    assert status(answer) == 200
    assert b"[DONE]" in answer if stream else b'"completion_tokens":400' in answer
    assert eventually(lambda: server.log[-1]["status"] == 200)


def test_short_requests_are_answered_after_the_client_half_closed(server: Running) -> None:
    connection = server.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
    connection.shutdown(socket.SHUT_WR)
    assert read(connection).count(b'"ready":true') == 3


def test_unread_log_drops_lines_and_counts_them() -> None:
    readable, writable = os.pipe()
    with os.fdopen(writable, "w") as stream:
        writer = LogWriter(stream, most=100_000)
        began = time.monotonic()
        for number in range(50_000):
            writer.write(json.dumps({"number": number, "text": "x" * 50}))
        assert time.monotonic() - began < 60
        writer.close(0.1)  # gives up
    with os.fdopen(readable) as reader:
        lines = [json.loads(line) for line in reader]
    dropped = sum(line.get("dropped_lines", 0) for line in lines)
    assert dropped > 40_000
    assert sum("number" in line for line in lines) + dropped == 50_000


def test_unread_output_does_not_block_and_a_second_signal_ends_the_server(chat: Path) -> None:
    with command(str(chat), "--port", "0", "--threads", "1", "--log-prompts") as (process, url, _):
        with httpx.Client(base_url=url, timeout=20) as client:
            for _ in range(40):  # 400 kB, and a pipe holds 64
                body = {"prompt": "x" * 10_000, "max_tokens": 1}
                assert client.post(TEXT, json=body).status_code == 400
            hanging = threading.Thread(target=_ask_for_long, args=(url,), daemon=True)
            hanging.start()
            assert eventually(lambda: 'running{model_name="llama-long"} 1.0' in client.get("/metrics").text)
        process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=url) as client:
            assert eventually(lambda: client.get("/health").status_code == 503)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1


def _ask_for_long(url: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4000, "logit_bias": {"2": -100}}
    with suppress(httpx.HTTPError):
        httpx.post(url + CHAT, json=body, timeout=60)


def test_lack_of_file_descriptors_is_logged_once_a_second(chat: Path) -> None:
    with command(str(chat), "--port", "0", "--threads", "1") as (process, url, _):
        assert httpx.get(url + "/health").status_code == 200
        limit = len(os.listdir(f"/proc/{process.pid}/fd")) + 5
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        address, began = httpx.URL(url), time.monotonic()
        held = [socket.create_connection((address.host, address.port)) for _ in range(12)]
        time.sleep(2.5)
        for connection in held:
            connection.close()
        assert httpx.get(url + "/health", timeout=20).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        seconds = time.monotonic() - began
    lines = said.splitlines()
    assert 1 <= sum("out of file descriptors" in line for line in lines) <= seconds + 1
    assert len(lines) < seconds + 4
    assert "Traceback" not in said
