"""A decoder's side of a comparison: one library behind a protocol of JSON lines on stdin and
stdout.

    python decoders.py genai        in that library's environment, which has none of this project

Those that need this project are in own_decoders.py.

    {"op": "convert", "source": path, "out": path, "options": {}}           -> {}
    {"op": "load", "model": path, "threads": n, "cpus": [], "options": {}}
        -> {"versions": {}, "flags": text}
    {"op": "generate", "prompts": [[ids]], "tokens": n, "beams": n}
        -> {"tokens": [[ids]], "first": s, "last": s, "seconds": s, "peak_bytes": n,
            "own_bytes": n, ...}

`prompts` has a prompt for each row, which are decoded together. `first` is when the first token of
every row is known, `last` when all tokens are, in seconds from the start of the request. Failed
requests return {"error": text}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

# Records tokens of a row when they become known. Arguments: number of the row, tokens.
Emit = Callable[..., None]
# Arguments: prompts, number of tokens, number of beams, emit. Generates exactly that many tokens,
# even after an end of sequence. With the option `schema`, generates JSON until its end. May return
# facts, such as `ended` if there are fewer tokens.
Generate = Callable[[list[list[int]], int, int, Emit], Any]
# Function that generates, and installed versions and the flags that were given.
Loaded = tuple[Generate, dict[str, Any]]
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
                generate, answer = load(request["model"], request["threads"], request["options"])
            elif request["op"] == "generate" and generate is not None:
                answer = _generate(
                    generate, request["prompts"], request["tokens"], request["beams"]
                )
            else:
                answer = {"error": f"this decoder cannot {request['op']} now"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _generate(
    generate: Generate, prompts: list[list[int]], count: int, beams: int
) -> dict[str, Any]:
    tokens: list[list[int]] = [[] for _ in prompts]
    first: list[float] = [0.0 for _ in prompts]
    last = 0.0

    def emit(row: int, *known: int) -> None:
        nonlocal last
        last = time.perf_counter() - began
        first[row] = first[row] or last
        tokens[row].extend(int(token) for token in known)

    began = time.perf_counter()
    facts = generate(prompts, count, beams, emit) or {}
    seconds = time.perf_counter() - began
    for row in tokens:
        if len(row) != count and not facts.get("ended"):
            raise RuntimeError(f"it generated {len(row)} tokens instead of {count}")
    return {
        "tokens": tokens,
        "first": max(first),
        "last": last,
        "seconds": seconds,
        **memory(),
        **facts,
    }


def memory(process: int | str = "self") -> dict[str, int]:
    """Return the memory of a process in bytes, as Linux counts it.

    `peak_bytes` is the largest resident set so far, and `own_bytes` the part of the present one
    that is no mapped file, such as weights that are read where they are.
    """
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    fields = {name: text for name, _, text in (line.partition(":") for line in lines)}
    names = {"peak_bytes": "VmHWM", "own_bytes": "RssAnon"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


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


def library_facts(flags: str, *distributions: str) -> dict[str, Any]:
    """Return the versions of distributions, and the flags."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime has several package names
            continue
    return {"versions": found, "flags": flags}


def only_prompt(prompts: list[list[int]], beams: int = 1) -> list[int]:
    """Return the only prompt. Raises ValueError for several rows or beams."""
    if len(prompts) > 1 or beams > 1:
        raise ValueError("this library is not measured with several rows or beams")
    return prompts[0]


def convert_genai(source: str, out: str, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source]
        command += ["-o", out, "-p", options["precision"], "-e", "cpu", "-c", cache]
        _run(command, "its model builder")


