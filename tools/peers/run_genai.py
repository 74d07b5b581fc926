"""onnxruntime-genai, on a model that its own builder makes from a Hugging Face directory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
from wire import Emit, Generate, serve, versions


def convert(source: str, out: str, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out]
        done = subprocess.run(
            [*command, "-p", options["precision"], "-e", "cpu", "-c", cache],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"its model builder failed: {(done.stdout.strip().splitlines() or [''])[-1]}")


def load(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    vocabulary = json.loads((Path(path) / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"]
    config = og.Config(path)
    session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    # Nothing is to end a sequence but its length. It must be a token: one that models hardly ever say.
    config.overlay(json.dumps({"model": {"eos_token_id": vocabulary - 1, "decoder": {"session_options": session}}}))
    model = og.Model(config)

    def generate(prompt: list[int], count: int, emit: Emit) -> None:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + count, min_length=0)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        for _ in range(count):
            generator.generate_next_token()
            emit(generator.get_next_tokens()[0])

    return generate, {"versions": versions("onnxruntime-genai", "onnxruntime")}


if __name__ == "__main__":
    serve(load, convert)
