"""CTranslate2, both architectures, converted from a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ctranslate2
from wire import Emit, Generate, serve, versions

UNQUANTIZED = "float32"


def convert(source: str, out: str, options: dict[str, Any]) -> None:
    from ctranslate2.converters import TransformersConverter

    kind = options["compute_type"]
    # The directory was made by who asks.
    TransformersConverter(source).convert(out, quantization=None if kind == UNQUANTIZED else kind, force=True)


def load(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    given = {"device": "cpu", "compute_type": options["compute_type"], "inter_threads": 1, "intra_threads": threads}
    shared, own = (Path(path) / name for name in ("shared_vocabulary.json", "vocabulary.json"))
    vocabulary = json.loads((shared if shared.exists() else own).read_text(encoding="utf-8"))
    engine, begin = (
        (ctranslate2.Translator(path, **given), _translate)
        if options["encoder_decoder"]
        else (ctranslate2.Generator(path, **given), _continue)
    )

    def generate(prompt: list[int], count: int, emit: Emit) -> None:
        def noted(step: Any) -> bool:
            emit(step.token_id)
            return False

        begin(engine, [vocabulary[token] for token in prompt], count, noted, [len(vocabulary)])

    return generate, {"versions": versions("ctranslate2")}


# Nothing ends a sequence but its length: `never` is an id that no token has.
def _translate(engine: Any, prompt: list[str], count: int, noted: Any, never: list[int]) -> None:
    engine.translate_batch(
        [prompt], beam_size=1, max_decoding_length=count, min_decoding_length=0, end_token=never, callback=noted
    )


def _continue(engine: Any, prompt: list[str], count: int, noted: Any, never: list[int]) -> None:
    engine.generate_batch(
        [prompt],
        beam_size=1,
        max_length=count,
        min_length=0,
        end_token=never,
        # The prompt in one call, as everyone reads it.
        include_prompt_in_result=False,
        callback=noted,
    )


if __name__ == "__main__":
    serve(load, convert)
