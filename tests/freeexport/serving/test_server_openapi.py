"""The OpenAPI document; requests made at random from it, by schemathesis where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import settings
from profiles import SEARCH, TIMES
from running_server import Running

from freeexport.serving.openapi import POST, document
from freeexport.serving.parsing import HARMLESS, NEUTRAL
from freeexport.serving.routes import application
from freeexport.serving.service import ServerOptions, Service

# Beside the interpreter, whose folder an environment that is not active has not on its path.
PROGRAM = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_openapi_document_describes_every_path_and_reference() -> None:
    made = document()
    served = application(Service(ServerOptions([Path("bundle")]), print))
    paths = {re.sub(":path", "", route.path) for route in served.routes}  # type: ignore[attr-defined]
    assert set(made["paths"]) == paths
    schemas = made["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/(\w+)", str(made))) <= schemas.keys()
    for _, kind, _ in POST.values():
        assert set(schemas[kind.__name__]["properties"]) == {*kind.__struct_fields__, *NEUTRAL, *HARMLESS}
    assert "security" not in made
    assert document(guarded=True)["security"] == [{"key": []}]


@pytest.mark.parametrize(
    ("path", "asked", "field"),
    [
        ("/v1/completions", {"prompt": "go"}, "object"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "go"}]}, "object"),
        ("/v1/responses", {"model": "m", "input": "go"}, "sequence_number"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "go"}], "max_tokens": 9}, "type"),
    ],
)
def test_every_stream_event_matches_the_document(
    http: httpx.Client, path: str, asked: dict[str, Any], field: str
) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    operation = schemathesis.openapi.from_dict(http.get("/openapi.json").json())[path]["POST"]
    answer = http.post(path, json={**asked, "stream": True})
    assert answer.text.count("data: {") > 1, answer.text
    operation.validate_response(answer)
    altered = answer.text.replace(f'"{field}"', '"other"')
    changed = httpx.Response(200, headers=answer.headers, text=altered, request=answer.request)
    changed.elapsed = answer.elapsed
    with pytest.raises(Exception, match="SSE event"):
        operation.validate_response(changed)


@pytest.mark.hypothesis
@pytest.mark.skipif(PROGRAM is None, reason="needs schemathesis")
def test_no_generated_request_causes_a_server_error(server: Running, pytestconfig: pytest.Config) -> None:
    if settings.get_current_profile_name() != SEARCH:
        pytest.skip("takes a minute: --hypothesis-profile search")
    command = [str(PROGRAM), "run", f"{server.url}/openapi.json", "--no-color", "--generation-database", "none"]
    command += ["--seed", pytestconfig.getoption("--hypothesis-seed") or "0", "--max-examples", str(TIMES)]
    command += ["--checks", CHECKS, "--suppress-health-check", "all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:]
