"""A tiny Whisper checkpoint with random weights, without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 300
END = 200
START = 201
FIRST = 211  # first timestamp
LANGUAGES = {"<|en|>": 202, "<|de|>": 203, "<|fr|>": 204}
SUPPRESSED = [*range(20, 60), START, 208, 209]
BEGIN = [7, END]
LAYERS = 3
POSITIONS = 50  # a window of 1 s
CAPACITY = 40


def write_whisper(path: Path, heads: int = 4) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        scale_embedding=True,  # transformers ignores it
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=48, decoder_ffn_dim=40, num_mel_bins=80, init_std=0.35,
        max_source_positions=POSITIONS, max_target_positions=CAPACITY, decoder_start_token_id=START, eos_token_id=END,
        pad_token_id=END, bos_token_id=END, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(path)
    generation = {
        "decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END, "bos_token_id": END,
        "no_timestamps_token_id": FIRST - 1, "prev_sot_token_id": 208, "is_multilingual": True,
        "lang_to_id": LANGUAGES, "task_to_id": {"translate": 205, "transcribe": 206}, "max_length": CAPACITY,
        "suppress_tokens": SUPPRESSED, "begin_suppress_tokens": BEGIN, "max_initial_timestamp_index": 10,
    }  # fmt: skip
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path
