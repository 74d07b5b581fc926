"""llama.cpp through llama-cpp-python: a GGUF file as it is, or rounded to another format."""

from __future__ import annotations

import ctypes
import os
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
from wire import Emit, Generate, serve, versions

NAME = "model.gguf"
CONTEXT = 2048
FORMATS = {"f32": llama_cpp.LLAMA_FTYPE_ALL_F32, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def convert(source: str, out: str, options: dict[str, Any]) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FORMATS[options["convert_to"]]
    params.allow_requantize = True
    target = os.path.join(out, NAME).encode()
    if llama_cpp.llama_model_quantize(source.encode(), target, ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot write {source} as {options['convert_to']}")


def load(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    file = Path(path) / NAME if os.path.isdir(path) else Path(path)
    model = llama_cpp.Llama(str(file), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompt: list[int], count: int, emit: Emit) -> None:
        # Else a prompt that begins like the last one is not read again.
        model.reset()
        for token in islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), count):
            emit(token)

    return generate, {"versions": versions("llama-cpp-python")}


if __name__ == "__main__":
    serve(load, convert)
