"""A decoder's side of a comparison: one library behind a protocol of JSON lines on stdin and
stdout.

    python decoders.py genai        in that library's environment, which has none of this project

    {"op": "convert", "source": path, "out": path, "options": {}}           -> {}
    {"op": "load", "model": path, "threads": n, "cpus": [], "options": {}}  -> {"versions": {}}
    {"op": "generate", "prompt": [ids], "tokens": n}
        -> {"tokens": [ids], "times": [seconds], "seconds": s, "peak_bytes": n, ...}

`times` are the seconds from the start of the request until each token is known. Failed requests
return {"error": text}.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

# Records the time of a token, or of several that became known together.
Emit = Callable[..., None]
# Arguments: prompt, number of tokens, emit. Generates exactly that many tokens, even after an end
# of sequence. With the option `schema`, generates JSON until its end. May return facts, such as
# `ended` if there are fewer tokens.
Generate = Callable[[list[int], int, Emit], Any]
# Function that generates, and installed versions.
Loaded = tuple[Generate, dict[str, str]]
# Arguments: path of the model, threads, options.
Load = Callable[[str, int, dict[str, Any]], Loaded]
# Arguments: source checkpoint, output path, options.
Convert = Callable[[str, str, dict[str, Any]], None]


def serve(load: Load, convert: Convert | None = None) -> None:
    """Answer requests until stdin ends."""
    # Libraries print to stdout, so redirect it to stderr and keep the original for answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    generate: Generate | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer = dict[str, Any]()
            if request["op"] == "convert" and convert is not None:
                convert(request["source"], request["out"], request["options"])
            elif request["op"] == "load":
                if request["cpus"] and hasattr(os, "sched_setaffinity"):
                    os.sched_setaffinity(0, request["cpus"])
                generate, answer["versions"] = load(
                    request["model"], request["threads"], request["options"]
                )
            elif request["op"] == "generate" and generate is not None:
                answer = _generate(generate, request["prompt"], request["tokens"])
            else:
                answer = {"error": f"this decoder cannot {request['op']} now"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _generate(generate: Generate, prompt: list[int], count: int) -> dict[str, Any]:
    tokens: list[int] = []
    times: list[float] = []

    def emit(*known: int) -> None:
        tokens.extend(int(token) for token in known)
        times.extend([time.perf_counter() - began] * len(known))

    began = time.perf_counter()
    facts = generate(prompt, count, emit)
    seconds = time.perf_counter() - began
    if len(tokens) != count and not (facts or {}).get("ended"):
        raise RuntimeError(f"it generated {len(tokens)} tokens instead of {count}")
    return {
        "tokens": tokens,
        "times": times,
        "seconds": seconds,
        "peak_bytes": _peak_bytes(),
        **(facts or {}),
    }


def _peak_bytes() -> int:
    """Return this process's peak resident memory. getrusage starts from the parent's peak."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _run(command: list[str], name: str) -> None:
    """Run a command. Raises RuntimeError with its last line of output."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [""]
        raise RuntimeError(f"{name} failed: {lines[-1]}")


def _versions(*distributions: str) -> dict[str, str]:
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime has several package names
            continue
    return found


def load_ours(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    """Load a bundle or a checkpoint.

    `options` are the fields of a Setting, `beams` for a beam search with this width, or
    `{"checkpoint": True}`.
    """
    if options.get("checkpoint"):
        import torch

        from freeexport.checkpoints.checkpoint import open_checkpoint
        from freeexport.checkpoints.transformers_model import reference_model

        torch.set_num_threads(threads)
        model = reference_model(open_checkpoint(path))
        return transformers_generate(model, {}), _versions("torch", "transformers")
    from runtime import Session

    if "beams" in options:
        beam_session = Session(path, threads=threads, slots=1)
        beams = options["beams"]

        def search(prompt: list[int], count: int, emit: Emit) -> None:
            result = beam_session.generate(
                prompt,
                max_new_tokens=count,
                ignore_eos=True,
                mode="full",
                num_beams=beams,
            )
            emit(*result.token_ids)

        return search, _versions("onnxruntime", "numpy")
    from freeexport.evaluate.measure import decode
    from freeexport.evaluate.settings import Setting

    setting = Setting(**options)
    session = Session(path, threads=threads, slots=1)

    def generate(prompt: list[int], count: int, emit: Emit) -> dict[str, Any]:
        found = decode(session, setting, prompt, count, emit)
        names = ("exited", "acceptance", "overhead")
        return {"calls": asdict(found["calls"]), **{name: found[name] for name in names}}

    return generate, _versions("onnxruntime", "numpy")


def convert_ours(source: str, out: str, options: dict[str, Any]) -> None:
    """Write a checkpoint of any format as a plain Hugging Face directory, without its exit."""
    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.checkpoints.tokenizer_files import write_tokenizer
    from freeexport.checkpoints.transformers_model import reference_model

    checkpoint = open_checkpoint(source)
    reference_model(checkpoint).save_pretrained(out)
    write_tokenizer(checkpoint, Path(out))
    file = Path(out) / "tokenizer_config.json"
    if file.is_file():
        # tokenizer.json is complete, and the model type's own class would change it.
        content = json.loads(file.read_text(encoding="utf-8"))
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def load_transformers(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    import torch
    import transformers

    torch.set_num_threads(threads)
    seq2seq = transformers.AutoConfig.from_pretrained(path).is_encoder_decoder
    loader = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = loader.from_pretrained(path, dtype=torch.float32).eval()
    return transformers_generate(model, options), _versions("torch", "transformers")


def transformers_generate(model: Any, options: dict[str, Any]) -> Generate:
    """Return a function that generates with a model.

    `options` may have `early_exit`, the layer that drafts, or `lookup`, the length of drafts from
    the prompt.
    """
    import torch

    class Streamer:
        """Receives tokens from `generate`, the prompt's first."""

        def __init__(self, emit: Emit) -> None:
            self.emit = emit
            self.prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt:
                self.emit(*value.flatten().tolist())
            self.prompt = False

        def end(self) -> None:
            pass

    config = model.config
    settings = model.generation_config
    # Continue after an end of sequence, so that all decoders generate equally many tokens.
    settings.eos_token_id = None
    settings.pad_token_id = 0
    # transformers' cache fails for T5 with a decoder deeper than the encoder.
    decoder_layers = getattr(config, "num_decoder_layers", 0)
    deeper = config.is_encoder_decoder and decoder_layers > getattr(config, "num_layers", 0)
    given: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": not deeper}
    if options.get("early_exit"):
        given["assistant_early_exit"] = options["early_exit"]
    if options.get("lookup"):
        given["prompt_lookup_num_tokens"] = options["lookup"]

    def generate(prompt: list[int], count: int, emit: Emit) -> None:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=count,
            streamer=Streamer(emit),
            **given,
        )

    return generate


