"""The command `freeexport serve`, as it is run: signals, imports, and what is refused."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
from command_line import invoke
from running_server import ENDLESS, MESSAGES, command


def test_sigterm_under_load_finishes_requests_and_torch_is_never_imported(chat: Path, t5: Path) -> None:
    options = ("--name", "chat", "--name", "t5", "--port", "0", "--threads", "1", "--shutdown-timeout", "60")
    with command(str(chat), str(t5), *options) as (process, url, said):
        assert "serving chat, t5 on" in said[-1]
        assert (
            "/v1; chat: mode lossless: the tokens of mode full, with drafts from the text; t5: mode lossless"
            in said[-1]
        )
        body = {"model": "chat", "messages": MESSAGES, "max_tokens": 200, **ENDLESS}
        answers: list[Any] = []

        def ask(stream: bool) -> None:
            try:
                answers.append(httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": stream}, timeout=60))
            except httpx.HTTPError as error:
                answers.append(error)

        threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(8)]
        for thread in threads:
            thread.start()
        while httpx.get(f"{url}/metrics").text.count('num_requests_waiting{model_name="chat"} 4') == 0:
            assert not answers
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        out, err = process.communicate(timeout=30)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert sum("data: [DONE]" in answer.text for answer in answers) == 4
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["completion_tokens"] for line in lines] == [200] * 8
    assert process.returncode == 0
    assert err.splitlines()[-1].strip() == "imported"


def test_server_with_unread_output_still_terminates(chat: Path) -> None:
    with command(str(chat), "--port", "0", "--threads", "1") as (process, url, _):
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
        body = {"messages": MESSAGES, "max_tokens": 2}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def refused(*arguments: str, **variables: str) -> str:
    result = invoke("serve", *arguments, env=variables)
    assert result.exit_code == 1, result.output
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    return last


def test_port_in_use_is_reported_before_loading(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert refused(str(tmp_path / "missing"), "--port", port) == (
            f"error: port {port} of 127.0.0.1: Address already in use; choose another --port"
        )
    assert "choose another --host" in refused(str(tmp_path), "--host", "no.such.host.invalid", "--port", "0")


def test_unservable_bundles_are_named(tmp_path: Path, chat: Path) -> None:
    missing = refused("--port", "0")
    assert "no bundle is given" in missing
    assert set(re.findall(r"--[a-z-]+", missing)) <= set(re.findall(r"--[a-z-]+", invoke("serve", "--help-all").stdout))
    assert f"{tmp_path / 'missing'}" in refused(str(tmp_path / "missing"), "--port", "0")
    assert "two bundles are named 'llama-long'" in refused(str(chat), str(chat), "--port", "0")
    assert "two bundles are named 'a'" in refused(str(chat), str(chat), "--name", "a", "--name", "a")
    assert "3 names are given for 1 bundles" in refused(str(chat), *["--name", "a"] * 3)
    assert "cuda" in refused(str(chat), "--device", "cuda:0", "--port", "0")
    assert "threshold is 3.0" in refused(str(chat), "--threshold", "3")


def test_api_key_is_read_from_the_environment_and_never_shown(chat: Path) -> None:
    with command(str(chat), "--port", "0", "--threads", "1", FREEEXPORT_API_KEY="secret") as (process, url, said):
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert "secret" not in "".join([*said, *process.communicate(timeout=20)])
