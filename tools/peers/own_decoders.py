"""Our bundles, and transformers, behind the protocol of decoders.py. They run in this environment.

python -m tools.peers.own_decoders ours
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.peers.decoders import Convert, Emit, Load, Loaded, library_facts, only_prompt, serve


def load_ours(path: str, threads: int, options: dict[str, Any]) -> Loaded:
    """Load a bundle.

    `options` may have `rows`, the maximum number of rows at once, `context`, the positions of a
    row, `lookup` to draft from the text, and `schema`, a JSON schema of the output.
    """
    # Only what an application imports: the time of imports is in the first token of a process.
    from runtime import Session
    from runtime.engines import kernels
    from runtime.requests.stream import Stream

    given: dict[str, Any] = {"mode": "full", "ignore_eos": True}
    if options.get("lookup"):
        given.update(mode="lossless", drafts="lookup")
    if schema := options.get("schema"):
        given.update(json_schema=json.loads(schema), ignore_eos=False)
    session = Session(
        path,
        threads=threads,
        slots=options.get("rows", 1),
        capacity=options.get("context"),
        draft_memory_mb=0,
        prefix_cache_mb=0,
    )

    def generate(prompts: list[list[int]], count: int, beams: int, emit: Emit) -> Any:
        if beams > 1:  # beam search does not stream
            result = session.generate(
                only_prompt(prompts), max_new_tokens=count, num_beams=beams, **given
            )
            emit(0, *result.token_ids)
            return {}
        streams = [session.stream(prompt, max_new_tokens=count, **given) for prompt in prompts]

        def follow(row: int, stream: Stream) -> None:
            for token in stream:
                emit(row, token.id)

        if len(streams) == 1:
            follow(0, streams[0])
            return {"ended": streams[0].result.finish_reason == "eos"} if schema else {}
        with ThreadPoolExecutor(len(streams)) as pool:
            list(pool.map(follow, range(len(streams)), streams))
        return {}

    used = "no kernels" if kernels.missing() else f"kernels for {kernels.instructions()}"
    flags = f"mode {given['mode']}, {used}"
    return generate, library_facts(flags, "freeexport", "onnxruntime", "numpy")


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
    """Load a checkpoint of any format with transformers, in fp32. Needs this project."""
    import torch

    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.checkpoints.transformers_model import reference_model

    torch.set_num_threads(threads)
    model: Any = reference_model(open_checkpoint(path))

    class Streamer:
        """Receives tokens from `generate`, the prompt's first."""

        def __init__(self, emit: Emit) -> None:
            self.emit = emit
            self.prompt = True

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt:
                self.emit(0, *value.flatten().tolist())
            self.prompt = False

        def end(self) -> None:
            pass

    config: Any = model.config
    settings: Any = model.generation_config
    # Continue after an end of sequence, so that all decoders generate equally many tokens.
    settings.eos_token_id = None
    settings.pad_token_id = 0
    # transformers' cache fails for T5 with a decoder deeper than the encoder.
    decoder_layers = getattr(config, "num_decoder_layers", 0)
    deeper = config.is_encoder_decoder and decoder_layers > getattr(config, "num_layers", 0)

    def generate(prompts: list[list[int]], count: int, beams: int, emit: Emit) -> None:
        ids = torch.tensor([only_prompt(prompts)])
        found: Any = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=beams,
            use_cache=not deeper,
            streamer=Streamer(emit) if beams == 1 else None,
        )
        if beams > 1:
            emit(0, *found[0, -count:].tolist())

    flags = f"eager, fp32, torch.set_num_threads({threads})"
    return generate, library_facts(flags, "torch", "transformers")


DECODERS: dict[str, tuple[Load, Convert | None]] = {
    "ours": (load_ours, convert_ours),
    "transformers": (load_transformers, None),
}

if __name__ == "__main__":
    serve(*DECODERS[sys.argv[1]])