def convert_genai(source: str, out: str, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source]
        command += ["-o", out, "-p", options["precision"], "-e", "cpu", "-c", cache]
        _run(command, "its model builder")


def load_genai(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    import onnxruntime_genai as og

    content = json.loads((Path(path) / "genai_config.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab_size"]
    config = og.Config(path)
    session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    schema = options.get("schema")
    # Only the length ends a sequence. The id must be in the vocabulary: use one that models hardly
    # ever generate.
    end = {} if schema else {"eos_token_id": vocabulary - 1}
    config.overlay(json.dumps({"model": {**end, "decoder": {"session_options": session}}}))
    model = og.Model(config)

    def generate(prompt: list[int], count: int, emit: Emit) -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + count, min_length=0)
        if schema:
            params.set_guidance("json_schema", schema)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        for _ in range(count):
            generator.generate_next_token()
            emit(generator.get_next_tokens()[0])
            if schema and generator.is_done():
                return {"ended": True}
        return {}

    return generate, _versions("onnxruntime-genai", "onnxruntime")


def convert_ctranslate2(source: str, out: str, options: dict[str, Any]) -> None:
    from ctranslate2.converters import TransformersConverter

    kind = None if options["compute_type"] == "float32" else options["compute_type"]
    TransformersConverter(source).convert(out, quantization=kind, force=True)


def load_ctranslate2(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    import ctranslate2

    file = Path(path) / "shared_vocabulary.json"
    if not file.exists():
        file = Path(path) / "vocabulary.json"
    vocabulary = json.loads(file.read_text(encoding="utf-8"))
    seq2seq = options["encoder_decoder"]
    kind = ctranslate2.Translator if seq2seq else ctranslate2.Generator
    given = {
        "device": "cpu",
        "compute_type": options["compute_type"],
        "inter_threads": 1,
        "intra_threads": threads,
    }
    engine = kind(path, **given)
    # Only the length ends a sequence, because no token has this id.
    common = {"beam_size": options.get("beams", 1), "end_token": [len(vocabulary)]}
    ids = {token: number for number, token in enumerate(vocabulary)}

    def generate(prompt: list[int], count: int, emit: Emit) -> None:
        texts = [[vocabulary[token] for token in prompt]]

        def record(step: Any) -> bool:
            emit(step.token_id)
            return False

        if seq2seq:
            lengths = {
                "max_decoding_length": count,
                "min_decoding_length": 0,
                "max_input_length": 0,
            }
            if common["beam_size"] > 1:  # beam search has no callback
                (found,) = engine.translate_batch(texts, **lengths, **common)
                emit(*(ids[token] for token in found.hypotheses[0]))
            else:
                engine.translate_batch(texts, **lengths, **common, callback=record)
        else:
            # Read the prompt in one call, like all other decoders.
            lengths = {"max_length": count, "min_length": 0, "include_prompt_in_result": False}
            engine.generate_batch(texts, **lengths, **common, callback=record)

    return generate, _versions("ctranslate2")


def convert_llama_cpp(source: str, out: str, options: dict[str, Any]) -> None:
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    formats = {"f32": llama_cpp.LLAMA_FTYPE_ALL_F32, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
    params.ftype = formats[options["convert_to"]]
    params.allow_requantize = True
    target = str(Path(out) / "model.gguf").encode()
    if llama_cpp.llama_model_quantize(source.encode(), target, ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot write {source} as {options['convert_to']}")


def load_llama_cpp(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    import llama_cpp

    file = Path(path) / "model.gguf" if Path(path).is_dir() else Path(path)
    context = options.get("context", 2048)
    given: dict[str, Any] = {
        "n_ctx": context,
        "n_threads": threads,
        "n_threads_batch": threads,
        "verbose": False,
    }
    if options.get("lookup"):
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        given["draft_model"] = LlamaPromptLookupDecoding(num_pred_tokens=options["lookup"])
    model = llama_cpp.Llama(str(file), **given)
    grammar = None
    if options.get("schema"):
        grammar = llama_cpp.LlamaGrammar.from_json_schema(options["schema"])

    def generate(prompt: list[int], count: int, emit: Emit) -> Any:
        model.reset()  # otherwise a prefix of the last prompt is not read again
        tokens = model.generate(prompt, temp=0.0, repeat_penalty=1.0, grammar=grammar)
        for token in islice(tokens, count):
            emit(token)
            if grammar is not None and token == model.token_eos():
                return {"ended": True}
        return {}

    return generate, _versions("llama-cpp-python")


def convert_openvino(source: str, out: str, options: dict[str, Any]) -> None:
    # Run as a module, because the script optimum-cli has the path before the environment was moved.
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    command += ["--model", source, "--task", "text-generation-with-past"]
    command += ["--weight-format", options["precision"]]
    if options["precision"] == "int4":
        # Groups that also divide the layers of small models, which otherwise stay in 8 bits.
        command += ["--group-size", "64"]
    _run([*command, out], "optimum-cli")


def load_openvino(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    import numpy as np
    import openvino
    import openvino_genai

    # Defaults of its documentation, except for threads: optimized for latency, 8-bit cache,
    # quantized activations.
    lookup = {"prompt_lookup": True} if options.get("lookup") else {}
    pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads, **lookup)

    class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
        def __init__(self, emit: Emit) -> None:
            super().__init__()
            self.emit = emit

        def write(self, token: int | list[int]) -> Any:
            self.emit(*(token if isinstance(token, list) else [token]))
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def generate(prompt: list[int], count: int, emit: Emit) -> None:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=count,
            ignore_eos=True,
            do_sample=False,
        )
        if lookup:  # of the last three tokens, as in its documentation
            config.num_assistant_tokens = options["lookup"]
            config.max_ngram_size = 3
        pipeline.generate(openvino.Tensor(np.array([prompt], np.int64)), config, Streamer(emit))

    return generate, _versions("openvino", "openvino-genai", "optimum-intel")


DECODERS: dict[str, tuple[Load, Convert | None]] = {
    "ours": (load_ours, convert_ours),
    "transformers": (load_transformers, None),
    "genai": (load_genai, convert_genai),
    "ctranslate2": (load_ctranslate2, convert_ctranslate2),
    "llama_cpp": (load_llama_cpp, convert_llama_cpp),
    "openvino": (load_openvino, convert_openvino),
}

if __name__ == "__main__":
    serve(*DECODERS[sys.argv[1]])
