"""What a session or transformers decodes on a device, and how fast: for the steps of tools/gpu/check.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from runtime import Session

PROMPTS = ("the cat sat on the mat", "a quick brown fox", "it was the best of times", "light travels faster than sound")


def decoded(path: Path, device: str) -> list[tuple[Sequence[int], Sequence[bool]]]:
    with Session(path, device=device) as session:
        results = [session.generate(prompt, max_new_tokens=48, threshold=0.5) for prompt in PROMPTS]
    return [(result.token_ids, result.exited) for result in results]


def equal(got: Sequence[Any], want: Sequence[Any]) -> dict[str, float]:
    """Shares of prompts with the same tokens, and with the same exits."""
    pairs = list(zip(got, want, strict=True))
    return {
        "tokens": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
        "exits": sum(a[1] == b[1] for a, b in pairs) / len(pairs),
    }


def speeds(session: Session, tokens: int) -> tuple[dict[str, float], list[Sequence[int]]]:
    """Tokens/s by mode, the median of three runs after one, and the tokens of mode free."""
    modes: dict[str, dict[str, Any]] = {
        "full": {"mode": "full"},
        "free": {"threshold": 0.5},
        "exits": {"threshold": 0.0},
    }
    found, tokens_of = {}, list[Sequence[int]]()
    for name, options in modes.items():
        times = []
        for _ in range(4):
            began = time.perf_counter()
            result = session.generate(PROMPTS[0], max_new_tokens=tokens, ignore_eos=True, **options)
            times.append(time.perf_counter() - began)
        found[f"{name}, tokens/s"] = round(len(result.token_ids) / median(times[1:]), 1)
        tokens_of.append(result.token_ids)
    return found, tokens_of


def transformers_speeds(path: Path, tokens: int) -> dict[str, Any]:
    """Tokens/s of transformers' generate, and of the same compiled, greedy, one prompt at a time."""
    import torch
    import transformers

    device = torch_device()
    where = "cpu" if device.startswith("none") else "cuda"
    config = transformers.AutoConfig.from_pretrained(path)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    dtype = torch.float16 if where == "cuda" else torch.float32
    model = kind.from_pretrained(path, dtype=dtype).eval().to(where)
    inputs = torch.tensor([list(range(5, 25))], device=where)
    # transformers' own cache fails where a T5 decoder is deeper than its encoder.
    deeper = getattr(config, "num_decoder_layers", 0) or 0
    model.generation_config.use_cache = deeper <= getattr(config, "num_layers", deeper)
    found: dict[str, Any] = {"device": device, "type": str(dtype), "cache": model.generation_config.use_cache}
    found["transformers"] = _torch_speed(model, inputs, tokens)
    if where == "cpu":
        found["torch.compile"] = "not measured: only where torch sees a GPU"
        return found
    try:
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward, mode="reduce-overhead")
        found["torch.compile"] = _torch_speed(model, inputs, tokens)
    except Exception as error:  # whatever a compiler raises is what there is to report
        found["torch.compile"] = f"failed: {str(error).splitlines()[0][:200]}"
    return found


def _torch_speed(model: Any, inputs: Any, tokens: int) -> float:
    """Tokens/s, the median of three runs after two."""
    import torch

    times = []
    for _ in range(5):
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1)
        if inputs.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return round(tokens / median(times[2:]), 1)


def torch_device() -> str:
    """The card that torch sees, or why none."""
    try:
        import torch
    except ImportError as error:
        return f"none: {error}"
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none: torch.cuda.is_available() is False"