def load_genai(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    import numpy as np
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

    def generate(prompts: list[list[int]], count: int, beams: int, emit: Emit) -> Any:
        params = og.GeneratorParams(model)
        length = len(prompts[0]) + count
        rows = len(prompts)
        params.set_search_options(
            do_sample=False, max_length=length, min_length=0, batch_size=rows, num_beams=beams
        )
        if schema:
            params.set_guidance("json_schema", schema)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            for row, token in enumerate(generator.get_next_tokens()):
                emit(row, token)
            if schema and generator.is_done():
                return {"ended": True}
        return {}

    flags = f"models.builder -p {options['precision']} -e cpu, {json.dumps(session)}"
    return generate, library_facts(flags, "onnxruntime-genai", "onnxruntime")


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
    common = {"end_token": [len(vocabulary)], "max_batch_size": 0}
    ids = {token: number for number, token in enumerate(vocabulary)}

    def generate(prompts: list[list[int]], count: int, beams: int, emit: Emit) -> None:
        texts = [[vocabulary[token] for token in prompt] for prompt in prompts]
        given: dict[str, Any] = {**common, "beam_size": beams}

        def record(step: Any) -> bool:
            emit(step.batch_id, step.token_id)
            return False

        if beams == 1:  # beam search has no callback
            given["callback"] = record
        if seq2seq:
            lengths = {"max_decoding_length": count, "min_decoding_length": 0}
            found = engine.translate_batch(texts, max_input_length=0, **lengths, **given)
            for row, result in enumerate(found if beams > 1 else ()):
                emit(row, *(ids[token] for token in result.hypotheses[0]))
        else:
            # Read the prompt in one call, like all other decoders.
            lengths = {"max_length": count, "min_length": 0}
            engine.generate_batch(texts, include_prompt_in_result=False, **lengths, **given)

    flags = f"compute_type={options['compute_type']}, inter_threads=1, intra_threads={threads}"
    return generate, library_facts(flags, "ctranslate2")


def convert_llama_cpp(source: str, out: str, options: dict[str, Any]) -> None:
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    formats = {
        "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
        "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    }
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

    def generate(prompts: list[list[int]], count: int, beams: int, emit: Emit) -> Any:
        prompt = only_prompt(prompts, beams)
        model.reset()  # otherwise a prefix of the last prompt is not read again
        tokens = model.generate(prompt, temp=0.0, repeat_penalty=1.0, grammar=grammar)
        for token in islice(tokens, count):
            emit(0, token)
            if grammar is not None and token == model.token_eos():
                return {"ended": True}
        return {}

    # The instructions that it was built for.
    built = llama_cpp.llama_print_system_info().decode().rpartition("CPU : ")[2]
    used = [pair.strip().removesuffix(" = 1") for pair in built.split("|") if " = 1" in pair]
    flags = f"{' '.join(used)}, n_threads={threads}, n_ctx={context}"
    return generate, library_facts(flags, "llama-cpp-python")


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
    given: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if options.get("rows", 1) > 1:
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = 1  # GB
        batches = openvino_genai.ContinuousBatchingPipeline(path, scheduling, "CPU", given)
    else:
        lookup = {"prompt_lookup": True} if options.get("lookup") else {}
        pipeline = openvino_genai.LLMPipeline(path, "CPU", **given, **lookup)

    class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
        def __init__(self, emit: Emit) -> None:
            super().__init__()
            self.emit = emit

        def write(self, token: int | list[int]) -> Any:
            self.emit(0, *(token if isinstance(token, list) else [token]))
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], count: int, beams: int, emit: Emit) -> None:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=count,
            ignore_eos=True,
            do_sample=False,
        )
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        if options.get("rows", 1) > 1:
            handles = [
                batches.add_request(number, tensor, config) for number, tensor in enumerate(tensors)
            ]
            while batches.has_non_finished_requests():
                batches.step()
                for row, handle in enumerate(handles):
                    if handle.can_read():
                        for output in handle.read().values():
                            emit(row, *output.generated_ids)
            return
        if options.get("lookup"):  # of the last three tokens, as in its documentation
            config.num_assistant_tokens = options["lookup"]
            config.max_ngram_size = 3
        only_prompt(prompts, beams)
        pipeline.generate(tensors[0], config, Streamer(emit))

    flags = f"--weight-format {options['precision']}, INFERENCE_NUM_THREADS={threads}, defaults"
    return generate, library_facts(flags, "openvino", "openvino-genai", "optimum-intel")


def load_faster_whisper(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    """Load a CTranslate2 model of Whisper. Prompts are the path of a recording."""
    from faster_whisper import WhisperModel
    from faster_whisper.audio import decode_audio

    kind = options["compute_type"]
    model = WhisperModel(path, device="cpu", compute_type=kind, cpu_threads=threads, num_workers=1)

    def generate(prompts: list[Any], count: int, beams: int, emit: Emit) -> Any:
        sound = decode_audio(prompts[0])
        began = time.perf_counter()
        found, _ = model.transcribe(
            sound,
            language="en",
            beam_size=1,
            best_of=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
        )
        text = "".join(segment.text for segment in found)
        return {"ended": True, "text": text, "seconds": time.perf_counter() - began}

    return generate, library_facts(f"compute_type={kind}", "faster-whisper", "ctranslate2")


DECODERS: dict[str, tuple[Load, Convert | None]] = {
    "genai": (load_genai, convert_genai),
    "ctranslate2": (load_ctranslate2, convert_ctranslate2),
    "llama_cpp": (load_llama_cpp, convert_llama_cpp),
    "openvino": (load_openvino, convert_openvino),
    "faster_whisper": (load_faster_whisper, None),
}

if __name__ == "__main__":
    serve(*DECODERS[sys.argv[1]])
