"""Ray Serve and Ray Data on a cluster of two nodes, started here: `nox -s clients -- tests/deploy`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from checkpoints import LONG, Bundles
from running_server import eventually

from freeexport.serving.server import listen
from runtime import Session

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "deploy" / "ray"
# Megabytes of shared memory are enough here, a busy machine starts slowly, and other programs take its memory.
STORE = {"object_store_memory": 80 << 20}
SLOW = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
    "RAY_raylet_start_wait_time_s": "120",
}


@pytest.fixture(scope="module")
def bundle8(bundle: Bundles) -> Path:
    return bundle(LONG, 1, capacity=4096, precision="int8")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SLOW, "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, SCRIPTS))))
        patch.syspath_prepend(str(SCRIPTS))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False, **STORE})
        cluster.add_node(num_cpus=4, **STORE)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def replicas() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "ray::ServeReplica" in process.name() or "ray::ServeReplica" in "".join(process.cmdline()):
                found.append(process)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def served(cluster: Any, bundle8: Path) -> Iterator[SimpleNamespace]:
    """Two replicas, one core each."""
    from ray import serve
    from ray_server import Arguments, build

    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    arguments = Arguments(bundle=bundle8, name="m", threads=1, min_replicas=2, max_replicas=2, deadline=100)
    serve.run(build(arguments))
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}", serve=serve, arguments=arguments, build=build)
    serve.shutdown()


@pytest.fixture(scope="module")
def expected(bundle8: Path) -> list[str]:
    with Session(bundle8, threads=1, slots=4) as session:
        return [each.text for each in session.generate([f"prompt {n}" for n in range(24)], max_new_tokens=60)]


def ask(url: str, number: int, tokens: int = 60) -> tuple[str, str]:
    """How a request ended, and its text. Every second one is a stream."""
    body = {"prompt": f"prompt {number}", "max_tokens": tokens, "stream": number % 2 == 1}
    text, ended = "", "cut"
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            if answer.status_code != 200:
                return f"status {answer.status_code}", answer.read().decode()
            if not body["stream"]:
                return "answered", json.loads(answer.read())["choices"][0]["text"]
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    ended = "answered"
                elif line.startswith("data: "):
                    text += json.loads(line[6:])["choices"][0]["text"]
    except httpx.RemoteProtocolError:
        return "broken stream", text
    return ended, text


def all_at_once(url: str, count: int = 24) -> list[tuple[str, str]]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: ask(url, number), range(count)))


def test_two_replicas_match_the_session_and_share_one_weight_file(
    served: SimpleNamespace, expected: list[str], bundle8: Path
) -> None:
    assert all_at_once(served.url) == [("answered", text) for text in expected]
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"] == "m"
    wrong = httpx.post(f"{served.url}/v1/completions", json={"prompt": "x", "tools": [1]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tools")
    weights = os.path.realpath(bundle8 / "weights.data")
    mapped = [{each.path for each in process.memory_maps()} for process in replicas()]
    assert len(mapped) == 2
    assert all(weights in paths for paths in mapped)


def start(cluster: Any, *arguments: Any, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    command = [sys.executable, str(SCRIPTS / "ray_batch.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stderr=stderr)


def batch(cluster: Any, *arguments: Any) -> tuple[int, str]:
    """The exit code of a whole job, and what it said."""
    with start(cluster, *arguments, stderr=subprocess.PIPE) as job:
        _, said = job.communicate()
    return job.returncode, said


def committed(output: Path) -> dict[str, bytes]:
    """Files in which the job says what is done."""
    files = (output / "_done").glob("*.parquet")
    return {path.name: path.read_bytes() for path in files if ".pending" not in path.name}


def rows(output: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    files = [path for path in output.iterdir() if path.suffix in (".parquet", ".json") and path.name[0] != "_"]
    return [
        row
        for path in files
        for row in (
            parquet.read_table(path).to_pylist()
            if path.suffix == ".parquet"
            else map(json.loads, path.read_text().splitlines())
        )
    ]


def test_killed_batch_job_resumes(cluster: Any, bundle8: Path, expected: list[str], tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    prompts = [*(f"prompt {number}" for number in range(24)), None, "x" * 5000]
    source, output = tmp_path / "prompts.parquet", tmp_path / "answers"
    parquet.write_table(pyarrow.table({"key": list(range(26)), "text": prompts}), source)
    job = [bundle8, source, output, "--id", "key", "--column", "text", "--max-new-tokens", 60, "--rows", 2]
    with start(cluster, *job) as first:
        assert eventually(lambda: len(committed(output)) > 1, 300)
        first.kill()
    kept = committed(output)
    assert len(rows(output)) < 26, "the job was done before it was killed"
    code, said = batch(cluster, *job)
    assert code == 0, said
    assert kept.items() <= committed(output).items()
    answers = {row["key"]: row for row in rows(output)}
    assert len(rows(output)) == len(answers) == 26
    assert [answers[number]["answer"] for number in range(24)] == expected
    assert answers[24]["error"] == "the prompt is None, no text"
    assert "5001 tokens" in answers[25]["error"]
