"""A T5 for grapheme to phoneme before training: a tokenizer of letters and phonemes, and a configuration.

    python -m tools.data.g2p_tokenizer models/g2p-init --d-model 192 --layers 2 --decoder-layers 8

One token a letter, one a phoneme, one for the task prefix. Letters are lower case and phonemes upper case, so one
tokenizer reads inputs and targets; decoding writes phonemes between spaces. The files need no class of their own:
AutoTokenizer loads them on transformers 4.57 and 5, and `freeexport train --from-config` begins with random weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import click
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from freeexport.system.output import output_directory
from tools.data.g2p import PREFIX, SEPARATOR
from tools.data.splits import run

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
PHONEMES = (
    *("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"),
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N"),
    *("NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"),
)
MARKER = "config.json"


@dataclass(frozen=True)
class Sizes:
    """A T5: `layers` in the encoder, `decoder_layers` in the decoder; `heads` of width d_model / heads."""

    d_model: int = 192
    d_ff: int = 512
    heads: int = 4
    layers: int = 2
    decoder_layers: int = 8


def vocabulary() -> list[str]:
    """Tokens in the order of their ids."""
    return [PAD, EOS, UNKNOWN, PREFIX, " ", "'", *ascii_lowercase, SEPARATOR, *PHONEMES]


def build_tokenizer() -> Tokenizer:
    """Letters and phonemes as tokens, EOS at the end; what is neither, as a digit, is unknown."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, UNKNOWN)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A space between phonemes only separates them; one between letters is a token.
            pre_tokenizers.Split(Regex(r"(?<=[A-Z012|]) +(?=[A-Z|])"), "removed"),
            pre_tokenizers.Split(Regex(rf"\A{PREFIX}|[A-Z]+[012]?|[\s\S]"), "isolated"),
        ]
    )
    # No decoder: tokens are then joined by spaces, which is how targets are written.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    return tokenizer


def config(sizes: Sizes, vocab_size: int) -> dict[str, Any]:
    """config.json of a T5 whose head shares the embedding's weights."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": vocab_size,
        "d_model": sizes.d_model,
        "d_kv": sizes.d_model // sizes.heads,
        "d_ff": sizes.d_ff,
        "num_heads": sizes.heads,
        "num_layers": sizes.layers,
        "num_decoder_layers": sizes.decoder_layers,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def write_files(directory: Path, sizes: Sizes, tokenizer: Tokenizer | None = None) -> None:
    """Write the configuration and the tokenizer, by default of letters and phonemes, into an existing directory."""
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {
        "config.json": config(sizes, tokenizer.get_vocab_size()),
        "generation_config.json": {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "eos_token": EOS,
            "unk_token": UNKNOWN,
            # It would move spaces around apostrophes and commas.
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--d-model", type=click.IntRange(8), default=Sizes.d_model)
@click.option("--d-ff", type=click.IntRange(8), default=Sizes.d_ff)
@click.option("--heads", type=click.IntRange(1), default=Sizes.heads)
@click.option("--layers", type=click.IntRange(1), default=Sizes.layers, help="Of the encoder.")
@click.option("--decoder-layers", type=click.IntRange(2), default=Sizes.decoder_layers)
@click.option("--overwrite", is_flag=True, help="Replace a model at OUT.")
def command(out: Path, d_model: int, d_ff: int, heads: int, layers: int, decoder_layers: int, overwrite: bool) -> None:
    """Write tokenizer and configuration of a grapheme-to-phoneme T5 to the directory OUT.

    \b
    Example:
      python -m tools.data.g2p_tokenizer models/g2p-init --d-model 192 --decoder-layers 8
    """
    if d_model % heads:
        raise click.UsageError(f"--d-model {d_model} is not a multiple of --heads {heads}")
    with output_directory(out, MARKER, overwrite) as directory:
        write_files(directory, Sizes(d_model, d_ff, heads, layers, decoder_layers))


if __name__ == "__main__":
    run(command)
