"""transformers' generate, float32, with its KV cache: eager, compiled, or drafting with layers or text of its own."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from wire import Emit, Generate, serve, versions


class Streamer:
    """Receives tokens from `generate`; the first are those of the prompt."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.prompt = emit, True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
        else:
            self.emit(*value.flatten().tolist())

    def end(self) -> None:
        pass


def load(path: str, threads: int, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    torch.set_num_threads(threads)
    seq2seq = transformers.AutoConfig.from_pretrained(path).is_encoder_decoder
    loader = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = loader.from_pretrained(path, dtype=torch.float32).eval()
    return generator(model, options), {"versions": versions("torch", "transformers")}


def generator(model: Any, options: dict[str, Any]) -> Generate:
    """`options`: `compile`; `early_exit`, the layer after which drafts are made, for decoder-only models; `lookup`, the
    tokens of a draft from the prompt."""
    config = model.config
    settings = model.generation_config
    # Decoding goes on after an end of sequence, so that all write equally many tokens.
    settings.eos_token_id, settings.pad_token_id = None, 0
    # transformers' cache fails for T5 with a decoder deeper than the encoder.
    deeper = config.is_encoder_decoder and getattr(config, "num_decoder_layers", 0) > getattr(config, "num_layers", 0)
    given: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": not deeper}
    if options.get("compile"):
        given["cache_implementation"] = "static"
        model.forward = torch.compile(model.forward)
    if options.get("early_exit"):
        given["assistant_early_exit"] = options["early_exit"]

    if options.get("lookup"):
        given["prompt_lookup_num_tokens"] = options["lookup"]

    def generate(prompt: list[int], count: int, emit: Emit) -> None:
        ids = torch.tensor([prompt])
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            streamer=Streamer(emit),
            **given,
        )

    return generate


if __name__ == "__main__":
    serve(load)
