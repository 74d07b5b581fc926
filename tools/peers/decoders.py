"""A decoder's end of a comparison: one library behind a protocol of JSON lines on stdin and stdout.

    python decoders.py genai        in the environment of that library, which has nothing of this project

    {"op": "convert", "source": path, "out": path, "options": {}}              -> {}
    {"op": "load", "model": path, "threads": n, "cpus": [], "options": {}}     -> {"versions": {}}
    {"op": "generate", "prompt": [ids], "tokens": n}                           -> {"tokens": [ids], "times": [seconds],
                                                                                   "seconds": s, "peak_bytes": n, ...}

`times` are those at which each token was known, from the request on. What fails answers {"error": text}.
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
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

# Notes the time of a token, or of several that became known at once.
Emit = Callable[..., None]
# (prompt, how many tokens, emit): exactly that many tokens, an end of sequence among them or not; with an option
# `schema`, JSON of which the output must be, up to its end. May return facts: `ended` where there are fewer.
Generate = Callable[[list[int], int, Emit], Any]
# What generates, and installed versions.
Loaded = tuple[Generate, dict[str, str]]
# (path of the model, threads, options).
Load = Callable[[str, int, dict[str, Any]], Loaded]
# (source checkpoint, where to write, options).
Convert = Callable[[str, str, dict[str, Any]], None]


def serve(load: Load, convert: Convert | None = None) -> None:
    """Answer requests until stdin ends."""
    # Libraries print on stdout: that becomes stderr, and the answers go where it was.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    generate: Generate | None = None
    for line in sys.stdin:
        try:
            request, answer = json.loads(line), dict[str, Any]()
            if request["op"] == "convert" and convert is not None:
                convert(request["source"], request["out"], request["options"])
            elif request["op"] == "load":
                if request["cpus"] and hasattr(os, "sched_setaffinity"):
                    os.sched_setaffinity(0, request["cpus"])
                generate, answer["versions"] = load(request["model"], request["threads"], request["options"])
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
        raise RuntimeError(f"it gave {len(tokens)} tokens, {count} were asked for")
    return {"tokens": tokens, "times": times, "seconds": seconds, "peak_bytes": _peak_bytes(), **(facts or {})}


def _peak_bytes() -> int:
    """The most resident memory of this process. getrusage's figure begins with that of the parent process."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _versions(*distributions: str) -> dict[str, str]:
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime goes by other names too
            continue
    return found


