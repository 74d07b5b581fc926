"""Forms with a sound: their size is bounded, and none of them holds up the others."""

from __future__ import annotations

import time

import httpx
import pytest
from running_server import Running, status
from test_server_hostile import SOON, health_watched

from freeexport.serving.errors import ApiError
from freeexport.serving.transcriptions import LARGEST_TEXT, MOST_PARTS, form_fields

KIND = "multipart/form-data; boundary=line"
PATH = "/v1/audio/transcriptions"


def part(name: str, content: bytes, more: str = "") -> bytes:
    return f'--line\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"


def test_form_fields_are_read() -> None:
    body = part("file", b"\r\n--lin\0", '; filename="a.wav"') + part("language", "d\u00e9".encode()) + b"--line--\r\n"
    assert form_fields(KIND, b"preamble\r\n" + body) == {"file": b"\r\n--lin\0", "language": "d\u00e9".encode()}
    assert form_fields('multipart/form-data; boundary="line"', body[: -len(b"--line--\r\n")]) != {}
    lists = part("a[]", b"1") + part("a[]", b"2") + b"--line--"
    assert form_fields(KIND, lists) == {"a[]": b"1\n2"}
    assert form_fields(KIND, b"--line--") == form_fields(KIND, b"") == {}


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("application/json", b"{}", "not a form"),
        ("multipart/form-data", b"", "not a form"),
        (KIND, part("a", b"1") + part("a", b"2") + b"--line--", "'a' is repeated"),
        (KIND, b"--line\r\n\r\nx\r\n--line--", "has no name"),
        (KIND, b"--line\r\nx" + b"y" * 10_000 + b'; name="a"\r\n\r\nx\r\n--line--', "has no name"),
        (KIND, b"".join(part(f"f{n}", b"") for n in range(MOST_PARTS + 1)) + b"--line--", "more than 32 fields"),
        (KIND, part("a[]", b"") * (MOST_PARTS + 1) + b"--line--", "more than 32 fields"),
        (KIND, part("prompt", b"x" * (LARGEST_TEXT + 1)) + b"--line--", "or 65536 bytes beside the file"),
    ],
)
def test_invalid_forms_are_refused(kind: str, body: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        form_fields(kind, body)
    assert caught.value.status == 400


def test_form_with_a_million_fields_is_refused_quickly() -> None:
    body = b"".join(part(f"f{n}", b"") for n in range(200_000))
    hostile = b"--line" * 2_000_000
    head = "multipart/form-data; x=" + '"' * 30_000 + ";" * 30_000
    began = time.thread_time()
    for kind in (KIND, head):
        with pytest.raises(ApiError):
            form_fields(kind, body)
    assert form_fields(KIND, hostile) == {}
    assert time.thread_time() - began < 0.3


def test_text_server_refuses_audio_before_the_upload(server: Running) -> None:
    connection = server.send(
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {KIND}\r\nContent-Length: 60000000\r\n\r\n".encode()
    )
    connection.settimeout(5)
    answer = b""
    while not answer.endswith(b"}}"):  # head and body may come apart
        piece = connection.recv(1 << 16)
        assert piece, answer
        answer += piece
    connection.close()
    assert status(answer) == 400
    assert b"no served model accepts speech" in answer


def test_form_with_many_fields_does_not_delay_others(server: Running) -> None:
    body = b"".join(part(f"f{n}", b"") for n in range(500_000)) + b"--line--"
    for _ in range(3):
        with health_watched(server) as took:
            answer = httpx.post(server.url + PATH, content=body, headers={"Content-Type": KIND}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        if max(took) < SOON:
            return
    pytest.fail(f"/health took {max(took):.2f} s")
