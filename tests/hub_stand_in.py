"""A stand-in of the Hugging Face hub's HTTP interface: downloads, repositories, branches, commits and LFS uploads.

It answers what huggingface_hub's hf_hub_download, create_repo, create_branch, model_info and create_commit request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    """A repository: the commit of each branch, and the files of each commit."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Add a commit with changed files to a branch, and return its hash."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = {**before, **files}
        self.branches[branch] = oid
        return oid


class HubStandIn(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: Its repositories by name.
        requests: Method, path and Range of each request.
        cut: Number of responses that will be cut in the middle of a body of more than 1000 bytes.
        altered: Name of a file that is sent with another first byte.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut = 0
        self.altered = ""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, directory: Path, branch: str = "main", private: bool = False) -> Repository:
        """Add the files of a directory."""
        found = self.repositories.setdefault(name, Repository(private))
        found.commit(branch, {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()})
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that went away."""


@contextmanager
def hub_stand_in(monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = TOKEN) -> Iterator[HubStandIn]:
    """Context manager: run the server, and point huggingface_hub in this process to it and to an empty cache."""
    from huggingface_hub import constants

    with HubStandIn() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
        try:
            yield server
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    def do_HEAD(self) -> None:
        self._download(body=False)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            found = self._repository(match[1], match[2] or "main")
            if found is not None:
                files = found[1]
                card = re.search(r"^license: (.*)$", files.get("README.md", b"").decode(), re.MULTILINE)
                data = {} if card is None else {"license": card[1]}
                self._json({"id": match[1], "sha": found[0], "cardData": data, "siblings": [], "tags": []})
            return
        self._download(body=True)

    def do_PUT(self) -> None:
        self._note()
        self.server.uploads[self.path.rpartition("/")[2]] = self._body()
        self._send(200, b"")

    def do_POST(self) -> None:
        self._note()
        path = urlsplit(self.path).path
        body = self._body()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._error(401, None, "Invalid username or password.")
        elif path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            answer = {"url": f"{self.server.url}/{name}", "id": name, "name": name}
            if name in self.server.repositories:
                self._json(answer, 409)
                return
            private = given.get("private") is True or given.get("visibility") == "private"
            self.server.repositories[name] = Repository(private)
            self.server.repositories[name].commit("main", {})
            self._json(answer)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = self.server.repositories[match[1]]
            exists = match[2] in repository.branches
            repository.branches.setdefault(match[2], repository.branches["main"])
            self._error(409, None, "exists") if exists else self._json({})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            lfs = ("onnx", "data", "safetensors")
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(lfs) else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    **each,
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}", "header": {}}},
                }
                for each in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            changed: dict[str, bytes] = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    changed[value["path"]] = self.server.uploads[value["oid"]]
            oid = self.server.repositories[match[1]].commit(unquote(match[2]), changed)
            self._json({"commitUrl": f"{self.server.url}/{match[1]}/commit/{oid}", "commitOid": oid})
        else:
            self._error(404, None, f"no {path}")

    def _download(self, body: bool) -> None:
        self._note()
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(urlsplit(self.path).path))
        if match is None:
            self._error(404, None, f"no {self.path}")
            return
        found = self._repository(match[1], match[2])
        if found is None:
            return
        oid, files = found
        if match[3] not in files:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": oid})
            return
        content = files[match[3]]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if match[3] == self.server.altered:
            content = bytes([content[0] ^ 1]) + content[1:]
        given = self.headers.get("range")
        if given is None or not body:
            self._send(200, content, headers, body)
            return
        start = int(given.removeprefix("bytes=").partition("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], headers)

    def _repository(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit and its files. Answers with an error if there is none."""
        known = self.headers.get("authorization") == f"Bearer {TOKEN}"
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not known):
            # As the hub: without a token, it does not tell whether a private one exists.
            self._error(404 if known else 401, "RepoNotFound", "Repository not found")
            return None
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return oid, repository.commits[oid]

    def _note(self) -> None:
        self.server.requests.append((self.command, urlsplit(self.path).path, self.headers.get("range")))

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        named = {} if code is None else {"X-Error-Code": code}
        content = json.dumps({"error": message}).encode()
        self._send(status, content, {**named, "X-Error-Message": message, **(headers or {})}, self.command != "HEAD")

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if self.server.cut and self.command == "GET" and len(content) > 1000:
            self.server.cut -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)