def load_ours(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    """Load a bundle for the fields of a BenchSetting, or for beam search with so many `beams`, or a checkpoint for
    `{"checkpoint": True}`."""
    if options.get("checkpoint"):
        import torch

        from freeexport.checkpoints.checkpoint import open_checkpoint
        from freeexport.checkpoints.transformers_model import reference_model

        torch.set_num_threads(threads)
        model = reference_model(open_checkpoint(path))
        return transformers_generate(model, {}), _versions("torch", "transformers")
    if "beams" in options:
        from runtime import Session

        searching, given = Session(path, threads=threads, slots=1), {"mode": "full", "num_beams": options["beams"]}

        def search(prompt: list[int], count: int, emit: Emit) -> None:
            emit(*searching.generate(prompt, max_new_tokens=count, ignore_eos=True, **given).token_ids)

        return search, _versions("onnxruntime", "numpy")
    from freeexport.measure.bench import BenchSetting, decode, full_tokens, open_session

    setting = BenchSetting(**options)
    session = open_session(Path(path), setting, threads, "cpu")
    whole: dict[tuple[int, ...], tuple[int, ...]] = {}

    def generate(prompt: list[int], count: int, emit: Emit) -> dict[str, Any]:
        key = tuple(prompt)
        if setting.right is not None and len(whole.get(key, ())) < count:  # the warm-up round pays for it
            whole[key] = full_tokens(session, [prompt], count)[0]
        run = decode(session, setting, prompt, count, whole.get(key), emit)
        return {name: getattr(run, name) for name in ("exit_rate", "acceptance", "sync_sizes", "overhead", "predicted")}

    return generate, _versions("onnxruntime", "numpy")


def convert_ours(source: str, out: str, options: dict[str, Any]) -> None:
    """Write a checkpoint of any kind as a plain Hugging Face directory, without an exit's own parameters."""
    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.checkpoints.tokenizer_files import write_tokenizer
    from freeexport.checkpoints.transformers_model import reference_model

    checkpoint = open_checkpoint(source)
    reference_model(checkpoint).save_pretrained(out)
    write_tokenizer(checkpoint, Path(out))
    file = Path(out) / "tokenizer_config.json"
    if file.is_file():
        # tokenizer.json says all there is: no class of the model type's own is to change it.
        content = {**json.loads(file.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
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
    """`options`: `early_exit`, the layer to draft after; `lookup`, the tokens of a draft from the prompt."""
    import torch

    class Streamer:
        """Receives tokens from `generate`; the first are those of the prompt."""

        def __init__(self, emit: Emit) -> None:
            self.emit, self.prompt = emit, True

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt:
                self.emit(*value.flatten().tolist())
            self.prompt = False

        def end(self) -> None:
            pass

    config, settings = model.config, model.generation_config
    # Decoding goes on after an end of sequence, so that all write equally many tokens.
    settings.eos_token_id, settings.pad_token_id = None, 0
    # transformers' cache fails for T5 with a decoder deeper than the encoder.
    deeper = config.is_encoder_decoder and getattr(config, "num_decoder_layers", 0) > getattr(config, "num_layers", 0)
    given: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": not deeper}
    if options.get("early_exit"):
        given["assistant_early_exit"] = options["early_exit"]
    if options.get("lookup"):
        given["prompt_lookup_num_tokens"] = options["lookup"]

    def generate(prompt: list[int], count: int, emit: Emit) -> None:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, streamer=Streamer(emit), **given)

    return generate


def convert_genai(source: str, out: str, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out]
        command += ["-p", options["precision"], "-e", "cpu", "-c", cache]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    if done.returncode:
        raise RuntimeError(f"its model builder failed: {(done.stdout.strip().splitlines() or [''])[-1]}")


def load_genai(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    import onnxruntime_genai as og

    vocabulary = json.loads((Path(path) / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"]
    config = og.Config(path)
    session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    schema = options.get("schema")
    # Only the length ends a sequence. The id must be a token's: one that models hardly ever write.
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

    shared, own = (Path(path) / name for name in ("shared_vocabulary.json", "vocabulary.json"))
    vocabulary = json.loads((shared if shared.exists() else own).read_text(encoding="utf-8"))
    seq2seq = options["encoder_decoder"]
    kind = ctranslate2.Translator if seq2seq else ctranslate2.Generator
    given = {"device": "cpu", "compute_type": options["compute_type"], "inter_threads": 1, "intra_threads": threads}
    engine = kind(path, **given)
    # Only the length ends a sequence: no token has this id.
    common = {"beam_size": options.get("beams", 1), "end_token": [len(vocabulary)]}
    ids = {token: number for number, token in enumerate(vocabulary)}

    def generate(prompt: list[int], count: int, emit: Emit) -> None:
        texts = [[vocabulary[token] for token in prompt]]

        def noted(step: Any) -> bool:
            emit(step.token_id)
            return False

        if seq2seq:
            lengths = {"max_decoding_length": count, "min_decoding_length": 0, "max_input_length": 0}
            if common["beam_size"] > 1:  # which has no callback
                (found,) = engine.translate_batch(texts, **lengths, **common)
                emit(*(ids[token] for token in found.hypotheses[0]))
            else:
                engine.translate_batch(texts, **lengths, **common, callback=noted)
        else:
            # The prompt in one call, as in every other decoder.
            lengths = {"max_length": count, "min_length": 0, "include_prompt_in_result": False}
            engine.generate_batch(texts, **lengths, **common, callback=noted)

    return generate, _versions("ctranslate2")


def convert_llama_cpp(source: str, out: str, options: dict[str, Any]) -> None:
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    formats = {"f32": llama_cpp.LLAMA_FTYPE_ALL_F32, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
    params.ftype, params.allow_requantize = formats[options["convert_to"]], True
    target = str(Path(out) / "model.gguf").encode()
    if llama_cpp.llama_model_quantize(source.encode(), target, ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot write {source} as {options['convert_to']}")


def load_llama_cpp(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    import llama_cpp

    file = Path(path) / "model.gguf" if Path(path).is_dir() else Path(path)
    context = options.get("context", 2048)
    given: dict[str, Any] = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    if options.get("lookup"):
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        given["draft_model"] = LlamaPromptLookupDecoding(num_pred_tokens=options["lookup"])
    model = llama_cpp.Llama(str(file), **given)
    grammar = llama_cpp.LlamaGrammar.from_json_schema(options["schema"]) if options.get("schema") else None

    def generate(prompt: list[int], count: int, emit: Emit) -> Any:
        model.reset()  # or a prompt that begins like the last one is not read again
        for token in islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0, grammar=grammar), count):
            emit(token)
            if grammar is not None and token == model.token_eos():
                return {"ended": True}
        return {}

    return generate, _versions("llama-cpp-python")


def convert_openvino(source: str, out: str, options: dict[str, Any]) -> None:
    # As a module: the environment was moved after pip wrote the path of its Python into optimum-cli.
    export = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", source]
    # Groups that divide the sizes of small models, too; by default such layers would stay in 8 bits.
    given = ["--group-size", "64"] if options["precision"] == "int4" else []
    export += ["--task", "text-generation-with-past", "--weight-format", options["precision"], *given, out]
    done = subprocess.run(export, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"optimum-cli failed: {(done.stdout.strip().splitlines() or [''])[-1]}")


def load_openvino(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    import numpy as np
    import openvino
    import openvino_genai

    # The defaults of its documentation but for the threads: latency, a cache in 8 bits, activations quantized.
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
        config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        if lookup:  # of the last three tokens, as in its documentation
            config.num_assistant_tokens, config.max_ngram_size = options["lookup"], 3
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
